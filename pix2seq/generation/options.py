"""Options and exceptions of decoding."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodingOptions:
    """Options of decoding, see docs/decoding.md.

    Args:
        max_objects: Maximum number of objects per image. Each object has five tokens.
        top_p: Probability mass of nucleus sampling, see `sample_top_p`. 0 is greedy decoding and 1 samples from the
            whole distribution. The paper uses 0.4.
        temperature: Temperature of the softmax that tokens are sampled from. Scores do not depend on it.
        seed: Seed of the sampling. The random numbers of an image depend on its pixels and on the seed alone.
        noise_patience: Ends the sequence of an image after this many consecutive objects whose score is below
            `noise_threshold`. 0 disables it, so that a model trained with noise objects generates `max_objects`.
        noise_threshold: Score below which `noise_patience` counts an object as noise.
        expectation_radius: Replaces a coordinate by the mean of the bins at most this far from the sampled bin,
            weighted by their probabilities. 0 keeps the centre of the sampled bin.
        box_score_power: Multiplies the score of an object by the probability of its four coordinates to this power.
            The probability of a coordinate is that of the bins within `expectation_radius`. 0 disables it.

    Raises:
        ValueError: A value is out of range.
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
            raise ValueError(f"max_objects is {self.max_objects}: must be at least 1")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: must be 0 (greedy) to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: must be above 0 (for greedy decoding use top_p 0)")
        if self.noise_patience < 0:
            raise ValueError(f"noise_patience is {self.noise_patience}: must be at least 0")
        if not 0 <= self.noise_threshold <= 1:
            raise ValueError(f"noise_threshold is {self.noise_threshold}: must be 0 to 1")
        if self.expectation_radius < 0:
            raise ValueError(f"expectation_radius is {self.expectation_radius}: must be at least 0")
        if not self.box_score_power >= 0:
            raise ValueError(f"box_score_power is {self.box_score_power}: must be at least 0")

    @property
    def needs_neighborhood(self) -> bool:
        """Whether decoding computes `neighborhood_mean` for every coordinate."""
        return self.expectation_radius > 0 or self.box_score_power > 0


class Interrupted(Exception):
    """Decoding was interrupted, because `interrupted()` returned True."""


class NonFiniteLogits(RuntimeError):
    """The logits of a model are NaN or infinite.

    Args:
        rows: Indices of the affected images in the batch.
    """

    def __init__(self, rows: list[int]):
        super().__init__(f"the model's logits are not finite for images {rows} of the batch")
        self.rows = rows
