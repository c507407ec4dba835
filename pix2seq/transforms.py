"""Image and box geometry: from a picture of any size to the square canvas, and back.

Built on torchvision.transforms.v2. Pictures are uint8 tensors (3, H, W) throughout; boxes enter as xyxy pixels of the
picture and leave as xyxy fractions of the canvas. All randomness comes from the generator passed in.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

# The authors fill the canvas with 0.3 of white and normalise nothing; filling before the normalisation is the same.
PAD_VALUE = int(0.3 * 255)


def from_pil(image: Image.Image) -> torch.Tensor:
    """Pixels uint8 RGB (3, H, W) of a picture of any mode, as they are stored: an EXIF tag turns nothing. Raises
    ValueError for 32 bits a pixel, and what Pillow raises for a damaged file."""
    if image.mode.startswith("I;16"):  # Pillow would cut these off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, of which nobody knows what is white")
    return F.pil_to_tensor(image.convert("RGB"))


@dataclass
class PaddedImage:
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
    def valid_fraction(self) -> tuple[float, float]:
        """(width, height) of the covered part as fractions of the canvas."""
        side = self.image.shape[-1]
        return self.size[1] / side, self.size[0] / side


@dataclass(frozen=True)
class TrainTransform:
    """The authors' augmentation: scale jitter, crop with one shared offset, flip, padding.

    scale_min, scale_max   range of the scale: at 1 the picture just fits the canvas
    flip                   probability of a horizontal flip
    independent_crop       the crop's two offsets are drawn each for itself; with scales from 0.1 to 2 this is the
                           large-scale jitter of Ghiasi et al. (2021)
    iou_crop               first SSD's crop, with torchvision's figures: a part of the picture that keeps enough of at
                           least one object; objects whose centre is outside are gone
    """

    image_size: int
    scale_min: float = 0.3
    scale_max: float = 2.0
    flip: float = 0.5
    independent_crop: bool = False
    iou_crop: bool = False

    def __call__(self, image, boxes: np.ndarray, rng: np.random.Generator) -> PaddedImage:
        """`image`: uint8 (3, H, W), or what has such a `shape` and gives such `pixels(at_least)`: see data.Picture."""
        side = self.image_size
        boxes = BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=tuple(image.shape[-2:]))
        if self.iou_crop and len(boxes) and min(image.shape[-2:]) >= 4:  # 0.3 of less is not a pixel
            image, boxes = _iou_crop(image, boxes, rng)

        target = side * rng.uniform(self.scale_min, self.scale_max)
        size = resized_size(image.shape[-2:], target)
        pixels = F.resize(pixels_of(image, size), size, antialias=False)
        boxes = F.resize(boxes, size)

        offsets = rng.random(2) if self.independent_crop else [rng.random()] * 2
        top, left = (int(max(length - side, 0) * offset) for length, offset in zip(size, offsets, strict=True))
        height, width = min(size[0], side), min(size[1], side)
        pixels = F.crop(pixels, top, left, height, width)
        boxes = F.crop(boxes, top, left, height, width)

        if rng.random() < self.flip:
            pixels, boxes = F.horizontal_flip(pixels), F.horizontal_flip(boxes)
        return _pad(pixels, boxes, side)


@dataclass(frozen=True)
class EvalTransform:
    """The whole picture, made as large as fits the canvas (small ones grow), in the top left corner."""

    image_size: int

    def __call__(self, image, boxes: np.ndarray | None = None) -> PaddedImage:
        """`image`: as TrainTransform's."""
        boxes = torch.zeros(0, 4) if boxes is None else torch.from_numpy(boxes)
        boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
        size = resized_size(image.shape[-2:], self.image_size)
        # All of the file: who comes with a decoded picture has no other pixels, and its boxes should be the same.
        pixels = F.resize(pixels_of(image), size, antialias=True)
        return _pad(pixels, F.resize(boxes, size), self.image_size)


def resized_size(size: tuple[int, int], side: float) -> tuple[int, int]:
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


def pixels_of(image, at_least: tuple[int, int] | None = None) -> torch.Tensor:
    """Those of what a transform takes, which may be decoded smaller if not below (height, width) `at_least`."""
    return image if isinstance(image, torch.Tensor) else image.pixels(at_least)


def _iou_crop(image, boxes: BoundingBoxes, rng: np.random.Generator) -> tuple[torch.Tensor, BoundingBoxes]:
    # torchvision draws from torch's global generator: lend it a seed of ours and put its state back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        crop = v2.RandomIoUCrop().make_params([torch.empty(image.shape, device="meta"), boxes])
    if not crop:  # one of the choices is to leave the picture whole
        return image, boxes
    centre_inside = crop.pop("is_within_crop_area")
    boxes = F.crop(boxes, **crop)
    boxes[~centre_inside] = 0  # without area: `_pad` leaves it out
    return F.crop(pixels_of(image), **crop), boxes


def _pad(image: torch.Tensor, boxes: BoundingBoxes, side: int) -> PaddedImage:
    size = tuple(image.shape[-2:])
    boxes = F.clamp_bounding_boxes(boxes).numpy().astype(np.float64)
    kept = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    # A pixel's three values lie side by side, as in what decoders give: putting them elsewhere takes longer than all
    # the padding.
    canvas = torch.full((side, side, 3), PAD_VALUE, dtype=torch.uint8).permute(2, 0, 1)
    canvas[:, : size[0], : size[1]] = image
    return PaddedImage(canvas, boxes[kept] / side, kept, size)
