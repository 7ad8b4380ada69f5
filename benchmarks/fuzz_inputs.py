"""What `fuzz.py` feeds the commands with: sound files of every kind, and what can be done to them.

Each maker takes a random generator, an empty folder and the seeds, writes files into the folder, and returns
the command and its arguments.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
Made = tuple[str, list[str]]

ODD_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    255,
    256,
    65535,
    65537,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
)
ODD_TEXTS = (
    "",
    " ",
    "\n",
    "\x1b[31m",
    "\u202e",
    "a" * 5000,
    "../x",
    "/etc/passwd",
    "NaN",
    "null",
    "é漢",
    "%s",
    "*",
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], {"": None}, [1, 2, 3], {"a": {"b": [1]}}),
    *ODD_NUMBERS,
    *ODD_TEXTS,
    *(0.5, -0.0, 1e-320, 1e308, -1e308, math.nan, math.inf),
)


class Seeds:
    """Sound files, made once a process."""

    def __init__(self, folder: Path) -> None:
        from meta_deploy.bundle.bundle import write_bundle
        from tests.bundles_by_hand import detector, manifest, raw_manifest, raw_model, segmenter

        size = (32, 32)
        self.bundles = {
            "detector": write_bundle(
                folder / "detector", manifest("instance-segmentation", size), {"model.onnx": detector(size)}
            ).path,
            "segmenter": write_bundle(
                folder / "segmenter", manifest("semantic-segmentation", size), {"model.onnx": segmenter(size)}
            ).path,
            "raw": write_bundle(folder / "raw", raw_manifest(), {"model.onnx": raw_model()}).path,
        }
        self.graphs = [(path / "model.onnx").read_bytes() for path in self.bundles.values()]
        self._images: list[tuple[str, bytes]] = []
        self._checkpoints: list[tuple[str, bytes]] = []

    @property
    def images(self) -> list[tuple[str, bytes]]:
        """Suffix and content: a picture in each format, and short videos."""
        if not self._images:
            self._images = [*_pictures(), *_videos()]
        return self._images

    @property
    def checkpoints(self) -> list[tuple[str, bytes]]:
        """A small model's weights in each format that there is."""
        if not self._checkpoints:
            self._checkpoints = _checkpoints()
        return self._checkpoints


def _pictures() -> list[tuple[str, bytes]]:
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    colour = Image.fromarray(np.sort(values, axis=1))
    grey = colour.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    wanted: list[tuple[str, str, Image.Image, dict[str, Any]]] = [
        (".jpg", "JPEG", colour, {}),
        (".jpg", "JPEG", colour, {"progressive": True}),
        (".jpg", "JPEG", colour.convert("CMYK"), {}),
        (".png", "PNG", colour, {}),
        (".png", "PNG", deep, {}),
        (".png", "PNG", colour.convert("P"), {}),
        (".png", "PNG", colour.convert("RGBA"), {}),
        (".webp", "WEBP", colour, {}),
        (".webp", "WEBP", colour, {"lossless": True}),
        (".gif", "GIF", colour.convert("P"), {}),
        (".bmp", "BMP", colour, {}),
        (".tif", "TIFF", colour, {}),
        (".tif", "TIFF", deep, {"compression": "tiff_lzw"}),
        (".tif", "TIFF", colour, {"compression": "jpeg"}),
        (".tif", "TIFF", grey.convert("1"), {"compression": "group4"}),
        (".tif", "TIFF", colour.convert("F"), {}),
        (".ppm", "PPM", colour, {}),
        (".jp2", "JPEG2000", colour, {}),
        (".avif", "AVIF", colour, {}),
    ]
    found = []
    for suffix, format_, image, options in wanted:
        stream = io.BytesIO()
        try:
            image.save(stream, format_, **options)
        except (KeyError, OSError, ValueError):  # this Pillow writes no such format
            continue
        found.append((suffix, stream.getvalue()))
    return found


def _videos() -> list[tuple[str, bytes]]:
    import tempfile

    import cv2

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix, code in ((".mp4", "mp4v"), (".avi", "MJPG")):
            path = os.path.join(folder, "v" + suffix)
            writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*code), 10.0, (40, 24))
            for i in range(4):
                writer.write(np.full((24, 40, 3), 60 * i, np.uint8))
            writer.release()
            if os.path.exists(path):
                found.append((suffix, Path(path).read_bytes()))
    return found


def _checkpoints() -> list[tuple[str, bytes]]:
    import torch
    from safetensors.torch import save

    from meta_deploy.models.registry import build_model, config_to_dict
    from tests.models.checkpoint.checkpoints import small

    config = small()
    state = build_model(config).state_dict()
    whole = {"model": state, "config": config_to_dict(config), "classes": ["a", "b", "c"]}
    found = []
    for content, zipped in ((whole, True), (whole, False), (dict(state), True)):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=zipped)
        found.append((".pth", stream.getvalue()))
    metadata = {"config": json.dumps(config_to_dict(config)), "classes": '["a", "b", "c"]'}
    return [*found, (".safetensors", save(state, metadata))]


