"""meta-export: a checkpoint or an ONNX file becomes a bundle. Parses, calls the API, prints."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from meta_deploy.cli.common import Parser, check_signals, done, number, path, positive_int, run
from meta_deploy.cli.export_triton import (
    add_triton,
    check_triton,
    triton_document,
    triton_summary,
    write_triton,
)
from meta_deploy.cli.terminal import tell
from meta_deploy.text import escaped

if TYPE_CHECKING:
    from meta_deploy.bundle.bundle import Bundle


_EPILOG = """\
examples:
  meta-export --ckpt model.pth --fp16
  meta-export --onnx model.onnx --target openvino
  meta-export --onnx model.onnx --scale 0.00392157 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225
  meta-export --bundle my-bundle --triton models

Exit code 0: done; 2: bad input or usage; 3: the export does not match the original; 1: internal error.
"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(lambda: export_command(parser().parse_args(argv)), "meta-export")


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="meta-export",
        description="Turn a checkpoint or an ONNX file into a bundle for meta-infer, verified against it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_source(p.add_argument_group("source"))
    _add_target(p.add_argument_group("target and precision"))
    _add_input(p.add_argument_group("input"))
    _add_onnx(p.add_argument_group("ONNX files"))
    _add_output(p.add_argument_group("passes, verification, output"))
    return p


def _add_source(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument("--ckpt", type=path, metavar="PATH", help="checkpoint: .pth, .pt or .safetensors")
    source.add_argument("--onnx", type=path, metavar="PATH", help="any ONNX file")
    source.add_argument(
        "--bundle", type=path, metavar="DIR", help="a bundle that is there already, for --triton"
    )
    group.add_argument(
        "--backbone-ckpt",
        type=path,
        metavar="PATH",
        help="a plain ViT (DeiT, AugReg, MAE, DINO, DINOv2), for what of it the checkpoint lacks; without "
        "--ckpt, the rest of --model is random, and for timm:... it is timm's own",
    )
    group.add_argument("--model", metavar="NAME", help="such as meta-t-mask-rcnn (default: inferred)")
    group.add_argument("--allow-partial", action="store_true", help="accept a checkpoint that lacks tensors")


def _add_target(group: argparse._ArgumentGroup) -> None:
    from meta_deploy.graph.precision import PRECISIONS
    from meta_deploy.targets import TARGET_NAMES

    group.add_argument(
        "--target",
        default="auto",
        choices=TARGET_NAMES,
        help="what will run the bundle (default: auto, TensorRT where it and a GPU are, else ONNX Runtime)",
    )
    precision = group.add_mutually_exclusive_group()
    for name, known in PRECISIONS.items():
        default = " (default)" if name == "fp32" else ""
        precision.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, help=f"{known.title}{default}"
        )
    group.set_defaults(precision="fp32")
    group.add_argument(
        "--operators",
        choices=("native", "lowered"),
        help="NMS, RoIAlign, GridSample: ONNX's own operators or simpler ones (default: the target's choice)",
    )
    group.add_argument(
        "--gpu",
        type=capabilities,
        default=(),
        metavar="X.Y,…",
        help="compute capabilities that a tensorrt-rtx engine is for, as 8.6,8.9 (default: all)",
    )
    group.add_argument(
        "--workspace",
        type=positive_int,
        metavar="MB",
        help="scratch memory of a TensorRT layer (default: TensorRT's own limit)",
    )


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input-size",
        nargs=2,
        type=positive_int,
        metavar=("H", "W"),
        help="pixels (default: the model's own)",
    )
    batch = group.add_mutually_exclusive_group()
    batch.add_argument(
        "--batch",
        type=positive_int,
        default=None,
        metavar="N",
        help="images per call (default: 1; for an ONNX file, what it says)",
    )
    batch.add_argument(
        "--dynamic-batch",
        nargs=3,
        type=positive_int,
        metavar=("MIN", "OPT", "MAX"),
        help="any number of images per call from MIN to MAX; OPT is the usual one",
    )
    group.add_argument(
        "--dynamic-size",
        action="store_true",
        help="any size in steps of 32 up to the longer side of --input-size; disables most passes",
    )


