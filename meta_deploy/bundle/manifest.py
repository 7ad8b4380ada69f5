"""The manifest of a bundle: its schema, stated here and nowhere else, read from JSON and written to it.

Knows JSON and field names; must not know the other files of a bundle.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from meta_deploy.bundle.shipped import SHIPPED
from meta_deploy.errors import BundleError

SCHEMA = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
LEAST_TILE, MOST_TILE = 16, 1 << 20  # pixels
MAX_CLASSES = 32767  # class maps are int16

# A line that a picture, a terminal and a file can hold: no control characters, no half characters.
_LINE = r"^(?=.*\S)[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+\Z"
Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^[^\x00]*\Z")]
Line: TypeAlias = Annotated[str, Meta(max_length=200, pattern=_LINE)]
Real: TypeAlias = Annotated[float, Meta(ge=-1e6, le=1e6)]
Probability: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Deviation: TypeAlias = Annotated[float, Meta(ge=1e-6, le=1e6)]
Edge: TypeAlias = Annotated[int, Meta(ge=1, le=65536)]
TileSide: TypeAlias = Annotated[int, Meta(ge=LEAST_TILE, le=MOST_TILE)]
Images: TypeAlias = Annotated[int, Meta(ge=1, le=4096)]
Count: TypeAlias = Annotated[int, Meta(ge=0)]
Size: TypeAlias = tuple[Edge, Edge]
Dims: TypeAlias = tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...]
Capability: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}\Z")]


class Profile(Struct, frozen=True):
    """The least, the usual and the largest shape of an input."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


# --- inputs and outputs -------------------------------------------------------------------------------------


class BatchRange(Struct, frozen=True, kw_only=True):
    """Images a call."""

    min: Images
    opt: Images
    max: Images

    def __post_init__(self) -> None:
        _check_order(self.min <= self.opt <= self.max)


class SizeRange(Struct, frozen=True, kw_only=True):
    """(height, width) in pixels."""

    min: Size
    opt: Size
    max: Size

    def __post_init__(self) -> None:
        _check_order(_within(self.min, self.opt) and _within(self.opt, self.max))


class InputSpec(Struct, frozen=True, kw_only=True):
    """The input of images, (B, 3, H, W): the batches and the sizes that it takes.

    `divisor` divides every height and width.
    """

    name: Text
    dtype: Literal["float32"] = "float32"
    batch: BatchRange
    size: SizeRange
    divisor: Edge

    def __post_init__(self) -> None:
        if any(edge % self.divisor for edge in (*self.size.min, *self.size.max)):
            raise ValueError(f"an input size that {self.divisor} does not divide")

    @property
    def static_batch(self) -> bool:
        return self.batch.min == self.batch.max

    @property
    def static_size(self) -> bool:
        return self.size.min == self.size.max

    @property
    def profile(self) -> Profile:
        """The least, the usual and the largest shape."""
        batch, size = self.batch, self.size
        return Profile(
            self.name, (batch.min, 3, *size.min), (batch.opt, 3, *size.opt), (batch.max, 3, *size.max)
        )


class RawInput(Struct, frozen=True, kw_only=True):
    """An input of any graph: numpy's name of its type, its shape, and the range of what is a name in it."""

    name: Text
    dtype: Text
    shape: tuple[int | str, ...]
    min: Dims
    opt: Dims
    max: Dims

    def __post_init__(self) -> None:
        dims = list(zip(self.shape, self.min, self.opt, self.max, strict=False))
        if not len(self.shape) == len(self.min) == len(self.opt) == len(self.max):
            raise ValueError("min, opt and max of other lengths than its shape")
        _check_order(all(low <= opt <= high for _, low, opt, high in dims))
        if any(low != dim or dim != high for dim, low, _, high in dims if isinstance(dim, int)):
            raise ValueError("min and max that are not its shape")

    @property
    def profile(self) -> Profile:
        return Profile(self.name, self.min, self.opt, self.max)


class TensorSpec(Struct, frozen=True, kw_only=True):
    """An output. `dtype` is numpy's name; a dimension that is known at run time only has a name."""

    name: Text
    dtype: Text
    shape: tuple[int | str, ...]


# --- preprocessing ------------------------------------------------------------------------------------------


class Fit(Struct, frozen=True, kw_only=True, tag_field="mode", tag="fit"):
    """Resized to fit into `size`, its ratio kept, and padded."""

    size: Size


class Edges(Struct, frozen=True, kw_only=True, tag_field="mode", tag="edges"):
    """Resized so that neither edge is longer than `long` and `short` say, its ratio kept, and padded."""

    long: Edge
    short: Edge


