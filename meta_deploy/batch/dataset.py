"""A prediction as stages of a Ray Dataset: read, prepare, model, finish, each with workers of its own.

Knows tables of images and the steps of a prediction; must not know where the images come from, nor what
becomes of the results.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from meta_deploy.batch import remote
from meta_deploy.batch.rows import TASKS, is_bytes, is_text, result_type, with_columns
from meta_deploy.bundle.bundle import Bundle, digest_of
from meta_deploy.bundle.shipped import SHIPPED, locate
from meta_deploy.errors import BundleError, ImageError, InputError
from meta_deploy.imaging.image_file import content
from meta_deploy.runtime.predictor import Predictor
from meta_deploy.runtime.processor import Prepared, Processor
from meta_deploy.tasks.results import ImageResult, Timings

if TYPE_CHECKING:
    from ray.data import Dataset

RESULT, ERROR = "result", "error"
_STATE = "__meta_deploy"  # of each row, what the next stage needs
_READERS = 16  # files that a task reads at a time: stores answer after some 50 ms
_CALL = 16  # rows of a call at least


@dataclass(frozen=True)
class Options:
    """What the stages are to do: the bundle, the options of a `Predictor`, the names of the columns."""

    bundle: str
    digest: str  # of its manifest
    bytes: int  # of its files
    backend: str = "auto"
    score_threshold: float | None = None
    depth: int | None = None
    tile: int | None = None
    tile_overlap: int | None = None
    slide: bool | int = False
    batch: int = 1
    threads: int = 1
    image: str = "path"
    path: str = "path"
    coco_ids: str | None = None

    def open(self) -> Bundle:
        """The bundle, which must be on this machine. Raises BundleError: it is not, or is another one."""
        place = locate(self.bundle)
        bundle = Bundle.open(place)
        if digest_of(place) != self.digest:
            raise BundleError(
                f"bundle '{place}' is not the one that the run was started with; copy that to every machine"
            )
        return bundle

    @property
    def processing(self) -> dict[str, Any]:
        """The options of a `Processor`."""
        names = ("score_threshold", "depth", "tile", "tile_overlap", "slide")
        return {name: getattr(self, name) for name in names}


def predict_dataset(
    ds: Dataset,
    bundle: str | os.PathLike[str] | None = None,
    *,
    image: str = "path",
    path: str = "path",
    backend: str = "auto",
    score_threshold: float | None = None,
    depth: int | None = None,
    tile: int | None = None,
    tile_overlap: int | None = None,
    slide: bool | int = False,
    batch: int | None = None,
    threads: int = 1,
    workers: int | tuple[int, int] = 1,
    gpus: float = 0,
    readers: int | None = None,
    decoders: int | None = None,
    finishers: int | None = None,
    coco_ids: str | None = None,
) -> Dataset:
    """The results of a Ray Dataset's images, as a Dataset: lazy, in no certain order, a row an image.

    >>> ds = ray.data.read_parquet("s3://photos/index/")     # a column `path` of paths or URIs
    >>> predict_dataset(ds, "my-bundle", workers=8).write_parquet("s3://photos/found/")

    Column `image` holds paths, URIs (s3://, gs://, …), encoded files (bytes, or a struct with a field
    `bytes`), or RGB uint8 arrays (H, W, 3).
    All columns stay, apart from bytes and arrays, and two are added: `result`, a struct as the entries of
    `meta-infer --json`, masks as COCO RLE, and `error`, why there is none. One of the two is null. What
    cannot be read fails alone. `path` is the column of the names that results and errors tell, if there is
    one. The bundle must be at the same place on every machine; paths must lead to the same files.

    The options up to `batch` are those of `Predictor` and `meta-infer`. Then:

    Args:
        threads: CPU threads of each model.
        workers: models, each in a process of its own with `threads` CPUs; (least, most) lets Ray choose.
        gpus: GPUs of each model.
        readers, decoders, finishers: the most tasks that at a time read files, decode and resize, make
            results of outputs; None: as many as there are CPUs for.
        coco_ids: a column of whole numbers. `result` is then the list of the COCO records of all that the
            bundle finds, with that number as `image_id`.

    Raises:
        InputError: no such bundle, options that it does not take, no such column, or one that is called
            `result` or `error`.
    """
    options = options_of(
        bundle,
        backend=backend,
        score_threshold=score_threshold if coco_ids is None else 0.0,
        depth=depth,
        tile=tile,
        tile_overlap=tile_overlap,
        slide=slide,
        threads=threads,
        image=image,
        path=path,
        coco_ids=coco_ids,
    )
    return staged(ds, checked(options, batch), workers, gpus, (readers, decoders, finishers))


def options_of(bundle: str | os.PathLike[str] | None, **settings: Any) -> Options:
    """Options for a bundle, a folder or the name of one in the package; to be `checked`."""
    place = os.fspath(bundle) if bundle is not None else SHIPPED[0]
    named = place in SHIPPED and not os.path.lexists(place)
    return Options(bundle=place if named else os.path.abspath(place), digest="", bytes=0, **settings)


def checked(options: Options, batch: int | None) -> Options:
    """The options with the bundle's digest and batch, once they are known to fit it. Raises InputError."""
    opened = Bundle.open(locate(options.bundle))
    if opened.task not in TASKS:
        raise InputError(
            f"bundle '{opened.path}' gives plain arrays, which are not run on Ray; use Predictor"
        )
    Processor(opened, **options.processing)
    most = opened.input.batch.max
    if batch is not None and not 1 <= batch <= most:
        raise InputError(f"the batch must be from 1 to {most}, as the bundle takes, not {batch}")
    size = sum(entry.bytes for entry in opened.manifest.files.values())
    batch = batch or opened.input.batch.opt
    return replace(options, digest=digest_of(opened.path), bytes=size, batch=batch)


