"""Headers and pixels of image files."""

import io
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from pix2seq.transforms import from_pil

# Formats that are opened. Pillow supports more, and starts external programs for some of them.
Image.init()
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")
FORMATS: tuple[str, ...] = tuple(name for name in _FORMATS if name in Image.OPEN)  # builds can lack AVIF
# File name suffix -> formats that the file should have.
FORMATS_OF_SUFFIX = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), ("JPEG", "MPO")),
    **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
    **dict.fromkeys((".ppm", ".pgm"), ("PPM",)),
    ".png": ("PNG",),
    ".webp": ("WEBP",),
    ".bmp": ("BMP",),
    ".gif": ("GIF",),
    ".avif": ("AVIF",),
    ".jp2": ("JPEG2000",),
}
MAX_PIXELS = (
    100_000_000  # decoding takes 3 bytes per pixel, and a file of a few kilobytes can claim any number of them
)
MAX_BYTES = 8 * MAX_PIXELS  # of a file: four uncompressed channels of 16 bits
EXIF_ORIENTATION = 0x0112


class BadImageError(ValueError):
    """An image cannot be used.

    Args:
        kind: A key of `pix2seq.data.issues.KINDS`.
        reason: One line. It names neither the image nor a folder of the machine, because reports are shared.
    """

    def __init__(self, kind: str, reason: object):
        super().__init__(kind, reason)
        # Messages of torchvision begin with a C++ source file and line.
        self.kind, self.reason = kind, " ".join(re.sub(r"\S+\.cpp:\d+, ", "", str(reason)).split())

    def __str__(self) -> str:
        return self.reason


class ImageFile:
    """An image file of which only the header has been decoded.

    Annotation tools differ in whether they apply the EXIF orientation. By default, this class applies it only if it
    swaps height and width and the swapped size equals `annotated_size`.

    Args:
        data: uint8 (num_bytes,), the content of the file.
        annotated_size: The (height, width) in the annotation file, None if unknown.
        exif_transpose: Always apply the EXIF orientation, as image viewers do.

    Attributes:
        header: The PIL image; its pixels are not decoded.
        is_transposed: Whether the EXIF orientation is applied.
        shape: (3, height, width) of the pixels.

    Raises:
        BadImageError: The file is not an image, or it has too many pixels.
    """

    def __init__(self, data: np.ndarray, annotated_size: tuple[int, int] | None = None, exif_transpose: bool = False):
        if len(data) == 0:
            raise BadImageError("unreadable-file", "the file is empty (0 bytes)")
        self._data = data
        self.header = self._open()
        width, height = self.header.size
        if width * height > MAX_PIXELS:
            raise _too_many_pixels(f"{width} x {height}")
        swaps_sides = self.orientation >= 5
        if exif_transpose:
            self.is_transposed = self.orientation > 1
        else:
            self.is_transposed = swaps_sides and width != height and annotated_size == (width, height)
        self.shape = (3, width, height) if self.is_transposed and swaps_sides else (3, height, width)

    def _open(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._data.data), formats=FORMATS)
        except Image.DecompressionBombError as error:  # the message begins with the number of pixels
            raise _too_many_pixels(re.findall(r"\d+", str(error))[0]) from None
        except Image.UnidentifiedImageError:
            raise BadImageError(
                "unreadable-file", f"not an image in one of the formats {', '.join(FORMATS)}"
            ) from None
        except Exception as error:  # decoders raise many types of exceptions for damaged headers
            raise BadImageError("unreadable-file", error) from None

    @property
    def orientation(self) -> int:
        """EXIF orientation from 1 to 8: 1 is as stored, 5 to 8 swap height and width."""
        try:
            orientation = int(self.header.getexif().get(EXIF_ORIENTATION, 1))
        except Exception:  # a damaged tag counts as absent
            return 1
        return orientation if 1 <= orientation <= 8 else 1

    def pixels(self, min_size: tuple[int, int] | None = None) -> torch.Tensor:
        """Decodes the pixels.

        Args:
            min_size: If given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster, as long as the
                result is not smaller than this (height, width).

        Returns:
            uint8 RGB (3, H, W).

        Raises:
            BadImageError: The file is damaged.
        """
        image = self.header
        try:
            if image.format == "JPEG" and image.mode in ("RGB", "L") and not self.is_transposed:
                if min_size is None or any(
                    2 * minimum > length for minimum, length in zip(min_size, self.shape[1:], strict=True)
                ):
                    return decode_jpeg(torch.from_numpy(self._data), mode=ImageReadMode.RGB)
                image = self._open()  # `draft` changes the image, and the next call may ask for another size
                image.draft("RGB", (min_size[1], min_size[0]))
            return from_pil(ImageOps.exif_transpose(image) if self.is_transposed else image)
        except Exception as error:  # decoders raise many types of exceptions for damaged files
            raise BadImageError("unreadable-file", error) from None


def open_file(path: str | Path) -> ImageFile:
    """Opens an image without annotations. Its EXIF orientation is applied.

    Raises:
        BadImageError: The path is not an image file.
    """
    check_regular(path)
    return ImageFile(read_file(path), exif_transpose=True)


def read_file(path: str | Path) -> np.ndarray:
    """Reads the bytes of a file: uint8 (num_bytes,). Raises BadImageError."""
    try:
        check_num_bytes(os.stat(path).st_size)
        return np.fromfile(path, dtype=np.uint8)
    except (OSError, MemoryError) as error:
        raise BadImageError("unreadable-file", getattr(error, "strerror", None) or error) from None


def check_num_bytes(num_bytes: int) -> None:
    """Raises BadImageError if a file is too large, before it is read."""
    if num_bytes > MAX_BYTES:
        reason = f"{num_bytes} bytes, more than the {MAX_BYTES / 1e6:.0f} million allowed"
        raise BadImageError("unreadable-file", reason)


def check_regular(path: str | Path) -> None:
    """Raises BadImageError for a pipe, device, socket or folder, because opening one may block."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImageError("unreadable-file", "not a regular file")


def _too_many_pixels(count: str) -> BadImageError:
    return BadImageError("too-many-pixels", f"{count} pixels, more than the {MAX_PIXELS / 1e6:.0f} million allowed")
