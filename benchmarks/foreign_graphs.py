"""Graphs of models that are not ours, as exported and after each optimizer: nodes, moves, layers, agreement.

    pip install -e '.[bench]'
    python benchmarks/foreign_graphs.py [--models NAME ...] [--exporters dynamo torchscript] [--no-engines]

Models of timm and transformers with random weights, nothing is downloaded; NAME+batch leaves the batch open.
Optimizers: onnxslim, onnxscript's, ONNX Runtime's own (basic, offline), and our passes for ONNX Runtime and
TensorRT. Layers are those of TensorRT-RTX engines in float16, which need no GPU to build. Exit code 1 if ours
gives other results, leaves more nodes than the best of the others, or more layers than there are as exported.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from benchmarks.cleanup_routes import ort_basic
from benchmarks.common import machine, open_session, parser, save, table
from benchmarks.graph_surgery import clocked, counted, engine_measures, standard
from meta_deploy.errors import EngineError, InputError
from meta_deploy.export.trace import quiet
from meta_deploy.graph.pipeline import run_passes
from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.models.backbones.timm_features import import_timm
from meta_deploy.targets import TARGETS
from meta_deploy.targets.tensorrt.build import available

STOCK = "as exported"
OURS = {"ours: ONNX Runtime": "onnxruntime", "ours: TensorRT": "tensorrt"}
EXPORTERS = ("dynamo", "torchscript")
BATCH = "+batch"
TOLERANCE = 1e-5
TORCHSCRIPT_OPSET = 17  # the newest that it writes layer norms for

Made = tuple[nn.Module, tuple[int, ...]]  # a model and its input's shape


def timm_model(name: str, side: int = 224, **settings: Any) -> Made:
    """One of timm's models by its name."""
    import timm

    return timm.create_model(name, **settings), (1, 3, side, side)


class Outputs(nn.Module):
    """A model of transformers that returns some of its outputs, as tensors."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        return tuple(getattr(outputs, name) for name in self.names)


def transformers_model(
    model: str, config: str, outputs: Sequence[str], side: int = 224, **settings: Any
) -> Made:
    """One of transformers' models by the names of its class and its configuration's."""
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return Outputs(made, outputs), (1, 3, side, side)


_SMALL = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
MODELS: dict[str, Callable[[], Made]] = {
    "vit": partial(timm_model, "vit_tiny_patch16_224"),
    "deit": partial(timm_model, "deit_tiny_distilled_patch16_224"),
    "beit": partial(timm_model, "beit_base_patch16_224", depth=3),
    "eva02": partial(timm_model, "eva02_tiny_patch14_224", depth=4),
    "dinov3": partial(timm_model, "vit_small_patch16_dinov3", 256, depth=4),
    "swin": partial(timm_model, "swin_tiny_patch4_window7_224"),
    "swinv2": partial(timm_model, "swinv2_tiny_window8_256", 256, depths=(2, 2, 2, 2)),
    "sam": partial(timm_model, "samvit_base_patch16", 256, depth=3, img_size=256),
    "davit": partial(timm_model, "davit_tiny", depths=(1, 1, 2, 1)),
    "maxvit": partial(timm_model, "maxvit_tiny_tf_224"),
    "mvitv2": partial(timm_model, "mvitv2_tiny"),
    "pvtv2": partial(timm_model, "pvt_v2_b1"),
    "xcit": partial(timm_model, "xcit_nano_12_p16_224"),
    "levit": partial(timm_model, "levit_128s"),
    "mobilevit": partial(timm_model, "mobilevit_s", 256),
    "edgenext": partial(timm_model, "edgenext_x_small", 256),
    "efficientvit": partial(timm_model, "efficientvit_m2"),
    "convnext": partial(timm_model, "convnext_tiny", depths=(2, 2, 3, 2)),
    "cvt": partial(transformers_model, "CvtModel", "CvtConfig", ["last_hidden_state"], depth=[1, 2, 3]),
    "segformer": partial(
        *(transformers_model, "SegformerForSemanticSegmentation", "SegformerConfig", ["logits"], 256),
        depths=[1, 1, 1, 1],
    ),
    "dinov2": partial(
        transformers_model, "Dinov2Model", "Dinov2Config", ["last_hidden_state"], image_size=224, **_SMALL
    ),
    "sam-small": partial(
        *(transformers_model, "SamVisionModel", "SamVisionConfig", ["last_hidden_state"], 256),
        **_SMALL,
        image_size=256,
        window_size=7,
        global_attn_indexes=[1, 3],
        output_channels=64,
    ),
    "vitpose": partial(
        *(transformers_model, "VitPoseBackbone", "VitPoseBackboneConfig", ["feature_maps"]),
        **_SMALL,
        image_size=[224, 224],
        out_features=["stage4"],
    ),
    "dpt": partial(
        *(transformers_model, "DPTForDepthEstimation", "DPTConfig", ["predicted_depth"]),
        **_SMALL,
        image_size=224,
        intermediate_size=768,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[32, 64, 128, 128],
        fusion_hidden_size=64,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__ or "", "foreign_graphs")
    p.add_argument("--models", nargs="+", metavar="NAME", default=list(MODELS), help="default: all")
    p.add_argument("--exporters", nargs="+", choices=EXPORTERS, default=list(EXPORTERS))
    p.add_argument("--no-engines", action="store_true", help="build no engines")
    args = p.parse_args(argv)
    if unknown := {name.removesuffix(BATCH) for name in args.models} - set(MODELS):
        p.error(f"unknown models: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    here, rows, missed = machine(), [], []
    try:
        import_timm()  # beside any torchvision, which transformers imports too
    except InputError as error:
        print(f"models of timm are left out: {error}", file=sys.stderr)
    for name in args.models:
        for exporter in args.exporters:
            case = f"{name}, {exporter}"
            try:
                proto, images = exported(name, exporter)
            except Exception as error:  # of a model or exporter that is not ours, anything
                print(f"{case}: not exported: {str(error).splitlines()[0][:150]}", file=sys.stderr)
                continue
            measured = [{"model": case, **row} for row in measures(proto, images, not args.no_engines)]
            print(table(measured), flush=True)
            rows += measured
            missed += [f"{case}: {line}" for line in misses(measured)]
            gc.collect()
    print(*(f"missed: {line}" for line in missed), sep="\n")
    save(args.json, machine=here, rows=rows, missed=missed)
    return int(bool(missed))


def exported(name: str, exporter: str) -> tuple[onnx.ModelProto, np.ndarray]:
    """A model's graph as PyTorch writes it, and random images for it; two where the batch is open."""
    torch.manual_seed(0)
    model, shape = MODELS[name.removesuffix(BATCH)]()
    enlivened(model.eval())
    any_batch = name.endswith(BATCH)
    images = torch.randn(1 + any_batch, *shape[1:])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), quiet(), silent():
        file = str(Path(folder) / "model.onnx")
        if exporter == "dynamo":
            sizes = ({0: torch.export.Dim("batch", min=1, max=8)},) if any_batch else None
            torch.onnx.export(
                model, (images,), file, dynamo=True, input_names=["x"], dynamic_shapes=sizes, verbose=False
            )
        else:
            axes = {"x": {0: "batch"}} if any_batch else None
            torch.onnx.export(
                *(model, (images,), file),
                dynamo=False,
                opset_version=TORCHSCRIPT_OPSET,
                input_names=["x"],
                dynamic_axes=axes,
            )
        return onnx.load(file), images.numpy()


