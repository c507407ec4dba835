"""One image's training sentence: object order, sequence augmentation, token weights and the shift.

Inputs, labels and weights are made in one place, so that they cannot drift apart: `labels[t]` is what the model must
say after reading `input_ids[: t + 1]`, and `weights[t]` is what that answer counts.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pix2seq.tokenizer import CLASS_SLOT, NOISE_LABEL, TOKENS_PER_OBJECT, Tokenizer

ObjectOrder = Literal["random", "area", "distance", "none"]
ClassCorruption = Literal["none", "rand_cls", "rand_n_fake_cls", "real_n_fake_cls", "real_n_rand_n_fake_cls"]

# Input class tokens under each corruption mode, as probabilities of (true class, random class, NOISE).
_CORRUPTION = {
    "none": (1.0, 0.0, 0.0),
    "rand_cls": (0.0, 1.0, 0.0),
    "rand_n_fake_cls": (0.0, 0.5, 0.5),
    "real_n_fake_cls": (0.5, 0.0, 0.5),
    "real_n_rand_n_fake_cls": (0.5, 0.25, 0.25),
}


@dataclass(frozen=True)
class SequenceBuilder:
    """Builds training sentences (Pix2Seq sections 2.2 and 2.3; figures from the authors' code).

    With `noise_objects`, every sentence holds exactly `max_objects` objects: the real ones first, then made-up boxes
    whose class is NOISE. Their coordinates have weight 0, so the model learns to say "nothing there" without learning
    where nothing is, and at test time it can always be asked for `max_objects` boxes. Without them a sentence is the
    real objects followed by EOS.

    max_objects      object slots in a sentence; an image with more keeps the first of the chosen order
    order            random (a new permutation each time), area (descending), distance (of the top left corner from
                     the origin, ascending) or none (as annotated)
    class_corruption what the model reads in place of the class tokens it has to predict; never changes the labels
    noise_weight     weight of a noise object's class token
    eos_weight       weight of EOS
    box_jitter       every edge of a real box is moved by up to this share of the box's width or height (0: not at all)
    mix_rate         probability that wrong noise boxes are scattered among the real ones instead of following them;
                     near-duplicates always follow what they repeat
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
        """Tokens in every sentence this builder makes."""
        return TOKENS_PER_OBJECT * self.max_objects + (0 if self.noise_objects else 1)

    def __call__(
        self,
        boxes: np.ndarray,
        labels: np.ndarray,
        rng: np.random.Generator,
        valid_fraction: tuple[float, float] = (1, 1),
    ) -> dict[str, np.ndarray]:
        """Boxes (N, 4) xyxy in [0, 1] of the canvas, labels (N,) -> input_ids, labels (int64) and weights (float32).

        Each result has shape (length,). `content` is the part of the canvas (width, height) the picture covers:
        noise boxes never lie in the padding.
        """
        chosen = _order(boxes, self.order, rng)[: self.max_objects]
        boxes, labels = boxes[chosen], labels[chosen]
        num_noise = self.max_objects - len(boxes) if self.noise_objects else 0
        extent = np.array([*valid_fraction, *valid_fraction])
        noise, repeats = noise_boxes(boxes / extent, num_noise, rng)
        noise *= extent
        if self.box_jitter:
            boxes = np.clip(_moved(boxes, self.box_jitter, rng), 0.0, extent)

        tokens = self.tokenizer.encode(
            np.concatenate([boxes, noise]), np.concatenate([labels, np.full(num_noise, NOISE_LABEL)])
        )
        weights = np.ones(tokens.shape, dtype=np.float32)
        weights[len(boxes) :, :CLASS_SLOT] = 0.0
        weights[len(boxes) :, CLASS_SLOT] = self.noise_weight
        if self.mix_rate and rng.random() < self.mix_rate:
            mixed = _scattered(len(boxes), repeats, rng)
            tokens, weights = tokens[mixed], weights[mixed]
        read = tokens.copy()
        read[:, CLASS_SLOT] = self._corrupt(tokens[:, CLASS_SLOT], rng)
        return self._shift(read.reshape(-1), tokens.reshape(-1), weights.reshape(-1))

    def _corrupt(self, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        keep, random, _ = _CORRUPTION[self.class_corruption]
        draw = rng.random(len(classes))
        first = self.tokenizer.first_class_id
        random_classes = rng.integers(first, first + self.tokenizer.num_classes, len(classes))
        return np.where(draw < keep, classes, np.where(draw < keep + random, random_classes, self.tokenizer.noise_id))

    def _shift(self, read: np.ndarray, said: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        tokenizer = self.tokenizer
        if not self.noise_objects:
            said = np.append(said, tokenizer.eos_id)
            weights = np.append(weights, np.float32(self.eos_weight))
        input_ids = np.concatenate([[tokenizer.bos_id], read])[: len(said)]
        sentence = {"input_ids": input_ids, "labels": said, "token_weights": weights}
        if padding := self.length - len(said):
            for name, fill in (("input_ids", tokenizer.pad_id), ("labels", tokenizer.pad_id), ("token_weights", 0)):
                sentence[name] = np.pad(sentence[name], (0, padding), constant_values=fill)
        return sentence


def noise_boxes(boxes: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`count` made-up boxes (count, 4) for an image with real `boxes` (N, 4), all xyxy in [0, 1] of the picture; and
    which of them are near-duplicates (count,).

    A random share are near-duplicates of real boxes: they teach "this one has been said already". The rest are wrong:
    half of them real boxes moved elsewhere, half random boxes (all random when the image has no object).
    """
    num_duplicates = int(rng.integers(0, count + 1)) if len(boxes) else 0
    num_wrong = count - num_duplicates
    wrong = _random_boxes(num_wrong, rng)
    if len(boxes):
        wrong = np.concatenate([_shifted(boxes, num_wrong, rng), wrong])
        wrong = rng.permutation(wrong)[:num_wrong]
    duplicates = _jittered(boxes, num_duplicates, rng)
    order = rng.permutation(count)
    return np.clip(np.concatenate([wrong, duplicates]), 0.0, 1.0)[order], order >= num_wrong


def _scattered(num_real: int, repeats: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order of real objects followed by noise: wrong noise boxes scattered among the real ones, whose own order
    stays, and near-duplicates behind both."""
    noise = num_real + np.arange(len(repeats))
    front = np.concatenate([np.arange(num_real), noise[~repeats]])
    places = rng.permutation(len(front))
    places = np.concatenate([np.sort(places[:num_real]), places[num_real:]])
    return np.concatenate([front[np.argsort(places)], noise[repeats]])


def _shifted(boxes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Real boxes with their size kept, at a uniformly random centre."""
    picked = _pick(boxes, count, rng)
    half_size = (picked[:, 2:] - picked[:, :2]) / 2
    centre = rng.random((count, 2))
    return np.concatenate([centre - half_size, centre + half_size], axis=1)


def _random_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    half_size = np.abs(_truncated_normal((count, 2), 0.5, rng)) / 2
    centre = rng.random((count, 2))
    return np.concatenate([centre - half_size, centre + half_size], axis=1)


def _jittered(boxes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Real boxes with each edge moved by up to a tenth of the box's width or height."""
    return _moved(_pick(boxes, count, rng), 0.1, rng)


def _moved(boxes: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    """Each edge moved by up to `most` of the box's width or height, normally distributed."""
    size = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return boxes + size * _truncated_normal((len(boxes), 4), most / 2, rng)


def _pick(boxes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the boxes with repetition, spread evenly over them."""
    if count == 0:
        return np.zeros((0, 4))
    tiled = np.tile(np.arange(len(boxes)), count // len(boxes) + 1)
    return boxes[rng.permutation(tiled)[:count]]


def _truncated_normal(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Normal values, redrawn while they are further than two sigma from 0."""
    values = rng.normal(size=shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.normal(size=int(outside.sum()))
    return values * sigma


def _order(boxes: np.ndarray, order: ObjectOrder, rng: np.random.Generator) -> np.ndarray:
    if order == "random":
        return rng.permutation(len(boxes))
    if order == "area":
        return np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable")
    if order == "distance":
        return np.argsort((boxes[:, :2] ** 2).sum(axis=1), kind="stable")
    return np.arange(len(boxes))
