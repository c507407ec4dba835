"""Training sequences: object order, noise objects, class corruption and token weights (Pix2Seq sections 2.1 to 2.3).

One class builds inputs, labels and weights, so that they cannot get out of step: `labels[t]` is the target of the
prediction after `input_ids[: t + 1]`, and `token_weights[t]` is its weight in the loss.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pix2seq.tokenizer import CLASS_SLOT, NOISE_LABEL, TOKENS_PER_OBJECT, Tokenizer

NO_BOXES = np.zeros((0, 4))

ObjectOrder = Literal["random", "top_to_bottom", "area", "distance", "none"]
ClassCorruption = Literal["none", "rand_cls", "rand_n_fake_cls", "real_n_fake_cls", "real_n_rand_n_fake_cls"]

# For each mode, the probabilities that an input class token is the true class, a random class or NOISE.
CORRUPTION_PROBABILITIES = {
    "none": (1.0, 0.0, 0.0),
    "rand_cls": (0.0, 1.0, 0.0),
    "rand_n_fake_cls": (0.0, 0.5, 0.5),
    "real_n_fake_cls": (0.5, 0.0, 0.5),
    "real_n_rand_n_fake_cls": (0.5, 0.25, 0.25),
}


@dataclass(frozen=True)
class SequenceBuilder:
    """Builds the training sequence of an image. The defaults are those of the authors' code.

    With `noise_objects` (the paper's sequence augmentation, section 2.3), every sequence holds exactly `max_objects`
    objects: the real ones, then synthetic boxes of class NOISE. The coordinates of a noise object have weight 0, its
    class has weight `noise_weight`. The model learns to reject wrong boxes, and at inference it can always generate
    `max_objects` objects. Without `noise_objects`, a sequence is the real objects followed by EOS.

    Args:
        tokenizer: Defines the vocabulary.
        max_objects: Number of object slots. Of an image with more objects, the first ones in `order` are used.
        order: Order of the real objects: "random" (a new permutation for every call), "top_to_bottom" (of the top
            left corner: by y1, then by x1), "area" (largest first), "distance" (of the top left corner from the
            origin, nearest first) or "none" (as annotated).
        noise_objects: Whether noise objects fill the remaining slots.
        class_corruption: How class tokens of the input are replaced, see `CORRUPTION_PROBABILITIES`. The labels are
            never corrupted.
        noise_weight: Loss weight of the class token of a noise object.
        eos_weight: Loss weight of EOS.
        box_jitter: Maximum shift of each edge of a real box, as a fraction of the box's width or height.
        mix_rate: Probability that the noise objects of an image are mixed into the real ones instead of following
            them. Near-duplicates still follow all real objects. A fixed order then applies to the mixture.
    """

    tokenizer: Tokenizer
    max_objects: int = 100
    order: ObjectOrder = "random"
    noise_objects: bool = True
    class_corruption: ClassCorruption = "rand_n_fake_cls"
    noise_weight: float = 1.0
    eos_weight: float = 0.1
    box_jitter: float = 0.0
    mix_rate: float = 0.0

    @property
    def length(self) -> int:
        """Number of tokens L of every sequence."""
        return TOKENS_PER_OBJECT * self.max_objects + (0 if self.noise_objects else 1)

    def __call__(
        self,
        boxes: np.ndarray,
        labels: np.ndarray,
        rng: np.random.Generator,
        valid_fraction: tuple[float, float] = (1, 1),
        hard_negatives: np.ndarray = NO_BOXES,
    ) -> dict[str, np.ndarray]:
        """Builds one training sequence.

        Args:
            boxes: Real boxes (N, 4), xyxy in [0, 1] of the padded image.
            labels: Their labels (N,), in 0 ... C-1.
            rng: Source of all randomness.
            valid_fraction: The (width, height) of the image as fractions of the padded image. Noise boxes lie inside.
            hard_negatives: False detections (K, 4), like `boxes`. At most half of the noise boxes are some of them.

        Returns:
            "input_ids" (L,) int64, "labels" (L,) int64 and "token_weights" (L,) float32.
        """
        order = order_objects(boxes, self.order, rng)[: self.max_objects]
        boxes, labels = boxes[order], labels[order]
        num_real = len(boxes)
        num_noise = self.max_objects - num_real if self.noise_objects else 0
        extent = np.array([*valid_fraction, *valid_fraction])
        noise, is_duplicate = noise_boxes(boxes / extent, num_noise, rng, hard_negatives / extent)
        noise *= extent
        if self.box_jitter:
            boxes = np.clip(_jitter_edges(boxes, self.box_jitter, rng), 0.0, extent)

        targets = self.tokenizer.encode(
            np.concatenate([boxes, noise]), np.concatenate([labels, np.full(num_noise, NOISE_LABEL)])
        )
        weights = np.ones(targets.shape, dtype=np.float32)
        weights[num_real:, :CLASS_SLOT] = 0.0
        weights[num_real:, CLASS_SLOT] = self.noise_weight
        if self.mix_rate and rng.random() < self.mix_rate:
            mixed = self._mixed_order(np.concatenate([boxes, noise]), num_real, is_duplicate, rng)
            targets, weights = targets[mixed], weights[mixed]
        inputs = targets.copy()
        inputs[:, CLASS_SLOT] = self._corrupt_classes(targets[:, CLASS_SLOT], rng)
        return self._shift(inputs.reshape(-1), targets.reshape(-1), weights.reshape(-1))

    def _mixed_order(
        self, boxes: np.ndarray, num_real: int, is_duplicate: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Indices that mix noise objects into the real ones, which keep their order. Near-duplicates come last.

        With a fixed order, the noise objects take part in it: otherwise their place would give them away.
        """
        noise = num_real + np.arange(len(is_duplicate))
        mixed = np.concatenate([np.arange(num_real), noise[~is_duplicate]])
        if self.order in ("random", "none"):
            positions = rng.permutation(len(mixed))
            positions = np.concatenate([np.sort(positions[:num_real]), positions[num_real:]])
            mixed = mixed[np.argsort(positions)]
        else:
            mixed = mixed[order_objects(boxes[mixed], self.order, rng)]
        return np.concatenate([mixed, noise[is_duplicate]])

    def _corrupt_classes(self, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        keep, random, _ = CORRUPTION_PROBABILITIES[self.class_corruption]
        draw = rng.random(len(classes))
        first = self.tokenizer.first_class_id
        random_classes = rng.integers(first, first + self.tokenizer.num_classes, len(classes))
        return np.where(draw < keep, classes, np.where(draw < keep + random, random_classes, self.tokenizer.noise_id))

    def _shift(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Shifts the inputs right by one token, adds BOS and EOS, and pads to `length`."""
        tokenizer = self.tokenizer
        if not self.noise_objects:
            targets = np.append(targets, tokenizer.eos_id)
            weights = np.append(weights, np.float32(self.eos_weight))
        input_ids = np.concatenate([[tokenizer.bos_id], inputs])[: len(targets)]
        padding = (0, self.length - len(targets))
        return {
            "input_ids": np.pad(input_ids, padding, constant_values=tokenizer.pad_id),
            "labels": np.pad(targets, padding, constant_values=tokenizer.pad_id),
            "token_weights": np.pad(weights, padding),
        }


def order_objects(boxes: np.ndarray, order: ObjectOrder, rng: np.random.Generator) -> np.ndarray:
    """Returns the indices (N,) of the boxes (N, 4) in the given order."""
    if order == "random":
        return rng.permutation(len(boxes))
    if order == "top_to_bottom":
        return np.lexsort((boxes[:, 0], boxes[:, 1]))
    if order == "area":
        return np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable")
    if order == "distance":
        return np.argsort((boxes[:, :2] ** 2).sum(axis=1), kind="stable")
    return np.arange(len(boxes))


def noise_boxes(
    boxes: np.ndarray, count: int, rng: np.random.Generator, hard_negatives: np.ndarray = NO_BOXES
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the boxes of noise objects.

    Up to half of them are hard negatives, if there are any. Of the rest, a random number, uniform from 0 to all, are
    near-duplicates of real boxes: they teach the model not to predict an object twice. Half of the others are real
    boxes shifted to a random position and half are random boxes; all are random if the image has no object.

    Args:
        boxes: Real boxes (N, 4), xyxy in [0, 1] of the image without padding.
        count: Number of noise boxes.
        rng: Source of all randomness.
        hard_negatives: False detections (K, 4) in the same coordinates.

    Returns:
        Noise boxes (count, 4) in the same coordinates, and whether each is a near-duplicate (count,).
    """
    if num_hard := min(len(hard_negatives), count // 2):
        drawn, is_duplicate = noise_boxes(boxes, count - num_hard, rng)
        drawn = np.concatenate([drawn, rng.permutation(hard_negatives)[:num_hard]])
        order = rng.permutation(count)
        return drawn[order], np.append(is_duplicate, np.zeros(num_hard, bool))[order]
    num_duplicates = int(rng.integers(0, count + 1)) if len(boxes) else 0
    num_others = count - num_duplicates
    others = _random_boxes(num_others, rng)
    if len(boxes):
        others = np.concatenate([_shifted_boxes(boxes, num_others, rng), others])
        others = rng.permutation(others)[:num_others]
    duplicates = _jitter_edges(_sample_evenly(boxes, num_duplicates, rng), 0.1, rng)
    order = rng.permutation(count)
    return np.clip(np.concatenate([others, duplicates]), 0.0, 1.0)[order], order >= num_others


def _shifted_boxes(boxes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Real boxes with their width and height, at a uniformly random center."""
    sampled = _sample_evenly(boxes, count, rng)
    half_size = (sampled[:, 2:] - sampled[:, :2]) / 2
    center = rng.random((count, 2))
    return np.concatenate([center - half_size, center + half_size], axis=1)


def _random_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    half_size = np.abs(_truncated_normal((count, 2), 0.5, rng)) / 2
    center = rng.random((count, 2))
    return np.concatenate([center - half_size, center + half_size], axis=1)


def _jitter_edges(boxes: np.ndarray, max_shift: float, rng: np.random.Generator) -> np.ndarray:
    """Shifts each edge by up to `max_shift` of the box's width or height, normally distributed."""
    size = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return boxes + size * _truncated_normal((len(boxes), 4), max_shift / 2, rng)


def _sample_evenly(boxes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Samples `count` boxes; repetitions are spread evenly over the boxes."""
    if count == 0:
        return np.zeros((0, 4))
    indices = np.tile(np.arange(len(boxes)), count // len(boxes) + 1)
    return boxes[rng.permutation(indices)[:count]]


def _truncated_normal(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Normal values with mean 0, truncated at two sigma."""
    values = rng.normal(size=shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.normal(size=int(outside.sum()))
    return values * sigma