def enlivened(model: nn.Module) -> None:
    """Random weights that keep values of order one, so that every path counts; many start as zero or one."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                fan = max(weight[0].numel(), 1)
                weight.copy_(torch.randn(weight.shape) / math.sqrt(fan))
            elif weight.numel() > 1:
                weight.copy_(weight.mean().round() * ("bias" not in name) + 0.2 * torch.randn(weight.shape))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep the exporters' remarks away."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def optimizers() -> dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]]:
    """What makes a graph of a graph, by name."""
    routes: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {STOCK: lambda proto: proto}
    if importlib.util.find_spec("onnxslim") is not None:
        import onnxslim

        routes["onnxslim"] = onnxslim.slim
    routes |= {"onnxscript": optimizer.optimize, "ONNX Runtime, offline": ort_basic}
    for name, target in OURS.items():
        passes, prices = list(TARGETS[target].passes), TARGETS[target].prices
        routes[name] = lambda proto, passes=passes, prices=prices: run_passes(proto, passes, prices)[0]
    return routes


def measures(proto: onnx.ModelProto, images: np.ndarray, engines: bool) -> Iterator[dict[str, Any]]:
    """A row for each optimizer."""
    expected = open_session(proto, 1).run(None, {"x": images})
    for name, route in optimizers().items():
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        row: dict[str, Any] = {"graph": name}
        try:
            made, seconds = clocked(partial(route, copy))
            outputs = open_session(made, 1).run(None, {"x": images})
        except Exception as error:  # other tools raise anything
            print(f"{name}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
            continue
        differences = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(outputs, expected, strict=True)]
        row |= {"seconds": seconds, **counted(made), "difference": float(max(differences))}
        yield row | layers(made, engines and len(images) == 1)


def layers(proto: onnx.ModelProto, wanted: bool) -> dict[str, Any]:
    """Layers and activation memory of the engine in float16; nothing known of graphs that are not ONNX's."""
    result: dict[str, Any] = dict.fromkeys(("layers", "attention", "activation MB"))
    if wanted and available("tensorrt-rtx") and standard(proto):
        stay = TARGETS["tensorrt"].float32_operators["fp16"]
        try:
            engine = engine_measures(PRECISIONS["fp16"].convert(proto, (), stay)[0])
        except EngineError as error:
            print(f"no engine: {error}", file=sys.stderr)
        else:
            result |= {key: engine[key] for key in result}
    return result


def misses(rows: list[dict[str, Any]]) -> list[str]:
    """Where ours is wrong, or behind."""
    lines = []
    others = [row for row in rows if row["graph"] not in OURS]
    for row in (row for row in rows if row["graph"] in OURS):
        name, fewest = row["graph"], min(other["nodes"] for other in others)
        if not row["difference"] <= TOLERANCE:  # nor is nan
            lines.append(f"{name}: largest difference {row['difference']:.1e}")
        if row["nodes"] > fewest:
            lines.append(f"{name}: {row['nodes']} nodes, the best of the others has {fewest}")
        if row["layers"] and others[0]["layers"] and row["layers"] > others[0]["layers"]:
            lines.append(f"{name}: {row['layers']} layers, as exported {others[0]['layers']}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
