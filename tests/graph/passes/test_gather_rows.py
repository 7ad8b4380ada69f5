"""gather_rows: the same elements in the same places, copied once; near-misses declined."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from meta_deploy.graph.explain import explaining
from meta_deploy.graph.graph import BATCH
from meta_deploy.graph.passes.gather_rows import gather_rows
from tests.graph import rewriting
from tests.graph.rewriting import RANDOM, node, ops, rewritten, same
from tests.small_graphs import any_batch, model, value

END = 2**62


class Moved:
    """Nodes from x to y, written as calls: `Moved((1, 8, 8, 32)).rolled(1, 3).reshape(...)`."""

    def __init__(self, shape):
        self.nodes, self.constants, self.outputs, self.inputs = [], [], [], [value("x", list(shape))]
        self.tensor, self.shape = "x", list(shape)
        self.add("Relu")

    def constant(self, values):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name

    def made(self, op, inputs, **attributes):
        self.nodes.append(node(op, inputs, [f"t{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def add(self, op, *values, **attributes):
        self.tensor = self.made(op, [self.tensor, *map(self.constant, values)], **attributes)
        return self

    def cut(self, axis, start, end=END, step=1, of=None):
        places = map(self.constant, ([start], [end], [axis], [step]))
        return self.made("Slice", [of or self.tensor, *places])

    def joined(self, axis, *parts):
        self.tensor = self.made("Concat", list(parts), axis=axis)
        return self

    def rolled(self, axis, by):
        return self.joined(axis, self.cut(axis, by), self.cut(axis, 0, by))

    def windows(self, side, batch=1):
        _, height, width, channels = self.shape
        self.add("Reshape", [batch, height // side, side, width // side, side, channels])
        self.add("Transpose", perm=[0, 1, 3, 2, 4, 5])
        return self.add("Reshape", [-1, side * side, channels])

    def merged(self):
        """Each two by two pixels side by side, as Swin's patches."""
        rows = [self.cut(1, i, step=2) for i in (0, 1)]
        return self.joined(-1, *(self.cut(2, j, step=2, of=rows[i]) for j in (0, 1) for i in (0, 1)))

    def also_read(self):
        self.outputs.append(self.made("Neg", [self.tensor]))
        return self

    def also_output(self):
        self.outputs.append(self.tensor)
        return self

    def proto(self):
        nodes = [*self.nodes, node("Neg", [self.tensor], ["y"])]
        inputs = [value(name) for name in [*self.outputs, "y"]]
        return model(nodes, self.inputs, inputs, self.constants, data_prop=False)


def agree(moved, changes):
    return rewriting.agree(gather_rows, moved.proto(), None, changes, tolerance=0, collapse=True)


def left(after):
    return [op for op in ops(after) if op not in ("Relu", "Neg")]


MAP = (1, 8, 8, 32)


@pytest.mark.parametrize(
    "moved",
    [
        Moved(MAP).rolled(1, 3).rolled(2, 3).windows(4),
        Moved((2, 8, 8, 32)).rolled(1, 3).rolled(2, 5).windows(4, 2),
        Moved(MAP).rolled(1, 3).rolled(2, 3),
        Moved((1, 12, 16))
        .add("Reshape", [1, 3, 4, 16])
        .rolled(2, 1)
        .add("Reshape", [1, 12, 16])
        .rolled(1, 2),
    ],
    ids=range(4),
)
def test_a_shifted_window_is_one_gather(moved):
    assert set(left(agree(moved, 1))) <= {"Reshape", "Gather"}


@pytest.mark.parametrize("shape", [(1, 8, 6, 5), (2, 4, 8, 3)])
def test_pixels_beside_their_neighbours_are_one_transpose(shape):
    assert left(agree(Moved(shape).merged(), 1)) == ["Reshape", "Transpose", "Reshape"]


def test_what_is_where_it_was_is_only_reshaped():
    moved = Moved((2, 4, 6)).add("Reshape", [2, 24])
    moved.joined(1, moved.cut(1, 0, 10), moved.cut(1, 10))
    after = rewriting.agree(gather_rows, moved.rolled(1, 12).rolled(1, 12).proto(), None, 1, tolerance=0)
    assert "Gather" not in ops(after)


def test_alike_places_share_their_constant():
    moved = Moved(MAP).rolled(1, 3).rolled(2, 3).add("Neg").rolled(1, 3).rolled(2, 3)
    after = agree(moved, 2)
    places = {n.input[1] for n in after.graph.node if n.op_type == "Gather"}
    assert len(places) == 1


@pytest.mark.parametrize("keep", [Moved.also_read, Moved.also_output])
def test_what_others_read_between_stays(keep):
    after = agree(keep(Moved(MAP).rolled(1, 3)).rolled(2, 3), 2)
    assert left(after).count("Gather") == 2


@pytest.mark.parametrize("images", [1, 3])
def test_images_of_any_number_are_moved_alike(images):
    moved = Moved((BATCH, 8, 8, 32)).rolled(1, 3).rolled(2, 3).windows(4, BATCH)
    proto = any_batch(moved.proto())
    after, changes = rewritten(gather_rows, proto)
    assert changes == 1
    assert set(left(after)) == {"Reshape", "Gather"}
    x = np.random.default_rng(0).standard_normal((images, 8, 8, 32)).astype(np.float32)
    same(proto, after, {"x": x}, tolerance=0)


