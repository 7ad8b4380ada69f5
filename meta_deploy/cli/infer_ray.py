"""meta-infer --ray: the same inputs on a Ray cluster, results in parts that a second run goes on with.

Parses, calls the batch and prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from meta_deploy.cli.common import EXIT_INPUT, check_signals
from meta_deploy.cli.infer import OUT, THIS_MACHINE, claims_of
from meta_deploy.cli.outputs import folder_for
from meta_deploy.cli.terminal import say, tell
from meta_deploy.errors import InputError

if TYPE_CHECKING:
    from argparse import Namespace

    from meta_deploy.batch.dataset import Options
    from meta_deploy.batch.parts import Part, Parts

TOLD = 20  # failures that have a line on standard error
_THREADS = 4  # of a model, where there are as many CPUs


def infer_on_ray(args: Namespace) -> int:
    """The command with --ray; returns the exit code."""
    _check(args)
    for module in ("ray", "pyarrow"):  # without importing Ray, which takes seconds
        if not _is_there(module):
            raise InputError(f"--ray needs {module}, which is not installed; pip install 'meta-deploy[ray]'")
    from meta_deploy.batch.cluster import connected
    from meta_deploy.batch.inputs import gather
    from meta_deploy.batch.run import PART_SIZE, open_parts, run

    inputs, options, out = gather(args.inputs, _note), _options(args), args.out or OUT
    claims_of(args, (place for place in inputs.places if place and "://" not in place), out)
    with (
        folder_for(out) as folder,
        open_parts(inputs, folder or Path(out), options, args.part_size or PART_SIZE) as parts,
    ):
        progress = _Progress(parts, args)
        with progress:
            if parts.todo():
                # Ray prints on standard output what befalls its processes.
                with (
                    _as_it_was_heard(),
                    redirect_stdout(sys.stderr),
                    connected(None if args.ray == THIS_MACHINE else args.ray),
                ):
                    run(
                        inputs,
                        parts,
                        options,
                        args.workers,
                        lambda runs_on: _note(f"runs on {runs_on}"),
                        progress.finished,
                        progress.done,
                    )
        if args.coco_json:
            _join(parts, args.coco_json)
        if args.json:
            _print(parts, options)
        return progress.finish()


@contextmanager
def _as_it_was_heard() -> Iterator[None]:
    """SIGTERM as that where Ray has made Ctrl-C of it."""
    try:
        yield
    except KeyboardInterrupt:
        check_signals()
        raise


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # None in its place, which says that it is not to be imported
        return False


def _note(line: str) -> None:
    tell(f"meta-infer: {line}")


def _check(args: Namespace) -> None:
    """Refuse what does not go with --ray. Raises InputError."""
    from meta_deploy.bundle.files import check_writable

    for value, option in (
        (args.csv, "--csv"),
        (args.label_image, "--label-image"),
        (args.label_format, "--label-format"),
        (args.rebuild, "--rebuild"),
    ):
        if value:
            raise InputError(f"{option} does not go with --ray; leave one of them out")
    if args.json and args.coco_json:
        raise InputError(
            "with --ray the results are those of --json or of --coco-json; leave one of them out"
        )
    if args.coco_json and args.score_threshold is not None:
        raise InputError(
            "--coco-json holds all that the bundle gives, and with --ray there is nothing else that "
            "--score-threshold could be for; leave it out"
        )
    if args.coco_json:
        check_writable(args.coco_json)  # now, as it is written when all is done


def _options(args: Namespace) -> Options:
    from meta_deploy.batch.dataset import checked, options_of
    from meta_deploy.cpus import cpu_count

    return checked(
        options_of(
            args.model,
            backend=args.backend,
            score_threshold=0.0 if args.coco_json else args.score_threshold,
            depth=args.depth,
            tile=args.tile,
            tile_overlap=args.tile_overlap,
            slide=args.slide,
            threads=args.threads or min(_THREADS, cpu_count()),
            coco_ids="image_id" if args.coco_json else None,
        ),
        args.batch,
    )


class _Progress:
    """A bar, a line for each part and for the first failures; a context manager."""

    def __init__(self, parts: Parts, args: Namespace):
        self._parts, self._failed = parts, 0
        self._lines = sys.stderr if args.json else sys.stdout
        self._bar = tqdm(total=parts.images, initial=parts.resumed, unit="image", disable=None, leave=False)
        if parts.resumed:
            tell(f"meta-infer: {parts.resumed} of {parts.images} images are done already in {parts.folder}")
            for part in parts:
                self._count(part)

    def done(self, images: int) -> None:
        check_signals()
        self._bar.update(images)

    def finished(self, part: Part) -> None:
        failed = f", {len(part.failed)} failed" if part.failed else ""
        say(f"{part.file}: {part.images} images{failed}", self._lines)
        self._count(part)

    def _count(self, part: Part) -> None:
        for _, why in part.failed:
            if self._failed < TOLD:
                tell(f"meta-infer: {why}; skipped")
            self._failed += 1

    def finish(self) -> int:
        """The last line; the exit code."""
        parts, done = self._parts, self._parts.images - self._failed
        say(f"{done} images in {len(parts.done)} parts in {parts.folder}", self._lines)
        if self._failed:
            more = f" ({self._failed - TOLD} more than the lines above)" if self._failed > TOLD else ""
            tell(f"meta-infer: {self._failed} failed{more}; {parts.folder / 'manifest.jsonl'} says why")
        return EXIT_INPUT if self._failed else 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()


def _join(parts: Parts, path: str) -> None:
    """One COCO file of all parts."""
    from meta_deploy.batch.run import array_of, records
    from meta_deploy.bundle.files import atomic_write

    with atomic_write(path) as stream:
        for piece in array_of(records(parts)):
            stream.write(piece.encode())
        stream.write(b"\n")


def _print(parts: Parts, options: Options) -> None:
    """The document of meta-infer --json, from the parts."""
    from meta_deploy.batch.run import array_of, entries
    from meta_deploy.runtime import document

    bundle = options.open()
    head = document.head(bundle, options.backend, options.score_threshold)
    print(json.dumps(head)[:-1] + ', "images": ', end="")
    for piece in array_of(json.dumps(document.entry(entry)) for entry in entries(parts)):
        print(piece, end="")
    errors = [{"path": name, "error": why} for part in parts for name, why in part.failed]
    print(f', "errors": {json.dumps(errors)}}}')
