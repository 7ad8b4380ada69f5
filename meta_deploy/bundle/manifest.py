"""The manifest of a bundle: its schema, and the check that this version can run what it says.

Knows JSON and field names; must not know the other files of a bundle.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meta_deploy.errors import BundleError


@dataclass(frozen=True)
class Profile:
    """An input's least, usual and largest shape."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


SCHEMA = 1
# What the runtime needs of each task's graph, by name.
_DETECTIONS = ("num_detections", "boxes", "scores", "labels")
OUTPUTS = {
    "instance-segmentation": (*_DETECTIONS, "masks"),
    "detection": _DETECTIONS,
    "semantic-segmentation": ("logits",),
}
ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")  # bundles with a model.engine, and an `engine` about it
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_REAL, MIN_STD = 1e6, 1e-6
MAX_EDGE, MAX_BATCH = 65536, 4096
MAX_CLASSES, MAX_NAME = 32767, 200  # class maps are int16


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in the folder `path`, parsed and not yet validated. Raises BundleError without one."""
    file = path / MANIFEST
    try:
        if not path.exists():
            raise BundleError(f"there is no bundle at '{path}'; write one with meta-export")
        if not file.is_file():
            raise BundleError(f"'{path}' is not a bundle: it has no {MANIFEST}; write one with meta-export")
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("it is larger than any manifest")
        manifest = json.loads(file.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"cannot read '{file}': {reason}; export the bundle again") from error
    return manifest


# One line a field, then what holds between fields.


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_REAL


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_batch(value: Any) -> bool:
    return _is_count(value) and value <= MAX_BATCH


def _is_edge(value: Any) -> bool:
    return _is_count(value) and value <= MAX_EDGE


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_edge, value))


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_class_name(value: Any) -> bool:
    """Text that a line, a picture and a file can hold: no control characters, no half characters."""
    return (
        _is_text(value)
        and 0 < len(value.strip()) <= MAX_NAME
        and not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value)
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_CLASSES and all(map(_is_class_name, value))


def _is_outputs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) and _is_text(v.get("name")) for v in value)


def _is_line(value: Any) -> bool:
    return _is_class_name(value)


def _is_capabilities(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, str) and re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", v) for v in value
    )


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


_FIELDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("task", _one_of(*OUTPUTS), f"one of {', '.join(OUTPUTS)}"),
    ("model.name", _is_text, "a name"),
    ("classes", _is_names, f"a list of class names, each a line of at most {MAX_NAME} characters"),
    ("input.name", _is_text, "a name"),
    ("input.dtype", _one_of("float32"), "float32"),
    ("input.batch.min", _is_batch, f"a whole number from 1 to {MAX_BATCH}"),
    ("input.batch.opt", _is_batch, f"a whole number from 1 to {MAX_BATCH}"),
    ("input.batch.max", _is_batch, f"a whole number from 1 to {MAX_BATCH}"),
    ("input.size.min", _is_size, "[height, width]"),
    ("input.size.opt", _is_size, "[height, width]"),
    ("input.size.max", _is_size, "[height, width]"),
    ("input.divisor", _is_edge, "a positive whole number"),
    ("outputs", _is_outputs, "a list of objects with a name"),
    ("preprocess.resize.mode", _one_of("fit", "edges"), "fit or edges"),
    ("preprocess.mean", _is_triple, "three numbers"),
    ("preprocess.std", lambda v: _is_triple(v) and min(v) >= MIN_STD, "three positive numbers"),
    ("preprocess.pad_value", _is_number, "a number"),
    ("target", _is_text, "a name"),
    ("precision", _is_text, "a name"),
    ("files", lambda v: isinstance(v, dict) and len(v) > 0, "an object with at least one file"),
)
_FIT_FIELDS = (("preprocess.resize.size", _is_size, "[height, width]"),)
_EDGES_FIELDS = (
    ("preprocess.resize.long", _is_edge, "a positive whole number"),
    ("preprocess.resize.short", _is_edge, "a positive whole number"),
)
_SCORE_FIELDS = (("thresholds.score", lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),)
_MASK_FIELDS = (("thresholds.mask", lambda v: _is_number(v) and 0 < v < 1, "a number between 0 and 1"),)
_ENGINE_FIELDS = (
    ("engine.version", _is_line, "a version"),
    ("engine.gpu", lambda v: v is None or _is_line(v), "a GPU's name or null"),
    ("engine.compute_capabilities", _is_capabilities, 'a list such as ["8.6"]'),
)
_ABSENT = object()


def validate(manifest: dict[str, Any], path: Path) -> None:
    """Raise BundleError unless the manifest is one that this version can run. Touches no other file."""
    _check_schema(manifest, path)
    _check_fields(manifest, path, _FIELDS)
    given = {output["name"] for output in manifest["outputs"]}
    if absent := [name for name in OUTPUTS[manifest["task"]] if name not in given]:
        raise BundleError(f"the manifest of bundle '{path}' lacks the output '{absent[0]}'; export it again")
    resize = manifest["preprocess"]["resize"]
    _check_fields(manifest, path, _FIT_FIELDS if resize["mode"] == "fit" else _EDGES_FIELDS)
    if manifest["task"] != "semantic-segmentation":
        _check_fields(manifest, path, _SCORE_FIELDS)
    if manifest["task"] == "instance-segmentation":
        _check_fields(manifest, path, _MASK_FIELDS)
    _check_ranges(manifest["input"], resize, path)
    if manifest["target"] in ENGINE_TARGETS:
        validate_engine(manifest.get("engine"), manifest["target"], path)
    for name, entry in manifest["files"].items():
        _check_file_entry(name, entry, path)


def validate_engine(engine: Any, library: str, path: Path) -> None:
    """Raise BundleError unless `engine`, a manifest's section, says what an engine of `library` is for."""
    fields = (("engine.library", _one_of(library), library), *_ENGINE_FIELDS)
    _check_fields({"engine": engine}, path, fields)


