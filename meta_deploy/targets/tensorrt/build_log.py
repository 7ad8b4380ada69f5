"""What an engine consists of, read from the log of its build: without a GPU there is no inspector to ask.

Knows the log's text, all of it in this one place; must not know how an engine is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from meta_deploy.targets.tensorrt.layers import Layer, LayerTensor

# Among the names of inputs and outputs there may be anything, but no end of a list before the next field.
_LINE = re.compile(
    r"Name: (?P<name>[^,]*), LayerType: (?P<kind>[^,]*)"
    r"(?:, Inputs: \[(?P<inputs>.*?)\])?(?:, Constants: \[(?P<constants>.*?)\])?"
    r"(?:, Outputs: \[(?P<outputs>.*?)\])?, TacticName: (?P<kernel>[^,]*)"
    r"(?:, StreamId: \d+)?(?:, Metadata:(?P<metadata>.*))?"
)
_FIELDS = ("Name", "Dimensions", "Strides", "StrideOrder", "Datatype", "Format", "Format/Datatype")
_FIELD = re.compile(rf"(?:^|, )({'|'.join(_FIELDS)}): (.*?)(?=, (?:{'|'.join(_FIELDS)}): |$)")


def parse_log(lines: Iterable[str]) -> tuple[tuple[Layer, ...], dict[str, float]]:
    """The layers and the memory in MB (Activation, Weights) that a verbose build's log tells.

    The layers are one message, a line each; memory is a line for each kind. The last of each counts. Empty
    where it does not tell, as it may be in another version of TensorRT.
    """
    layers: tuple[Layer, ...] = ()
    memory: dict[str, float] = {}
    for line in lines:
        if line.startswith("Layers:"):
            found = (_LINE.fullmatch(each.rstrip()) for each in line.splitlines())
            layers = tuple(_layer(match) for match in found if match)
        elif match := re.match(r"Total (Activation|Weights) Memory: (\d+) bytes", line):
            memory[match[1]] = int(match[2]) / 1e6
    return layers, memory


def _layer(line: re.Match[str]) -> Layer:
    inputs, constants, outputs = (_tensors(line[part] or "") for part in ("inputs", "constants", "outputs"))
    return Layer(
        name=line["name"],
        kind=line["kind"],
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        kernel=line["kernel"].strip(),
        metadata=(line["metadata"] or "").strip(),
    )


def _tensors(text: str) -> tuple[LayerTensor, ...]:
    """Of "{ Name: x, Dimensions: [1,3], Datatype: Half, Format: … }, { … }"."""
    found = (dict(_FIELD.findall(each)) for each in re.split(r" ?\}, \{ ", text.strip(" {}")) if each)
    return tuple(
        LayerTensor(
            name=fields.get("Name", ""),
            shape=tuple(map(int, re.findall(r"-?\d+", fields.get("Dimensions", "")))),
            datatype=fields.get("Datatype", ""),
            format=fields.get("Format", ""),
            words=fields.get("Format/Datatype", ""),
        )
        for fields in found
    )
