"""meta-report: models compared on this machine, a page, Markdown or JSON. Parses, calls, prints."""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from meta_deploy.cli.common import (
    EXIT_INPUT,
    Parser,
    check_signals,
    done,
    path,
    positive_int,
    run,
    thread_count,
)
from meta_deploy.cli.terminal import say, tell
from meta_deploy.errors import InputError
from meta_deploy.report import COUNT, RUNS
from meta_deploy.targets import BACKEND_NAMES

if TYPE_CHECKING:
    from argparse import Namespace

    from meta_deploy.report.schema import Report

OUT = "report.html"
EXIT_CONDITION = 3

_EPILOG = """\
examples:
  meta-report my-bundle other-bundle
  meta-report model.pth stock-bundle my-bundle --images val/ --annotations instances_val.json
  meta-report my-bundle --backend onnxruntime --backend openvino --batch 1 4 8 --out report.md
  meta-report engine-bundle other-engine-bundle
  meta-report stock-bundle my-bundle --fail-if "latency_ratio > 1.05" --fail-if "box_ap < 0.95"
  meta-report my-bundle --baseline report.json --fail-if "latency_ms / baseline > 1.1"

The first model that runs is what the others are compared with. docs/report.md has the metrics of --fail-if.
Exit code 0: done; 2: bad input (what could be measured is in the report); 3: a --fail-if is met;
1: internal error.
"""


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="meta-report",
        description="Compare models on this machine: latency, memory, where the time goes, accuracy.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "models",
        nargs="+",
        type=path,
        metavar="BUNDLE|ONNX|CKPT|ENGINE",
        help="bundles, .onnx files, checkpoints; TensorRT's .engine files and what trtexec --exportLayerInfo "
        "writes",
    )
    p.add_argument(
        "--images",
        type=path,
        metavar="DIR",
        help="images to run on (default: the package's own); models that take arrays get random ones",
    )
    p.add_argument(
        "--annotations",
        type=path,
        metavar="FILE|DIR",
        help="what is true of the images: a COCO JSON file for detectors, or for class maps a folder of "
        "label images, 255 where a pixel does not count (default: the first model's results)",
    )
    p.add_argument(
        "--count",
        type=positive_int,
        default=COUNT,
        metavar="N",
        help="the most images, spread evenly over those there are (default: %(default)s)",
    )
    p.add_argument(
        "--backend",
        action="append",
        choices=BACKEND_NAMES,
        help="what runs bundles and .onnx files; several times for several (default: auto); checkpoints run "
        "on PyTorch",
    )
    p.add_argument(
        "--batch",
        nargs="+",
        type=positive_int,
        default=[],
        metavar="N",
        help="measure images a second at these batch sizes, too",
    )
    p.add_argument(
        "--by-pass",
        action="store_true",
        help="tell where the time of checkpoints and .onnx files goes before and after each graph pass, on "
        "ONNX Runtime, too",
    )
    p.add_argument(
        "--runs",
        type=positive_int,
        default=RUNS,
        metavar="N",
        help="timed rounds, at least 20; each runs every model once (default: %(default)s)",
    )
    p.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="CPU threads of each model, 1 to 1024 (default: all that this process may use)",
    )
    p.add_argument(
        "--baseline",
        type=path,
        metavar="FILE.json",
        help="a report of this machine to compare with, as --out FILE.json writes it",
    )
    p.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help="exit with 3 where it is true of a model, such as 'latency_ratio > 1.05', "
        "'latency_ms / baseline > 1.1' or 'box_ap - baseline < -0.01'; several times for several",
    )
    p.add_argument(
        "--out",
        action="append",
        type=path,
        metavar="FILE",
        help=f"where the report goes: .html, .md or .json by its suffix; several times for several (default: "
        f"{OUT}; with --json none)",
    )
    p.add_argument(
        "--trace",
        type=path,
        metavar="FILE",
        help="write the profiles as Chrome trace events, for ui.perfetto.dev or chrome://tracing",
    )
    p.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run(lambda: _report(parser().parse_args(argv)), "meta-report")