class Stretch(Struct, frozen=True, kw_only=True, tag_field="mode", tag="stretch"):
    """Resized to exactly `size`, whatever its ratio."""

    size: Size


class Preprocess(Struct, frozen=True, kw_only=True):
    """From an RGB image of values 0 to 255 to the network's input: resize, (x - mean) / std, pad.

    `mean` and `std` are in the order of `channels`.
    """

    resize: Fit | Edges | Stretch
    mean: tuple[Real, Real, Real]
    std: tuple[Deviation, Deviation, Deviation]
    pad_value: Real = 0.0
    channels: Literal["rgb", "bgr"] = "rgb"


class Thresholds(Struct, frozen=True, kw_only=True):
    """The least score of a detection, of one that is shown unless asked otherwise, and the least probability
    of a pixel of its mask.
    """

    score: Probability
    shown: Probability = 0.3
    mask: Annotated[float, Meta(gt=0, lt=1)] = 0.5


# --- what was built -----------------------------------------------------------------------------------------


class _Engine(Struct, frozen=True, kw_only=True, tag_field="library"):
    @property
    def library(self) -> str:
        return str(self.__struct_config__.tag)


class TensorRTEngine(_Engine, frozen=True, kw_only=True, tag="tensorrt"):
    """What model.engine was built with and for, and what its build's log tells of it (None: it does not).

    `gpu` is the one GPU model that it is for (None: no such bond); `compute_capabilities` those that it is
    for (empty: all that the library knows); `kernels` the layers of each kind, by type; `eight_bits` those
    that compute products in int8 or fp8, by which.
    """

    version: Line
    gpu: Line | None
    compute_capabilities: tuple[Capability, ...]
    tf32: bool = False
    layers: int | None = None
    generated_kernels: int | None = None
    fused_attention: int | None = None
    attention: int | None = None
    kernels: dict[str, dict[str, int]] = {}
    eight_bits: dict[str, int] = {}
    activation_mb: float | None = None
    weights_mb: float | None = None
    plan_mb: float | None = None
    seconds: float | None = None


class TensorRTRTXEngine(TensorRTEngine, frozen=True, kw_only=True, tag="tensorrt-rtx"):
    """The same, of TensorRT-RTX."""


class OpenVINOModel(_Engine, frozen=True, kw_only=True, tag="openvino"):
    """What model.xml was written with, and the precision that it is to be run in."""

    version: Line
    precision_hint: Literal["f32", "f16", "bf16"]
    nodes: int | None = None


Engine: TypeAlias = TensorRTEngine | TensorRTRTXEngine | OpenVINOModel
_LIBRARIES = tuple(engine.__struct_config__.tag for engine in get_args(Engine))


class DeclinedPlace(Struct, frozen=True, kw_only=True):
    """A node that a pass left as it is although it is near the pass' pattern, and why."""

    node: str
    op: str
    reason: str


class PassRow(Struct, frozen=True, kw_only=True):
    """What a graph pass did: changes, and nodes, moves (Transpose, Reshape) and bytes moved around it."""

    name: Text
    changes: Count
    nodes_before: Count
    nodes_after: Count
    moves_before: Count
    moves_after: Count
    bytes_before: Count = 0
    bytes_after: Count = 0
    bytes_exact: bool = False
    seconds: float = 0.0
    declined: tuple[DeclinedPlace, ...] | UnsetType = UNSET  # there only where the export was to explain


class TriedPipeline(Struct, frozen=True, kw_only=True):
    """Passes that were measured: nodes of their graph, and its figures.

    `ms` is the median time of a run and `ratio` the median by which it is longer than that of the first; of
    engines that do not run on the exporting machine, layers, activation memory and size.
    """

    name: Line
    nodes: Count
    ms: float | None = None
    ratio: float | None = None
    layers: int | None = None
    activation_mb: float | None = None
    plan_mb: float | None = None


class Tuning(Struct, frozen=True, kw_only=True):
    """The pipelines that were tried, the target's own first, and the name of the one that ships.

    `rounds` is how often each was timed; 0 for engines.
    """

    chosen: Line
    rounds: Count = 0
    tried: tuple[TriedPipeline, ...] = ()


class LeftOut(Struct, frozen=True, kw_only=True):
    """A pass that is left out because it made results differ, and how far."""

    name: Line
    reason: Text


class Nodes(Struct, frozen=True, kw_only=True):
    """Nodes of the graph before and after all passes."""

    before: Count
    after: Count


