"""Nodes are named by the PyTorch module that they came from, also those that passes made."""

import pytest
from onnx import helper as h

from meta_deploy.graph.modules import inherit_modules, innermost, module_of, modules_of, name_by_module
from tests.tiny_models import exported


def graph(*nodes):
    made = [h.make_node(op, inputs, outputs, name=name) for op, inputs, outputs, name in nodes]
    return h.make_graph(made, "g", [], [])


@pytest.mark.parametrize(
    ("scopes", "name"),
    [
        ("['', 'backbone', 'backbone.attn', 'matmul_3']", "backbone.attn/n"),
        ("['', 'matmul_3']", "n"),
        ("['matmul_3']", "n"),
        ("[", "n"),
        ("7", "n"),
        (None, "n"),
    ],
)
def test_the_exporter_tells_the_module(scopes, name):
    node = h.make_node("MatMul", ["a", "b"], ["c"], name="n")
    if scopes is not None:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    name_by_module([node])
    name_by_module([node])  # as where an export's own file is exported again
    assert node.name == name


def test_the_module_is_the_first_part_of_a_name():
    assert module_of("a.b/Conv_1/MatMulAddFusion") == "a.b"
    assert module_of("Conv_1") == module_of("/Conv") == ""


def test_a_path_of_the_older_exporter_is_a_module():
    assert module_of("/backbone/blocks/blocks.0/attn/MatMul_3") == "backbone.blocks.0.attn"
    assert module_of("/a/b/Conv") == "a.b"
    assert module_of("/a/ab.0/Conv") == "a.ab.0"


def test_slashes_in_the_names_of_a_few_nodes_are_no_modules():
    assert modules_of(["stem/x", "/c/d/y", "z"]) == {"stem/x": "stem", "/c/d/y": "c.d", "z": ""}
    assert modules_of(["node_1", "matmul_3/joined", "x"]) == {}
    added = [f"InsertedCast_{i}" for i in range(9)]
    assert modules_of(["a.b/x", "c.d/y", *added])["c.d/y"] == "c.d"  # of a library's nodes there may be many


def test_the_innermost_module_holds_all():
    assert innermost(["a.b.c", "a.b.d"]) == innermost(["a.b"]) == "a.b"
    assert innermost(["a.bc", "a.bd"]) == "a"
    assert innermost(["a", "b"]) == innermost([]) == ""


def test_new_nodes_inherit_from_what_they_replace():
    before = graph(
        ("Sub", ["x"], ["s"], "a.norm/sub"), ("Mul", ["s"], ["y"], "b/mul"), ("Relu", ["y"], ["z"], "r")
    )
    after = graph(
        ("Sub", ["x"], ["s"], "a.norm/sub"),  # is as it was
        ("LayerNormalization", ["x"], ["y"], "y/norm"),  # makes what b/mul made
        ("Transpose", ["y"], ["s/move"], "s/move"),  # named after what a.norm/sub made
        ("Add", ["s/move", "x"], ["new"], "sum"),  # of what comes from a.norm
        ("Relu", ["y"], ["z"], "r"),  # had no module, and has none
        ("Neg", ["x"], ["n"], "n"),
    )
    inherit_modules(before, after)
    names = ["a.norm/sub", "b/y.norm", "a.norm/s.move", "a.norm/sum", "r", "n"]
    assert [node.name for node in after.node] == names


def test_quantization_of_a_weight_is_of_the_module_that_reads_it():
    before = graph(("MatMul", ["x", "w"], ["y"], "a.fc/matmul"))
    after = graph(
        ("QuantizeLinear", ["x"], ["x/int8"], "x/int8"),
        ("DequantizeLinear", ["x/int8"], ["x/float"], "x/float"),
        ("DequantizeLinear", ["w/int8"], ["w/float"], "w/float"),
        ("MatMul", ["x/float", "w/float"], ["y"], "a.fc/matmul"),
        ("Cast", ["z"], ["z/float16"], "z/float16"),
    )
    inherit_modules(before, after)
    assert [node.name for node in after.node] == [
        *("a.fc/x.int8", "a.fc/x.float", "a.fc/w.float", "a.fc/matmul"),
        "z.float16",  # is of none, and does not look like one of "z"
    ]


def test_nodes_of_an_export_name_modules_of_the_model_through_all_passes():
    made = exported("segmenter")
    modules = {name for name, _ in made.model.named_modules()}
    found = [module_of(node.name) for node in made.graph.graph.node]
    assert set(filter(None, found)) <= modules
    assert sum(map(bool, found)) > 0.9 * len(found)
    attentions = {module_of(node.name) for node in made.graph.graph.node if "Attention" in node.op_type}
    assert "backbone.vit.blocks.0.attn" in attentions
