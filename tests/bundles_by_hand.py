"""Manifests and ONNX models made by hand: what they must give follows from the lines here."""

from __future__ import annotations

import numpy as np

from meta_deploy.bundle.manifest import (
    MANIFESTS,
    BatchRange,
    Fit,
    InputSpec,
    Manifest,
    ModelInfo,
    Preprocess,
    RawInput,
    RawManifest,
    Size,
    SizeRange,
    Stretch,
    TensorRTRTXEngine,
    TensorSpec,
    Thresholds,
)

CLASSES = ("disc", "star", "ring")


SCORES = {"thresholds": Thresholds(score=0.05)}
OF_TASK = {"detection": SCORES, "instance-segmentation": SCORES, "semantic-segmentation": {}}
ENGINE = TensorRTRTXEngine(version="1.7.1", gpu=None, compute_capabilities=())


def input_spec(*sizes: Size, batch=(1, 1, 1), name="images", divisor=1) -> InputSpec:
    """An input of one size, or of the (height, width) of least, usual and largest."""
    low, usual, high = sizes * 3 if len(sizes) == 1 else sizes
    least, opt, most = batch
    return InputSpec(
        name=name,
        batch=BatchRange(min=least, opt=opt, max=most),
        size=SizeRange(min=low, opt=usual, max=high),
        divisor=divisor,
    )


def manifest(task: str, size: Size, dynamic: bool = False, batch: int = 1, **changes) -> Manifest:
    """A valid manifest; mean 0 and std 255, so that the network sees pixels as 0 to 1."""
    sizes = ((32, 32), size, (size[0] * 4, size[1] * 4)) if dynamic else (size,)
    fields = {
        "model": ModelInfo(name="by-hand"),
        "classes": CLASSES,
        "input": input_spec(*sizes, batch=(1 if dynamic else batch, batch, batch), divisor=32),
        "outputs": tuple(TensorSpec(name=name, dtype="float32", shape=()) for name in MANIFESTS[task].needs),
        "preprocess": Preprocess(resize=Fit(size=size), mean=(0.0,) * 3, std=(255.0,) * 3),
        "target": "onnxruntime",
        "precision": "fp32",
        **OF_TASK[task],
    }
    return MANIFESTS[task](**fields | changes)


