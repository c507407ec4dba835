"""Colour augmentation: decided by the given generator, painted on the picture and not on the padding."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from pix2seq.colors import (
    BRIGHTNESS,
    CHANNELS,
    CONTRAST,
    GREY,
    HUE,
    MOST_CHANGES,
    NOTHING,
    SATURATION,
    ColorAugmentation,
    apply_color_ops,
)
from pix2seq.transforms import PAD_VALUE


def draws(augmentation: ColorAugmentation, count: int = 400) -> np.ndarray:
    return np.stack([augmentation.draw(np.random.default_rng(seed)) for seed in range(count)])


def batch(size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)


def test_nothing_is_off():
    assert not ColorAugmentation()
    assert ColorAugmentation(jitter=0.1)
    assert ColorAugmentation(grayscale=0.1)
    assert ColorAugmentation(photometric=True)


def test_jitter_has_the_authors_figures():
    """SimCLR: probability 0.8; brightness, contrast, saturation within 0.8 s, hue within 0.2 s; any order."""
    found = draws(ColorAugmentation(jitter=0.5))
    assert found.shape == (400, MOST_CHANGES, 2)
    on = found[:, 0, 0] != NOTHING
    assert 0.73 < on.mean() < 0.87
    for which, low, high in ((BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.6, 1.4), (SATURATION, 0.6, 1.4), (HUE, -0.1, 0.1)):
        factors = found[on, :, 1][found[on, :, 0] == which]
        assert len(factors) == on.sum()
        assert low <= factors.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < factors.max() <= high
    assert len({tuple(order) for order in found[on, :4, 0]}) > 20  # of 24


def test_grey_has_its_probability():
    assert 0.13 < (draws(ColorAugmentation(grayscale=0.2))[:, :, 0] == GREY).any(axis=1).mean() < 0.27
    assert (draws(ColorAugmentation(grayscale=1.0))[:, 0, 0] == GREY).all()


def test_photometric_distortion_has_torchvisions_figures():
    found = draws(ColorAugmentation(photometric=True))
    limits = {BRIGHTNESS: (0.875, 1.125), CONTRAST: (0.5, 1.5), SATURATION: (0.5, 1.5), HUE: (-0.05, 0.05)}
    for which, (low, high) in limits.items():
        factors = found[:, :, 1][found[:, :, 0] == which]
        assert 0.42 < len(factors) / 400 < 0.58
        assert low <= factors.min() < factors.max() <= high
    assert set(found[:, :, 1][found[:, :, 0] == CHANNELS]) == set(range(6))
    contrast_first = [
        row.tolist().index(CONTRAST) < row.tolist().index(SATURATION)
        for row in found[:, :, 0]
        if CONTRAST in row and SATURATION in row
    ]
    assert 0.3 < np.mean(contrast_first) < 0.7


@pytest.mark.parametrize(
    ("which", "amount", "reference"),
    [
        (BRIGHTNESS, 0.5, lambda image: F.adjust_brightness(image, 0.5)),
        (CONTRAST, 1.5, lambda image: F.adjust_contrast(image, 1.5)),
        (SATURATION, 0.25, lambda image: F.adjust_saturation(image, 0.25)),
        (HUE, 0.125, lambda image: F.adjust_hue(image, 0.125)),
        (GREY, 0, lambda image: F.rgb_to_grayscale(image, 3)),
        (CHANNELS, 3, lambda image: image[[1, 2, 0]]),
    ],
)
def test_each_change_is_torchvisions_on_the_picture_alone(which, amount, reference):
    pixels = batch()
    pixels[:, :, 16:], pixels[:, :, :, 20:] = PAD_VALUE, PAD_VALUE
    colors = torch.zeros(2, MOST_CHANGES, 2)
    colors[1, 0] = torch.tensor([which, amount])
    given = pixels.clone()
    painted = apply_color_ops(pixels, torch.tensor([[24, 24], [16, 20]]), colors)
    assert torch.equal(pixels, given)  # not in place
    assert torch.equal(painted[0], pixels[0])
    assert torch.equal(painted[1, :, :16, :20], reference(pixels[1, :, :16, :20]))
    assert (painted[1, :, 16:] == PAD_VALUE).all()
    assert (painted[1, :, :, 20:] == PAD_VALUE).all()


def test_changes_follow_each_other_in_order():
    pixels = batch()
    colors = torch.zeros(2, MOST_CHANGES, 2)
    colors[:, 0] = torch.tensor([BRIGHTNESS, 1.8])
    colors[:, 1] = torch.tensor([GREY, 0.0])
    sizes = torch.tensor([[24, 24]] * 2)
    expected = torch.stack([F.rgb_to_grayscale(F.adjust_brightness(image, 1.8), 3) for image in pixels])
    assert torch.equal(apply_color_ops(pixels, sizes, colors), expected)
    assert not torch.equal(apply_color_ops(pixels, sizes, colors.flip(1)), expected)  # colours are cut off at white


def test_all_options_together_are_one_array():
    """More changes than there were places for ended a run that had both."""
    for jitter in (0.0, 0.5):
        for photometric in (False, True):
            found = draws(ColorAugmentation(jitter, 0.5, photometric and not jitter), 300)
            assert found.shape == (300, MOST_CHANGES, 2)
