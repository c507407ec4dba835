"""Repeat factor sampling: images with rare classes occur several times in an epoch (Gupta et al. 2019, LVIS)."""

import numpy as np

from pix2seq.data.coco import Annotations


def repeat_factors(annotations: Annotations, threshold: float) -> np.ndarray:
    """How often each image occurs in an epoch on average.

    A class that a share f of the images contains has the factor max(1, sqrt(threshold / f)), and an image has the
    largest factor of its classes. Only objects that training uses count.

    Args:
        annotations: The training images.
        threshold: Images with a class that a smaller share of the images contains are repeated.

    Returns:
        float64 (N,), at least 1.
    """
    image_of_object = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    used = annotations.trainable
    num_classes = len(annotations.categories.ids)
    pairs = np.unique(image_of_object[used] * num_classes + annotations.labels[used])
    images, classes = np.divmod(pairs, num_classes)
    frequencies = np.bincount(classes, minlength=num_classes) / len(annotations)
    factors = np.ones(len(annotations))
    np.maximum.at(factors, images, np.sqrt(threshold / frequencies[classes]))
    return factors


def epoch_length(factors: np.ndarray) -> int:
    """Number of samples of an epoch, the same in every epoch: the sum of the factors, rounded."""
    return int(np.floor(factors).sum()) + round(float((factors % 1).sum()))


def draw_epoch(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws how often each image occurs in an epoch.

    It is the integer part of its factor, and more for images that are drawn by systematic sampling in a random order:
    in proportion to the fractional parts, and so many that the total is `epoch_length`. Because this total is rounded,
    an image of a very small dataset can be drawn twice.

    Returns:
        int64 (N,), with the sum `epoch_length(factors)`.
    """
    counts = np.floor(factors).astype(np.int64)
    order = rng.permutation(len(factors))
    ends = np.cumsum(factors[order] % 1)
    num_extra = epoch_length(factors) - counts.sum()
    if num_extra:
        points = (rng.random() + np.arange(num_extra)) * (ends[-1] / num_extra)
        positions = np.searchsorted(ends, points, side="right").clip(max=len(order) - 1)
        np.add.at(counts, order[positions], 1)
    return counts