# --- bytes --------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes, other: bytes = b"", head: int = 4096) -> bytes:
    """Some bytes changed, cut out, repeated, spliced in; half of the time near the start."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not result:
            break
        near = min(len(result), head if rng.random() < 0.5 else len(result))
        at = rng.randrange(near)
        what = rng.randrange(8)
        if what == 0:
            result[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            result[at] = rng.randrange(256)
        elif what == 2:
            number = rng.choice(ODD_NUMBERS) % 2**32
            result[at : at + 4] = struct.pack(rng.choice(("<I", ">I")), number)
        elif what == 3:
            del result[at : at + rng.choice((1, 2, 16, 256))]
        elif what == 4:
            del result[at:]
        elif what == 5:
            result[at:at] = result[at : at + rng.choice((1, 8, 64, 1024))] * rng.choice((1, 2, 50))
        elif what == 6:
            result[at : at + 64] = rng.randbytes(rng.randrange(64))
        else:
            start = rng.randrange(len(other)) if other else 0
            result[at:at] = other[start : start + 256]
    return bytes(result)


def images(rng: random.Random, folder: Path, seeds: Seeds) -> Made:
    """A damaged picture or video, sometimes under the suffix of another format."""
    suffix, content = rng.choice(seeds.images)
    other_suffix, other = rng.choice(seeds.images)
    if rng.random() < 0.05:
        suffix = other_suffix
    (folder / f"x{suffix}").write_bytes(mutated(rng, content, other, head=200))
    where = ["--json"] if rng.random() < 0.5 else ["--out", "out"]
    bundle = seeds.bundles[rng.choice(("detector", "segmenter"))]
    return "meta-infer", [f"x{suffix}", "--model", str(bundle), *where]


# --- JSON ---------------------------------------------------------------------------------------------------


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested dicts and lists."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in list(keys) for place in ((value, key), *places(value[key]))]


def restructured(rng: random.Random, content: Any) -> Any:
    """Nested data with some of its entries replaced, removed, doubled or exchanged."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(content)
        if not found:
            break
        container, key = rng.choice(found)
        what = rng.randrange(6)
        if what == 0:
            del container[key]
        elif what == 1:
            container[key] = [container[key]]
        elif what == 2 and isinstance(container[key], list):
            container[key] = container[key] * rng.choice((0, 2, 1000))
        elif what == 3:
            other, place = rng.choice(found)
            container[key] = copy.deepcopy(other[place]) if place in _keys(other) else None
        elif what == 4 and isinstance(container, dict):
            container[rng.choice(ODD_TEXTS)] = rng.choice(ODD_VALUES)
        else:
            container[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return content


def _keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def manifests(rng: random.Random, folder: Path, seeds: Seeds) -> Made:
    """A bundle with a changed manifest, or a changed model that its manifest knows."""
    name = rng.choice(list(seeds.bundles))
    bundle = folder / "bundle"
    bundle.mkdir()
    model = (seeds.bundles[name] / "model.onnx").read_bytes()
    content = json.loads((seeds.bundles[name] / "manifest.json").read_bytes())
    if rng.random() < 0.3:
        model = mutated(rng, model)
        content["files"]["model.onnx"] = {"sha256": hashlib.sha256(model).hexdigest(), "bytes": len(model)}
    else:
        content = restructured(rng, content)
    text = json.dumps(content).encode()
    if rng.random() < 0.2:
        text = mutated(rng, text)
    (bundle / "manifest.json").write_bytes(text)
    (bundle / "model.onnx").write_bytes(model)
    if name == "raw":
        np.savez(folder / "x.npz", x=np.ones((2, 3), np.float32))
        return "meta-infer", ["x.npz", "--model", "bundle", "--out", "out"]
    (folder / "x.png").write_bytes(next(data for suffix, data in seeds.images if suffix == ".png"))
    backend = ["--backend", "openvino"] if rng.random() < 0.05 else []
    return "meta-infer", ["x.png", "--model", "bundle", "--out", "out", *backend]


# --- checkpoints --------------------------------------------------------------------------------------------


def checkpoints(rng: random.Random, folder: Path, seeds: Seeds) -> Made:
    """A checkpoint with changed bytes, a changed pickle in a sound archive, or odd things saved."""
    suffix, content = rng.choice(seeds.checkpoints)
    how = rng.random()
    if suffix == ".pth" and how < 0.35 and content[:2] == b"PK":
        content = _other_pickle(rng, content)
    elif suffix == ".pth" and how < 0.7:
        content = _odd_contents(rng, seeds)
    else:
        content = mutated(rng, content, rng.choice(seeds.checkpoints)[1])
    path = f"x{suffix}"
    (folder / path).write_bytes(content)
    partial = ["--allow-partial"] if rng.random() < 0.2 else []
    named = ["--model", "meta-nano-mask-rcnn"] if rng.random() < 0.2 else []
    return "meta-export", ["--ckpt", path, "--out", "out", *partial, *named]


def _other_pickle(rng: random.Random, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("/data.pkl"):
                data = mutated(rng, data, data)
            new.writestr(entry.filename, data)
    return stream.getvalue()


def _odd_contents(rng: random.Random, seeds: Seeds) -> bytes:
    import torch

    whole = torch.load(io.BytesIO(seeds.checkpoints[0][1]), weights_only=True)
    state, values = dict(whole["model"]), _odd_tensors(torch)
    for _ in range(rng.choice((0, 1, 1, 3))):
        name = rng.choice(list(state))
        what = rng.randrange(4)
        if what == 0:
            del state[name]
        elif what == 1:
            state[name] = rng.choice(values)
        elif what == 2:
            state[rng.choice(ODD_TEXTS) + name] = state.pop(name)
        else:
            state[name] = state[name][..., None].expand(*state[name].shape, rng.choice((0, 1, 2)))
    config = restructured(rng, whole["config"]) if rng.random() < 0.6 else whole["config"]
    names = rng.choice((["a", "b", "c"], ["a"], ["", "b", "c"], ["\n", "\x1b", "x"], {0: "a", 1: 2}, "abc"))
    saved = {
        rng.choice(("model", "state_dict", "ema", "teacher", "x")): state,
        "config": config,
        "classes": names,
    }
    if rng.random() < 0.3:
        saved[rng.choice(("ema", "student", "meta"))] = rng.choice(ODD_VALUES)
    stream = io.BytesIO()
    torch.save(saved, stream)
    return stream.getvalue()


def _odd_tensors(torch: Any) -> list[Any]:
    return [
        torch.tensor(0.0),
        torch.tensor(float("nan")),
        torch.ones(0),
        torch.ones(2, 3),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.bfloat16),
        torch.eye(3).to_sparse(),
        torch.ones(3, device="meta"),
        torch.ones(1).expand(100_000),
        torch.nn.Parameter(torch.ones(3)),
        torch.Size([1, 2]),
        [1, 2],
        "text",
    ]


# --- ONNX ---------------------------------------------------------------------------------------------------


def onnx(rng: random.Random, folder: Path, seeds: Seeds) -> Made:
    """An ONNX file with changed bytes, or with changed nodes, shapes, types and constants."""
    content = rng.choice(seeds.graphs)
    content = mutated(rng, content) if rng.random() < 0.3 else _rewritten(rng, content)
    (folder / "x.onnx").write_bytes(content)
    options = ["--no-verify"] if rng.random() < 0.3 else []
    options += ["--fp16"] if rng.random() < 0.1 else []
    return "meta-export", ["--onnx", "x.onnx", "--target", "onnxruntime", "--out", "out", *options]


def _rewritten(rng: random.Random, content: bytes) -> bytes:
    from onnx import ModelProto

    model = ModelProto.FromString(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(_REWRITES)(rng, model)
    return model.SerializeToString()


def _node(rng: random.Random, model: Any) -> None:
    if not model.graph.node:
        return
    node = rng.choice(model.graph.node)
    what = rng.randrange(6)
    if what == 0:
        node.op_type = rng.choice(
            [*(n.op_type for n in model.graph.node), "Loop", "Nope", "", "NonZero", "Identity"]
        )
    elif what == 1:
        node.domain = rng.choice(("", "com.microsoft", "ai.onnx", "x\n"))
    elif what == 2 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(_names(model))
    elif what == 3 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(_names(model))
    elif what == 4:
        node.name = rng.choice(ODD_TEXTS)
    else:
        model.graph.node.remove(node)


def _names(model: Any) -> list[str]:
    return [*ODD_TEXTS[:6], *(name for node in model.graph.node for name in (*node.input, *node.output))]


def _attribute(rng: random.Random, model: Any) -> None:
    found = [a for node in model.graph.node for a in node.attribute]
    if not found:
        return
    attribute = rng.choice(found)
    what = rng.randrange(4)
    if what == 0:
        attribute.type = rng.randrange(15)
    elif what == 1:
        attribute.i = max(-(2**63), min(2**63 - 1, rng.choice(ODD_NUMBERS)))
    elif what == 2:
        attribute.ints.append(rng.choice((0, -1, 7, 2**40)))
    else:
        attribute.f = rng.choice((0.0, -1.0, math.nan, math.inf, 1e30))


def _shape(rng: random.Random, model: Any) -> None:
    values = [*model.graph.input, *model.graph.output]
    if not values:
        return
    value = rng.choice(values)
    tensor = value.type.tensor_type
    what = rng.randrange(5)
    if what == 0 and tensor.shape.dim:
        rng.choice(tensor.shape.dim).dim_value = rng.choice((0, -1, 1, 3, 7, 2**31, 2**62))
    elif what == 1 and tensor.shape.dim:
        rng.choice(tensor.shape.dim).dim_param = rng.choice(ODD_TEXTS)
    elif what == 2:
        tensor.elem_type = rng.randrange(25)
    elif what == 3:
        value.name = rng.choice(ODD_TEXTS)
    else:
        tensor.shape.dim.add().dim_value = rng.choice((0, 1, 5))


def _constant(rng: random.Random, model: Any) -> None:
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    what = rng.randrange(6)
    if what == 0:
        tensor.data_type = rng.randrange(25)
    elif what == 1:
        tensor.dims.append(rng.choice((0, 1, 2, -1, 2**40)))
    elif what == 2:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif what == 3:
        tensor.name = rng.choice(ODD_TEXTS)
    elif what == 4:
        tensor.data_location = 1
        tensor.external_data.add(
            key="location", value=rng.choice(("/etc/passwd", "../x", "x.onnx", "", "a\x00b"))
        )
    else:
        tensor.raw_data = rng.randbytes(len(tensor.raw_data))


def _model(rng: random.Random, model: Any) -> None:
    what = rng.randrange(4)
    if what == 0:
        model.ir_version = rng.choice((0, 1, 3, 7, 99, 2**40))
    elif what == 1 and model.opset_import:
        model.opset_import[0].version = rng.choice((0, 1, 7, 11, 13, 17, 24, 99, 2**40))
    elif what == 2:
        model.metadata_props.add(
            key="meta_deploy.classes", value=rng.choice(('["a\\n"]', "[1]", "[" * 500, '[""]'))
        )
    elif model.graph.node:
        model.graph.node.insert(0, model.graph.node[-1])


_REWRITES: tuple[Callable[[random.Random, Any], None], ...] = (
    _node,
    _node,
    _attribute,
    _shape,
    _constant,
    _model,
)


# --- command lines ------------------------------------------------------------------------------------------


def commands(rng: random.Random, folder: Path, seeds: Seeds) -> Made:
    """A random choice of a command's own options, with values that fit and values that do not."""
    from meta_deploy.cli import export, infer

    (folder / "x.png").write_bytes(next(data for suffix, data in seeds.images if suffix == ".png"))
    (folder / "x.onnx").write_bytes(rng.choice(seeds.graphs))
    (folder / "names.txt").write_text("a\nb\nc\n")
    np.savez(folder / "x.npz", x=np.ones((2, 3), np.float32))
    (folder / "empty").mkdir()
    command = rng.choice(("meta-infer", "meta-export"))
    parser = {"meta-infer": infer, "meta-export": export}[command].parser()
    argv = [rng.choice(_places(seeds))] if command == "meta-infer" else ["--onnx", "x.onnx"]
    argv = argv if rng.random() < 0.9 else []
    options = [a for a in parser._actions if a.option_strings and a.dest != "help"]
    for action in rng.sample(options, rng.choice((0, 1, 1, 2, 3))):
        argv.append(rng.choice(action.option_strings))
        count = {None: 1, "+": rng.choice((1, 3)), "?": rng.choice((0, 1))}.get(action.nargs, action.nargs)
        argv += [_value(rng, action, seeds) for _ in range(count if isinstance(count, int) else 1)]
    if rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv) + 1), rng.choice(ODD_TEXTS))
    return command, [text.replace("\0", "") for text in argv]


def _places(seeds: Seeds) -> list[str]:
    return [
        "x.png",
        "x.npz",
        "x.onnx",
        ".",
        "empty",
        "missing.png",
        "*.png",
        "[",
        *ODD_TEXTS,
        *map(str, seeds.bundles.values()),
    ]


def _value(rng: random.Random, action: Any, seeds: Seeds) -> str:
    if action.choices and rng.random() < 0.8:
        return str(rng.choice(list(action.choices)))
    if action.dest in ("out", "coco_json") and rng.random() < 0.7:
        return "out"
    if rng.random() < 0.6:
        return rng.choice(
            ("0", "1", "2", "4", "0.5", "32", "64", "-1", "1e-3", "nan", "1_0", "٣", str(2**40), "9" * 30)
        )
    return rng.choice(_places(seeds))


KINDS: dict[str, Callable[[random.Random, Path, Seeds], Made]] = {
    "images": images,
    "manifests": manifests,
    "checkpoints": checkpoints,
    "onnx": onnx,
    "commands": commands,
}
