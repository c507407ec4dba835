"""The objects detected in one image."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.inference.images import ImageSource, open_image
from pix2seq.transforms import read_pixels
from pix2seq.visualization import CELL, color_of, draw_boxes, enlarge


@dataclass
class DetectionResult:
    """The N objects detected in an image, in descending order of their scores.

    Attributes:
        source: The image as it was passed.
        size: (height, width) of the image after its EXIF orientation has been applied.
        boxes: float64 (N, 4), xyxy in pixels of an image of this size.
        labels: int64 (N,), contiguous class indices.
        scores: float64 (N,), in [0, 1].
        names: N class names.
        error: Name of the image and reason if it cannot be read, otherwise "".
    """

    source: ImageSource = field(repr=False)
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    names: list[str]
    error: str = ""

    def __len__(self) -> int:
        return len(self.boxes)

    def draw(self) -> Image.Image:
        """Draws the boxes on the image; small images are enlarged, so that class names are legible."""
        image = to_pil_image(read_pixels(open_image(self.source)))
        image, boxes = enlarge(image, self.boxes, max(CELL, *image.size))
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        colors = [color_of(label) for label in self.labels]
        return draw_boxes(image, boxes, captions, colors, font_size=max(12, min(image.size) // 40))
