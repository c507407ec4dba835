"""A batch of sentences while they are written, and the objects they come to."""

import dataclasses
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from pix2seq.generation.options import DecodingOptions, Detections, NonFiniteLogits
from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT, Tokenizer


@dataclass
class DecodingState:
    """Of R pictures of a batch. A sentence has L tokens at most.

    rows       (R,)      which picture of the batch     tokens     (R, L), EOS where nothing was written
    labels     (R, N)    and scores (R, N) of objects   uniforms   (R, L), the randomness of each token, or None
    noise      (R,)      objects in a row, the last one among them, that score below `noise_threshold`
    passes     (R,)      how often the decoder was run
    offsets    (R, L), in bins, from a coordinate's token to where it lies, and masses (R, L): see `around`
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor
    uniforms: torch.Tensor | None
    noise: torch.Tensor
    passes: torch.Tensor
    offsets: torch.Tensor
    masses: torch.Tensor

    @classmethod
    def create(cls, pixel_values: torch.Tensor, tokenizer: Tokenizer, options: DecodingOptions) -> "DecodingState":
        batch, device = len(pixel_values), pixel_values.device
        length = TOKENS_PER_OBJECT * options.max_objects
        uniforms = None
        if options.top_p > 0:
            keys = _keys(pixel_values)
            uniforms = np.stack([np.random.default_rng((options.seed, key)).random(length) for key in keys])
            uniforms = torch.from_numpy(uniforms).to(device, torch.float32)
        return cls(
            rows=torch.arange(batch, device=device),
            tokens=torch.full((batch, length), tokenizer.eos_id, device=device),
            labels=torch.zeros(batch, options.max_objects, dtype=torch.long, device=device),
            scores=torch.zeros(batch, options.max_objects, device=device),
            uniforms=uniforms,
            noise=torch.zeros(batch, dtype=torch.long, device=device),
            passes=torch.zeros(batch, dtype=torch.long, device=device),
            offsets=torch.zeros(batch, length, dtype=torch.float64, device=device),
            masses=torch.ones(batch, length, dtype=torch.float64, device=device),
        )

    def select(self, indices: torch.Tensor) -> "DecodingState":
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return DecodingState(**{name: None if part is None else part[indices] for name, part in parts.items()})

    @classmethod
    def merge(cls, parts: list["DecodingState"]) -> "DecodingState":
        """Those of all pictures, in their order."""
        order = torch.cat([part.rows for part in parts]).argsort()
        names = [field.name for field in dataclasses.fields(cls) if getattr(parts[0], field.name) is not None]
        whole = {name: torch.cat([getattr(part, name) for part in parts])[order] for name in names}
        return cls(**{"uniforms": None} | whole)

    def detections(self, tokenizer: Tokenizer, box_score_power: float = 0.0) -> list[Detections]:
        """The objects of each picture. A sentence ends at its first EOS. Raises NonFiniteLogits."""
        labels, scores, passes = (part.cpu().numpy() for part in (self.labels, self.scores, self.passes))
        tokens, offsets, masses = (
            part.cpu().numpy().reshape(len(part), -1, TOKENS_PER_OBJECT)
            for part in (self.tokens, self.offsets, self.masses)
        )
        finite = np.isfinite(scores).all(axis=1) & np.isfinite(offsets + masses).all(axis=(1, 2))
        if not finite.all():
            raise NonFiniteLogits((~finite).nonzero()[0].tolist())
        written = (tokens != tokenizer.eos_id).all(axis=-1).cumprod(axis=1).astype(bool)
        boxes = tokenizer.dequantize((tokens + offsets)[..., [1, 0, 3, 2]])
        # Of corners that are close, averages may lie the wrong way around.
        boxes[..., 2:] = np.maximum(boxes[..., :2], boxes[..., 2:])
        scores = scores.astype(np.float64)
        if box_score_power:
            scores *= masses[..., :CLASS_SLOT].prod(axis=-1) ** box_score_power
        return [
            Detections(boxes[i][has], labels[i][has], scores[i][has], int(passes[i])) for i, has in enumerate(written)
        ]


def _keys(pixel_values: torch.Tensor) -> list[int]:
    """A number for each picture that tells it from others."""
    rows = pixel_values.detach().cpu().contiguous().view(torch.uint8)
    return [zlib.crc32(row.numpy()) for row in rows]
