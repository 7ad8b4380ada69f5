"""Engines in a report: layers lead back to nodes and modules, attentions that are not fused have a reason."""

import json

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from meta_deploy.bundle.bundle import write_bundle
from meta_deploy.cli.report import main
from meta_deploy.errors import InputError
from meta_deploy.report import machine, side_by_side, words
from meta_deploy.report.compare import image_files, report
from meta_deploy.report.engines import of_file, with_layers
from meta_deploy.report.markdown import to_markdown
from meta_deploy.report.page import to_html
from meta_deploy.report.schema import EngineRow, Entry
from meta_deploy.report.subject import Subject
from meta_deploy.report.trace import to_trace
from meta_deploy.targets.tensorrt.layers import Layer, LayerTensor, to_json
from tests.bundles_by_hand import ENGINE, detector, manifest
from tests.small_graphs import model, value
from tests.targets.gpu_stand_in import engine_bytes, install

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
NAMES = {HALF: "Half", FLOAT: "Float"}
node = helper.make_node


def attention(kind=HALF, width=16, between=None, axis=-1, weights_out=False):
    """softmax(q k) v of two heads over eight tokens, in the module "block.attn"."""
    nodes = [
        node("MatMul", ["q", "k"], ["s"], name="block.attn/qk"),
        *([node(between, ["s"], ["t"], name="block.attn/between")] if between else []),
        node("Softmax", ["t" if between else "s"], ["p"], name="block.attn/soft", axis=axis),
        node("MatMul", ["p", "v"], ["y"], name="block.attn/pv"),
    ]
    inputs = [("q", [1, 2, 8, width]), ("k", [1, 2, width, 8]), ("v", [1, 2, 8, width])]
    outputs = [value("y", [1, 2, 8, width], kind)] + [value("p", [1, 2, 8, 8], kind)] * weights_out
    return model(nodes, [value(name, shape, kind) for name, shape in inputs], outputs)


def tensor(name, *shape, kind="Half"):
    return LayerTensor(name=name, shape=shape, datatype=kind)


def of_nodes(*names):
    return "\x1f".join(f"[ONNX Layer: {name}]" for name in names)


def layer(name, kind, kernel, nodes=(), inputs=(), outputs=(), constants=()):
    return Layer(
        name=name,
        kind=kind,
        kernel=kernel,
        inputs=inputs,
        outputs=outputs,
        constants=constants,
        metadata=of_nodes(*nodes),
    )


APART = [
    layer("qk_0", "gemm", "__myelin_CASK_STUB", ["block.attn/qk"]),
    layer("soft_1", "kgen", "__myl_MaxrSubExpSumDiv_0x12", ["block.attn/soft"]),
    layer("pv_2", "gemm", "__myelin_CASK_STUB", ["block.attn/pv"]),
]
FUSED = [
    layer("mha_0", "kgen", "_gemm_mha_v2_0x34", ["block.attn/qk", "block.attn/soft", "node_of_y"]),
    layer("signal_1", "signal", ""),
]
UNKNOWN = EngineRow()


# --- attention ---


def test_an_attention_in_one_kernel_is_fused():
    row = with_layers(UNKNOWN, FUSED, attention())
    (found,) = row.attentions
    assert (found.fused, found.reason, found.module, found.layers) == (True, None, "block.attn", ("mha_0",))
    assert (row.fused_attentions, row.attention_count, row.layer_count) == (1, 1, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": FLOAT}, "it computes in float32, and"),
        ({"width": 8}, "its heads have 8 channels"),
        ({"width": 264}, "its heads have 264 channels"),
        ({"between": "Tanh"}, "Tanh stands between its products and its softmax"),
        ({"between": "Identity"}, "no reason is known"),
        ({"axis": 2}, "its softmax runs along axis 2"),
        ({"axis": 3}, "no reason is known"),
        ({"weights_out": True}, "its weights are an output"),
        ({}, "no reason is known"),
    ],
)
def test_an_attention_in_several_layers_has_a_reason_and_its_layers(changes, reason):
    (found,) = with_layers(UNKNOWN, APART, attention(**changes)).attentions
    assert not found.fused
    assert found.reason.startswith(reason)
    assert found.layers == ("qk_0", "soft_1", "pv_2")


TRIES = [
    ({}, True),
    ({"width": 9}, True),
    ({"between": "Identity"}, True),
    ({"kind": FLOAT}, False),
    ({"width": 8}, False),
    ({"between": "Tanh"}, False),
    ({"axis": 2}, False),
    ({"weights_out": True}, False),
]


@pytest.mark.parametrize(("changes", "fused"), TRIES)
def test_the_reasons_are_those_of_tensorrt(changes, fused):
    pytest.importorskip("tensorrt_rtx")
    from meta_deploy.bundle.manifest import Profile
    from meta_deploy.targets.tensorrt.build import build_engine

    proto = attention(**changes)
    shapes = {v.name: tuple(dim.dim_value for dim in v.type.tensor_type.shape.dim) for v in proto.graph.input}
    profiles = [Profile(name, shape, shape, shape) for name, shape in shapes.items()]
    built = build_engine(proto.SerializeToString(), "tensorrt-rtx", profiles)
    (found,) = with_layers(UNKNOWN, built.layers, proto).attentions
    assert found.fused is fused
    assert (found.reason is None) is fused
    assert found.reason != "no reason is known"


