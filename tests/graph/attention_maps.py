"""Attentions inside of stripes of a map, to vary: what the tests of attention share."""

import dataclasses
from itertools import permutations, product

import numpy as np
from hypothesis import strategies as st

from meta_deploy.graph.graph import BATCH
from tests.graph.rewriting import Writer, node
from tests.small_graphs import any_batch


@dataclasses.dataclass(frozen=True)
class Stripes:
    """One attention inside of stripes (or windows) of a map, to vary.

    A scale is (operator, number, whether the constant is the first operand). `order` has the order of the
    axes (image, row of stripes, column of stripes) in the batch and of (row, column) in the tokens.
    """

    rows: int = 4  # of a stripe
    columns: int = 2
    heads: int = 1
    d: int = 4
    axis: int = 1  # of Split
    parts: tuple | None = None  # its sizes, where they are said to it
    order: tuple = ((0, 1, 2), (0, 1))
    back: tuple | None = None  # (rows, columns, order), where the tokens go back otherwise
    q_scale: tuple | None = ("Mul", 0.5, False)
    k_before: tuple | None = None  # before k's Transpose
    k_scale: tuple | None = None  # after it
    scale: tuple | None = None  # on the products
    three: bool = False  # k is transposed with batch and heads in one
    mask: bool = False
    softmax: int | None = -1
    mixed: bool = False  # q and k change places

    def channels(self):
        """That it gives: v's of q's heads."""
        heads = self.parts[0] if self.parts and self.axis == 1 else self.heads
        return heads * (self.parts[2] if self.parts and self.axis != 1 else self.d)


@dataclasses.dataclass(frozen=True)
class Map:
    """Attentions side by side on a map (batch, height, width), to vary.

    Tensors of the i-th attention are named start, packed, q, k, v, kt, product, weights, out, end, and the
    index.
    """

    stripes: tuple = (Stripes(),)
    batch: int = 1
    height: int = 4
    width: int = 6
    # What they start from: parts of one "split", the "same" tensor, one "own" each, or the "input". The
    # second also starts from what the first gives, and so on: from that and a part in a "chain", that in a
    # "row", three times that with "next".
    source: str = "split"
    reader: str = ""  # this tensor has another reader
    output: str = ""  # is an output as well
    branch: str = ""  # is read inside of an If as well
    joined: bool = True  # the results are put side by side; else each is an output
    sizes: bool = True  # the batch is a number in the graph
    opset: int = 18
    dtype: str = "float32"
    prefix: str = ""
    shuffle: int = 0

    def n(self, name):
        return self.prefix + name

    def proto(self):
        return Builder(self).proto()

    def feeds(self):
        x = np.random.default_rng(0).standard_normal((self.batch, self.height, self.width, self.channels()))
        feeds = {self.n("x"): x.astype(self.dtype)}
        return {**feeds, **({self.n("c"): np.array(True)} if self.branch else {})}

    def channels(self):
        """Of the input."""
        each = [3 * s.heads * s.d for s in self.stripes]
        return sum(each) if self.source in ("split", "chain") else each[0]


