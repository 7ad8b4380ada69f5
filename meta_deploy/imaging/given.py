"""What a caller hands over as an image, as one of the things that are read. Knows types, and no format."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from meta_deploy.errors import ImageError


def given_image(value: Any) -> str | os.PathLike[str] | bytes | np.ndarray | Image.Image:
    """A path, bytes, a Pillow image or an array as it is; of other buffers and of open files the bytes.

    Raises:
        ImageError: it is none of these, or a Pillow image without pixels, or a file that cannot be read.
    """
    if isinstance(value, Image.Image):
        if 0 in value.size:
            raise ImageError(f"the given image has no pixels ({value.width}x{value.height}); give another")
        return value
    if isinstance(value, (str, os.PathLike, bytes, np.ndarray)):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if hasattr(value, "read"):
        try:
            content = value.read()
        except (OSError, ValueError) as error:
            raise ImageError(f"the given file cannot be read ({error}); open it again") from error
        if isinstance(content, bytes):
            return content
        raise ImageError("the given file is open as text; open it in mode 'rb'")
    raise ImageError(
        "an image is a path, an encoded file's bytes, an open file, a Pillow image or an RGB uint8 array, "
        f"not {type(value).__name__}"
    )