@pytest.mark.parametrize("images", [1, 3])
def test_windows_of_any_number_of_images_are_put_back(images):
    moved = Moved((4 * BATCH, 16, 32)).add("Reshape", [BATCH, 2, 2, 4, 4, 32])
    moved.add("Transpose", perm=[0, 1, 3, 2, 4, 5]).add("Reshape", [BATCH, 8, 8, 32]).rolled(1, 5).rolled(
        2, 5
    )
    proto = moved.proto()
    proto.graph.input.insert(0, value("images", [BATCH]))  # what the size of a batch is known by
    proto = any_batch(proto)
    after, changes = rewritten(gather_rows, proto)
    assert changes == 1
    assert left(after) == ["Reshape", "Gather", "Reshape"]
    x = np.random.default_rng(0).standard_normal((4 * images, 16, 32)).astype(np.float32)
    same(proto, after, {"x": x, "images": np.zeros(images, np.float32)}, tolerance=0)


def two_sources():
    moved = Moved(MAP)
    return moved.joined(1, moved.cut(1, 3), moved.cut(1, 0, 3, of="x")).rolled(2, 3)


def beside_a_constant():
    moved = Moved(MAP)
    moved.constants.append(numpy_helper.from_array(np.ones((1, 1, 8, 32), np.float32), "token"))
    return moved.joined(1, "token", moved.cut(1, 1)).rolled(1, 2)


def doubled():
    moved = Moved(MAP)
    return moved.joined(1, moved.tensor, moved.tensor)


def of_computed_size():
    moved = Moved(MAP)
    moved.inputs.append(value("start", [1], 7))
    places = [moved.constant([END]), moved.constant([1])]
    return moved.joined(1, moved.made("Slice", [moved.tensor, "start", *places]), moved.cut(1, 0, 3)).rolled(
        2, 3
    )


@pytest.mark.parametrize(
    ("moved", "reason"),
    [
        (Moved((1, 8, 8, 7)).rolled(1, 3).rolled(2, 3).windows(4), "rows of 7 numbers"),
        (doubled(), "no more is copied"),
        (two_sources(), None),
        (beside_a_constant(), None),
        (Moved(MAP).windows(4), None),  # no part of it is put elsewhere
        (Moved((1, 8, "width", 32)).rolled(1, 3).rolled(2, 3), "not of a known size"),
    ],
    ids=range(6),
)
def test_a_near_miss_is_declined(moved, reason):
    proto = moved.proto()
    with explaining() as told:
        after, changes = rewritten(gather_rows, proto)
    assert changes == 0
    assert ops(after) == ops(proto)
    assert reason is None or any(reason in place.reason for place in told)


def test_a_computed_place_is_declined():
    with explaining() as told:
        assert rewritten(gather_rows, of_computed_size().proto())[1] == 0
    assert told


def test_images_that_change_places_are_declined():
    proto = any_batch(Moved((BATCH, 8, 32)).add("Reshape", [8, BATCH, 32]).rolled(0, 3).rolled(0, 3).proto())
    assert rewritten(gather_rows, proto)[1] == 0


@dataclasses.dataclass
class Step:
    """A move of a random chain: `kind`, and numbers to choose by."""

    kind: str
    a: int
    b: int


@settings(RANDOM, max_examples=60)
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ((1, 2), (2, 4, 6), (3, 4), (2, 16, 32)))),
    steps=st.lists(
        st.builds(Step, st.sampled_from("rrcctmwo"), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=6,
    ),
)
def test_random_moves_end_as_before_and_copy_no_more(shape, steps):
    moved, sizes = Moved(shape), list(shape)
    for step in steps:
        axis = step.a % len(sizes)
        if step.kind == "r" and sizes[axis] > 1:
            moved.rolled(axis, 1 + step.b % (sizes[axis] - 1))
        elif step.kind == "c" and sizes[axis] > 2:  # some of it, some twice
            parts = [moved.cut(axis, 1, step=2), moved.cut(axis, 0, 1 + step.b % 2)]
            moved.joined(axis, *parts)
            sizes[axis] = sizes[axis] // 2 + 1 + step.b % 2
        elif step.kind == "t":
            perm = list(np.roll(range(len(sizes)), step.b))
            moved.add("Transpose", perm=[int(p) for p in perm])
            sizes = [sizes[p] for p in perm]
        elif step.kind == "m" and len(sizes) > 2:
            sizes[:2] = [sizes[0] * sizes[1]]
            moved.add("Reshape", sizes)
        elif step.kind == "w" and sizes[axis] % 2 == 0:
            sizes[axis : axis + 1] = [2, sizes[axis] // 2]
            moved.add("Reshape", sizes)
        elif step.kind == "o" and step.b < 3:
            moved.also_read()
    proto = moved.proto()
    after = rewriting.agree(gather_rows, proto, tolerance=0)
    assert len(after.graph.node) <= len(proto.graph.node)
    assert copied(after) <= copied(proto)


def copied(proto):
    """Numbers that are written by what copies."""
    inferred = rewriting.sizes_of(proto)
    kinds = ("Slice", "Concat", "Transpose", "Gather")
    return sum(math.prod(inferred[n.output[0]]) for n in proto.graph.node if n.op_type in kinds)
