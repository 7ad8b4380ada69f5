"""A linear map to vary: what the tests of the passes that fold into such share."""

import dataclasses

import numpy as np

from tests.graph.rewriting import agree, feeds, node

PADDED = {"pads": [1, 1, 1, 1]}


@dataclasses.dataclass(frozen=True)
class Map:
    """A linear map to vary.

    `bias` is "none", its "own", in an "add" or there "first", or it has "both".
    """

    op: str = "Conv"
    inner: int = 4
    outer: int = 6
    group: int = 1
    kernel: int = 1
    rank: int = 4  # of its input
    bias: str = "own"
    attrs: dict = dataclasses.field(default_factory=dict)

    @property
    def is_conv(self):
        return self.op in ("Conv", "ConvTranspose")

    def build(self, x, y, n, constant, weight=None):
        """The nodes from x to y; `n` gives names, `constant` makes constants of a name and an array."""
        rng = np.random.default_rng(len(y) + self.outer + 10 * self.inner)
        size = [self.inner, self.outer]
        if self.op == "Conv":
            size = [self.outer, self.inner // self.group]
        elif self.op == "ConvTranspose":
            size = [self.inner, self.outer // self.group]
        elif self.attrs.get("transB"):
            size = size[::-1]
        size += [self.kernel] * (self.rank - 2) * self.is_conv
        weight = weight or constant(f"{y}.w", rng.standard_normal(size) / np.sqrt(self.inner * self.kernel))
        bias = rng.standard_normal(self.outer)
        inputs = [x, weight]
        if self.bias in ("own", "both"):
            inputs.append(constant(f"{y}.b", bias))
        out = n(f"{y}.p") if self.bias in ("add", "first", "both") else n(y)
        attrs = {**self.attrs, **({"group": self.group} if self.group > 1 else {})}
        nodes = [node(self.op, inputs, [out], **attrs)]
        if out != n(y):
            shape = (-1, *(1,) * (self.rank - 2)) if self.is_conv else -1
            terms = [out, constant(f"{y}.a", bias.reshape(shape))]
            nodes.append(node("Add", terms[::-1] if self.bias == "first" else terms, [n(y)]))
        return nodes

    def shape(self, batch=2):
        if self.is_conv:
            return [batch, self.inner, 5, 6, 5][: self.rank]
        return [*(batch, 3, 5)[: self.rank - 1], self.inner]


def agree_for_batches(fold, proto, changes, shuffle=0, runs=True):
    """As `rewriting.agree`, for several batches where any goes, or without running the model."""
    any_goes = any(d.dim_param for i in proto.graph.input for d in i.type.tensor_type.shape.dim)
    for batch in (2, 3) if runs and any_goes else (2,):
        after = agree(fold, proto, feeds(proto, batch), changes, shuffle=shuffle, runs=runs)
    return after
