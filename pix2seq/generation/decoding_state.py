"""The token sequences of a batch while they are generated."""

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pix2seq.generation.options import DecodingOptions
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer


@dataclass
class DecodingState:
    """R token sequences of the images of a batch, with at most N objects and L = 5 N tokens each.

    Args:
        indices: Indices (R,) of the sequences. With S samples of each image, those of image i are i S to i S + S - 1.
        tokens: Token ids (R, L), without BOS. EOS where no token was generated.
        labels: The most probable class (R, N) of each object.
        scores: The probability (R, N) of that class among all tokens. NaN if the logits are not finite.
        uniforms: Random numbers (R, L) for sampling, or None for greedy decoding.
        num_trailing_noise: Number (R,) of consecutive objects up to the last one with a score below `noise_threshold`.
        num_steps: Number (R,) of decoder steps.
        offsets: Signed offset (R, L), in bins, of the expected coordinate from its token, see `neighborhood_mean`.
        neighborhood_probs: Probability (R, L) of the bins around a coordinate, see `neighborhood_mean`.
    """

    indices: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor
    uniforms: torch.Tensor | None
    num_trailing_noise: torch.Tensor
    num_steps: torch.Tensor
    offsets: torch.Tensor
    neighborhood_probs: torch.Tensor

    @classmethod
    def create(cls, pixel_values: torch.Tensor, tokenizer: Tokenizer, options: DecodingOptions) -> "DecodingState":
        """Creates the state of a batch before the first token. The random numbers of an image depend on its pixels."""
        batch_size, device = len(pixel_values) * options.num_samples, pixel_values.device
        length = TOKENS_PER_OBJECT * options.max_objects
        uniforms = None
        if options.top_p > 0:
            # The first sample of an image does not depend on the number of samples.
            samples: list[tuple[int, ...]] = [(), *((number,) for number in range(1, options.num_samples))]
            seeds = [(options.seed, key, *sample) for key in _checksums(pixel_values) for sample in samples]
            generators = [np.random.default_rng(seed) for seed in seeds]
            numbers = np.stack([generator.random(length) for generator in generators])
            uniforms = torch.from_numpy(numbers).to(device, torch.float32)
        return cls(
            indices=torch.arange(batch_size, device=device),
            tokens=torch.full((batch_size, length), tokenizer.eos_id, device=device),
            labels=torch.zeros(batch_size, options.max_objects, dtype=torch.long, device=device),
            scores=torch.zeros(batch_size, options.max_objects, device=device),
            uniforms=uniforms,
            num_trailing_noise=torch.zeros(batch_size, dtype=torch.long, device=device),
            num_steps=torch.zeros(batch_size, dtype=torch.long, device=device),
            offsets=torch.zeros(batch_size, length, dtype=torch.float64, device=device),
            neighborhood_probs=torch.ones(batch_size, length, dtype=torch.float64, device=device),
        )

    def select(self, rows: torch.Tensor) -> "DecodingState":
        """Returns a copy of these rows."""
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        selected: dict[str, Any] = {name: None if value is None else value[rows] for name, value in fields.items()}
        return DecodingState(**selected)

    @classmethod
    def merge(cls, states: list["DecodingState"]) -> "DecodingState":
        """Merges the states of different sequences of a batch, in the order of their indices."""
        order = torch.cat([state.indices for state in states]).argsort()
        names = [field.name for field in dataclasses.fields(cls) if getattr(states[0], field.name) is not None]
        merged: dict[str, Any] = {"uniforms": None}
        merged |= {name: torch.cat([getattr(state, name) for state in states])[order] for name in names}
        return cls(**merged)


def _checksums(pixel_values: torch.Tensor) -> list[int]:
    """The CRC-32 of each image, which seeds its random numbers."""
    images = pixel_values.detach().cpu().contiguous().view(torch.uint8)
    return [zlib.crc32(image.numpy()) for image in images]