# --- layers ---


def test_a_layers_class_is_its_kernels_or_that_of_its_nodes():
    weights = [numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")]
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="stem/conv"),
        node("Relu", ["c"], ["r"], name="stem/relu"),
        node("Transpose", ["r"], ["y"], name="head.norm/move", perm=[0, 2, 3, 1]),
    ]
    proto = model(nodes, [value("x", [1, 3, 8, 8])], [value("y", [1, 8, 8, 4])], weights)
    layers = [
        layer("pad", "kgen", "__myl_CastConc_0x1", ["stem/conv"]),
        layer("conv", "correlation", "__myelin_CASK_STUB", ["stem/conv", "stem/relu"]),
        layer("act", "kgen", "__myl_ReluTran_0x2", ["stem/conv", "stem/relu", "head.norm/move"]),
        layer("move", "kgen", "__myl_Tran_0x3", ["head.norm/move"]),
        layer("again", "Reformat", "copy"),
        layer("fc", "gemm", ""),
    ]
    rows = with_layers(UNKNOWN, layers, proto).layers
    assert [(row.op_class, row.reformat) for row in rows] == [
        ("data movement", True),  # nobody asked for it
        ("convolution", False),
        ("element-wise", False),  # a generated kernel holds no convolution
        ("data movement", False),
        ("data movement", True),
        ("matrix product", False),
    ]
    assert rows[2].modules == ("stem", "head.norm")
    assert rows[2].nodes == ("stem/conv", "stem/relu", "head.norm/move")
    assert rows[2].kernel == "__myl_ReluTran"
    assert [side_by_side.module(row) for row in rows[:4]] == [
        "stem",
        "stem",
        "(several modules)",
        "head.norm",
    ]


def test_bytes_are_of_each_tensor_once_and_of_views_what_they_show():
    layers = [
        layer("a", "gemm", "", outputs=[tensor("t", 4, 6)], inputs=[tensor("x", 4, 2, kind="Float")]),
        layer("same twice", "kgen", "", inputs=[tensor("t", 4, 6)] * 2, outputs=[tensor("u", 4, 6)]),
        layer("two parts", "kgen", "", inputs=[tensor("t", 4, 2)] * 2, constants=[tensor("w", 10)]),
        layer("open", "kgen", "", inputs=[tensor("t", -1, 6)]),
    ]
    rows = with_layers(UNKNOWN, layers).layers
    assert [row.bytes_read for row in rows] == [32, 48, 16 + 16 + 20, None]
    assert [row.bytes_written for row in rows] == [48, 48, 0, 0]
    assert rows[0].inputs == ("fp32 4x2",)


# --- side by side ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two bundles with an engine, fused and not; one that keeps no layers; layers and an engine alone."""
    folder = tmp_path_factory.mktemp("engines")
    section = msgspec.structs.replace(ENGINE, layers=3, activation_mb=1.5, weights_mb=2.5, plan_mb=4.0)
    content = manifest("instance-segmentation", (64, 64), target="tensorrt-rtx", engine=section)
    graphs = {"fused": attention(), "apart": attention(width=8), "old": attention()}
    graphs["fused"].graph.node[2].name = ""
    for name, layers in (("fused", FUSED), ("apart", APART), ("old", None)):
        files = {"model.onnx": graphs[name].SerializeToString(), "model.engine": b"x"}
        kept = {"layers.json": to_json(layers)} if layers else {}
        write_bundle(folder / name, content, files | kept)
    (folder / "layers.json").write_bytes(to_json(APART))
    (folder / "alone.engine").write_bytes(b"x" * 1000)
    return folder


