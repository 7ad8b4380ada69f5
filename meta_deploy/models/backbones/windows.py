"""Windows of a feature map and back: square ones for the ViT, stripes for the MEA block. Knows no layers."""

from torch import SymBool, Tensor
from torch.nn import functional as F


def divides(size: int, window: int) -> bool:
    """Whether `window` divides `size`; of sizes known at run time only, whether it does so always."""
    return _always(size % window == 0)


def count(size: int, window: int) -> int:
    """Windows that it takes to cover `size`."""
    if _always(size == window):
        return 1
    return size // window if divides(size, window) else (size + window - 1) // window


def _always(condition: bool | SymBool) -> bool:
    """Whether a condition holds whatever is known at run time only; asking makes no assumption."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which imports a good deal

    return statically_known_true(condition)


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
    rows, columns = count(H, h), count(W, w)
    if not divides(H, h) or not divides(W, w):
        x = F.pad(x, (0, 0, 0, columns * w - W, 0, rows * h - H))
    x = x.reshape(B, rows, h, columns, w, C).permute(0, 1, 3, 2, 4, 5)  # (B, rows, columns, h, w, C)
    return x.reshape(B * rows * columns, h * w, C)


def merge(windows: Tensor, window: tuple[int, int], shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `partition`.

    Args:
        windows: (B * rows * columns, h * w, C).
        window: (h, w) of one window.
        shape: (B, H, W) of the map.

    Returns:
        (B, H, W, C), the padding cut off.
    """
    (B, H, W), (h, w), C = shape, window, windows.shape[-1]
    rows, columns = count(H, h), count(W, w)
    x = windows.reshape(B, rows, columns, h, w, C).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(B, rows * h, columns * w, C)
    if divides(H, h) and divides(W, w):
        return x
    return x[:, :H, :W]
