"""Which passes ship: those that pay where the bundle runs, and none that makes results differ."""

import time
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from meta_deploy import Predictor
from meta_deploy.bundle.bundle import Bundle
from meta_deploy.calib import timing
from meta_deploy.errors import BackendError, InputError, VerificationError
from meta_deploy.export import Progress, export, tune
from meta_deploy.export.plan import planned
from meta_deploy.graph.pipeline import PASSES
from meta_deploy.targets import TARGETS
from tests.small_graphs import model, run, value

node = helper.make_node
SHAPE = (1, 6, 16)  # batch, tokens, width; two heads


def network():
    """A block of attention and the product after it."""
    rng, nodes = np.random.default_rng(0), []
    constants = {"scale": np.float32(0.35), "heads": [1, 6, 2, 8], "joined": [1, 6, 16]}
    for name in ("wq", "wk", "wv", "w"):
        constants[name] = rng.normal(0, 0.3, (16, 16)).astype(np.float32)
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            node("MatMul", ["x", f"w{name}"], [f"{name}1"]),
            node("Reshape", [f"{name}1", "heads"], [f"{name}2"]),
            node("Transpose", [f"{name}2"], [name], perm=perm),
        ]
    nodes += [
        node("MatMul", ["q", "k"], ["product"]),
        node("Mul", ["product", "scale"], ["scaled"]),
        node("Softmax", ["scaled"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["attended"]),
        node("Transpose", ["attended"], ["moved"], perm=[0, 2, 1, 3]),
        node("Reshape", ["moved", "joined"], ["tokens"]),
        node("MatMul", ["tokens", "w"], ["y"]),
    ]
    initializers = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    return model(nodes, [value("x", SHAPE)], [value("y", SHAPE)], initializers)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(network(), "net.onnx")
    return tmp_path


def row(name, changes):
    return SimpleNamespace(name=name, changes=changes)


def graph_of(nodes):
    return SimpleNamespace(graph=SimpleNamespace(node=[None] * nodes))


# --- what is tried ---


def test_a_pass_in_doubt_is_left_out_where_it_changed_something():
    rows = [row("clean-up", 3), row("move-linears", 2), row("fold-scales", 0), row("fuse-attention", 1)]
    found = tune.pipelines(rows, ["fuse-attention", "fold-scales", "move-linears", "stack-attention"])
    assert found == {
        "all passes": ["clean-up", "move-linears", "fold-scales", "fuse-attention"],
        "clean-up alone": ["clean-up"],
        "without fuse-attention": ["clean-up", "move-linears", "fold-scales"],
        "without move-linears": ["clean-up", "fold-scales", "fuse-attention"],
    }
    assert list(tune.pipelines(rows[:1], ["fuse-attention"])) == ["all passes"]
    alone = [row("clean-up", 3), row("move-linears", 2)]
    assert list(tune.pipelines(alone, ["move-linears"])) == ["all passes", "clean-up alone"]


def test_every_pass_in_doubt_is_of_its_targets_pipeline():
    for target in TARGETS.values():
        assert set(target.doubtful) <= set(target.passes) - set(target.required_passes)


# --- what is faster ---


@pytest.mark.parametrize(
    ("ratios", "sure"),
    [
        ([0.9] * 5, True),
        ([0.9] * 3, True),
        ([0.9, 0.9, 0.98], False),  # three rounds that do not all show a gain
        ([0.98] * 15, False),  # sure, and not worth it
        ([0.9] * 12 + [1.1] * 3, True),
        ([0.9] * 11 + [1.1] * 4, False),  # as often by chance
        ([0.9] * 10 + [3.0] * 5, False),
        ([0.5] * 13 + [9.0] * 2, True),  # however slow other work made two of them
        ([1.1] * 15, False),
    ],
)
def test_faster_is_what_is_neither_chance_nor_too_little(ratios, sure):
    others = np.random.default_rng(0).uniform(1, 2, len(ratios))
    assert tune.faster(others * ratios, others) == sure


@pytest.fixture
def clock(monkeypatch):
    """A clock that only stands in for time: `clock.runs(seconds)` is a run that takes so long."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    for module in (tune, timing):
        monkeypatch.setattr(module, "time", clock)

    def runs(*seconds):
        turns = iter(seconds * 1000)

        def run(feed):
            clock.now += next(turns)

        return run

    clock.runs = runs
    return clock


def timed(clock, candidates, seconds=1000.0, making=0.0):
    """`by_time` of name -> (nodes, seconds of a run): the record and the names that were made."""
    made = []

    def graphs():
        for name, (nodes, _) in candidates.items():
            clock.now += making
            made.append(name)
            yield name, graph_of(nodes)

    def opened(graph):
        return clock.runs(candidates[made[-1]][1])

    return tune.by_time(graphs(), opened, {}, seconds), made


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ({"own": (9, 1.0), "b": (9, 0.9)}, "b"),
        ({"own": (9, 1.0), "b": (5, 0.99)}, "own"),
        ({"own": (9, 1.0), "b": (9, 1.2)}, "own"),
        ({"own": (9, 1.0), "more nodes": (9, 0.89), "less": (5, 0.9)}, "less"),
        ({"own": (9, 1.0), "more nodes": (9, 0.8), "less": (5, 0.9)}, "more nodes"),
        ({"own": (1, 1.0), "b": (5, 0.9), "c": (9, 0.8)}, "c"),
    ],
)
def test_the_best_that_is_not_within_noise_of_a_simpler_one_ships(clock, candidates, best):
    tuning, _ = timed(clock, candidates)
    assert tuning.chosen == best
    assert tuning.rounds == tune.ROUNDS
    first, seconds = candidates["own"][1], [seconds for _, seconds in candidates.values()]
    assert [tried.ms for tried in tuning.tried] == pytest.approx([1000 * s for s in seconds])
    assert [tried.ratio for tried in tuning.tried] == pytest.approx([s / first for s in seconds], abs=1e-3)


def test_measuring_keeps_to_its_seconds(clock):
    many = {str(i): (9, 1.0) for i in range(20)}
    for seconds in (10, 25, 60):
        clock.now = 0.0
        tuning, made = timed(clock, many, seconds)
        assert tuning.rounds >= 3
        assert clock.now <= seconds + len(made) + 2  # a warm-up more, and the first one's two runs
        assert 2 <= len(tuning.tried) <= len(made) <= len(tuning.tried) + 1
    tuning, _ = timed(clock, {"a": (9, 0.001), "b": (9, 0.001)}, 10)
    assert tuning.rounds == tune.ROUNDS


def test_a_model_that_is_too_slow_is_not_measured(clock):
    tuning, made = timed(clock, {"a": (9, 4.0), "b": (9, 4.0)}, 10)
    assert tuning is None
    assert made == ["a"]
    assert timed(clock, {"a": (9, 0.1), "b": (9, 4.0)}, 10)[0] is None
    assert timed(clock, {"a": (9, 0.1), "b": (9, 0.1)}, 10, making=11.0) == (None, ["a"])


def test_what_does_not_run_does_not_ship(clock):
    def opened(graph):
        if len(graph.graph.node) == 5:
            raise BackendError("no")
        return clock.runs(len(graph.graph.node))

    def graphs(*sizes):
        return ((str(size), graph_of(size)) for size in sizes)

    assert [t.name for t in tune.by_time(graphs(9, 5, 8), opened, {}, 900).tried] == ["9", "8"]
    assert tune.by_time(graphs(5, 9, 8), opened, {}, 900) is None


def test_of_engines_layers_activations_and_size_decide(clock):
    figures = {
        "own": {"layers": 123, "activation_mb": 12.5, "plan_mb": 60.0},
        "clean-up alone": {"layers": 142, "activation_mb": 12.5, "plan_mb": 60.0},
        "without it": {"layers": 118, "activation_mb": 13.0, "plan_mb": 60.0},
        "a layer less, much more memory": {"layers": 117, "activation_mb": 20.0, "plan_mb": 60.0},
    }

    def build(graph):
        clock.now += 3.0
        return figures[graph]

    def graphs(names):
        for name in names:
            made.append(name)
            yield name, StandIn(name)

    class StandIn(str):
        graph = SimpleNamespace(node=[])

    made = []
    tuning = tune.by_build(graphs(figures), build, 100)
    assert tuning.chosen == "without it"
    assert [(t.name, t.layers) for t in tuning.tried] == [(n, f["layers"]) for n, f in figures.items()]
    assert tune.by_build(graphs(["own", "own", "clean-up alone"]), build, 100).chosen == "own"
    figures["own"]["layers"] = 143  # more than the clean-up alone leaves
    figures["own"]["activation_mb"] = 6.0
    assert tune.by_build(graphs(["own", "clean-up alone"]), build, 100).chosen == "clean-up alone"
    assert tune.by_build(graphs(["own", "without it", "clean-up alone"]), build, 100).chosen == "without it"
    made.clear()
    assert len(tune.by_build(graphs(figures), build, 5).tried) == len(made) == 2  # the first is not counted
    assert tune.by_build(graphs(figures), build, 2) is None
    assert tune.by_build(graphs(figures), lambda graph: {}, 100) is None


# --- in an export ---


def slow(monkeypatch, ops, factor):
    """Graphs with one of these operators take so many times as long."""

    def opened(target, graph, *_):
        return 0.01 * (factor if ops & {node.op_type for node in graph.graph.node} else 1.0)

    monkeypatch.setattr(tune, "opened", opened)
    monkeypatch.setattr(tune, "_seconds", lambda run, feed: run)
    monkeypatch.setattr(tune, "interleaved", lambda runs, *_: [list(runs)] * 15)


@pytest.mark.parametrize(("factor", "fused"), [(2.0, False), (1.01, True), (0.5, True)])
def test_a_pass_that_does_not_pay_is_left_out_and_told(here, monkeypatch, factor, fused):
    slow(monkeypatch, {"Attention", "MultiHeadAttention"}, factor)
    lines = []
    bundle = export("net.onnx", tune=True, out="b", progress=Progress(note=lines.append))
    operators = {node.op_type for node in onnx.load("b/model.onnx").graph.node}
    assert ("Attention" in operators) == fused
    tuning = Bundle.open("b").manifest.tuning
    names = [tried.name for tried in tuning.tried]
    doubtful = [f"without {name}" for name in ("fuse-attention", "pack-attention", "merge-siblings")]
    assert names == ["all passes", "clean-up alone", *doubtful]
    assert tuning.chosen == ("all passes" if fused else "without fuse-attention")
    assert ("fuse-attention" in [row.name for row in bundle.manifest.passes]) == fused
    assert f"; chosen: {tuning.chosen}" in next(line for line in lines if line.startswith("tried all passes"))
    assert bundle.manifest.verification["passed"]


def test_an_export_measures_where_it_is_asked_to_alone(here, monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(tune, "by_time", refuse)
    assert export("net.onnx", out="b").manifest.tuning is None
    assert export("net.onnx", out="c", tune=True, passes="clean-up,fuse-attention").manifest.tuning is None
    assert export("net.onnx", out="d", tune=True, check=False).manifest.tuning is None  # nothing is run
    with pytest.raises(AssertionError):
        export("net.onnx", out="e", tune=True)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_graphs_are_timed_in_the_library_that_runs_them(here, target):
    pytest.importorskip(target)
    began = time.perf_counter()
    tuning = export("net.onnx", tune=True, target=target, out="b").manifest.tuning
    assert time.perf_counter() - began < 20
    assert tuning is None or (len(tuning.tried) >= 2 and all(tried.ms > 0 for tried in tuning.tried))
    if target == "onnxruntime":
        assert tuning.rounds == tune.ROUNDS


def test_engines_are_built_and_compared_each_once(here, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    target, built = type(TARGETS["tensorrt-rtx"]), []
    build = target.build
    monkeypatch.setattr(target, "build", lambda *given: built.append(given[1]) or build(*given))
    bundle = export("net.onnx", tune=True, target="tensorrt-rtx", precision="fp16", out="b")
    tuning = bundle.manifest.tuning
    assert len(tuning.tried) == len(built) == len(set(built)) >= 2
    assert bundle.read("model.onnx") in built
    chosen = next(tried for tried in tuning.tried if tried.name == tuning.chosen)
    assert chosen.layers == bundle.engine.layers == min(tried.layers for tried in tuning.tried)


def test_the_command_tunes_unless_told_not_to(here):
    from meta_deploy.cli.export import options_of, parser

    for extra, wanted in (([], True), (["--no-tune"], False)):
        assert options_of(parser().parse_args(["--onnx", "net.onnx", *extra]))["tune"] == wanted


# --- a pass that makes results differ ---


def wrong(factor=1.5):
    """A pass with a mistake: it scales a weight."""

    def rewrite(graph):
        weight = graph.tensors()["w"]
        weight.values = weight.values * np.float32(factor)
        return 1

    return rewrite


def coarse(graph):
    """A pass that is right in float32 and not in float16: small weights, and their inverse afterwards."""
    weight = graph.tensors()["w"]
    if weight.values.max() < 1e-3:
        return 0
    import onnx_graphsurgeon as gs

    weight.values = weight.values * np.float32(1e-7)
    (product,) = weight.outputs
    out = product.outputs[0]
    product.outputs[0] = gs.Variable("small", np.float32, out.shape)
    factor = gs.Constant("inverse", np.array(1e7, np.float32))
    graph.nodes.append(gs.Node("Mul", "inverse", {}, [product.outputs[0], factor], [out]))
    return 1


@pytest.mark.parametrize("which", ["clean-up", "share-norms", "collapse-chains", "discarded-rows"])
def test_a_pass_that_is_wrong_is_named_and_left_out(here, monkeypatch, which):
    if which == "clean-up":
        from meta_deploy.graph import pipeline

        monkeypatch.setattr(pipeline, "clean_up", lambda graph, model=None: wrong()(graph))
    monkeypatch.setitem(PASSES, which, wrong())
    lines = []
    bundle = export("net.onnx", out="b", progress=Progress(note=lines.append))
    (left,) = Bundle.open("b").manifest.left_out
    assert left.name == which
    assert left.reason.startswith("y are off (")
    assert f"warning: with the pass {which}, {left.reason}; it is left out" in lines
    assert which not in [row.name for row in bundle.manifest.passes]
    x = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    with Predictor(bundle) as predictor:
        np.testing.assert_allclose(predictor.run({"x": x})["y"], run(network(), x=x)["y"], atol=1e-5)


def test_of_several_wrong_passes_each_is_left_out(here, monkeypatch):
    monkeypatch.setitem(PASSES, "share-norms", wrong())
    monkeypatch.setitem(PASSES, "fold-scales", wrong(0.3))
    bundle = export("net.onnx", out="b")
    assert {left.name for left in bundle.manifest.left_out} == {"share-norms", "fold-scales"}
    assert bundle.manifest.verification["passed"]


def test_a_pass_that_is_wrong_in_the_low_precision_alone_is_left_out(here, monkeypatch):
    monkeypatch.setitem(PASSES, "fold-scales", coarse)
    assert export("net.onnx", out="b").manifest.left_out == ()
    bundle = export("net.onnx", out="c", precision="fp16")
    assert [left.name for left in bundle.manifest.left_out] == ["fold-scales"]


def test_what_is_wrong_without_passes_too_fails(here, monkeypatch):
    from meta_deploy.export import pipeline

    monkeypatch.setitem(PASSES, "share-norms", lambda graph: 1)
    ship = pipeline.ship

    def broken(graph, source):
        weight = next(tensor for tensor in graph.graph.initializer if tensor.name == "w")
        weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), "w"))
        return ship(graph, source)

    monkeypatch.setattr(pipeline, "ship", broken)
    with pytest.raises(VerificationError, match="y are off"):
        export("net.onnx", out="b")


def test_only_passes_that_may_be_left_out_are_blamed(here, monkeypatch):
    from meta_deploy.graph import pipeline

    monkeypatch.setattr(pipeline, "clean_up", lambda graph, model=None: wrong()(graph))
    monkeypatch.setattr(type(TARGETS["onnxruntime"]), "required_passes", ("clean-up",))
    with pytest.raises(VerificationError, match="y are off"):
        export("net.onnx", out="b")


def test_no_option_of_the_plan_is_lost(here):
    from meta_deploy.export.options import Options

    assert planned("net.onnx", Options(tune=True)).tunes
    assert not planned("net.onnx", Options(tune=True, passes="none")).tunes
    with pytest.raises(InputError, match="no option 'tunes'"):
        export("net.onnx", tunes=True)
