"""A network of products in a row, and a trial of it whose times and errors are written down."""

import numpy as np
from onnx import helper, numpy_helper

from meta_deploy.calib import timed
from meta_deploy.calib.costs import Trial, Verdict
from meta_deploy.graph.graph import normalized
from meta_deploy.graph.precision.placement import place
from meta_deploy.graph.precision.rules import EightBitRules
from tests.small_graphs import model, value

RULES = EightBitRules(False, True, True, speedup=4, value=0, node=0, channels=2)
node = helper.make_node


def constant(name, *shape):
    numbers = np.random.default_rng(sum(map(ord, name))).normal(0, 0.3, shape)
    return numpy_helper.from_array(numbers.astype(np.float32), name)


def network(count=4, shared=False):
    """A product after the other with a Gelu between them; `shared`: the last two have the same weights."""
    nodes = [node("Gelu", ["x"], ["g0"])]
    for i in range(count):
        weights = f"w{count - 2}" if shared and i == count - 1 else f"w{i}"
        nodes += [node("MatMul", [f"g{i}", weights], [f"p{i}"]), node("Gelu", [f"p{i}"], [f"g{i + 1}"])]
    nodes.append(node("MatMul", [f"g{count}", "last"], ["y"]))
    constants = [*(constant(f"w{i}", 8, 8) for i in range(count)), constant("last", 8, 4)]
    opset = [helper.make_opsetid("", 20)]
    return model(nodes, [value("x", ["n", 12, 8])], ["y"], constants, opset_imports=opset)


FEED = {"x": np.random.default_rng(0).normal(size=(2, 12, 8)).astype(np.float32)}


def placed(proto, rules=RULES):
    graph = normalized(proto)
    return graph, place(graph.graph, rules)


class Scripted(Trial):
    """Times and errors by the names of products; errors of several add up in squares."""

    rest, feed, facts = "fp32", FEED, ("here",)

    def __init__(self, times, errors, drops=None, monkeypatch=None):
        self.times, self.errors = times, errors
        self.asked, self.expected = [], None
        monkeypatch.setattr(timed, "interleaved", lambda runs, *_: [[run(FEED) for run in runs]] * 5)

    def low(self, proto):
        """The products that are in 8 bits."""
        made = {n.output[0]: n for n in proto.graph.node}
        return [
            n.output[0]
            for n in proto.graph.node
            if n.op_type == "MatMul" and made.get(n.input[1], n).op_type == "DequantizeLinear"
        ]

    def seconds(self, proto):
        low = self.low(proto)
        every = [n.output[0] for n in proto.graph.node if n.op_type == "MatMul" and n.output[0] in self.times]
        total = sum(self.times[name][name in low] for name in every)
        return lambda feed: total / 1000

    def begin(self, proto):
        self.full = proto

    def expect(self, proto):
        self.expected = proto

    def open(self, proto):
        return self.seconds(proto)

    def baseline(self):
        return self.seconds(self.full)

    def price(self, proto):
        return {"ms": self.seconds(proto)(FEED)}

    def engine(self, proto):
        return self.price(proto), None

    def quick(self, proto):
        low = self.low(proto)
        self.asked.append(low)
        return sum(self.errors[name] ** 2 for name in low) ** 0.5

    def judge(self, proto):
        low = self.low(proto)
        self.asked.append(low)
        error = sum(self.errors[name] ** 2 for name in low) ** 0.5
        return Verdict(10 * error, error)