def detector(size: tuple[int, int], dynamic: bool = False, batch: int = 1) -> bytes:
    """A network that finds the same three boxes in any image; the first's score is the image's largest value.

    In input pixels of a 64x64 input: a disc at (8, 8, 40, 40), a star at (32, 16, 64, 48) with score 0.6, a
    ring at (0, 0, 16, 16) with score 0.1. Each mask is set in its left half.
    """
    import onnx
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper

    boxes = np.zeros((1, 5, 4), np.float32)
    boxes[0, :3] = [[8, 8, 40, 40], [32, 16, 64, 48], [0, 0, 16, 16]]
    masks = np.zeros((1, 5, 28, 28), np.float32)
    masks[:, :3, :, :14] = 1
    constants = {
        "count": np.array([3], np.int32),
        "boxes1": boxes,
        "rest": np.array([[0.6, 0.1, 0, 0]], np.float32),
        "labels1": np.array([[0, 1, 2, -1, -1]], np.int32),
        "masks1": masks,
        "one": np.array([1], np.int64),
        **{f"tail{n}": np.ones(n, np.int64) for n in (1, 2, 3)},
    }
    nodes = [
        h.make_node("Shape", ["images"], ["b"], start=0, end=1),
        h.make_node("ReduceMax", ["images"], ["first"], axes=[1, 2, 3], keepdims=0),
        h.make_node("Unsqueeze", ["first", "one"], ["first_"]),
        h.make_node("Expand", ["count", "b"], ["num_detections"]),
    ]
    for name, tail in (("rest", 1), ("labels1", 1), ("boxes1", 2), ("masks1", 3)):
        nodes.append(h.make_node("Concat", ["b", f"tail{tail}"], [f"{name}_shape"], axis=0))
        nodes.append(
            h.make_node(
                "Expand", [name, f"{name}_shape"], [name.removesuffix("1") + ("_" if name == "rest" else "")]
            )
        )
    nodes.append(h.make_node("Concat", ["first_", "rest_"], ["scores"], axis=1))
    b, hw = ("b", ("h", "w")) if dynamic else (batch, size)
    graph = h.make_graph(
        nodes,
        "detector",
        [h.make_tensor_value_info("images", T.FLOAT, [b, 3, *hw])],
        [
            h.make_tensor_value_info("num_detections", T.INT32, [b]),
            h.make_tensor_value_info("boxes", T.FLOAT, [b, 5, 4]),
            h.make_tensor_value_info("scores", T.FLOAT, [b, 5]),
            h.make_tensor_value_info("labels", T.INT32, [b, 5]),
            h.make_tensor_value_info("masks", T.FLOAT, [b, 5, 28, 28]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def segmenter(size: tuple[int, int], dynamic: bool = False) -> bytes:
    """A network whose logits are the colours' means over 4x4 pixels: red is class 0, green 1, blue 2."""
    from onnx import TensorProto as T
    from onnx import helper as h

    hw, quarter = (("h", "w"), ("qh", "qw")) if dynamic else (size, (size[0] // 4, size[1] // 4))
    graph = h.make_graph(
        [h.make_node("AveragePool", ["images"], ["logits"], kernel_shape=[4, 4], strides=[4, 4])],
        "segmenter",
        [h.make_tensor_value_info("images", T.FLOAT, [1, 3, *hw])],
        [h.make_tensor_value_info("logits", T.FLOAT, [1, 3, *quarter])],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def raw_manifest(of_images: bool = False, **changes) -> RawManifest:
    """Of `doubler`, or with `of_images` of `average`, which takes one of 64x64, stretched and in BGR."""
    size = (1, 3, 64, 64)
    fields = {
        "model": ModelInfo(name="doubler"),
        "inputs": (
            RawInput(name="x", dtype="float32", shape=("n", 3), min=(1, 3), opt=(2, 3), max=(4, 3)),
            RawInput(name="k", dtype="int64", shape=(2,), min=(2,), opt=(2,), max=(2,)),
        ),
        "outputs": (
            TensorSpec(name="a/y", dtype="float32", shape=("n", 3)),
            TensorSpec(name="more", dtype="bool", shape=(2,)),
        ),
        "target": "onnxruntime",
        "precision": "fp32",
    }
    if of_images:
        fields |= {
            "model": ModelInfo(name="average"),
            "inputs": (RawInput(name="pixels", dtype="float32", shape=size, min=size, opt=size, max=size),),
            "outputs": (TensorSpec(name="mean", dtype="float32", shape=(1, 3)),),
            "image": input_spec((64, 64), name="pixels"),
            "preprocess": Preprocess(
                resize=Stretch(size=(64, 64)), mean=(0.0, 10.0, 20.0), std=(255.0,) * 3, channels="bgr"
            ),
        }
    return RawManifest(**fields | changes)


def raw_model(of_images: bool = False) -> bytes:
    """`doubler`: a/y = 2 x, more = k > 5. `average`: the mean of each channel."""
    from onnx import TensorProto as T
    from onnx import helper as h

    if of_images:
        nodes = [h.make_node("ReduceMean", ["pixels"], ["mean"], axes=[2, 3], keepdims=0)]
        inputs = [h.make_tensor_value_info("pixels", T.FLOAT, [1, 3, 64, 64])]
        outputs = [h.make_tensor_value_info("mean", T.FLOAT, [1, 3])]
        constants = []
    else:
        nodes = [h.make_node("Add", ["x", "x"], ["a/y"]), h.make_node("Greater", ["k", "five"], ["more"])]
        inputs = [
            h.make_tensor_value_info("x", T.FLOAT, ["n", 3]),
            h.make_tensor_value_info("k", T.INT64, [2]),
        ]
        outputs = [
            h.make_tensor_value_info("a/y", T.FLOAT, ["n", 3]),
            h.make_tensor_value_info("more", T.BOOL, [2]),
        ]
        constants = [h.make_tensor("five", T.INT64, [], [5])]
    graph = h.make_graph(nodes, "raw", inputs, outputs, constants)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8).SerializeToString()
