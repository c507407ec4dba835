"""Geometry of images and boxes, on torchvision.transforms.v2.

Images are uint8 RGB tensors (3, H, W). Boxes are xyxy: in pixels of the original image before a transform, and
normalized to [0, 1] by the side of the padded square image after it. Coordinates in tokens refer to the padded image.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

# The authors pad with 0.3 and do not normalize images. Padding before the normalization gives the same gray.
PAD_VALUE = int(0.3 * 255)


def from_pil(image: Image.Image) -> torch.Tensor:
    """Converts a PIL image of any mode to uint8 RGB (3, H, W). The EXIF orientation is not applied.

    Raises:
        ValueError: The image has 32 bits per pixel. Pillow raises other exceptions for damaged files.
    """
    if image.mode.startswith("I;16"):  # Pillow's conversion would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel: the value of white is not defined; convert the image to 8 or 16 bits")
    return F.pil_to_tensor(image.convert("RGB"))


@dataclass
class PaddedImage:
    """A transformed image, padded at the right and the bottom to a square of side S.

    Args:
        image: uint8 (3, S, S), filled with PAD_VALUE outside the valid part.
        boxes: float64 (M, 4), xyxy in [0, 1] of the padded image. Boxes without area are removed.
        kept: int64 (M,), the index of each box among the boxes that were given.
        valid_size: The (height, width) in pixels of the part of the square that the image covers.
    """

    image: torch.Tensor
    boxes: np.ndarray
    kept: np.ndarray
    valid_size: tuple[int, int]

    @property
    def valid_fraction(self) -> tuple[float, float]:
        """The (width, height) of the valid part, as fractions of the side."""
        side = self.image.shape[-1]
        return self.valid_size[1] / side, self.valid_size[0] / side


@dataclass(frozen=True)
class TrainTransform:
    """Training augmentation of the authors' code: scale jitter, crop, horizontal flip and padding.

    Args:
        image_size: Side S of the padded image, in pixels.
        scale_min: Minimum scale. At scale 1, the image just fits into the square.
        scale_max: Maximum scale.
        flip: Probability of a horizontal flip.
        independent_crop: Draw the vertical and the horizontal crop offset independently instead of sharing one random
            number. With scales of 0.1 to 2, this is the large-scale jitter of Ghiasi et al. (2021).
        iou_crop: Apply the crop of SSD first (torchvision's RandomIoUCrop). It removes objects whose center lies
            outside the crop.
    """

    image_size: int
    scale_min: float = 0.3
    scale_max: float = 2.0
    flip: float = 0.5
    independent_crop: bool = False
    iou_crop: bool = False

    def __call__(self, image, boxes: np.ndarray, rng: np.random.Generator) -> PaddedImage:
        """Transforms an image and its boxes.

        Args:
            image: uint8 (3, H, W), or a `pix2seq.data.image_files.ImageFile`, which is decoded as small as possible.
            boxes: Boxes (N, 4), float64, xyxy in pixels.
            rng: Source of all randomness.
        """
        side = self.image_size
        boxes = BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=tuple(image.shape[-2:]))
        if self.iou_crop and len(boxes) and min(image.shape[-2:]) >= 4:  # crops of smaller images can be empty
            image, boxes = _iou_crop(image, boxes, rng)

        target = side * rng.uniform(self.scale_min, self.scale_max)
        size = resized_size(image.shape[-2:], target)
        pixels = F.resize(read_pixels(image, size), size, antialias=False)
        boxes = F.resize(boxes, size)

        offsets = rng.random(2) if self.independent_crop else [rng.random()] * 2
        top, left = (int(max(length - side, 0) * offset) for length, offset in zip(size, offsets, strict=True))
        height, width = min(size[0], side), min(size[1], side)
        pixels = F.crop(pixels, top, left, height, width)
        boxes = F.crop(boxes, top, left, height, width)

        if rng.random() < self.flip:
            pixels, boxes = F.horizontal_flip(pixels), F.horizontal_flip(boxes)
        return _pad(pixels, boxes, side)

    def of_quadrant(self) -> "TrainTransform":
        """Returns the transform to a quarter of the square, in which objects have the same size in pixels."""
        return replace(
            self, image_size=self.image_size // 2, scale_min=2 * self.scale_min, scale_max=2 * self.scale_max
        )


def join_quadrants(quadrants: list[PaddedImage]) -> PaddedImage:
    """Joins four square images to one of twice the side (mosaic, YOLOv4, 2004.10934).

    Args:
        quadrants: The top left, top right, bottom left and bottom right image, of side S.

    Returns:
        The image of side 2S, which counts as filled, with the boxes of all images. `kept` are the indices among them.
    """
    rows = [torch.cat([part.image for part in quadrants[row : row + 2]], dim=2) for row in (0, 2)]
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    boxes = np.concatenate(
        [(part.boxes + np.tile(corner, 2)) / 2 for part, corner in zip(quadrants, corners, strict=True)]
    )
    image = torch.cat(rows, dim=1)
    return PaddedImage(image, boxes, np.arange(len(boxes)), (image.shape[1], image.shape[2]))


@dataclass(frozen=True)
class EvalTransform:
    """Resizes the whole image to fit into the square (small images grow) and pads it.

    Args:
        image_size: Side S of the padded image, in pixels.
        resize: Whether to resize the image. If not, it must fit into the square.
    """

    image_size: int
    resize: bool = True

    def __call__(self, image, boxes: np.ndarray | None = None) -> PaddedImage:
        """Transforms an image and, if given, its boxes. See `TrainTransform.__call__` for the arguments.

        Raises:
            ValueError: The image is not resized and does not fit into the square.
        """
        given = torch.zeros(0, 4) if boxes is None else torch.from_numpy(boxes)
        annotated = BoundingBoxes(given, format="XYXY", canvas_size=tuple(image.shape[-2:]))
        size = resized_size(image.shape[-2:], self.image_size) if self.resize else tuple(image.shape[-2:])
        if max(size) > self.image_size:
            raise ValueError(
                f"an image of {size[1]} x {size[0]} pixels does not fit into a square of {self.image_size}"
            )
        # Decodes at full resolution, so that an image file and a decoded image give the same boxes.
        pixels = F.resize(read_pixels(image), size, antialias=True)
        return _pad(pixels, F.resize(annotated, size), self.image_size)


def resized_size(size: tuple[int, int], side: float) -> tuple[int, int]:
    """Returns the (height, width) that fits into a square of the given side, aspect ratio kept, truncated."""
    ratio = min(side / size[0], side / size[1])
    # Without 1e-6, rounding errors may truncate the longer side to one pixel less than `side`.
    return max(1, int(size[0] * ratio + 1e-6)), max(1, int(size[1] * ratio + 1e-6))


def to_original_pixels(
    boxes: np.ndarray, side: int, valid_size: tuple[int, int], original_size: tuple[int, int]
) -> np.ndarray:
    """Converts boxes from the padded image to pixels of the original image.

    Args:
        boxes: Boxes (N, 4), xyxy in [0, 1] of the padded image.
        side: Side of the padded image, in pixels.
        valid_size: The (height, width) of its part that the image covers, in pixels.
        original_size: The (height, width) of the original image, in pixels.

    Returns:
        Boxes (N, 4), xyxy in pixels of the original image, clipped to it and not rounded.
    """
    scale = [side / length * original for length, original in zip(valid_size, original_size, strict=True)]
    limit = np.array([original_size[1], original_size[0]] * 2, dtype=np.float64)
    return np.clip(boxes * np.array([scale[1], scale[0]] * 2), 0, limit)


def read_pixels(image, min_size: tuple[int, int] | None = None) -> torch.Tensor:
    """Returns the pixels (3, H, W) of a tensor or an `ImageFile`.

    Files may be decoded at a smaller size, but not below the (height, width) `min_size`.
    """
    return image if isinstance(image, torch.Tensor) else image.pixels(min_size)


def _iou_crop(image, boxes: BoundingBoxes, rng: np.random.Generator) -> tuple[torch.Tensor, BoundingBoxes]:
    # torchvision draws from torch's global generator, so seed it here and restore its state afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        crop = v2.RandomIoUCrop().make_params([torch.empty(image.shape, device="meta"), boxes])
    if not crop:  # RandomIoUCrop sometimes keeps the whole image
        return image, boxes
    center_inside = crop.pop("is_within_crop_area")
    boxes = F.crop(boxes, **crop)
    boxes[~center_inside] = 0  # no area, so `_pad` removes it
    return F.crop(read_pixels(image), **crop), boxes


def _pad(image: torch.Tensor, boxes: BoundingBoxes, side: int) -> PaddedImage:
    height, width = image.shape[-2:]
    boxes = F.clamp_bounding_boxes(boxes).numpy().astype(np.float64)
    kept = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    # Channels last in memory, as image decoders return pixels: converting the layout takes longer than the padding.
    padded = torch.full((side, side, 3), PAD_VALUE, dtype=torch.uint8).permute(2, 0, 1)
    padded[:, :height, :width] = image
    return PaddedImage(padded, boxes[kept] / side, kept, (height, width))