def staged(
    ds: Dataset,
    options: Options,
    workers: int | tuple[int, int] = 1,
    gpus: float = 0,
    tasks: tuple[int | None, int | None, int | None] = (None, None, None),
    rows: int | None = None,
) -> Dataset:
    """`ds` through the stages, `rows` at a time (None: what fills some batches of the model)."""
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    _check_columns(ds.columns(), options)
    rows = rows or call_rows(options.batch)
    least, most = (workers, workers) if isinstance(workers, int) else workers
    readers, decoders, finishers = (TaskPoolStrategy(size) for size in tasks)

    def each(ds: Dataset, stage: Callable, compute: TaskPoolStrategy) -> Dataset:
        return ds.map_batches(
            stage, fn_args=(options,), batch_format="pyarrow", batch_size=rows, compute=compute
        )

    ds = each(each(ds, read, readers), prepare, decoders)
    ds = ds.map_batches(
        Model,
        fn_constructor_args=(options,),
        batch_format="pyarrow",
        batch_size=rows,
        compute=ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=options.threads,
        num_gpus=gpus or None,
        memory=options.bytes,  # other than what a task needs, or Ray would decode in the model's process
    )
    return each(ds, finish, finishers)


def _check_columns(there: Sequence[str] | None, options: Options) -> None:
    """Raise InputError where a dataset of these columns (None: not known) lacks one, or has one of ours."""
    if there is None:
        return
    for name in (RESULT, ERROR):
        if name in there:
            raise InputError(f"the dataset has a column '{name}' already; rename it")
    for wanted in (options.image, options.coco_ids):
        if wanted is not None and wanted not in there:
            raise InputError(f"the dataset has no column '{wanted}'; there are {', '.join(there)}")


