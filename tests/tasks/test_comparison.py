"""Comparing passes what is the same, catches what is not, and names the stage; matching is exact."""

import itertools

import numpy as np
import pytest

from meta_deploy.graph.precision import PRECISIONS
from meta_deploy.models.ops.boxes import INVALID
from meta_deploy.tasks import get_task
from meta_deploy.tasks.comparison import MATCH_IOU, PADDING, Boxes, box_ious, match

K, SCORE_THRESHOLD = 12, 0.05


def outputs(seed=0, found=8, K=K, batch=2, side=60):
    """A detector's answer, stages too: `found` boxes an image, well apart in score."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 400, (batch, K, 2))
    boxes = np.concatenate([low, low + rng.uniform(side, 2 * side, (batch, K, 2))], axis=-1)
    scores = np.tile(np.linspace(0.95, 0.15, K), (batch, 1))
    empty = np.arange(K) >= found
    logits = np.tile(np.linspace(5, -5, K), (batch, 1))
    return {
        "num_detections": np.full(batch, found, np.int32),
        "boxes": np.where(empty[:, None], 0, boxes).astype(np.float32),
        "scores": np.where(empty, 0, scores).astype(np.float32),
        "labels": np.where(empty, -1, rng.integers(0, 5, (batch, K))).astype(np.int32),
        "masks": np.where(empty[:, None, None], 0, rng.random((batch, K, 28, 28))).astype(np.float32),
        "feature_0": rng.standard_normal((batch, 4, 8, 8)).astype(np.float32),
        "proposals": boxes.astype(np.float32),
        "proposal_logits": logits.astype(np.float32),
    }


def compare(expected, actual, threshold=SCORE_THRESHOLD):
    task = "instance-segmentation" if "boxes" in expected else "semantic-segmentation"
    comparison = get_task(task).comparison(PRECISIONS["fp32"].tolerances, threshold)
    comparison.add(expected, actual)
    return comparison.stages()


def changed(name, function, **kwargs):
    expected = outputs(**kwargs)
    actual = {key: array.copy() for key, array in expected.items()}
    actual[name] = function(actual[name])
    return compare(expected, actual)


def failed(stages):
    return [name for name, stage in stages.items() if not stage["passed"]]


def test_what_is_the_same_passes():
    stages = compare(outputs(), outputs())
    assert list(stages) == ["maps", "proposals", "detections"]
    assert failed(stages) == []
    assert stages["maps"]["max_relative_error"] == 0
    detections = stages["detections"]
    assert detections["compared"] == 16
    assert detections["agreement"] == detections["mean_box_iou"] == detections["mean_mask_iou"] == 1
    assert detections["max_score_difference"] == detections["mean_score_difference"] == 0


def test_rounding_passes():
    rng = np.random.default_rng(0)
    for name in ("boxes", "scores", "masks", "feature_0", "proposals", "proposal_logits"):
        assert failed(changed(name, lambda x: x + rng.normal(0, 1e-5, x.shape).astype(np.float32))) == []


def test_another_order_passes():
    """Equal scores may come in either order."""
    expected = outputs(found=K)
    actual = {k: v[:, ::-1] if v.ndim > 1 and v.shape[1] == K else v for k, v in expected.items()}
    assert failed(compare(expected, actual)) == []


@pytest.mark.parametrize(
    ("name", "fault", "stage"),
    [
        ("feature_0", lambda x: x * 1.01, "maps"),
        ("feature_0", lambda x: x[:, [1, 0, 2, 3]], "maps"),
        ("feature_0", lambda x: np.where(np.arange(8) == 3, np.nan, x), "maps"),
        ("feature_0", lambda x: x + np.inf, "maps"),
        ("proposals", lambda x: x + 3, "proposals"),
        ("proposals", lambda x: x[..., [1, 0, 3, 2]], "proposals"),
        ("proposals", lambda x: x * np.nan, "proposals"),
        ("proposal_logits", lambda x: x + 0.1, "proposals"),
        ("proposal_logits", lambda x: x + 0.02, "proposals"),
        ("scores", lambda x: np.where(x > 0, x - 0.05, x), "detections"),
        ("scores", lambda x: np.where(x > 0, x + 0.003, x), "detections"),
        ("scores", lambda x: x * np.nan, "detections"),
        ("scores", lambda x: x * 0, "detections"),
        ("boxes", lambda x: x + 3, "detections"),
        ("boxes", lambda x: x + 1, "detections"),
        ("boxes", lambda x: x * 1.05, "detections"),
        ("boxes", lambda x: x * np.nan, "detections"),
        ("labels", lambda x: np.where(np.arange(K) == 2, x + 1, x), "detections"),
        ("labels", lambda x: np.where(x >= 0, (x + 1) % 5, x), "detections"),
        ("masks", lambda x: 1 - x, "detections"),
        ("masks", lambda x: x.swapaxes(-1, -2), "detections"),
        ("masks", lambda x: x * np.nan, "detections"),
        ("num_detections", lambda x: x * 0, "detections"),
        ("num_detections", lambda x: x - 1, "detections"),
    ],
)
def test_a_fault_is_caught_in_its_stage(name, fault, stage):
    assert failed(changed(name, fault)) == [stage]


def test_a_fault_of_one_image_among_several_is_caught():
    assert failed(changed("boxes", lambda x: x + np.reshape([9, 0, 0], (3, 1, 1)), batch=3)) == ["detections"]


def test_boxes_that_one_side_alone_found_are_caught():
    few, many = outputs(found=7), outputs(found=8)
    assert failed(compare(few, many)) == ["detections"]
    assert failed(compare(many, few)) == ["detections"]


def test_nothing_found_by_either_passes_and_says_so():
    stages = compare(outputs(found=0), outputs(found=0))
    assert failed(stages) == []
    assert stages["detections"]["compared"] == 0
    assert "mean_mask_iou" not in stages["detections"]


def test_something_found_by_one_side_only_is_caught():
    assert failed(compare(outputs(found=0), outputs(found=8))) == ["detections"]
    assert failed(compare(outputs(found=8), outputs(found=0))) == ["detections"]


def test_a_box_at_the_score_threshold_needs_no_partner():
    for score, expected in ((SCORE_THRESHOLD + 0.005, []), (SCORE_THRESHOLD + 0.02, ["detections"])):
        whole = outputs()
        whole["scores"][:, 7] = score
        short = {name: array.copy() for name, array in whole.items()}
        short["num_detections"] -= 1
        assert failed(compare(whole, short)) == expected
        assert failed(compare(short, whole)) == expected


def test_the_last_box_of_a_full_list_needs_no_partner():
    """Which of two boxes of one score was the last to fit is a matter of rounding."""
    a, b = outputs(found=K), outputs(found=K)
    b["boxes"][:, -1] += 200
    assert failed(compare(a, b)) == []
    b["boxes"][:, -3] += 200
    assert failed(compare(a, b)) == ["detections"]


def test_the_last_box_of_a_list_that_is_not_full_does():
    a, b = outputs(found=K - 1), outputs(found=K - 1)
    b["boxes"][:, K - 2] += 200
    assert failed(compare(a, b)) == ["detections"]


def test_boxes_without_any_partner_are_not_excused():
    """An untrained network's scores are all near the last one's."""
    a, b = outputs(), outputs()
    a["proposal_logits"][:] = b["proposal_logits"][:] = np.linspace(0.01, 0, K)
    assert failed(compare(a, b)) == []
    b["proposals"] += 100
    assert failed(compare(a, b)) == ["proposals"]


def test_stages_that_the_graph_lacks_are_left_out():
    actual = {name: outputs()[name] for name in ("num_detections", "boxes", "scores", "labels", "masks")}
    assert list(compare(outputs(), actual)) == ["detections"]


def test_segmentation_compares_logits_and_pixels():
    rng = np.random.default_rng(0)
    expected = {"logits": rng.standard_normal((2, 6, 16, 16)).astype(np.float32)}
    stages = compare(expected, expected)
    assert list(stages) == ["maps", "pixels"]
    assert failed(stages) == []
    swapped = {"logits": expected["logits"][:, [1, 0, 2, 3, 4, 5]]}
    assert failed(compare(expected, swapped)) == ["maps", "pixels"]
    assert failed(compare(expected, {"logits": expected["logits"] * np.nan}))[0] == "maps"


def boxes_of(rng, count, classes=2):
    low = rng.integers(0, 6, (count, 2))
    xyxy = np.concatenate([low, low + rng.integers(30, 34, (count, 2))], axis=1).astype(np.float32)
    scores = rng.choice([0.5, 0.505, 0.51, 0.9], count).astype(np.float32)
    return Boxes(xyxy, scores, 0.0, 0.01, rng.integers(0, classes, count))


@pytest.mark.parametrize("seed", range(60))
def test_matching_is_the_greedy_one_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    a, b = boxes_of(rng, rng.integers(0, 7)), boxes_of(rng, rng.integers(0, 7))
    candidates = []
    for i, j in itertools.product(range(len(a.scores)), range(len(b.scores))):
        (ax, ay, aX, aY), (bx, by, bX, bY) = a.boxes[i].tolist(), b.boxes[j].tolist()
        inter = max(min(aX, bX) - max(ax, bx), 0) * max(min(aY, bY) - max(ay, by), 0)
        iou = inter / ((aX - ax) * (aY - ay) + (bX - bx) * (bY - by) - inter)
        same = a.labels[i] == b.labels[j] and abs(a.scores[i] - b.scores[j]) <= 0.01
        if same and iou >= MATCH_IOU:
            candidates.append((-iou, i, j))
    expected = []
    for _, i, j in sorted(candidates):
        if all(i != p and j != q for p, q in expected):
            expected.append((i, j))
    assert match(a, b) == expected


@pytest.mark.parametrize("seed", range(40))
def test_boxes_that_match_themselves_all_match(seed):
    """No pairing has more pairs: every box of a shuffled copy finds a partner."""
    rng = np.random.default_rng(seed)
    a = boxes_of(rng, 6)
    order = rng.permutation(6)
    b = Boxes(a.boxes[order], a.scores[order], 0.0, 0.01, a.labels[order])
    assert len(match(a, b)) == 6


def test_overlap_of_pairs():
    a = np.array([[0, 0, 10, 10], [5, 5, 5, 5]], np.float64)
    b = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30], [5, 5, 5, 5]], np.float64)
    np.testing.assert_allclose(box_ious(a, b), [[1, 0.5, 0, 0], [0, 0, 0, 0]])


def test_padding_is_no_box():
    assert PADDING == INVALID
    boxes = Boxes(np.zeros((3, 4)), np.array([1.0, INVALID, INVALID]), INVALID, 0.05)
    assert len(boxes.scores) == 1


def test_detections_without_masks_are_compared_too():
    bare = {name: array for name, array in outputs().items() if name != "masks"}
    comparison = get_task("detection").comparison(PRECISIONS["fp32"].tolerances, SCORE_THRESHOLD)
    comparison.add(bare, {**bare, "boxes": bare["boxes"] + 3})
    stages = comparison.stages()
    assert failed(stages) == ["detections"]
    assert "mean_mask_iou" not in stages["detections"]


# --- arrays of any names ---


def compare_raw(expected, actual, precision="fp32"):
    comparison = get_task("raw").comparison(PRECISIONS[precision].tolerances)
    for one, other in zip(expected, actual, strict=True):
        comparison.add(one, other)
    return comparison.stages()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_differ_by_the_relative_error_that_numpy_gives_in_float64(dtype):
    rng = np.random.default_rng(0)
    ours = [{"x": rng.standard_normal((3, 5)).astype(dtype)} for _ in range(3)]
    theirs = [{"x": (a["x"] + rng.normal(0, 0.01, (3, 5))).astype(dtype)} for a in ours]
    stage = compare_raw(ours, theirs)["x"]
    pairs = [
        (a["x"].astype(np.float64), b["x"].astype(np.float64)) for a, b in zip(ours, theirs, strict=True)
    ]
    most = max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs)
    rms = max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in pairs)
    assert stage["max_relative_error"] == pytest.approx(most, rel=1e-12)
    assert stage["rms_relative_error"] == pytest.approx(rms, rel=1e-12)
    assert not stage["passed"]
    assert compare_raw(ours, theirs, "fp16")["x"]["tolerance"] == {"rms_relative_error": 0.02}
    assert compare_raw(ours, ours)["x"]["passed"]


@pytest.mark.parametrize(
    ("expected", "actual", "passes"),
    [
        ([np.nan, np.inf, -np.inf, 1], [np.nan, np.inf, -np.inf, 1], True),
        ([np.nan, 1], [1, 1], False),
        ([1, 1], [np.nan, 1], False),
        ([np.inf, 1], [-np.inf, 1], False),
        ([np.inf, 1], [1, 1], False),
        ([np.nan], [np.nan], True),
        ([], [], True),
        ([0, 0], [0, 0], True),
        ([0, 0], [0, 1e-3], False),
        ([1.0], [1.0, 1.0], False),
        ([[1.0]], [1.0], False),
    ],
)
def test_nan_and_infinity_agree_only_with_themselves_and_shapes_must_be_the_same(expected, actual, passes):
    sides = ([{"x": np.array(side, np.float32)}] for side in (expected, actual))
    assert compare_raw(*sides)["x"]["passed"] is passes


def test_integers_and_booleans_agree_by_their_share_and_absent_outputs_do_not():
    numbers = np.arange(200)
    off = np.where(numbers < 3, -1, numbers)  # 1.5 %
    stages = compare_raw([{"i": numbers, "b": numbers > 5, "a": numbers}], [{"i": off, "b": numbers > 5}])
    assert stages["i"]["agreement"] == 0.985
    assert [stages[name]["passed"] for name in "iba"] == [False, True, False]
