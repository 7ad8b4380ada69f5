"""meta-export: a checkpoint becomes a bundle. Parses, calls the API, prints."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from typing import TYPE_CHECKING

from meta_deploy.cli.common import Parser, positive_int, run
from meta_deploy.errors import InputError

if TYPE_CHECKING:
    from meta_deploy.bundle.bundle import Bundle

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(lambda: export_command(parser().parse_args(argv)), "meta-export")


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="meta-export",
        description="Turn a checkpoint into a bundle that meta-infer runs, checked against the checkpoint.",
    )
    p.add_argument("--ckpt", required=True, metavar="PATH", help=".pth, .pt or .safetensors")
    p.add_argument("--model", metavar="NAME", help="zoo model, such as meta-t-mask-rcnn (default: inferred)")
    p.add_argument(
        "--target",
        default="auto",
        choices=("auto", "onnxruntime", "tensorrt", "tensorrt-rtx"),
        help="what will run the bundle (default: %(default)s, which says what it chose and why)",
    )
    precision = p.add_mutually_exclusive_group()
    for name in PRECISIONS:
        default = " (default)" if name == "fp32" else ""
        precision.add_argument(
            f"--{name}", dest="precision", action="store_const", const=name, help=f"{name} weights{default}"
        )
    p.set_defaults(precision="fp32")
    p.add_argument(
        "--calib-images",
        metavar="DIR",
        help="images to measure and verify on (default: eight that ship with the package)",
    )
    p.add_argument(
        "--input-size",
        nargs=2,
        type=positive_int,
        metavar=("H", "W"),
        help="pixels, multiples of 32 (default: the model's own)",
    )
    batch = p.add_mutually_exclusive_group()
    batch.add_argument(
        "--batch", type=positive_int, default=None, metavar="N", help="images a call (default: 1)"
    )
    batch.add_argument(
        "--dynamic-batch",
        nargs=3,
        type=positive_int,
        metavar=("MIN", "OPT", "MAX"),
        help="any number of images a call from MIN to MAX, OPT being the usual",
    )
    p.add_argument(
        "--dynamic-size",
        action="store_true",
        help="take any size in steps of 32 up to the longer side of --input-size",
    )
    p.add_argument("--passes", default="all", metavar="all|none|NAME,…", help="graph passes to run")
    p.add_argument(
        "--explain",
        nargs="?",
        const="all",
        metavar="PASS",
        help="say which places close to its pattern a graph pass (default: each) left as they are, and why",
    )
    p.add_argument(
        "--operators",
        choices=("native", "lowered"),
        help="NMS and RoIAlign as ONNX has them, or in plain arithmetic (default: what the target runs)",
    )
    p.add_argument(
        "--gpu",
        type=capabilities,
        default=(),
        metavar="X.Y,…",
        help="compute capabilities of the GPUs for a tensorrt-rtx engine, as 8.6,8.9 (default: all known)",
    )
    p.add_argument(
        "--workspace",
        type=positive_int,
        metavar="MB",
        help="scratch memory that a TensorRT layer may use (default: TensorRT's own limit)",
    )
    p.add_argument("--out", metavar="DIR", help="the bundle (default: CKPT-TARGET-PRECISION here)")
    p.add_argument("--no-verify", action="store_true", help="skip the comparison with PyTorch on images")
    p.add_argument("--allow-partial", action="store_true", help="accept a checkpoint that lacks tensors")
    p.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return p


def capabilities(text: str) -> tuple[str, ...]:
    """An option's value as compute capabilities, such as 8.6,8.9."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        major, _, minor = name.partition(".")
        if not (major.isdecimal() and minor.isdecimal() and major.isascii() and minor.isascii()):
            raise argparse.ArgumentTypeError(f"'{name}' is not a compute capability such as 8.9")
    return tuple(dict.fromkeys(names))


def export_command(args: argparse.Namespace) -> int:
    from meta_deploy.export import Progress, export
    from meta_deploy.graph.pipeline import PASSES

    if args.explain not in (None, "all", *PASSES):
        raise InputError(f"'{args.explain}' is not a graph pass; choose all, or one of {', '.join(PASSES)}")
    started = time.perf_counter()
    display = StageDisplay()
    try:
        bundle = export(
            args.ckpt,
            model=args.model,
            target=args.target,
            precision=args.precision,
            operators=args.operators,
            gpus=args.gpu,
            workspace_mb=args.workspace,
            calib_images=args.calib_images,
            input_size=tuple(args.input_size) if args.input_size else None,
            batch=args.batch or 1,
            dynamic_batch=tuple(args.dynamic_batch) if args.dynamic_batch else None,
            dynamic_size=args.dynamic_size,
            passes=args.passes,
            explain=args.explain is not None,
            out=args.out,
            check=not args.no_verify,
            allow_partial=args.allow_partial,
            progress=Progress(display.note, display.start, display.end, display.count),
        )
    finally:
        display.close()
    if args.json:
        print(json.dumps(document(bundle)))
    else:
        print(summary(bundle, time.perf_counter() - started), flush=True)
    if args.explain is not None:
        print(explanation(bundle.manifest["passes"], args.explain), file=sys.stderr)
    return 0


