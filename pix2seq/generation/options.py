"""What is asked of a sentence, and what comes of it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DecodingOptions:
    """top_p 0 is greedy decoding, 1 samples from the whole distribution; the authors found 0.4 best.

    noise_patience   a picture's sentence ends after so many objects in a row whose score is below `noise_threshold`:
                       what follows is noise, most likely (0: never, all `max_objects` are written)
    expectation_radius      a coordinate lies where the bins at most so many from the one that was written lie on average,
                       weighted by their probabilities (0: at that bin)
    sharpness          an object's score is multiplied by the probability of those bins of its four coordinates, to
                       this power (0: not at all): sharp boxes come first
    """

    max_objects: int = 100
    top_p: float = 0.4
    temperature: float = 1.0
    seed: int = 0
    noise_patience: int = 0
    noise_threshold: float = 0.5
    expectation_radius: int = 0
    box_score_power: float = 0.0

    def __post_init__(self):
        if self.max_objects < 1:
            raise ValueError(f"max_objects is {self.max_objects}: at least 1 is needed")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must lie in 0 ... 1 (0 is greedy)")
        if self.noise_patience < 0 or not 0 <= self.noise_threshold <= 1:
            raise ValueError(
                f"noise_patience is {self.noise_patience}, noise_threshold {self.noise_threshold}: at least 0, and 0 to 1"
            )
        if self.expectation_radius < 0 or self.box_score_power < 0:
            raise ValueError(
                f"expectation_radius is {self.expectation_radius}, sharpness {self.sharpness}: each must be at least 0"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}: it must be above 0 (for greedy decoding use top_p 0)"
            )

    @property
    def needs_neighborhood(self) -> bool:
        """Whether more is needed of a coordinate than its bin."""
        return self.expectation_radius > 0 or self.box_score_power > 0


@dataclass
class Detections:
    """One picture's objects, in the order they were written.

    boxes   float64 (N, 4), xyxy in [0, 1] of the canvas      labels   int64 (N,), contiguous
    scores  float64 (N,), the label's probability among all tokens: what the model gives to NOISE lowers it; with
            `sharpness`, times that of the coordinates
    passes  how often the decoder was run for it
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    passes: int = 0


class Interrupted(Exception):
    """Writing was broken off, because it was asked for."""


class NonFiniteLogits(RuntimeError):
    """A model said NaN or infinity. `rows`: of which pictures of the batch."""

    def __init__(self, rows: list[int]):
        super().__init__(f"the model's logits are not finite for pictures {rows} of the batch")
        self.rows = rows
