"""convolve_linears: the same numbers from a 1x1 convolution; near-misses stay."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from meta_deploy.graph.graph import BATCH
from meta_deploy.graph.passes.convolve_linears import convolve_linears
from tests.graph.rewriting import RANDOM, node, ops, rewritten, same
from tests.small_graphs import any_batch, model, value


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Conv, Reshape, Transpose, MatMul and Add, to vary."""

    b: int = 2
    c: int = 4
    out: int = 5
    height: int = 3
    width: int = 4
    bias: bool = True
    perm: tuple = (0, 2, 1)
    made_by: str = "Conv"
    rows: tuple | None = None  # what the Reshape makes, in place of (b, c, height * width)
    reader: str = ""  # another node reads this tensor

    def proto(self):
        rng = np.random.default_rng(0)
        rows = self.rows or (self.b, self.c, self.height * self.width)
        constants = {
            "kernel": rng.standard_normal((self.c, 1, 3, 3)).astype(np.float32),
            "rows": np.array(rows),
            "w": rng.standard_normal((rows[self.perm[2]], self.out)).astype(np.float32),
            "bias": rng.standard_normal(self.out).astype(np.float32),
        }
        image = node("Conv", ["x", "kernel"], ["image"], group=self.c, pads=[1] * 4)
        nodes = [
            image if self.made_by == "Conv" else node(self.made_by, ["x"], ["image"]),
            node("Reshape", ["image", "rows"], ["flat"]),
            node("Transpose", ["flat"], ["tokens"], perm=self.perm),
            node("MatMul", ["tokens", "w"], ["product" if self.bias else "y"]),
            *([node("Add", ["product", "bias"], ["y"])] if self.bias else []),
            *([node("Neg", [self.reader], ["read"])] if self.reader else []),
        ]
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        inputs = [value("x", [self.b, self.c, self.height, self.width])]
        return model(nodes, inputs, ["y", *(["read"] if self.reader else [])], initializers)


def agree(tokens, changes):
    proto = tokens.proto()
    after, made = rewritten(convolve_linears, proto)
    assert made == changes
    assert ("MatMul" not in ops(after)) == bool(changes)
    same(proto, after)
    return after


@pytest.mark.parametrize("tokens", [Tokens(), Tokens(bias=False), Tokens(b=1, height=1)], ids=str)
def test_tokens_of_a_map_are_convolved(tokens):
    assert ops(agree(tokens, 1)) == ["Conv", "Conv", "Reshape", "Transpose"]


@pytest.mark.parametrize(
    "tokens",
    [
        Tokens(made_by="Relu"),
        Tokens(perm=(0, 1, 2)),
        Tokens(rows=(2, 12, 4)),  # channels are mixed with places
        Tokens(rows=(2, 2, 24)),
        Tokens(reader="image"),
        Tokens(reader="flat"),
        Tokens(reader="tokens"),
    ],
    ids=str,
)
def test_a_near_miss_stays(tokens):
    agree(tokens, 0)


@pytest.mark.parametrize("images", [1, 3])
def test_any_number_of_images(images):
    proto = any_batch(Tokens(b=BATCH).proto())
    after, changes = rewritten(convolve_linears, proto)
    assert changes == 1
    x = np.random.default_rng(0).standard_normal((images, 4, 3, 4)).astype(np.float32)
    same(proto, after, {"x": x})


@settings(RANDOM, max_examples=20)
@given(
    st.builds(
        Tokens,
        b=st.integers(1, 3),
        c=st.integers(1, 5),
        out=st.integers(1, 5),
        height=st.integers(1, 4),
        width=st.integers(1, 4),
        bias=st.booleans(),
        reader=st.sampled_from(("", "", "image", "y")),
    )
)
def test_random_maps_answer_as_before(tokens):
    agree(tokens, int(tokens.reader != "image"))