class Builder(Writer):
    """Writes the model of a map."""

    def scaled(self, x, scale, out):
        if scale is None:
            return x
        op, number, first = scale
        c = self.floats(number)
        return self.add(op, [c, x] if first else [x, c], out)

    def partition(self, i, s, x, size):
        """(B, H, W, C) -> (windows, heads * 3, N, d), or (windows, heads, N, 3 * d) for another Split."""
        B, (H, W) = size, (self.case.height, self.case.width)
        h, w = s.rows, s.columns
        high, wide = -(-H // h), -(-W // w)
        if (high * h, wide * w) != (H, W):
            pads = self.integers((0, 0, 0, 0, 0, high * h - H, wide * w - W, 0))
            x = self.add("Pad", [x, pads], f"padded{i}")
        groups = (s.heads, 3 * s.d) if s.axis in (3, -1) else (3 * s.heads, s.d)
        x = self.add("Reshape", [x, self.integers((B, high, h, wide, w, *groups))], f"cut{i}")
        batch, tokens = ([(0, 1, 3)[a] for a in s.order[0]], [(2, 4)[a] for a in s.order[1]])
        x = self.add("Transpose", [x], f"turned{i}", perm=(*batch, *tokens, 5, 6))
        x = self.add("Reshape", [x, self.integers((max(B * high * wide, -1), h * w, *groups))], f"tokens{i}")
        return self.add("Transpose", [x], f"packed{i}", perm=(0, 2, 1, 3))

    def merge(self, i, s, x, size):
        """(windows, heads, N, d) -> (B, H, W, heads * d)."""
        B, (H, W) = size, (self.case.height, self.case.width)
        h, w, order = s.back or (s.rows, s.columns, s.order)
        high, wide = -(-H // h), -(-W // w)
        x = self.add("Transpose", [x], f"back{i}", perm=(0, 2, 1, 3))
        batch, tokens = [(B, high, wide)[a] for a in order[0]], [(h, w)[a] for a in order[1]]
        x = self.add("Reshape", [x, self.integers((*batch, *tokens, s.channels()))], f"uncut{i}")
        where = [order[0].index(a) for a in range(3)], [3 + order[1].index(a) for a in range(2)]
        perm = (where[0][0], where[0][1], where[1][0], where[0][2], where[1][1], 5)
        x = self.add("Transpose", [x], f"unturned{i}", perm=perm)
        padded = (high * h, wide * w) != (H, W)
        out = f"merged{i}" if padded else f"end{i}"
        x = self.add("Reshape", [x, self.integers((B, high * h, wide * w, s.channels()))], out)
        if padded:
            x = self.add("Slice", [x, *map(self.integers, ((0, 0), (H, W), (1, 2)))], f"end{i}")
        return x

    def attention(self, i, s, start):
        case, size = self.case, self.case.batch if self.case.sizes else -1
        packed = self.partition(i, s, start, size)
        parts = [self.integers(s.parts)] if s.parts else []
        count = {"num_outputs": 3} if case.opset >= 18 and not parts else {}
        q, k, v = (self.n(f"{name}{i}") for name in "qkv")
        outputs = [k, q, v] if s.mixed else [q, k, v]
        self.nodes.append(node("Split", [packed, *parts], outputs, axis=s.axis, **count))
        q, k = self.scaled(q, s.q_scale, f"q_scaled{i}"), self.scaled(k, s.k_before, f"k_before{i}")
        if s.three:
            n = s.rows * s.columns
            windows = max(size * -(-case.height // s.rows) * -(-case.width // s.columns), -1)
            k = self.add("Reshape", [k, self.integers((max(windows * s.heads, -1), n, s.d))], f"flat{i}")
            k = self.add("Transpose", [k], f"flat_kt{i}", perm=(0, 2, 1))
            kt = self.add("Reshape", [k, self.integers((windows, s.heads, s.d, n))], f"kt{i}")
        else:
            kt = self.add("Transpose", [k], f"kt{i}", perm=(0, 1, 3, 2))
        kt = self.scaled(kt, s.k_scale, f"k_scaled{i}")
        products = self.add("MatMul", [q, kt], f"product{i}")
        products = self.scaled(products, s.scale, f"scaled{i}")
        if s.mask:
            n = s.rows * s.columns
            numbers = np.random.default_rng(1).standard_normal((n, n))
            products = self.add("Add", [products, self.floats(numbers)], f"masked{i}")
        softmax = {} if s.softmax is None else {"axis": s.softmax}
        weights = self.add("Softmax", [products], f"weights{i}", **softmax)
        out = self.add("MatMul", [weights, v], f"out{i}")
        return self.merge(i, s, out, size)

    def starts(self, x):
        """What each attention starts from; the third of what it needs is what one gives."""
        case, count = self.case, len(self.case.stripes)
        if case.source == "input":
            return [x] * count
        x = self.add("Identity", [x], "source")
        if case.source == "same":
            return [x] * count
        if case.source in ("own", "next", "row"):
            return [self.add(("Neg", "Relu", "Abs")[i % 3], [x], f"start{i}") for i in range(count)]
        names = [f"start{i}" for i in range(count)]
        sizes = self.integers([3 * s.heads * s.d for s in case.stripes])
        self.nodes.append(node("Split", [x, sizes], [self.n(name) for name in names], axis=3))
        return [self.n(name) for name in names]

    def proto(self):
        case = self.case
        ends, starts = [], self.starts(self.n("x"))
        for i, (s, start) in enumerate(zip(case.stripes, starts, strict=True)):
            if ends and case.source in ("chain", "next"):
                thrice = self.add("Concat", [ends[-1]] * 3, f"thrice{i}", axis=3)
                start = thrice if case.source == "next" else self.add("Add", [start, thrice], f"sum{i}")
            elif ends and case.source == "row":
                start = ends.pop()
            ends.append(self.attention(i, s, start))
        if case.joined:
            ends = [self.add("Concat", ends, "y", axis=3)]
        self.input("x", [case.batch if case.sizes else "b", case.height, case.width, case.channels()])
        others = [self.n(name) if name else "" for name in (case.reader, case.output, case.branch)]
        return self.model(ends, *others, case.shuffle)


SCALES = (None, ("Mul", 0.5, False), ("Mul", -2.0, True), ("Div", 4.0, False))


def factor(scale):
    if scale is None:
        return 1.0
    return scale[1] if scale[0] == "Mul" else 1 / scale[1]


TENSORS = [
    "start0",
    "cut0",
    "turned0",
    "tokens0",
    "packed0",
    "q0",
    "k0",
    "v0",
    "q_scaled0",
    "kt0",
    "product0",
]
WINDOWS = ((4, 2), (4, 1), (2, 4), (2, 2), (1, 4))
ORDERS = tuple(product(permutations(range(3)), permutations(range(2))))


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def stripes(draw, height, width):
    """Of a map of this size, which they divide mostly."""
    sizes = [draw(st.sampled_from((*divisors(side), *divisors(side), 5))) for side in (height, width)]
    heads, d, axis = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from((1, 3, -1)))
    places = ("q_scale", "k_before", "k_scale", "scale")
    back, order = None, draw(st.sampled_from(ORDERS))
    if draw(
        st.sampled_from((False,) * 5 + (True,))
    ):  # to another order, or other stripes if those are as many
        back = (*sizes, draw(st.sampled_from(ORDERS)))
        if height == width and draw(st.booleans()):
            back = (*sizes[::-1], order)
    equal = (heads if axis == 1 else d,) * 3
    return Stripes(
        *sizes,
        heads,
        d,
        axis,
        parts=draw(st.sampled_from((None, equal))),
        order=order,
        back=back,
        **{place: draw(st.sampled_from((None, *SCALES))) for place in places},
        three=draw(st.booleans()),
        mask=draw(st.sampled_from((False,) * 12 + (True,))),
        mixed=draw(st.sampled_from((False,) * 12 + (True,))),
    )


def turned(s):
    """Stripes in the other direction."""
    back = s.back and (s.back[1], s.back[0], s.back[2])
    return dataclasses.replace(s, rows=s.columns, columns=s.rows, back=back)


@st.composite
def maps(draw, most=2):
    """Some attentions, often alike, mostly on a square map."""
    count = draw(st.integers(1, most))
    height, width = draw(st.sampled_from(((4, 4), (6, 6), (4, 4), (6, 6), (4, 6), (5, 3), (1, 6), (6, 1))))
    kinds = [draw(stripes(height, width))]
    for _ in range(count - 1):
        alike = draw(st.sampled_from(("same", "turned", "other")))
        s = draw(stripes(height, width)) if alike == "other" else kinds[0]
        kinds.append(turned(s) if alike == "turned" and height == width else s)
    source = draw(st.sampled_from(("split",) * 5 + ("same", "own", "input", "chain", "next")))
    if source != "split":
        kinds = [dataclasses.replace(s, heads=kinds[0].heads, d=kinds[0].d, parts=None) for s in kinds]
    index = draw(st.integers(0, count - 1))
    tensor = f"{draw(st.sampled_from(TENSORS))[:-1]}{index}"
    tensor = f"q{index}" if tensor.startswith(("start", "q_scaled")) else tensor
    kind = draw(st.sampled_from(("",) * 6 + ("reader", "output", "branch")))
    return Map(
        tuple(kinds),
        draw(st.integers(1, 2)),
        height,
        width,
        source,
        **({kind: tensor} if kind else {}),
        joined=draw(st.booleans()),
        opset=draw(st.sampled_from((13, 17, 18, 20))),
        dtype=draw(st.sampled_from(("float32",) * 9 + ("float16",))),
        prefix=draw(st.sampled_from(("", "q0/", "packed0/ordered"))),
    )


def of_any_batch(case):
    """The model of a case, for any batch."""
    return any_batch(dataclasses.replace(case, batch=BATCH).proto())
