"""What the parts are compared with: numpy float64, one element at a time, written from the equations."""

import math

import numpy as np


def linear(x, state, name):
    """(..., C_in) -> (..., C_out)."""
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(x, state, name, eps=1e-6):
    """Over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def conv3x3(x, state, name):
    """(C_in, H, W) -> (C_out, H, W), zero padding 1; depthwise where the weight has one input channel."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    _, H, W = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    depthwise = weight.shape[1] == 1 and x.shape[0] > 1
    out = np.zeros((weight.shape[0], H, W)) + bias[:, None, None]
    for dy in range(3):
        for dx in range(3):
            window = padded[:, dy : dy + H, dx : dx + W]
            tap = weight[:, :, dy, dx]
            out += tap[:, :1, None] * window if depthwise else np.einsum("oc,chw->ohw", tap, window)
    return out


def conv1x1(x, state, name):
    """(C_in, H, W) -> (C_out, H, W)."""
    weight = state[f"{name}.weight"][:, :, 0, 0]
    return np.einsum("oc,chw->ohw", weight, x) + state[f"{name}.bias"][:, None, None]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def upsampling(size, factor):
    """Bilinear (corners not aligned) along one axis as a matrix (size * factor, size)."""
    matrix = np.zeros((size * factor, size))
    for i in range(size * factor):
        at = max((i + 0.5) / factor - 0.5, 0.0)
        low = min(int(at), size - 1)
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, high] += at - low
    return matrix


def upsample(x, factor):
    """Bilinear, (..., H, W) -> (..., H * factor, W * factor)."""
    return upsampling(x.shape[-2], factor) @ x @ upsampling(x.shape[-1], factor).T


def halve(x):
    """Bilinear by one half: with corners not aligned that is the mean of each 2x2 square."""
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def greedy_nms(boxes, scores, iou_threshold, score_threshold=-np.inf, max_output=None):
    """Indices of the kept boxes, best first; of equal scores the first."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if scores[i] > score_threshold and all(iou(boxes[i], boxes[j]) <= iou_threshold for j in kept):
            kept.append(i)
    return np.array(kept[:max_output], dtype=np.int64)


def decode(box, delta, stds, image_size):
    """One box moved by one delta: Fast R-CNN's appendix C with MMDetection's limits."""
    dx, dy, dw, dh = (d * s for d, s in zip(delta, stds, strict=True))
    limit = abs(math.log(16 / 1000))
    width, height = box[2] - box[0], box[3] - box[1]
    cx, cy = (box[0] + box[2]) / 2 + dx * width, (box[1] + box[3]) / 2 + dy * height
    width *= math.exp(min(max(dw, -limit), limit))
    height *= math.exp(min(max(dh, -limit), limit))
    H, W = image_size
    return [
        min(max(cx - width / 2, 0), W),
        min(max(cy - height / 2, 0), H),
        min(max(cx + width / 2, 0), W),
        min(max(cy + height / 2, 0), H),
    ]


def bilinear(feature, y, x):
    """Value (C,) at a point, pixel centres at integers; zero more than a pixel outside."""
    _, H, W = feature.shape
    if y < -1 or y > H or x < -1 or x > W:
        return np.zeros(feature.shape[0])
    y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, H - 1), min(x0 + 1, W - 1)
    fy, fx = y - y0, x - x0
    top = feature[:, y0, x0] * (1 - fx) + feature[:, y0, x1] * fx
    bottom = feature[:, y1, x0] * (1 - fx) + feature[:, y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def roi_align(feature, roi, bins, stride):
    """(C, H, W) and one xyxy box in input pixels -> (C, bins, bins), ceil(size / bins)^2 samples a bin."""
    x1, y1, x2, y2 = (float(edge) / stride - 0.5 for edge in roi)
    bin_w, bin_h = (x2 - x1) / bins, (y2 - y1) / bins
    n_x, n_y = math.ceil(bin_w), math.ceil(bin_h)
    out = np.zeros((feature.shape[0], bins, bins))
    for row in range(bins):
        for column in range(bins):
            for i in range(n_y):
                for j in range(n_x):
                    y = y1 + row * bin_h + (i + 0.5) * bin_h / n_y
                    x = x1 + column * bin_w + (j + 0.5) * bin_w / n_x
                    out[:, row, column] += bilinear(feature, y, x)
    return out / max(n_x * n_y, 1)


def pyramid_pool(features, rois, bins):
    """SingleRoIExtractor: maps (C, h, w) at strides 4..32 and RoIs (R, 4) -> (R, C, bins, bins)."""
    out = []
    for roi in rois:
        scale = math.sqrt((roi[2] - roi[0]) * (roi[3] - roi[1]))
        level = int(min(max(math.floor(math.log2(scale / 56 + 1e-6)), 0), 3))
        out.append(roi_align(features[level], roi, bins, 4 * 2**level))
    return np.array(out)


def multiclass_nms(boxes, scores, score_threshold, iou_threshold, max_num):
    """Boxes (P, classes, 4), scores (P, classes) -> detections, class by class, then the best of all."""
    found = []
    for c in range(scores.shape[1]):
        for i in greedy_nms(boxes[:, c], scores[:, c], iou_threshold, score_threshold):
            found.append((scores[i, c], c, boxes[i, c]))
    found.sort(key=lambda item: -item[0])
    return found[:max_num]


def numpy_state(module):
    """A module's state dict as float64 arrays."""
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}
