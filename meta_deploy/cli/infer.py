"""meta-infer: images, folders, videos and arrays in; overlays, a line each, COCO JSON and JSON out.

Parses, calls the runtime and prints; imports nothing heavy before there is something to do.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

from meta_deploy.cli.common import (
    EXIT_INPUT,
    Parser,
    bit_depth,
    check_signals,
    fraction,
    path,
    positive_int,
    run,
    thread_count,
    whole_number,
)
from meta_deploy.cli.terminal import tell
from meta_deploy.targets import BACKEND_NAMES

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    from meta_deploy.bundle.bundle import Bundle
    from meta_deploy.bundle.claims import Claims
    from meta_deploy.imaging.sources import Source
    from meta_deploy.runtime.predictor import Predictor

OUT = "meta-infer-out"
THIS_MACHINE = "local"  # an address of Ray's
MOST_ENLARGED = 4  # times that tiles may be enlarged without a warning

_EPILOG = """\
examples:
  meta-infer picture.png                                the nuclei model, an overlay in meta-infer-out/
  meta-infer photos/ --model my-bundle --out overlays
  meta-infer 'val/*.jpg' --model my-bundle --coco-json results.json
  meta-infer clip.mp4 --model my-bundle --json > clip.json
  meta-infer photos/ --ray --out found                  the same on all of this machine, in parts
  meta-infer input.npz --model raw-bundle               arrays by name, to meta-infer-out/input-outputs.npz