def _check_schema(manifest: dict[str, Any], path: Path) -> None:
    schema: Any = manifest.get("schema")
    if not _is_count(schema):
        raise BundleError(
            f"'{path}' is not a bundle: its {MANIFEST} gives no schema; write one with meta-export"
        )
    if schema > SCHEMA:
        raise BundleError(
            f"bundle '{path}' has manifest schema {schema}, and this meta-deploy reads up to {SCHEMA}; "
            "upgrade meta-deploy, or export the bundle with this version"
        )


def _check_fields(manifest: dict[str, Any], path: Path, fields: Any) -> None:
    for dotted, accepts, expected in fields:
        value: Any = manifest
        for key in dotted.split("."):
            value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is _ABSENT:
            raise BundleError(f"the manifest of bundle '{path}' lacks '{dotted}'; export it again")
        if not accepts(value):
            shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
            raise BundleError(
                f"the manifest of bundle '{path}' has {shown} for '{dotted}', not {expected}; export it again"
            )


def _check_ranges(spec: dict[str, Any], resize: dict[str, Any], path: Path) -> None:
    batch, size = spec["batch"], spec["size"]
    ordered = batch["min"] <= batch["opt"] <= batch["max"] and all(
        size["min"][i] <= size["opt"][i] <= size["max"][i] for i in (0, 1)
    )
    if not ordered:
        raise BundleError(
            f"the manifest of bundle '{path}' has min, opt and max out of order; export it again"
        )
    if any(edge % spec["divisor"] for key in ("min", "max") for edge in size[key]):
        raise BundleError(
            f"the manifest of bundle '{path}' has an input size that {spec['divisor']} does not divide; "
            "export it again"
        )
    if resize["mode"] == "fit" and any(resize["size"][i] > size["max"][i] for i in (0, 1)):
        raise BundleError(
            f"the manifest of bundle '{path}' resizes to more than its largest input; export it again"
        )


def _check_file_entry(name: str, entry: Any, path: Path) -> None:
    plain = name not in ("", ".", "..", MANIFEST) and not set(name) & set("/\\:\0")
    if not plain:
        raise BundleError(f"the manifest of bundle '{path}' lists {name!r}, which is not a plain file name")
    known = isinstance(entry, dict) and _is_text(entry.get("sha256")) and isinstance(entry.get("bytes"), int)
    if not known:
        raise BundleError(
            f"the manifest of bundle '{path}' gives no sha256 and bytes for {name}; export it again"
        )