class FileEntry(Struct, frozen=True, kw_only=True):
    """What a file of the bundle has to be."""

    sha256: Text
    bytes: Count


class ModelInfo(Struct, frozen=True, kw_only=True):
    """The model's name, and its configuration where it is one of ours."""

    name: Line
    config: dict[str, Any] | None = None


# --- the whole ----------------------------------------------------------------------------------------------


class _Manifest(Struct, frozen=True, kw_only=True, tag_field="task"):
    """What manifests of all tasks have; of what is for people only, anything may be absent."""

    schema: int = SCHEMA
    created_by: dict[str, str] = {}
    model: ModelInfo
    target: Line
    precision: Line
    operators: str | None = None
    outputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    files: dict[str, FileEntry] = {}
    parameters: Count = 0
    nodes: Nodes | None = None
    passes: tuple[PassRow, ...] = ()
    tuning: Tuning | None = None
    left_out: tuple[LeftOut, ...] = ()
    conversion: dict[str, Any] | None = None
    verification: dict[str, Any] | None = None
    seconds: dict[str, float] = {}
    peak_rss_mb: int | None = None
    engine: Engine | None = None

    @property
    def task(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs that results are made of."""
        return tuple(output.name for output in self.outputs)


class _ImageManifest(_Manifest, frozen=True, kw_only=True):
    """`tile` is the side in pixels of the tiles that larger images are run in (None: always as a whole)."""

    needs: ClassVar[tuple[str, ...]]  # outputs of the graph, by name

    input: InputSpec
    preprocess: Preprocess
    classes: Annotated[tuple[Line, ...], Meta(min_length=1, max_length=MAX_CLASSES)]
    tile: TileSide | None = None

    @property
    def output_names(self) -> tuple[str, ...]:
        return self.needs


class DetectionManifest(_ImageManifest, frozen=True, kw_only=True, tag="detection"):
    """Boxes without masks."""

    needs: ClassVar[tuple[str, ...]] = ("num_detections", "boxes", "scores", "labels")
    thresholds: Thresholds


class InstanceSegmentationManifest(DetectionManifest, frozen=True, kw_only=True, tag="instance-segmentation"):
    """Boxes, each with a mask."""

    needs: ClassVar[tuple[str, ...]] = (*DetectionManifest.needs, "masks")


class SemanticSegmentationManifest(_ImageManifest, frozen=True, kw_only=True, tag="semantic-segmentation"):
    """A class for every pixel."""

    needs: ClassVar[tuple[str, ...]] = ("logits",)


class RawManifest(_Manifest, frozen=True, kw_only=True, tag="raw"):
    """Any graph: named arrays in and out.

    `image` is the input that takes an image, prepared by `preprocess`; both are None where none does.
    """

    inputs: Annotated[tuple[RawInput, ...], Meta(min_length=1)]
    image: InputSpec | None = None
    preprocess: Preprocess | None = None
    classes: None = None


Manifest: TypeAlias = (
    DetectionManifest | InstanceSegmentationManifest | SemanticSegmentationManifest | RawManifest
)

MANIFESTS: dict[str, Any] = {manifest.__struct_config__.tag: manifest for manifest in get_args(Manifest)}


def read_manifest(path: Path) -> tuple[dict[str, Any], Any]:
    """The manifest in the folder `path`, parsed and not yet validated, and its file's `identity`.

    Raises:
        BundleError: there is none.
    """
    file = path / MANIFEST
    try:
        if not path.exists():
            shipped = f"name one in the package ({', '.join(SHIPPED)})"
            raise BundleError(f"there is no bundle at '{path}'; write one with meta-export, or {shipped}")
        if not file.is_file():
            raise BundleError(f"'{path}' is not a bundle: it has no {MANIFEST}; write one with meta-export")
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_size > MAX_MANIFEST_BYTES:
                raise ValueError("it is larger than any manifest")
            manifest = json.loads(stream.read())
        if not isinstance(manifest, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"cannot read '{file}': {reason}; export the bundle again") from error
    return manifest, _identity(status)


def identity(file: Path) -> Any:
    """What tells a file or folder from one that took its place; None without one."""
    try:
        return _identity(file.stat())
    except OSError:
        return None


def _identity(status: os.stat_result) -> Any:
    # A number of a file that is gone is given to the next one.
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def from_dict(content: dict[str, Any], path: Path) -> Manifest:
    """The manifest of the bundle at `path`, from its parsed JSON. Touches no file.

    Raises:
        BundleError: a newer schema, a field that is missing or wrong, or fields that do not fit each other.
    """
    schema = content.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BundleError(
            f"'{path}' is not a bundle: its {MANIFEST} gives no schema; write one with meta-export"
        )
    if schema > SCHEMA:
        raise BundleError(
            f"bundle '{path}' has manifest schema {schema}, and this meta-deploy reads up to {SCHEMA}; "
            "upgrade meta-deploy, or export the bundle with this version"
        )
    manifest: Manifest = _convert(content, Manifest, "", path)
    if problem := _problem(manifest):
        raise BundleError(f"the manifest of bundle '{path}' {problem}; export it again")
    return manifest


def to_json(manifest: Manifest) -> str:
    """The text of manifest.json."""
    return json.dumps(msgspec.to_builtins(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_engine(section: Any, path: Path) -> Engine:
    """An `engine` section, from its parsed JSON, of a bundle. Raises BundleError if it is none."""
    return _convert(section, Engine, "engine", path)


def _convert(content: Any, type_: Any, name: str, path: Path) -> Any:
    """`content` as a Struct. Errors name the field, with dots, below `name`."""
    try:
        return msgspec.convert(content, type_)
    except msgspec.ValidationError as error:
        raise BundleError(
            f"the manifest of bundle '{path}' {_said(error, content, name)}; export it again"
        ) from error
    except UnicodeEncodeError as error:
        raise BundleError(
            f"the manifest of bundle '{path}' has half a character ({error.object!r}); export it again"
        ) from error


def _said(error: msgspec.ValidationError, content: Any, name: str) -> str:
    """What is wrong, from msgspec's "reason - at `$.field[0].other`"."""
    reason, _, place = str(error).partition(" - at `$")
    place = place.rstrip("`")
    dotted = f"{name}{place}".lstrip(".")
    if absent := re.match("Object missing required field `(.*)`", reason):
        return f"lacks '{f'{dotted}.{absent[1]}'.lstrip('.')}'"
    if error.__cause__ is not None:  # of a __post_init__
        return f"has {reason} in '{dotted}'"
    value = content
    for step in re.findall(r"[^.\[\]]+|\.\.\.", place):
        if step == "...":  # an entry of a dictionary: msgspec does not tell which
            return f"has a wrong value for '{dotted}' ({reason})"
        value = value[step if isinstance(value, dict) else int(step)]
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if repr(_LINE) in reason:
        reason = "Expected a line of printable text"
    return f"has {shown} for '{dotted}' ({reason[0].lower()}{reason[1:]})"


def _problem(manifest: Manifest) -> str | None:
    """What holds between fields and does not here."""
    names = {output.name for output in manifest.outputs}
    if absent := [name for name in manifest.output_names if name not in names]:
        return f"lacks the output '{absent[0]}'"
    spec = manifest.image if isinstance(manifest, RawManifest) else manifest.input
    if isinstance(manifest, RawManifest):
        if (spec is None) != (manifest.preprocess is None):
            return "has one of 'image' and 'preprocess' without the other"
        if spec is not None and not (len(manifest.inputs) == 1 and _takes(manifest.inputs[0], spec.profile)):
            return "has an 'image' that its one input does not take"
    resize = manifest.preprocess and manifest.preprocess.resize
    if spec and isinstance(resize, (Fit, Stretch)) and not _within(resize.size, spec.size.max):
        return "resizes to more than its largest input"
    if manifest.target in _LIBRARIES:
        if manifest.engine is None:
            return f"lacks 'engine', which a bundle for {manifest.target} has"
        if manifest.engine.library != manifest.target:
            return f"has '{manifest.engine.library}' for 'engine.library', and is for {manifest.target}"
    if not manifest.files:
        return "has no entry for 'files'"
    for name in manifest.files:
        if name in ("", ".", "..", MANIFEST) or set(name) & set("/\\:") or not name.isprintable():
            return f"lists {name!r}, which is not a plain file name"
    return None


def _takes(given: RawInput, profile: Profile) -> bool:
    """Whether a float32 input takes every shape of a profile."""
    return (given.name, given.dtype, len(given.shape)) == (profile.name, "float32", len(profile.min)) and all(
        low <= least and most <= high
        for low, least, most, high in zip(given.min, profile.min, profile.max, given.max, strict=True)
    )


def _within(size: Size, largest: Size) -> bool:
    return size[0] <= largest[0] and size[1] <= largest[1]


def _check_order(ordered: bool) -> None:
    if not ordered:
        raise ValueError("min, opt and max out of order")