def call_rows(batch: int) -> int:
    """The rows that a stage is called with: full batches of the model, and some memory only."""
    return batch * -(-_CALL // batch)


# --- the stages -------------------------------------------------------------------------------------------


def read(table: pa.Table, options: Options) -> pa.Table:
    """Paths and URIs to their files' bytes; what else is in the column goes on as it is."""
    name, column = options.image, table[options.image]
    kind = column.type
    if is_text(kind):
        with ThreadPoolExecutor(_READERS) as pool:
            return _next(table, list(pool.map(_caught(_content), column.to_pylist())))
    table = table.drop_columns([name])
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as in Hugging Face's data sets
        column = pc.struct_field(column, "bytes")
    images: list[Any]
    if is_bytes(column.type) or pa.types.is_null(column.type):
        images = column.to_pylist()
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or isinstance(kind, pa.BaseExtensionType):
        from ray.data.block import BlockAccessor

        images = list(BlockAccessor.for_block(pa.table({name: column})).to_numpy(name))
    else:
        odd = InputError(f"column '{name}' is of {kind}, and not of paths, encoded files or arrays")
        images = [odd] * len(table)
    for i, (image, called) in enumerate(zip(images, _names(table, options), strict=True)):
        if image is None:
            told = "there is no image" if called is None else f"'{called}' has no image"
            images[i] = InputError(f"{told}: the value in its column is null")
    return _next(table, images)


def prepare(table: pa.Table, options: Options) -> pa.Table:
    """Bytes and arrays to the pieces that the model sees."""
    steps = _processor(options)

    def one(image: Any, name: str | None) -> Prepared:
        return steps.prepare(steps.read(image, name))

    return _next(table, list(map(_caught(one), _states(table), _names(table, options))))


class Model:
    """Pieces to outputs: a worker with a model of its own."""

    def __init__(self, options: Options):
        import cv2

        cv2.setNumThreads(options.threads)
        bundle = options.open()
        self._batch = options.batch
        self._predictor = Predictor(bundle, options.backend, threads=options.threads, **options.processing)

    def __call__(self, table: pa.Table) -> pa.Table:
        states = list(_states(table))
        images = [state for state in states if not isinstance(state, Exception)]
        try:
            done = iter(self._run(images))
        except InputError:  # of one of them, which fails alone then
            done = map(_caught(lambda image: self._run([image])[0]), images)
        return _next(table, [state if isinstance(state, Exception) else next(done) for state in states])

    def _run(self, images: Sequence[Prepared]) -> list[Prepared]:
        sizes = [size for image in images for size in self._predictor.sizes(image.size)]
        began = perf_counter()
        outputs = self._predictor.outputs(
            [piece for image in images for piece in image.pieces], sizes, self._batch
        )
        took = 1000 * (perf_counter() - began) / max(len(outputs), 1)
        rest = iter(outputs)
        return [
            replace(
                image,
                timings=image.timings + Timings(model=took * len(image.pieces)),
                outputs=[next(rest) for _ in image.pieces],
                pieces=(),
            )
            for image in images
        ]


def finish(table: pa.Table, options: Options) -> pa.Table:
    """Outputs to results."""
    steps = _processor(options)
    ids = table[options.coco_ids].to_pylist() if options.coco_ids else [None] * len(table)

    def one(image: Prepared, name: str | None, coco_id: int | None) -> Any:
        result = steps.finish(image, name)
        if coco_id is None:
            return result.to_dict()
        assert isinstance(result, ImageResult)
        return result.to_coco(coco_id)

    results = list(map(_caught(one), _states(table), _names(table, options), ids))
    errors = [str(result) if isinstance(result, Exception) else None for result in results]
    values = [None if isinstance(result, Exception) else result for result in results]
    kind = result_type(steps.bundle.task, options.coco_ids is not None)
    return with_columns(
        table, [_STATE], **{RESULT: pa.array(values, kind), ERROR: pa.array(errors, pa.string())}
    )


# --- rows -------------------------------------------------------------------------------------------------


def _next(table: pa.Table, states: Sequence[Any]) -> pa.Table:
    """The table with what the next stage needs of each row."""
    drop = [field.name for field in table.schema if is_bytes(field.type)]
    packed = pa.array([pickle.dumps(state, protocol=5) for state in states], pa.large_binary())
    return with_columns(table, drop, **{_STATE: packed})


def _states(table: pa.Table) -> Iterator[Any]:
    return (pickle.loads(value.as_buffer()) for value in table[_STATE])


def _names(table: pa.Table, options: Options) -> list[str | None]:
    named = options.path in table.column_names and is_text(table[options.path].type)
    return table[options.path].to_pylist() if named else [None] * len(table)


def _caught(step: Callable) -> Callable:
    """A step that gives an image's error where it raises one, and hands on that of an earlier step."""

    def guarded(state: Any, *rest: Any) -> Any:
        if isinstance(state, Exception):
            return state
        try:
            return step(state, *rest)
        except InputError as error:
            return error
        except MemoryError:
            return ImageError("there is not enough memory for it; make it smaller first")

    return guarded


def _content(name: str | None) -> bytes:
    if not name:
        raise ImageError("its path is empty; name an image")
    return remote.content(name) if remote.is_uri(name) else content(name)


@functools.lru_cache(maxsize=4)
def _processor(options: Options) -> Processor:
    import cv2

    cv2.setNumThreads(1)  # there are as many processes as CPUs
    return Processor(options.open(), **options.processing)
