"""Image and box geometry: from a picture of any size to the square canvas, and back.

Built on torchvision.transforms.v2. Pictures are uint8 tensors (3, H, W) throughout; boxes enter as xyxy pixels of the
picture and leave as xyxy fractions of the canvas. All randomness comes from the generator passed in.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

# The authors fill the canvas with 0.3 of white and normalise nothing; filling before the normalisation is the same.
PAD_VALUE = int(0.3 * 255)


@dataclass
class Canvas:
    """What the model sees of a picture.

    image     uint8 (3, S, S): the picture in the top left corner, PAD_VALUE right of it and below
    boxes     float64 (M, 4): xyxy in [0, 1] of the canvas
    kept      int64 (M,): which of the given boxes these are; a box with no area left in the crop is gone
    size      (height, width) in pixels of the part of the canvas that the picture covers
    """

    image: torch.Tensor
    boxes: np.ndarray
    kept: np.ndarray
    size: tuple[int, int]

    @property
    def content(self) -> tuple[float, float]:
        """(width, height) of the covered part as fractions of the canvas."""
        side = self.image.shape[-1]
        return self.size[1] / side, self.size[0] / side


@dataclass(frozen=True)
class TrainTransform:
    """The authors' augmentation: scale jitter, crop with one shared offset, flip, optional colour jitter, padding.

    scale_min, scale_max   range of the scale: at 1 the picture just fits the canvas
    flip                   probability of a horizontal flip
    color_jitter           strength of SimCLR's colour jitter (0 is off, the default for detection)
    """

    image_size: int
    scale_min: float = 0.3
    scale_max: float = 2.0
    flip: float = 0.5
    color_jitter: float = 0.0

    def __call__(self, image: torch.Tensor, boxes: np.ndarray, rng: np.random.Generator) -> Canvas:
        side = self.image_size
        boxes = BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=tuple(image.shape[-2:]))

        target = side * rng.uniform(self.scale_min, self.scale_max)
        size = fitted_size(image.shape[-2:], target)
        image = F.resize(image, size, antialias=False)
        boxes = F.resize(boxes, size)

        shared = rng.random()
        top, left = (int(max(length - side, 0) * shared) for length in size)
        height, width = min(size[0], side), min(size[1], side)
        image = F.crop(image, top, left, height, width)
        boxes = F.crop(boxes, top, left, height, width)

        if rng.random() < self.flip:
            image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
        if self.color_jitter:
            image = self._jitter_colors(image, rng)
        return _pad(image, boxes, side)

    def _jitter_colors(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        strong, hue = 0.8 * self.color_jitter, 0.2 * self.color_jitter
        jitter = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(strong, strong, strong, hue)], p=0.8), v2.RandomGrayscale(p=0.2)]
        )
        # torchvision draws from torch's global generator: lend it a seed of ours and put its state back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            return jitter(image)


@dataclass(frozen=True)
class EvalTransform:
    """The whole picture, made as large as fits the canvas (small ones grow), in the top left corner."""

    image_size: int

    def __call__(self, image: torch.Tensor, boxes: np.ndarray | None = None) -> Canvas:
        boxes = torch.zeros(0, 4) if boxes is None else torch.from_numpy(boxes)
        boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
        size = fitted_size(image.shape[-2:], self.image_size)
        return _pad(F.resize(image, size, antialias=True), F.resize(boxes, size), self.image_size)


def fitted_size(size: tuple[int, int], side: float) -> tuple[int, int]:
    """(height, width) scaled, aspect kept, to fit a square of the given side. Truncated like the original's."""
    ratio = min(side / size[0], side / size[1])
    # The longer side times its own ratio may come out a hair under the side: 1e-6 keeps it from losing a pixel.
    return max(1, int(size[0] * ratio + 1e-6)), max(1, int(size[1] * ratio + 1e-6))


def to_original_pixels(
    boxes: np.ndarray, side: int, size: tuple[int, int], original_size: tuple[int, int]
) -> np.ndarray:
    """Boxes (N, 4) xyxy in [0, 1] of the canvas -> xyxy pixels of the original picture, clipped to it, unrounded.

    side            of the canvas, in pixels
    size            (height, width) of the part of the canvas that the picture covers
    original_size   (height, width) of the original picture
    """
    scale = [side / length * original for length, original in zip(size, original_size, strict=True)]
    limit = np.array([original_size[1], original_size[0]] * 2, dtype=np.float64)
    return np.clip(boxes * np.array([scale[1], scale[0]] * 2), 0, limit)


def _pad(image: torch.Tensor, boxes: BoundingBoxes, side: int) -> Canvas:
    size = tuple(image.shape[-2:])
    boxes = F.clamp_bounding_boxes(boxes).numpy().astype(np.float64)
    kept = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    image = F.pad(image, [0, 0, side - size[1], side - size[0]], fill=PAD_VALUE)
    return Canvas(image, boxes[kept] / side, kept, size)
