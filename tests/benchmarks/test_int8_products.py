"""The benchmark of 8-bit products measures what it says."""

import numpy as np

from benchmarks import int8_products
from meta_deploy.targets import TARGETS
from tests.small_graphs import run


def test_a_product_is_measured_in_8_bits_and_in_float32():
    rules = TARGETS["onnxruntime"].eight_bits["int8"]
    for proto in (int8_products.convolution(32, 32, 3, 24), int8_products.product(400, 64, 192)):
        converted, pays = int8_products.quantized(proto, rules)
        assert pays
        assert any(tensor.name.startswith("w/int8") for tensor in converted.graph.initializer)
        shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        expected, actual = run(proto, x=x)["y"], run(converted, x=x)["y"]
        assert np.linalg.norm(actual - expected) < 0.1 * np.linalg.norm(expected)
        row = int8_products.measure(proto, rules, threads=1, rounds=2)
        assert row["int8 / fp32"] > 0
        assert sum(name.startswith("quantize_static") and row[name] > 0 for name in row) == 3
    assert not int8_products.quantized(int8_products.convolution(16, 32, 1, 20), rules)[1]
