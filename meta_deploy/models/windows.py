"""Windows of a feature map and back: square ones for the ViT, stripes for the MEA block. Knows no layers."""

from torch import Tensor
from torch.nn import functional as F


def divides(size: int, window: int) -> bool:
    """Whether `window` divides `size`; False for a size that is only known at run time."""
    return isinstance(size, int) and size % window == 0


def partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut a map into windows that don't overlap, zero-padded below and to the right.

    Args:
        x: (B, H, W, C).
        window: (h, w) of one window.

    Returns:
        (B * ceil(H/h) * ceil(W/w), h * w, C), image by image, row by row.
    """
    B, H, W, C = x.shape
    h, w = window
    if not divides(H, h) or not divides(W, w):
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
    rows, columns = x.shape[1] // h, x.shape[2] // w
    x = x.reshape(B, rows, h, columns, w, C).permute(0, 1, 3, 2, 4, 5)  # (B, rows, columns, h, w, C)
    return x.reshape(B * rows * columns, h * w, C)


def merge(windows: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The inverse of `partition`: (B * rows * columns, h * w, C) back to (B, H, W, C), padding cut off."""
    (H, W), (h, w) = size, window
    rows, columns = -(-H // h), -(-W // w)
    x = windows.reshape(-1, rows, columns, h, w, windows.shape[-1])
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * h, columns * w, windows.shape[-1])
    if divides(H, h) and divides(W, w):
        return x
    return x[:, :H, :W]
