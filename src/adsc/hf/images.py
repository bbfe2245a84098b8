"""Open image files as a model should see them, and refuse those that cannot be read."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file: decoded in full, upright (its EXIF orientation applied), RGB.

    Raises
    ------
    InputError
        When the file is missing, is not an image, is cut off, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``;
        the latter is found in the header, before anything is decoded.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"image {path}: {'not a file' if path.exists() else 'no such file'}; give the path of an image"
        )
    try:
        with warnings.catch_warnings():
            # Between one and two times the limit Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"image {path}: more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down first") from None
    except UnidentifiedImageError:
        raise InputError(f"image {path}: not an image that Pillow can read; use PNG, JPEG or WebP") from None
    except OSError as error:
        raise InputError(f"image {path}: cannot be opened: {error.strerror or error}") from None
    with image:
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # decoders raise errors of many kinds when data is cut off or broken
            raise InputError(f"image {path}: damaged or cut off ({error})") from None
