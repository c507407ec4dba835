"""Options and exceptions of decoding."""

import math
from dataclasses import dataclass, field, fields

import torch


def option(default, help: str, minimum: float = 0, maximum: float = math.inf, above_minimum: bool = False):
    """A field of DecodingOptions.

    Args:
        default: Default value. It must not change the results of other options.
        help: Help text of the flag that `evaluate.py`, `predict.py` and the demo have for every option.
        minimum: Smallest allowed value.
        maximum: Largest allowed value; infinity itself is not allowed.
        above_minimum: The value must be above the minimum.
    """
    allowed = f"above {minimum}" if above_minimum else f"at least {minimum}"
    if math.isfinite(maximum):
        allowed = f"{minimum} to {maximum}"

    def is_valid(value) -> bool:
        return math.isfinite(value) and minimum <= value <= maximum and not (above_minimum and value == minimum)

    return field(default=default, metadata={"help": help, "is_valid": is_valid, "allowed": allowed})


@dataclass(frozen=True)
class DecodingOptions:
    """Options of decoding, see docs/decoding.md. Every option is a flag of the commands that run a trained model.

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
        num_samples: Number of sequences that are sampled for each image. Above 1, their objects are merged: of objects
            of the same class that overlap, the one with the highest score remains, and at most `max_objects` in all.
        box_score_power: Multiplies the score of an object by the probability of its four coordinates to this power.
            The probability of a coordinate is that of the bins within `expectation_radius`. 0 disables it.

    Raises:
        ValueError: A value is out of range.
    """

    max_objects: int = option(100, "objects to decode for an image", minimum=1)
    top_p: float = option(0.4, "nucleus sampling; 0 is greedy decoding", maximum=1)
    temperature: float = option(1.0, "sampling temperature", above_minimum=True)
    seed: int = option(0, "seed of sampling", maximum=2**32 - 1)
    num_samples: int = option(
        1,
        "sequences to sample for each image; the objects of several are merged by non-maximum suppression",
        minimum=1,
    )
    noise_patience: int = option(
        0, "stop after this many consecutive objects that score below --noise_threshold; 0 disables it"
    )
    noise_threshold: float = option(0.5, "score limit of --noise_patience", maximum=1)
    expectation_radius: int = option(
        0, "a coordinate is the probability-weighted mean of the bins up to this far from the decoded bin"
    )
    box_score_power: float = option(
        0.0,
        "multiply scores by the product of the probabilities of the four coordinates to this power; a probability is "
        "that of the bins within --expectation_radius",
    )

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if not option.metadata["is_valid"](value):
                raise ValueError(f"{option.name} {value}: must be {option.metadata['allowed']}")
        if self.num_samples > 1 and self.top_p == 0:
            raise ValueError(f"num_samples {self.num_samples}: must be 1 with top_p 0, which gives equal sequences")

    @property
    def needs_neighborhood(self) -> bool:
        """Whether decoding computes `neighborhood_mean` for every coordinate."""
        return self.expectation_radius > 0 or self.box_score_power > 0

    def process_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Changes the logits from which the next token is sampled. Scores and coordinates use the original logits.

        Args:
            logits: Logits (B, R) of the next token, -inf where the grammar does not allow it.

        Returns:
            The new logits (B, R). GPUs capture the operations as a CUDA graph, so `.item()` is not allowed.
        """
        return logits / self.temperature if self.top_p > 0 else logits


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
