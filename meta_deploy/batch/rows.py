"""Results as rows of Arrow tables: the types of what `Result.to_dict` and `to_coco` give, for each task.

Knows tables and the shape of results; must not know Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

_RLE = pa.struct([("size", pa.list_(pa.int64())), ("counts", pa.string())])
_BOX = pa.list_(pa.float64())
_TIMINGS = pa.struct([(f"{name}_ms", pa.float64()) for name in ("pre", "model", "post")])
_FOUND = [("label", pa.int64()), ("name", pa.string())]
_THINGS = {  # of an image, by task: the field's name, and the fields of each
    "detection": ("detections", [*_FOUND, ("score", pa.float64()), ("box", _BOX)]),
    "instance-segmentation": (
        "detections",
        [*_FOUND, ("score", pa.float64()), ("box", _BOX), ("mask", _RLE)],
    ),
    "semantic-segmentation": ("segments", [*_FOUND, ("pixels", pa.int64()), ("mask", _RLE)]),
}
_RECORD = [("image_id", pa.int64()), ("category_id", pa.int64())]
_SCORED = [*_RECORD, ("bbox", _BOX), ("score", pa.float64())]
_RECORDS = {
    "detection": _SCORED,
    "instance-segmentation": [*_SCORED, ("segmentation", _RLE)],
    "semantic-segmentation": [*_RECORD, ("segmentation", _RLE)],
}
TASKS = tuple(_THINGS)


def result_type(task: str, coco: bool = False) -> pa.DataType:
    """The type of a result of a task: that of its `to_dict`, or of the list of its COCO records."""
    if coco:
        return pa.list_(pa.struct(_RECORDS[task]))
    name, fields = _THINGS[task]
    return pa.struct(
        [
            ("path", pa.string()),
            ("size", pa.list_(pa.int64())),
            (name, pa.list_(pa.struct(fields))),
            ("timings", _TIMINGS),
        ]
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, also of the kinds that pandas and newer writers make of them."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds bytes of any length."""
    if pa.types.is_dictionary(kind):
        return is_bytes(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def with_columns(table: pa.Table, drop: Iterable[str] = (), **columns: Sequence[Any] | pa.Array) -> pa.Table:
    """A table with columns put in or replaced, and others left out."""
    table = table.drop_columns([name for name in {*drop, *columns} if name in table.column_names])
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table
