"""Color augmentation on torchvision.transforms.v2: drawn by the data workers, applied to batches on their device."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F


class ColorOp(IntEnum):
    """The color operations that `ColorAugmentation.draw` samples and `apply_color_ops` applies."""

    NONE = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4
    GRAYSCALE = 5
    PERMUTE_CHANNELS = 6


MAX_COLOR_OPS = 6  # per image
CHANNEL_ORDERS = ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0])
COLOR_FUNCTIONS: dict[int, Callable[[torch.Tensor, float], torch.Tensor]] = {
    ColorOp.BRIGHTNESS: F.adjust_brightness,
    ColorOp.CONTRAST: F.adjust_contrast,
    ColorOp.SATURATION: F.adjust_saturation,
    ColorOp.HUE: F.adjust_hue,
    ColorOp.GRAYSCALE: lambda image, _: F.rgb_to_grayscale(image, num_output_channels=3),
    ColorOp.PERMUTE_CHANNELS: lambda image, index: F.permute_channels(image, CHANNEL_ORDERS[int(index)]),
}


@dataclass(frozen=True)
class ColorAugmentation:
    """Samples color operations in the data workers; `apply_color_ops` applies them to a batch on its device.

    Args:
        jitter: Strength s of the color jitter of SimCLR, as in the authors' code: with probability 0.8, brightness,
            contrast and saturation change by up to 0.8 s and hue by up to 0.2 s, in random order. 0 disables it.
        grayscale: Probability of a conversion to grayscale, after the jitter.
        photometric: Photometric distortion of SSD with torchvision's parameters: brightness, contrast, saturation, hue
            and the order of the channels each change with probability 0.5.
    """

    jitter: float = 0.0
    grayscale: float = 0.0
    photometric: bool = False

    def __bool__(self) -> bool:
        return self.jitter > 0 or self.grayscale > 0 or self.photometric

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Returns the operations of one image in order, float32 (MAX_COLOR_OPS, 2): pairs of ColorOp and amount."""
        ops = []
        if self.jitter and rng.random() < 0.8:
            strength, hue = 0.8 * self.jitter, 0.2 * self.jitter
            jitter = [
                (op, rng.uniform(max(0, 1 - strength), 1 + strength))
                for op in (ColorOp.BRIGHTNESS, ColorOp.CONTRAST, ColorOp.SATURATION)
            ]
            jitter.append((ColorOp.HUE, rng.uniform(-hue, hue)))
            ops += [jitter[index] for index in rng.permutation(len(jitter))]
        if self.photometric:
            ops += _photometric_distortion(rng)
        if self.grayscale and rng.random() < self.grayscale:
            ops.append((ColorOp.GRAYSCALE, 0))
        ops += [(ColorOp.NONE, 0)] * (MAX_COLOR_OPS - len(ops))
        return np.array(ops, dtype=np.float32)


def _photometric_distortion(rng: np.random.Generator) -> list[tuple[ColorOp, float]]:
    apply = rng.random(5) < 0.5
    contrast = (apply[1], ColorOp.CONTRAST, rng.uniform(0.5, 1.5) if apply[1] else 1.0)
    contrast_first = rng.random() < 0.5
    brightness = (apply[0], ColorOp.BRIGHTNESS, rng.uniform(0.875, 1.125))
    saturation = (apply[2], ColorOp.SATURATION, rng.uniform(0.5, 1.5))
    hue = (apply[3], ColorOp.HUE, rng.uniform(-0.05, 0.05))
    channels = (apply[4], ColorOp.PERMUTE_CHANNELS, int(rng.integers(len(CHANNEL_ORDERS))))
    middle = (contrast, saturation, hue) if contrast_first else (saturation, hue, contrast)
    return [(op, amount) for chosen, op, amount in (brightness, *middle, channels) if chosen]


def apply_color_ops(pixel_values: torch.Tensor, valid_sizes: torch.Tensor, color_ops: torch.Tensor) -> torch.Tensor:
    """Applies each image's color operations to its valid part; the padding keeps its color.

    Args:
        pixel_values: uint8 (B, 3, S, S), on any device. It is not modified.
        valid_sizes: (B, 2), on the CPU: `PaddedImage.valid_size` of each image.
        color_ops: (B, MAX_COLOR_OPS, 2), on the CPU: from `ColorAugmentation.draw`.
    """
    result = pixel_values.clone()
    for padded, (height, width), ops in zip(result, valid_sizes.tolist(), color_ops.tolist(), strict=True):
        image = padded[:, :height, :width]
        for op, amount in ops:
            if op != ColorOp.NONE:
                image = COLOR_FUNCTIONS[int(op)](image, amount)
        padded[:, :height, :width] = image
    return result