def document(bundle: Bundle) -> dict[str, object]:
    """What --json prints."""
    manifest = bundle.manifest
    keys = (
        "target",
        "precision",
        "operators",
        "conversion",
        "parameters",
        "nodes",
        "passes",
        "verification",
        "seconds",
        "peak_rss_mb",
    )
    return {
        "bundle": str(bundle.path),
        "model": manifest["model"]["name"],
        **{key: manifest[key] for key in keys},
        "engine": manifest["engine"],
    }


def summary(bundle: Bundle, seconds: float) -> str:
    """What the command prints at its end: passes, verification, bundle."""
    from meta_deploy.targets.backend import ENGINE_PRECISIONS

    manifest = bundle.manifest
    lines = []
    if manifest["passes"]:
        lines.append(passes_table(manifest["passes"]))
    if manifest["conversion"]:
        lines.append(conversion_line(manifest["precision"], manifest["conversion"]))
    lines.append(verdict(manifest["verification"]))
    if manifest["engine"]:
        lines.append(engine_line(manifest["engine"]))
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    memory = f", peak memory {manifest['peak_rss_mb'] / 1e3:.1f} GB" if manifest["peak_rss_mb"] else ""
    lines.append(f"{bundle.path}: {size:.1f} MB, {manifest['precision']}, in {seconds:.0f} s{memory}")
    where = ", where a GPU is" if bundle.precision in ENGINE_PRECISIONS else ""
    lines.append(f"next{where}: meta-infer IMAGE --model {bundle.path}")
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
        lines.append(f"  {len(reasons)} {op} ({names}): {example}{next(iter(reasons.values()))}")
    return lines


def wording(reason: str) -> str:
    """A reason without names, shapes and numbers."""
    rest = re.sub(r"'[^']*'", "", reason)
    while (shorter := re.sub(r"\([^()]*\)", "", rest)) != rest:
        rest = shorter
    return re.sub(r"[\d.]+(e[+-]\d+)?", "", rest)


def conversion_line(precision: str, conversion: dict) -> str:
    """What a lower precision left in float32, in one line."""
    low, nodes = conversion["nodes"] - conversion["float32_nodes"], conversion["nodes"]
    line = f"{low} of the {nodes} nodes that compute with floats in {precision}"
    if not conversion["overflow"]:
        return line
    names = list(conversion["overflow"])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{line}; near its range, and so in float32: {', '.join(names[:3])}{more}"


def engine_line(engine: dict) -> str:
    """What was built, in one line."""
    gpus = engine["gpu"] or ", ".join(engine["compute_capabilities"]) or "all GPUs that it knows"
    line = f"engine of {engine['library']} {engine['version']} for {gpus}: "
    if engine["layers"] is None:
        return f"{line}{engine['plan_mb']:.1f} MB (its log does not tell what is inside)"
    return (
        f"{line}{engine['layers']} layers, {engine['fused_attention']} of {engine['attention']} attentions "
        f"fused, {engine['activation_mb']:.0f} MB activations, {engine['weights_mb']:.0f} MB weights; "
        "it has not run here"
    )


def verdict(verification: dict | None) -> str:
    """The verification in one line."""
    if verification is None:
        return "not compared with PyTorch (--no-verify)"
    parts = []
    for name, stage in verification["stages"].items():
        if "rms_relative_error" in stage.get("tolerance", ()):
            rms, most = stage["rms_relative_error"], stage["max_relative_error"]
            parts.append(f"{name} within {rms:.1e} (rms; {most:.1e} at most)")
        elif "max_relative_error" in stage:
            parts.append(f"{name} within {stage['max_relative_error']:.1e}")
        elif stage.get("compared", 1) == 0:
            parts.append(f"no {name} on them to compare")
        else:
            parts.append(f"{stage['agreement']:.1%} of {name} agree")
    return f"matches PyTorch on {verification['images']} images: {', '.join(parts)}"


class StageDisplay:
    """Stages on standard error: a line that updates on a terminal, a line per finished stage elsewhere."""

    TITLES = {  # noqa: RUF012
        "load": "loading the checkpoint",
        "export": "exporting to ONNX",
        "passes": "running graph passes",
        "precision": "lowering the precision",
        "verify": "comparing with PyTorch",
        "engine": "building the engine",
        "write": "writing the bundle",
    }

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.title = ""

    def note(self, line: str) -> None:
        self._clear()
        print(line, file=sys.stderr, flush=True)

    def start(self, stage: str) -> None:
        self.title = self.TITLES[stage]
        self._show("…")

    def count(self, done: int, total: int) -> None:
        self._show(f" {done}/{total}{'' if self.title == self.TITLES['engine'] else ' images'}")

    def end(self, stage: str, seconds: float) -> None:
        self._clear()
        print(f"{self.title} {seconds:.1f} s", file=sys.stderr, flush=True)
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
