"""Images for inference: files, PIL images and arrays."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pix2seq.data.image_files import BadImageError, ImageFile, open_file
from pix2seq.transforms import from_pil

ImageSource = str | Path | Image.Image | np.ndarray


def open_image(source: ImageSource) -> ImageFile | torch.Tensor:
    """Opens an image and applies its EXIF orientation.

    Args:
        source: Path, PIL image, or uint8 RGB array of shape (H, W, 3).

    Returns:
        For a path an `ImageFile`, of which only the header has been read; otherwise uint8 RGB pixels (3, H, W).

    Raises:
        BadImageError: The image cannot be read.
        ValueError: The source is not an image.
    """
    if isinstance(source, str | Path):
        return open_file(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ValueError(f"array of shape {source.shape} and type {source.dtype}: must be uint8 RGB (H, W, 3)")
        source = Image.fromarray(source)
    if not isinstance(source, Image.Image):
        raise ValueError(f"image of type {type(source).__name__}: must be a path, a PIL image or an array")
    if 0 in source.size:
        raise ValueError(f"image of {source.width} x {source.height} pixels: must not be empty")
    try:
        return from_pil(ImageOps.exif_transpose(source))
    except Exception as error:  # PIL decodes lazily, and each of its decoders raises other exceptions
        raise BadImageError("unreadable-file", error) from None


class ImageList:
    """Images without annotations, in the form that `EvalDataset` expects of its annotations."""

    def __init__(self, sources: Sequence[ImageSource]):
        self.sources = sources

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def image_ids(self) -> range:
        return range(len(self.sources))

    def image_file(self, index: int) -> ImageFile | torch.Tensor:
        return open_image(self.sources[index])

    def name(self, index: int) -> str:
        """The path of an image, or "image INDEX" if it is not a file."""
        source = self.sources[index]
        return str(source) if isinstance(source, str | Path) else f"image {index}"
