"""A run over many images on Ray: started here or elsewhere, its results in parts, gone on with if stopped.

Knows the order of things; must not know how an image is read or what a result is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from meta_deploy.batch.cluster import gpus_of, told
from meta_deploy.batch.dataset import ERROR, RESULT, Options, call_rows, staged
from meta_deploy.batch.inputs import Group, Inputs, images_of
from meta_deploy.batch.parts import Part, Parts
from meta_deploy.batch.rows import result_type
from meta_deploy.bundle.bundle import Bundle
from meta_deploy.bundle.shipped import locate
from meta_deploy.runtime.predictor import Predictor

if TYPE_CHECKING:
    from ray.data import Dataset

PART_SIZE = 1000
MOST_FAULTS = 100  # calls that may fail by a fault in us or in a library before the run is given up
FAULT = "an internal error, also when it was run alone; Ray's log says which"
_PLACE, _COCO_ID = "place", "image_id"


def open_parts(inputs: Inputs, out: Path, options: Options, part_size: int = PART_SIZE) -> Parts[pa.Table]:
    """The parts of a run over `inputs` in the folder `out`, some of them perhaps there.

    They are Parquet files with a row an image: `path`, `result` and `error`, as `predict_dataset` gives them;
    or with `options.coco_ids` COCO results, a JSON array each.

    Raises:
        InputError: the folder holds another run's, or another process writes there.
    """
    coco = options.coco_ids is not None
    run = {
        "bundle": options.digest,
        "backend": options.backend,
        **options.processing,
        "batch": options.batch,
        "results": "coco" if coco else "rows",
        "inputs": inputs.digest,
    }
    write, suffix = (_write_records, ".json") if coco else (_write_rows, ".parquet")
    return Parts(out, run, len(inputs), part_size, suffix, write, _failure)


def run(
    inputs: Inputs,
    parts: Parts[pa.Table],
    options: Options,
    workers: int | None = None,
    started: Callable[[str], object] = lambda runs_on: None,
    finished: Callable[[Part], object] = lambda part: None,
    done: Callable[[int], object] = lambda images: None,
) -> None:
    """Do what is not done; on the Ray cluster that this process is connected to.

    `options.image` and `path` are set here. `started` is told what runs the model, `finished` each part as it
    is written, `done` how many images have come.

    Raises:
        InputError: the bundle cannot be opened or run there, or a part cannot be written.
    """
    if not parts.todo():
        return
    import ray

    own = {"image": "image", "path": "path", "coco_ids": options.coco_ids and _COCO_ID}
    options = Options(**{**vars(options), **own})
    gpus = gpus_of(Bundle.open(locate(options.bundle)).target, options.backend)
    workers = workers or _workers(options, gpus)
    with told():
        runs_on = ray.remote(num_cpus=options.threads, num_gpus=gpus)(_tried).remote(options)
        started(f"{ray.get(runs_on)}; models: {workers}")

    def collect(spans: Sequence[range], rows: int) -> None:
        for dataset in _datasets(inputs, spans, rows, options):
            ready = staged(dataset, options, workers, gpus, rows=rows)
            for table in ready.iter_batches(batch_size=None, batch_format="pyarrow"):
                kept = table.select([_PLACE, "path", RESULT, ERROR]).take(pa.array(range(len(table))))
                for i, place in enumerate(kept[_PLACE].to_pylist()):
                    if (part := parts.add(place, kept.slice(i, 1))) is not None:
                        finished(part)
                done(len(kept))

    with _quiet():
        collect(parts.todo(), call_rows(options.batch))
        # What shared a call with a picture that made it fail comes alone, and the picture does not come.
        if missing := parts.missing():
            collect([range(i, i + 1) for i in missing], 1)
    kind = result_type(Bundle.open(locate(options.bundle)).task, options.coco_ids is not None)
    for place in parts.missing():
        error = f"'{inputs.names[place]}': {FAULT}"
        row = pa.table(
            {
                _PLACE: [place],
                "path": [inputs.names[place]],
                RESULT: pa.nulls(1, kind),
                ERROR: pa.array([error], pa.string()),
            }
        )
        if (part := parts.add(place, row)) is not None:
            finished(part)
        done(1)


# --- Ray --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without progress bars and notes of its own, going on where a call crashes."""
    from ray.data import DataContext

    context = DataContext.get_current()
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "max_errored_blocks": MOST_FAULTS,
    }
    before = {name: getattr(context, name) for name in settings}
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        for name, value in settings.items():
            setattr(context, name, value)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"ray\.")  # as that there are fewer images than models
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)