def _add_onnx(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shape",
        action=Shapes,
        type=input_shape,
        default={},
        metavar="NAME=1x3x…",
        help="fix the shape of an input that leaves it open (? leaves a size open); may be repeated",
    )
    for name, what in (("mean", "subtracted from"), ("std", "that divides")):
        group.add_argument(
            f"--{name}",
            nargs="+",
            type=number,
            metavar="X",
            help=f"one number or three (R G B) {what} pixel * scale; the file then takes images",
        )
    group.add_argument(
        "--scale", type=number, metavar="X", help="what pixels (0 to 255) are multiplied by (default: 1)"
    )
    group.add_argument("--bgr", action="store_true", help="the network wants its channels as B, G, R")
    group.add_argument(
        "--class-names",
        type=path,
        metavar="FILE",
        help="class names, one per line, of a detector without them",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    from meta_deploy.calib import METHOD_NAMES

    group.add_argument("--passes", default="all", metavar="all|none|NAME,…", help="graph passes to run")
    group.add_argument(
        "--no-tune",
        action="store_true",
        help="run all passes, without measuring whether the target does better without some",
    )
    group.add_argument(
        "--explain",
        nargs="?",
        const="all",
        metavar="PASS",
        help="say which places close to its pattern a graph pass (default: each) left as they are, and why",
    )
    group.add_argument(
        "--calib-images",
        type=path,
        metavar="DIR",
        help="images, or .npz files of an ONNX file's inputs, to calibrate (up to 512) and verify (8) on "
        "(default: eight images of the package, or seeded random inputs)",
    )
    group.add_argument(
        "--calib-method",
        default=METHOD_NAMES[0],
        choices=METHOD_NAMES,
        help="how 8 bits find the range of a tensor (default: auto, for each the best of the others)",
    )
    group.add_argument(
        "--max-drop",
        type=number,
        metavar="POINTS",
        help="how much 8 bits may lose: of average precision or mean IoU with --annotations, else of what "
        "agrees with float32, of 100 (default: what verification tolerates)",
    )
    group.add_argument(
        "--annotations",
        type=path,
        metavar="PATH",
        help="of the --calib-images: a COCO file, or for class maps a folder of label images",
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="fail where 8 bits gain nothing, instead of doing without",
    )
    group.add_argument(
        "--no-search",
        action="store_true",
        help="let the target's rules say what is in 8 bits, without timing or building anything to find out",
    )
    group.add_argument("--no-verify", action="store_true", help="skip the comparison with the original")
    group.add_argument("--out", type=path, metavar="DIR", help="the bundle (default: NAME-TARGET-PRECISION)")
    add_triton(group)
    group.add_argument("--json", action="store_true", help="print one JSON document instead of text")


class Shapes(argparse.Action):
    """Gathers --shape NAME=..., each name once."""

    def __call__(self, parser, namespace, value, option_string=None):
        name, shape = value
        shapes = getattr(namespace, self.dest)
        if name in shapes:
            parser.error(f"{option_string} gives '{name}' twice")
        setattr(namespace, self.dest, {**shapes, name: shape})


def input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """An option's value as an input's name and shape, such as images=1x3x224x224."""
    name, _, sizes = text.rpartition("=")
    parts = sizes.lower().split("x")
    if not name or not all(re.fullmatch("[1-9][0-9]{0,9}|[?]", part) for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not a name and a shape such as images=1x3x224x224")
    return name, tuple(0 if part == "?" else int(part) for part in parts)


def capabilities(text: str) -> tuple[str, ...]:
    """An option's value as compute capabilities, such as 8.6,8.9."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        major, _, minor = name.partition(".")
        if not (major.isdecimal() and minor.isdecimal() and major.isascii() and minor.isascii()):
            raise argparse.ArgumentTypeError(f"'{name}' is not a compute capability such as 8.9")
    return tuple(dict.fromkeys(names))


def export_command(args: argparse.Namespace) -> int:
    check_triton(args, parser)
    started = time.perf_counter()
    bundle = exported(args) if args.bundle is None else opened(args.bundle)
    if args.bundle is None and not args.json:
        print(summary(bundle, time.perf_counter() - started), flush=True)
    written = write_triton(args, bundle)
    if args.json:
        print(json.dumps(document(bundle) | {"triton": triton_document(written)}))
    elif written is not None:
        print(triton_summary(written), flush=True)
    if args.explain is not None:
        print(explanation(document(bundle)["passes"], args.explain), file=sys.stderr)
    return 0


def exported(args: argparse.Namespace) -> Bundle:
    """The bundle of a checkpoint or an ONNX file."""
    from meta_deploy.export import Progress, export

    display = StageDisplay()
    try:
        return export(
            source_of(args),
            progress=Progress(display.note, display.start, display.end, display.count, done),
            **options_of(args),
        )
    finally:
        display.close()


def opened(path: str) -> Bundle:
    """A bundle that is there, by its folder or the name of one in the package."""
    from meta_deploy.bundle.bundle import Bundle
    from meta_deploy.bundle.shipped import locate

    return Bundle.open(locate(path))


def source_of(args: argparse.Namespace) -> str:
    """The file to export; its suffix has to agree with the option that names it."""
    from meta_deploy.errors import InputError

    if args.ckpt is not None and args.ckpt.lower().endswith(".onnx"):
        raise InputError(f"'{args.ckpt}' is an ONNX file; use --onnx instead of --ckpt")
    if args.onnx is not None and not args.onnx.lower().endswith(".onnx"):
        raise InputError(f"'{args.onnx}' has no .onnx suffix; rename it, or use --ckpt for a checkpoint")
    given = (args.ckpt, args.onnx, args.backbone_ckpt)
    source = next((path for path in given if path is not None), None)
    if source is None:
        raise InputError("there is nothing to export; give --ckpt PATH, --onnx PATH or --backbone-ckpt PATH")
    return source


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `export`."""
    from meta_deploy.errors import InputError
    from meta_deploy.graph.pipeline import PASSES

    if args.explain not in (None, "all", *PASSES):
        raise InputError(f"'{args.explain}' is not a graph pass; choose all, or one of {', '.join(PASSES)}")
    same = (
        "model",
        "target",
        "precision",
        "operators",
        "calib_images",
        "calib_method",
        "max_drop",
        "annotations",
        "strict",
        "batch",
        "dynamic_size",
        "scale",
    )
    return {
        **{name: getattr(args, name) for name in (*same, "bgr", "passes", "out")},
        "allow_partial": args.allow_partial,
        "backbone_ckpt": args.backbone_ckpt,
        "gpus": args.gpu,
        "workspace_mb": args.workspace,
        "input_size": tuple(args.input_size) if args.input_size else None,
        "dynamic_batch": tuple(args.dynamic_batch) if args.dynamic_batch else None,
        "shapes": args.shape,
        "mean": three("mean", args.mean),
        "std": three("std", args.std),
        "class_names": class_names(args.class_names),
        "explain": args.explain is not None,
        "check": not args.no_verify,
        "search": not args.no_search,
        "tune": not args.no_tune,
    }


def three(option: str, numbers: list[float] | None) -> tuple[float, ...] | None:
    """A number for each channel, from one or three."""
    from meta_deploy.errors import InputError

    if numbers is None:
        return None
    if len(numbers) not in (1, 3):
        raise InputError(f"--{option} takes one number or three, not {len(numbers)}")
    if option == "std" and min(numbers) <= 0:
        raise InputError(f"--std {min(numbers):g} is not above zero")
    return tuple(numbers * 3 if len(numbers) == 1 else numbers)


def class_names(path: str | None) -> list[str] | None:
    """The lines of a file."""
    from meta_deploy.errors import InputError

    if path is None:
        return None
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"'{path}' is not a regular file; give a file of class names, one per line")
        with open(path, encoding="utf-8") as stream:
            names = [line.strip() for line in stream if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(
            f"cannot read '{path}': {reason}; give a file of class names, one per line"
        ) from error
    if not names:
        raise InputError(f"'{path}' holds no class names; give one per line")
    return names


def document(bundle: Bundle) -> dict[str, Any]:
    """What --json prints."""
    from msgspec import to_builtins

    manifest = bundle.manifest
    keys = (
        *("target", "precision", "operators", "conversion", "parameters", "nodes", "passes"),
        *("tuning", "left_out", "verification", "seconds", "peak_rss_mb", "engine"),
    )
    facts = {key: to_builtins(getattr(manifest, key)) for key in keys}
    return {"bundle": str(bundle.path), "model": manifest.model.name, "task": manifest.task, **facts}


def summary(bundle: Bundle, seconds: float) -> str:
    """What the command prints at its end: passes, verification, bundle."""
    from meta_deploy.graph.precision import PRECISIONS
    from meta_deploy.targets import get_target

    facts = document(bundle)
    manifest = bundle.manifest
    lines = []
    if facts["passes"]:
        lines.append(passes_table(facts["passes"]))
    if facts["conversion"]:
        lines.append(PRECISIONS[bundle.precision].describe(facts["conversion"]))
    lines.append(verdict(manifest.verification))
    target = get_target(bundle.target)
    if manifest.engine is not None:
        ran = manifest.verification is not None and manifest.verification.get("ran")
        lines.append(target.describe(manifest.engine) + ("" if ran else "; it has not run here"))
    size = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    memory = f", peak memory {manifest.peak_rss_mb / 1e3:.1f} GB" if manifest.peak_rss_mb else ""
    path = escaped(str(bundle.path))
    lines.append(f"{path}: {size:.1f} MB, {bundle.precision}, in {seconds:.0f} s{memory}")
    where = ", on a machine with a GPU" if bundle.precision in target.gpu_only else ""
    what = "IMAGE" if manifest.preprocess is not None else "INPUTS.npz"
    lines.append(f"next{where}: meta-infer {what} --model {path}")
    return "\n".join(lines)


def passes_table(rows: list[dict]) -> str:
    """What each pass did, a line each, and all of them."""
    head = f"{'pass':<20}{'changes':>8}{'nodes':>16}{'transpose+reshape':>19}{'MB moved':>20}{'seconds':>9}"
    return "\n".join([head, *(pass_row(row) for row in with_total(rows))])


def with_total(rows: list[dict]) -> list[dict]:
    """The passes' rows, and one for all of them where there are several."""
    if len(rows) < 2:
        return rows
    first, last = rows[0], rows[-1]
    total = {"name": "all", **{what: sum(row[what] for row in rows) for what in ("changes", "seconds")}}
    total["bytes_exact"] = all(row["bytes_exact"] for row in rows)
    for what in ("nodes", "moves", "bytes"):
        total |= {f"{what}_before": first[f"{what}_before"], f"{what}_after": last[f"{what}_after"]}
    return [*rows, total]


def pass_row(row: dict) -> str:
    """A line of the table."""
    nodes = f"{row['nodes_before']} -> {row['nodes_after']}"
    moves = f"{row['moves_before']} -> {row['moves_after']}"
    least = "" if row["bytes_exact"] else ">"
    moved = f"{least}{row['bytes_before'] / 1e6:.1f} -> {least}{row['bytes_after'] / 1e6:.1f}"
    return f"{row['name']:<20}{row['changes']:>8}{nodes:>16}{moves:>19}{moved:>20}{row['seconds']:>9.1f}"


def explanation(rows: list[dict], chosen: str) -> str:
    """Which places passes declined and why, alike ones together; of all passes, or of the chosen one."""
    paragraphs = []
    for row in rows:
        if chosen in ("all", row["name"]) and row["declined"]:
            paragraphs.append("\n".join([f"{row['name']} left as they are:", *reason_lines(row["declined"])]))
    return (
        "\n".join(dict.fromkeys(paragraphs)) or "no pass left a place as it is that is close to its pattern"
    )


def reason_lines(declined: list[dict]) -> list[str]:
    """A line for each operator and reason, whatever its names and sizes, with the first of the nodes."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for place in declined:
        groups.setdefault((place["op"], wording(place["reason"])), {}).setdefault(
            place["node"], place["reason"]
        )
    lines = []
    for (op, _), reasons in groups.items():
        names = ", ".join(list(reasons)[:3]) + (", …" if len(reasons) > 3 else "")
        example = "for the first, " if len(reasons) > 1 else ""
        lines.append(escaped(f"  {len(reasons)} {op} ({names}): {example}{next(iter(reasons.values()))}"))
    return lines


def wording(reason: str) -> str:
    """A reason without names, shapes and numbers."""
    rest = re.sub(r"'[^']*'", "", reason)
    while (shorter := re.sub(r"\([^()]*\)", "", rest)) != rest:
        rest = shorter
    return re.sub(r"[\d.]+(e[+-]\d+)?", "", rest)


def verdict(verification: dict | None) -> str:
    """The verification in one line."""
    if verification is None:
        return "not compared with the original (--no-verify)"
    parts = []
    for name, stage in verification["stages"].items():
        if "rms_relative_error" in stage.get("tolerance", ()):
            rms, most = stage["rms_relative_error"], stage["max_relative_error"]
            parts.append(f"{name} within {rms:.1e} (rms; single values {most:.1e} of the largest)")
        elif "max_relative_error" in stage:
            parts.append(f"{name} within {stage['max_relative_error']:.1e}")
        elif stage.get("compared", 1) == 0:
            parts.append(f"no {name} on them to compare")
        else:
            parts.append(f"{stage['agreement']:.1%} of {name} agree")
    from meta_deploy.export.verify import counted

    original = verification.get("original", "PyTorch")
    return f"matches {original} on {counted(verification)}: {', '.join(parts)}"


class StageDisplay:
    """Stages on standard error: a line that updates on a terminal, a line per finished stage elsewhere."""

    TITLES = {  # noqa: RUF012
        "load": "loading the model",
        "export": "exporting to ONNX",
        "passes": "running graph passes",
        "tune": "trying other passes",
        "precision": "lowering the precision",
        "verify": "comparing with the original",
        "blame": "looking for the pass at fault",
        "engine": "building for the target",
        "speed": "timing against float32",
        "write": "writing the bundle",
    }

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.title = ""

    def note(self, line: str) -> None:
        self._clear()
        tell(line)

    def start(self, stage: str) -> None:
        check_signals()
        self.title = self.TITLES[stage]
        self._show("…")

    def count(self, done: int, total: int) -> None:
        check_signals()
        self._show(f" {done}/{total}")

    def end(self, stage: str, seconds: float) -> None:
        self._clear()
        tell(f"{self.title} {seconds:.1f} s")
        self.title = ""

    def close(self) -> None:
        """Leave the cursor on a clean line, also after an error."""
        self._clear()

    def _show(self, rest: str) -> None:
        if self.live:
            print(f"\r\033[K{self.title}{rest}", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
