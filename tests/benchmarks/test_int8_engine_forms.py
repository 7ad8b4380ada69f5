"""Which form of 8 bits costs a kernel: what the rules for TensorRT build on."""

import pytest

from benchmarks.int8_engine_forms import CASES, kernels


def test_a_convolution_of_one_scale_takes_bias_and_relu_in_and_others_do_not():
    pytest.importorskip("tensorrt_rtx")
    found = kernels(CASES["convolution, bias, ReLU"], "8.9")
    most = found["float16"] + 1
    assert found == {
        "float16": most - 1,
        "int8, one scale": most - 1,
        "int8, a scale a channel": most,
        "int8, factors": most,
        "fp8, one scale": most - 1,
        "fp8, a scale a channel": most,
    }