def _tried(options: Options) -> str:
    """What runs the model, on a worker; where it cannot be run, that is told before there are many."""
    with Predictor(
        options.open(), options.backend, threads=options.threads, **options.processing
    ) as predictor:
        return predictor.runs_on


def _workers(options: Options, gpus: int) -> int:
    """As many models as there are GPUs, or CPUs beside one for the other stages."""
    import ray

    resources = ray.cluster_resources()
    if gpus:
        return int(resources["GPU"])
    return max(1, int(resources.get("CPU", 1) - 1) // options.threads)


def _datasets(inputs: Inputs, spans: Sequence[range], rows: int, options: Options) -> Iterator[Dataset]:
    """The images of `spans`: those that are files, and those in tables."""
    import ray.data

    ids = inputs.image_ids() if options.coco_ids else []

    def table(places: Sequence[int], images: pa.Array) -> pa.Table:
        columns = {
            _PLACE: pa.array(places, pa.int64()),
            "path": pa.array([inputs.names[i] for i in places], pa.string()),
            "image": images,
        }
        if ids:
            columns[_COCO_ID] = pa.array([ids[i] for i in places], pa.int64())
        return pa.table(columns)

    files = [table(places, pa.array(own, pa.string())) for places, own in inputs.files(spans, rows)]
    if files:
        yield ray.data.from_arrow(files)
    groups = [
        pa.table(
            {
                **{name: [value] for name, value in vars(group).items()},
                "rows": pa.array([table(places, pa.nulls(len(places))).to_pylist()]),
            }
        )
        for group, places in inputs.tables(spans)
    ]
    if groups:
        yield ray.data.from_arrow(groups).map_batches(
            _unpacked, fn_args=(rows,), batch_format="pyarrow", batch_size=1
        )


def _unpacked(table: pa.Table, count: int) -> Iterator[pa.Table]:
    """Row groups to the images in them."""
    for row in table.to_pylist():
        known = {own[_PLACE]: own for own in row.pop("rows")}
        for places, images in images_of(Group(**row), list(known), count):
            columns = pa.Table.from_pylist([known[place] for place in places]).drop_columns(["image"])
            yield columns.append_column("image", pa.array(images, pa.large_binary()))


# --- files ------------------------------------------------------------------------------------------------


def _failure(row: pa.Table) -> tuple[str, str] | None:
    error = row[ERROR][0].as_py()
    return None if error is None else (row["path"][0].as_py(), error)


def _write_rows(path: Path, rows: Sequence[pa.Table]) -> None:
    pq.write_table(pa.concat_tables(rows).drop_columns([_PLACE]).combine_chunks(), path, compression="zstd")


def _write_records(path: Path, rows: Sequence[pa.Table]) -> None:
    records = []
    for row in rows:
        name = {"file_name": PurePosixPath(row["path"][0].as_py()).name}
        records += [json.dumps(record | name) for record in row[RESULT][0].as_py() or ()]
    path.write_text("".join(array_of(records)) + "\n")


def array_of(texts: Iterable[str]) -> Iterator[str]:
    """The pieces of a JSON array of what is JSON already, one a line."""
    before = "[\n"
    for text in texts:
        yield before + text
        before = ",\n"
    yield "[\n]" if before == "[\n" else "\n]"


def entries(parts: Parts[pa.Table]) -> Iterator[Mapping[str, Any]]:
    """The results of the finished parts, in order, as `Result.to_dict` gave them."""
    for part in parts:
        with pq.ParquetFile(parts.folder / part.file) as file:
            for batch in file.iter_batches(64, columns=[RESULT]):
                yield from (result for result in batch.column(0).to_pylist() if result is not None)


def records(parts: Parts[pa.Table]) -> Iterator[str]:
    """The COCO records of the finished parts, in order, each as JSON."""
    for part in parts:
        with (parts.folder / part.file).open() as file:
            yield from (line.rstrip(",\n") for line in file if line.startswith("{"))