@pytest.fixture(scope="module")
def made(folder, small_images, bundles):
    names = ["fused", "apart", "old", "layers.json", "alone.engine"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_gpus", lambda: ())
        return report([folder / name for name in names], images=small_images, runs=20, threads=1)


def test_an_engine_without_a_gpu_is_a_row_that_says_so(made):
    assert [(e.kind, e.error, e.not_timed, e.latency) for e in made.entries] == [
        *[("bundle", None, "no GPU here", None)] * 3,
        *[("engine", None, "no GPU here", None)] * 2,
    ]
    fused, _, old, layers, alone = (entry.engine for entry in made.entries)
    assert (fused.library, fused.activation_mb, len(fused.layers)) == ("tensorrt-rtx", 1.5, 1)
    assert (old.layer_count, "export it again" in old.no_layers) == (3, True)
    assert (layers.layer_count, layers.library) == (3, None)
    assert (alone.plan_mb, "GPU" in alone.no_layers) == (0.001, True)
    assert set(made.entries[0].files) == {"model.onnx", "model.engine", "layers.json"}


def test_what_differs_between_engines_is_marked(made):
    lines = {line.title: line for line in side_by_side.figures(made.entries[:2])}
    assert lines["attentions fused"] == ("attentions fused", ["1 of 1", "0 of 1"], True)
    assert lines["layers"] == ("layers", ["1", "3"], True)
    assert not lines["activations, MB"].differs
    assert lines["gemm"] == ("gemm", ["0", "2"], True)
    assert side_by_side.modules(made.entries) == [
        ("block.attn", ["1", "3", "", "3", ""], True)  # two engines do not tell their layers
    ]
    unknown = side_by_side.figures([made.entries[0], made.entries[4]])
    assert not next(line for line in unknown if line.title == "layers").differs


def test_page_and_markdown_show_engines_without_any_latency(made):
    text = to_markdown(made)
    assert "| fused | no GPU here |" in text
    assert "| `block.attn` | 1 | 3 |  | 3 |  |" in text
    assert "rounds" not in text  # nothing was timed, and nothing could be disturbed
    assert made.disturbances == ()
    assert "| attentions fused | **1 of 1** | **0 of 1** |" in text
    assert "apart, attention not fused: `block.attn/soft`: its heads have 8 channels" in text
    assert '"apart: no GPU here"' in to_trace(made)
    page = to_html(made)
    assert page.count("no GPU here") >= 5
    assert "apart: 3 layers" in page
    assert "<h2>Plots" not in page
    assert "4 MB on a GPU" in page


def test_the_command_prints_engines_and_its_gates_count_them(folder, capsys, small_images):
    arguments = [str(folder / "fused"), str(folder / "apart"), "--images", str(small_images), "--json"]
    assert main([*arguments, "--fail-if", "attentions_not_fused > 0", "--fail-if", "activations_mb > 2"]) == 3
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert [gate["failed"] for gate in document["gates"]] == [["apart"], []]
    assert document["entries"][1]["engine"]["attentions"][0]["node"] == "block.attn/soft"
    assert "apart: 3 layers, 0 of 1 attentions fused, 1.5 MB activations" in printed.err


def test_an_engine_in_its_bundle_is_the_bundle_and_on_a_cpu_its_graph_runs(tmp_path, small_images):
    content = manifest("instance-segmentation", (64, 64), target="tensorrt-rtx", engine=ENGINE)
    write_bundle(tmp_path / "b", content, {"model.onnx": detector((64, 64)), "model.engine": b"x"})
    paths, backends = [tmp_path / "b" / "model.engine"], ["auto", "onnxruntime"]
    engine, graph = report(paths, images=small_images, backends=backends, runs=20, threads=1).entries
    assert (engine.name, engine.kind, engine.backend) == ("b (auto)", "bundle", "tensorrt")
    assert (engine.latency, engine.engine is None) == (None, False)
    assert (graph.engine, graph.latency.rounds) == (None, 20)


def test_on_a_machine_with_a_gpu_what_failed_is_an_error(folder, small_images, monkeypatch):
    monkeypatch.setattr(machine, "_gpus", lambda: ("NVIDIA H100",))
    paths = [folder / "fused", folder / "alone.engine"]
    bundle, alone = report(paths, images=small_images, runs=20, threads=1).entries
    assert "CUDA" in bundle.error or "GPU" in bundle.error
    assert bundle.engine.layer_count == 1
    assert (alone.error, alone.not_timed) == (None, "an engine by itself is not run; name its bundle")


def test_rounds_on_a_gpu_are_timed_by_its_events(small_images, tmp_path, monkeypatch):
    _, library = install(monkeypatch)
    content = manifest("instance-segmentation", (64, 64), target="tensorrt-rtx", engine=ENGINE)
    plan = engine_bytes(detector((64, 64)), content.input)
    files = {"model.onnx": detector((64, 64)), "model.engine": plan, "layers.json": to_json(APART)}
    write_bundle(tmp_path / "b", content, files)
    images = image_files(small_images)
    library.layers = {"one": 2.0, "two": 1.0, "three": 0.5}
    subject = Subject(str(tmp_path / "b"), "tensorrt", 1, images, tmp_path)
    assert subject.facts()["gpu"] is None
    for index in range(-2, 5):
        subject.timings(index)
    found = subject.facts()["gpu"]
    assert [found.to_device.median, found.compute.p99, found.to_host.median] == [1, 10, 5]
    assert found.memory_mb == pytest.approx((4 * 3 * 64 * 64 + 4 + 5 * (16 + 4 + 4 + 4 * 28 * 28)) / 1e6)
    profile = subject.profile()
    subject.predictor.close()
    assert (profile.ms, profile.runs) == (pytest.approx(3.5), 5)
    assert [(row.name, row.op, row.op_class, row.ms) for row in profile.nodes] == [
        (name, "gemm", "matrix product", ms) for name, ms in library.layers.items()
    ]
    entry = Entry(name="b", path="b", kind="bundle", backend="tensorrt", gpu=found)
    assert words.gpu_table([entry])[1] == ["b", "10.0", "10.0", "10.0", "1.00", "5.00", "0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "does not tell an engine's layers"),
        (b'{"entries": []}', "does not tell an engine's layers"),
        (b'{"Layers": ["conv"]}', "the layers' names alone"),
    ],
)
def test_a_file_that_tells_no_layers_is_refused(content, message, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        of_file(tmp_path / "x.json")