Exit code 0: done; 2: bad input (the images that could be read are done); 1: internal error.
"""


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="meta-infer",
        description="Find objects or classes in images with an exported bundle.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "inputs",
        nargs="+",
        type=path,
        metavar="IMAGE|DIR|GLOB|VIDEO|NPZ",
        help="image files, videos, folders (the images directly in them) or quoted patterns; for a raw "
        "bundle .npz files with an array for each of the graph's inputs",
    )
    p.add_argument(
        "--model",
        type=path,
        metavar="BUNDLE",
        help="the bundle to run: a folder, or the name of one in the package, nuclei (objects, the default) "
        "or nuclei-semantic (class maps)",
    )
    p.add_argument(
        "--backend",
        choices=BACKEND_NAMES,
        default="auto",
        help="what runs the model (default: auto, the best that works here of what the bundle was made for; "
        "standard error says which)",
    )
    p.add_argument(
        "--rebuild",
        action="store_true",
        help="build a TensorRT bundle's engine again, from its model.onnx, if it does not fit this machine; "
        "it is kept for next time",
    )
    p.add_argument(
        "--score-threshold",
        type=fraction,
        metavar="X",
        help="the least score of a detection in overlays, tables, printed lines and --json (default: what "
        "the bundle says, usually 0.3; 0.5 for nuclei); --coco-json always holds all that the bundle gives, "
        "since average precision needs them",
    )
    p.add_argument(
        "--batch",
        type=positive_int,
        metavar="N",
        help="images per run of the model (default: what the bundle was made for)",
    )
    p.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="CPU threads, 1 to 1024 (default: all that this process may use)",
    )
    p.add_argument(
        "--tile",
        type=whole_number,
        metavar="PIXELS",
        help="run larger images in overlapping square tiles of this side and join their results, so that "
        "small objects are not lost in resizing; 0: every image as a whole (default: what the bundle says, "
        "usually 0; 384 for those in the package)",
    )
    p.add_argument(
        "--tile-overlap",
        type=whole_number,
        metavar="PIXELS",
        help="pixels that neighbouring tiles share at least; best larger than most objects (default: a "
        "quarter of --tile)",
    )
    p.add_argument(
        "--slide",
        action="store_true",
        help="for class maps, MMSegmentation's slide mode: resize images to just cover the model's input, "
        "slide windows of that size over them by two thirds of a window, and average the logits",
    )
    p.add_argument(
        "--depth",
        type=bit_depth,
        metavar="BITS",
        help="the bits that samples of 16-bit, 32-bit and float images really have, such as 12; 1 for floats "
        "from 0 to 1 (default: what each file declares, else by the range of its values)",
    )
    p.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help=f"folder for the overlays, NAME-overlay.jpg or .png, .mp4 for a video, and for the arrays of a "
        f"raw bundle, NAME-outputs.npz (default: {OUT}; "
        "with --json, --coco-json or --csv none are written unless this or --label-image is given)",
    )
    p.add_argument(
        "--coco-json",
        type=path,
        metavar="FILE",
        help="write COCO results; image_id is the number that the file is named by, if all are, else the "
        "place in the order of input, from 1; category_id is COCO's for its 80 classes, else label + 1",
    )
    p.add_argument(
        "--csv",
        type=path,
        metavar="FILE",
        help="write a table with one row per object: class, score, area, centroid, box, mean intensity; for "
        "class maps one row per class",
    )
    p.add_argument(
        "--label-image",
        action="store_true",
        help="write NAME-labels.png beside each overlay: the number of each pixel's object, in the order "
        "of the table, or of its class; 16 bits, as Fiji, napari and CellProfiler read it",
    )
    p.add_argument(
        "--label-format",
        choices=("png", "tif"),
        help="the format of label images (default: png)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    p.add_argument(
        "--ray",
        nargs="?",
        const=THIS_MACHINE,
        metavar="ADDRESS",
        help="run many images on the Ray cluster at ADDRESS, or without one on all of this machine; inputs "
        "may also be URIs (s3://, gs://), lists (.txt) and Parquet files; --out then gets the results, in "
        "Parquet parts or with --coco-json in COCO parts; the same command again does what is not done",
    )
    p.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="with --ray: models, each in a process of its own with --threads CPUs, or a GPU (default: one "
        "for each --threads CPUs, or for each GPU)",
    )
    p.add_argument(
        "--part-size",
        type=positive_int,
        metavar="N",
        help="with --ray: images of a part of the results (default: 1000)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run(lambda: _infer(parser().parse_args(argv)), "meta-infer")


def _infer(args: Namespace) -> int:
    # Decoders' own chatter: what matters of it arrives as an exception.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    warnings.filterwarnings("ignore", module="PIL")

    if args.ray is not None:
        from meta_deploy.cli.infer_ray import infer_on_ray

        return infer_on_ray(args)
    if args.workers or args.part_size:
        _refuse("--workers" if args.workers else "--part-size", "is for --ray; give that too")
    from meta_deploy.cli.outputs import CocoFile, LabelImages, Overlays, Report, TableFile, folder_for
    from meta_deploy.imaging.sources import expand
    from meta_deploy.runtime.stream import predict
    from meta_deploy.tasks import get_task

    sources = expand(args.inputs, lambda line: tell(f"meta-infer: {line}"))
    other = args.json or args.coco_json or args.csv
    out = args.out or (None if other and not args.label_image else OUT)
    claims = claims_of(args, [source.path for source in sources], out)
    with (
        folder_for(out) as folder,
        CocoFile(args.coco_json, sources) as coco,
        TableFile(args.csv) as rows,
        _open(args) as predictor,
    ):
        _check(args, sources, predictor.bundle)
        _warn_of_small_tiles(args, predictor)
        threshold = predictor.bundle.shown_score if args.score_threshold is None else args.score_threshold
        report = Report(sources, as_json=args.json, intro=_intro(args, predictor))
        raw = predictor.bundle.task == "raw"
        batch = 1 if raw else args.batch or predictor.bundle.input.batch.opt
        labels = LabelImages(
            folder if args.label_image else None, sources, claims, args.label_format or "png"
        )
        rows.begin(get_task(predictor.bundle.task).columns, args.label_image)
        older = (args.coco_json, args.csv)
        with Overlays(folder, sources, claims, raw, older) as overlays, report:
            for frame in predict(predictor, sources, batch):
                check_signals()
                if frame.result is None:
                    report.fail(frame)
                    continue
                coco.add(frame)
                found = frame.result.filter(threshold)
                # All outputs hold the same objects.
                shown = found.apart() if args.csv or args.label_image else found
                overlay, label_image = overlays.add(frame, shown), labels.add(frame, shown)
                rows.add(frame, shown, label_image)
                report.add(frame, shown, overlay, label_image, found)
        report.finish(predictor, threshold, _files(args, folder, raw, rows.count))
    return EXIT_INPUT if report.failed else 0


def _refuse(option: str, why: str) -> NoReturn:
    from meta_deploy.errors import InputError

    raise InputError(f"{option} {why}")


def _files(args: Namespace, folder: Path | None, raw: bool, rows: int) -> list[str]:
    """What was written, and where."""
    files = []
    if folder is not None:
        what = "arrays" if raw else "overlays and label images" if args.label_image else "overlays"
        files.append(f"{what} in {folder}{os.sep}")
    if args.csv:
        files.append(f"{rows} {'row' if rows == 1 else 'rows'} in {args.csv}")
    if args.coco_json:
        files.append(f"COCO results in {args.coco_json}")
    return files


def claims_of(args: Namespace, inputs: Iterable[str | Path], out: str | None) -> Claims:
    """What is read, and the files that are named for writing.

    Raises:
        InputError: one of these, or the folder `out`, is one that is read or in it.
    """
    from meta_deploy.bundle.claims import Claims
    from meta_deploy.bundle.manifest import MANIFEST
    from meta_deploy.bundle.shipped import locate
    from meta_deploy.errors import InputError

    claims = Claims()
    claims.add_streams()
    for place in inputs:
        claims.add(place, "an input")
    bundle = locate(args.model)
    if os.path.exists(os.path.join(bundle, MANIFEST)):  # what is no bundle is told later
        claims.add(bundle, "the bundle")
        with contextlib.suppress(OSError):
            for entry in os.scandir(bundle):
                claims.add(entry.path, "the bundle")  # by links it may be elsewhere
    for name, option in ((args.coco_json, "--coco-json"), (args.csv, "--csv")):
        if name is not None:
            claims.write(name, option)
    if out is not None and (user := claims.holder(out)) is not None:
        raise InputError(f"--out '{out}' is a place of {user}, where nothing is written; name another folder")
    return claims


def _open(args: Namespace) -> Predictor:
    import cv2

    from meta_deploy.bundle.shipped import locate
    from meta_deploy.cpus import limited_threads
    from meta_deploy.runtime.predictor import Predictor

    if threads := args.threads or limited_threads():
        cv2.setNumThreads(threads)
    # COCO results hold everything; else what is not shown need not be computed.
    threshold = 0.0 if args.coco_json else args.score_threshold
    bundle, backend = args.model, args.backend
    if args.rebuild:
        bundle, backend = _rebuilt(locate(args.model), args.backend)
    return Predictor(
        bundle, backend, threshold, args.threads, args.depth, args.tile, args.tile_overlap, args.slide
    )


def _intro(args: Namespace, predictor: Predictor) -> str | None:
    """A line that says what was chosen for the user."""
    chosen = []
    if args.backend == "auto":
        chosen.append(f"runs on {predictor.runs_on}")
    if args.tile is None and predictor.tile is not None:
        chosen.append(f"images over {predictor.tile} pixels in tiles (--tile 0 runs them whole)")
    return f"meta-infer: {'; '.join(chosen)}" if chosen else None


def _warn_of_small_tiles(args: Namespace, predictor: Predictor) -> None:
    """Say what comes of tiles far smaller than the model's input."""
    if not args.tile or predictor.tile is None:
        return
    size = predictor.bundle.input.size.opt
    if (factor := min(size) // predictor.tile) > MOST_ENLARGED:
        tell(
            f"meta-infer: warning: tiles of {predictor.tile} pixels are enlarged {factor} times to the "
            f"model's {size[1]}x{size[0]}; that takes long and cuts objects, so take a larger --tile"
        )


def _check(args: Namespace, sources: Sequence[Source], bundle: Bundle) -> None:
    """Refuse what does not go with the bundle, before any work. Raises InputError."""
    from meta_deploy.errors import InputError

    raw = bundle.task == "raw"
    for value, option in (
        (args.coco_json, "--coco-json"),
        (args.csv, "--csv"),
        (args.label_image, "--label-image"),
        (args.tile, "--tile"),
    ):
        if raw and value:
            raise InputError(
                f"{option} is for objects and classes; bundle '{bundle.path}' gives plain arrays"
            )
    if args.score_threshold is not None and bundle.task not in ("detection", "instance-segmentation"):
        raise InputError(f"--score-threshold is for detections, and bundle '{bundle.path}' gives none")
    if args.label_format and not args.label_image:
        raise InputError("--label-format is for label images; give --label-image too")
    if args.label_image and bundle.task == "detection":
        raise InputError(f"--label-image needs masks, and bundle '{bundle.path}' gives boxes only")
    if raw and args.batch:
        raise InputError(f"--batch is for images; bundle '{bundle.path}' is run on one input at a time")
    for source in sources:
        if source.arrays and not raw:
            raise InputError(f"'{source.path}' holds arrays, and bundle '{bundle.path}' takes images")
        if source.video and args.label_image:
            raise InputError(f"'{source.path}' is a video, and --label-image is for images")
        if source.video and raw:
            raise InputError(f"'{source.path}' is a video; bundle '{bundle.path}' takes .npz files or images")
        if not source.arrays and not bundle.takes_images:
            raise InputError(f"bundle '{bundle.path}' takes arrays and not images; give it an .npz file")
    if args.batch and args.batch > (most := bundle.input.batch.max):
        fixed = bundle.input.static_batch
        option = (
            f"--batch {args.batch} or --dynamic-batch" if fixed else f"a --dynamic-batch up to {args.batch}"
        )
        raise InputError(
            f"--batch {args.batch} is more than the {most} that this bundle takes; export it with {option}"
        )


def _rebuilt(path: str | os.PathLike[str], backend: str) -> tuple[Bundle, str]:
    """The bundle, for which an engine that fits this machine is now kept, and the back end that runs it."""
    from meta_deploy.bundle.bundle import Bundle
    from meta_deploy.errors import InputError
    from meta_deploy.targets import get_target

    bundle = Bundle.open(path)
    target = get_target(bundle.target)
    best = target.automatic[0]
    if backend not in ("auto", best):
        raise InputError(f"--rebuild makes an engine, which --backend {backend} does not use; leave one out")
    target.rebuild(bundle, lambda line: tell(f"meta-infer: {line}"))
    return bundle, best


if __name__ == "__main__":
    sys.exit(main())
