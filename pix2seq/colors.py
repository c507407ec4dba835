"""Colour augmentation: decided with the rest of an example, by a worker; painted on the device, a batch at a time."""

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

NOTHING, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, CHANNELS = range(7)
MOST_CHANGES = 6
_CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True)
class ColorAugmentation:
    """What may happen to the colours of an image.

    jitter        strength of SimCLR's colour jitter, as in the authors' code: with probability 0.8 brightness,
                  contrast and saturation by up to 0.8 of it and hue by up to 0.2 of it, in random order (0: off)
    grayscale     probability that all colour is taken away, after the jitter
    photometric   the distortion of SSD, with torchvision's figures: each of brightness, contrast, saturation, hue and
                  the order of the channels with probability one half
    """

    jitter: float = 0.0
    grayscale: float = 0.0
    photometric: bool = False

    def __bool__(self) -> bool:
        return self.jitter > 0 or self.grayscale > 0 or self.photometric

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The changes of one image, float32 (MOST_CHANGES, 2): rows (which, how much), in order."""
        changes = []
        if self.jitter and rng.random() < 0.8:
            strong, hue = 0.8 * self.jitter, 0.2 * self.jitter
            factors = [
                (which, rng.uniform(max(0, 1 - strong), 1 + strong)) for which in (BRIGHTNESS, CONTRAST, SATURATION)
            ]
            factors.append((HUE, rng.uniform(-hue, hue)))
            changes += [factors[index] for index in rng.permutation(len(factors))]
        if self.photometric:
            chosen = rng.random(5) < 0.5
            contrast = [(CONTRAST, rng.uniform(0.5, 1.5))] if chosen[1] else []
            contrast_first = rng.random() < 0.5
            changes += [(BRIGHTNESS, rng.uniform(0.875, 1.125))] * bool(chosen[0])
            changes += contrast if contrast_first else []
            changes += [(SATURATION, rng.uniform(0.5, 1.5))] * bool(chosen[2])
            changes += [(HUE, rng.uniform(-0.05, 0.05))] * bool(chosen[3])
            changes += [] if contrast_first else contrast
            changes += [(CHANNELS, rng.integers(len(_CHANNEL_ORDERS)))] * bool(chosen[4])
        if self.grayscale and rng.random() < self.grayscale:
            changes.append((GREY, 0))
        changes += [(NOTHING, 0)] * (MOST_CHANGES - len(changes))
        return np.array(changes, dtype=np.float32)


def apply_color_ops(pixel_values: torch.Tensor, sizes: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
    """A batch with its colours changed, on its device: uint8 (B, 3, S, S).

    sizes    (B, 2), on the CPU: (height, width) of what the picture covers; the padding keeps its colour
    colors   (B, MOST_CHANGES, 2), on the CPU: see ColorAugmentation.draw
    """
    painted = pixel_values.clone()
    for canvas, (height, width), changes in zip(painted, sizes.tolist(), colors.tolist(), strict=True):
        image = canvas[:, :height, :width]
        for which, amount in changes:
            image = _change(image, int(which), amount)
        canvas[:, :height, :width] = image
    return painted


def _change(image: torch.Tensor, which: int, amount: float) -> torch.Tensor:
    if which == BRIGHTNESS:
        return F.adjust_brightness(image, amount)
    if which == CONTRAST:
        return F.adjust_contrast(image, amount)
    if which == SATURATION:
        return F.adjust_saturation(image, amount)
    if which == HUE:
        return F.adjust_hue(image, amount)
    if which == GREY:
        return F.rgb_to_grayscale(image, num_output_channels=3)
    if which == CHANNELS:
        return F.permute_channels(image, list(_CHANNEL_ORDERS[int(amount)]))
    return image