def _report(args: Namespace) -> int:
    outs = args.out or ([] if args.json else [OUT])
    try:
        from meta_deploy.report import words
        from meta_deploy.report.compare import report
        from meta_deploy.report.trace import to_trace
        from meta_deploy.report.write import renderer
    except ImportError as error:
        raise InputError(
            f"{error.name or error} is not installed; pip install meta-deploy[report]"
        ) from error

    renderers = {out: renderer(out) for out in outs}
    _check_outs(args, outs)
    if args.trace is not None:
        renderers[args.trace] = to_trace
    with _Bar() as bar:
        found = report(
            args.models,
            images=args.images,
            annotations=args.annotations,
            count=args.count,
            backends=args.backend or ["auto"],
            batches=args.batch,
            by_pass=args.by_pass,
            runs=args.runs,
            threads=args.threads,
            baseline=args.baseline,
            fail_if=args.fail_if,
            progress=bar.progress(),
        )
    for entry in found.entries:
        if entry.error is not None:
            tell(f"meta-report: {entry.name}: {entry.error}")
    if not any(entry.latency or entry.engine for entry in found.entries):
        raise InputError("none of the models could be measured, so there is no report")
    _write(found, renderers)
    _tell_verdicts(found, args.json)
    met = [gate for gate in found.gates if not gate.passed]
    for gate in met:
        tell(f"meta-report: {words.gate(gate)}")
    done()
    if met:
        return EXIT_CONDITION
    return EXIT_INPUT if _lacking(found) else 0


def _check_outs(args: Namespace, outs: Sequence[str]) -> None:
    """Refuse now what cannot be written after minutes. Raises InputError."""
    from meta_deploy.bundle.claims import Claims
    from meta_deploy.bundle.files import check_writable

    claims = Claims()
    claims.add_streams()
    for name, what in (*((model, "a model") for model in args.models), (args.images, "the images")):
        if name is not None:
            claims.add(name, what)
    if args.annotations is not None:
        claims.add(args.annotations, "the annotations")
    if args.baseline is not None:
        claims.add(args.baseline, "the baseline")
    for out in outs:
        claims.write(out, "--out")
        check_writable(out)
    if args.trace is not None:
        claims.write(args.trace, "--trace")
        check_writable(args.trace)


def _write(found: Report, renderers: dict[str, Any]) -> None:
    from meta_deploy.bundle.files import atomic_write

    for out, render in renderers.items():
        text = render(found)
        check_signals()
        with atomic_write(out) as stream:
            stream.write(text.encode())


def _tell_verdicts(found: Report, as_json: bool) -> None:
    """The comparison on standard output; with --json the document, and the comparison elsewhere."""
    from meta_deploy.report import side_by_side, words

    stream = sys.stderr if as_json else sys.stdout
    for text in found.disturbances:
        tell(f"meta-report: warning: {text}")
    for entry in found.entries:
        if entry.latency:
            memory = f", {entry.peak_memory_mb:,.0f} MB" if entry.peak_memory_mb else ""
            total = entry.latency.total
            spread = f"{words.ms(total.p5)} to {words.ms(total.p90)}"
            say(f"{entry.name}: {words.ms(total.median)} ms ({spread}){memory}", stream)
        elif entry.engine:
            say(f"{entry.name}: {side_by_side.summary(entry.engine)}", stream)
    for sentence in words.verdicts(found):
        if "was not measured" not in sentence:
            say(sentence, stream)
    if as_json:
        print(found.to_json(), end="")


def _lacking(found: Report) -> bool:
    """Whether a model was measured on none of its back ends."""
    measured = {entry.path for entry in found.entries if entry.error is None}
    return any(entry.path not in measured for entry in found.entries)


class _Bar:
    """A progress bar for each stage, on a terminal, with what is left of it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def progress(self) -> Any:
        from meta_deploy.export.progress import Progress

        return Progress(start=self._start, end=self._end, count=self._count)

    def _start(self, stage: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=stage, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)

    def _count(self, at: int, total: int) -> None:
        check_signals()
        self._bar.total = total
        self._bar.update(at - self._bar.n)

    def _end(self, stage: str, seconds: float) -> None:
        self._bar.close()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
