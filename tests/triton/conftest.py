"""Bundles whose manifests tell the shapes of their outputs, as exports write them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from meta_deploy.bundle.bundle import write_bundle
from meta_deploy.bundle.manifest import TensorSpec
from tests.bundles_by_hand import detector, manifest, raw_manifest, raw_model, segmenter

SIZE = (64, 64)
INSTANCES, SEMANTIC = "instance-segmentation", "semantic-segmentation"
MADE = {
    "detector": (manifest(INSTANCES, SIZE), detector(SIZE)),
    "four": (manifest(INSTANCES, SIZE, batch=4), detector(SIZE, batch=4)),
    "tiles": (manifest(INSTANCES, SIZE, dynamic=True, batch=4, tile=64), detector(SIZE, dynamic=True)),
    "segmenter": (manifest(SEMANTIC, SIZE), segmenter(SIZE)),
    "boxes": (manifest("detection", SIZE), detector(SIZE)),
    "raw": (raw_manifest(), raw_model()),
    "raw-image": (raw_manifest(of_images=True), raw_model(of_images=True)),
}


def spec(output: onnx.ValueInfoProto) -> TensorSpec:
    """As a manifest lists a graph's output."""
    tensor = output.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(name=output.name, dtype=dtype, shape=shape)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder of them: detector, four (a batch of 4), tiles (1 to 4, any size), segmenter, boxes, raw, …"""
    import msgspec

    folder = tmp_path_factory.mktemp("made")
    for name, (content, model) in MADE.items():
        outputs = onnx.load_from_string(model).graph.output
        content = msgspec.structs.replace(content, outputs=tuple(map(spec, outputs)))
        write_bundle(folder / name, content, {"model.onnx": model})
    return folder
