"""What a precision is: how a float32 graph becomes one of it, and how near it must stay.

Importing this loads neither onnx nor numpy, so that a command can list precisions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from meta_deploy.graph.precision.int8 import Quantization, Quantized
    from meta_deploy.graph.precision.lower import Conversion

Feeds = Iterable[Mapping[str, "np.ndarray"]]  # inputs by name, one dictionary a run


class Precision(ABC):
    """A precision that a graph can be written in.

    Attributes:
        name: as options and manifests have it.
        title: in words.
        measures: whether `convert` runs the graph on inputs first.
        calibrates: whether it does so on as many as there are, to find ranges.
        tolerances: how near its results must be to the original's. `maps`: largest difference over the
            map's largest value; `maps_rms`: norm of the difference over the map's, where single values may be
            far off; `agreement`: share of boxes (pixels, whole numbers) that both sides have; `proposals`:
            the same for proposals. The others are means over matched boxes.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    measures: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    tolerances: ClassVar[Mapping[str, float]]

    def check(self, proto: onnx.ModelProto) -> None:
        """Refuse a graph that cannot be written in it, before long work.

        Raises:
            InputError: it is such a graph.
        """
        return

    @abstractmethod
    def convert(
        self,
        proto: onnx.ModelProto,
        feeds: Feeds = (),
        float32_operators: Collection[str] = (),
        note: Callable[[str], None] = lambda line: None,
        quantization: Quantization | None = None,
    ) -> tuple[onnx.ModelProto, Conversion | Quantized | None]:
        """A float32 graph in this precision, and what was done; None where nothing had to be.

        Args:
            proto: the graph; not changed.
            feeds: inputs to measure on, where the precision `measures`.
            float32_operators: operators that the target has in float32 alone.
            note: called with each line worth telling.
            quantization: how to quantize, where the precision `calibrates`.

        Raises:
            InputError: nothing of the graph can be converted, or it cannot be measured.
        """

    def describe(self, conversion: Mapping[str, Any]) -> str:
        """What a conversion left in float32, in one line; or why 8 bits gave way to this precision."""
        if "declined" in conversion:
            from meta_deploy.graph.precision.int8 import declined

            return declined(conversion)
        low, nodes = conversion["nodes"] - conversion["float32_nodes"], conversion["nodes"]
        line = f"{low} of {nodes} floating-point nodes in {self.name}"
        if not conversion["overflow"]:
            return line
        names = list(conversion["overflow"])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{line}; kept in float32, being near its range: {', '.join(names[:3])}{more}"
