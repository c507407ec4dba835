"""Writing the sentence: a grammar, a sampling rule and a loop over single tokens.

The loop knows nothing of boxes, the grammar nothing of the model. A row's answer depends on its picture alone, not on
the rows it shares a batch with.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT, Tokenizer


@dataclass(frozen=True)
class DecodingOptions:
    """top_p 0 is greedy decoding, 1 samples from the whole distribution; the authors found 0.4 best.

    stop_after_noise   a picture's sentence ends after so many objects in a row whose score is below `noise_score`:
                       what follows is noise, most likely (0: never, all `max_objects` are written)
    """

    max_objects: int = 100
    top_p: float = 0.4
    temperature: float = 1.0
    seed: int = 0
    stop_after_noise: int = 0
    noise_score: float = 0.5

    def __post_init__(self):
        if self.max_objects < 1:
            raise ValueError(f"max_objects is {self.max_objects}: at least 1 is needed")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must lie in 0 ... 1 (0 is greedy)")
        if self.stop_after_noise < 0 or not 0 <= self.noise_score <= 1:
            raise ValueError(
                f"stop_after_noise is {self.stop_after_noise}, noise_score {self.noise_score}: at least 0, and 0 to 1"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}: it must be above 0 (for greedy decoding use top_p 0)"
            )


@dataclass
class Detections:
    """One picture's objects, in the order they were written.

    boxes   float64 (N, 4), xyxy in [0, 1] of the canvas      labels   int64 (N,), contiguous
    scores  float64 (N,), the label's probability among all tokens: what the model gives to NOISE lowers it
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


class Interrupted(Exception):
    """Writing was broken off, because it was asked for."""


class NonFiniteLogits(RuntimeError):
    """A model said NaN or infinity. `rows`: of which pictures of the batch."""

    def __init__(self, rows: list[int]):
        super().__init__(f"the model's logits are not finite for pictures {rows} of the batch")
        self.rows = rows


class Grammar:
    """Which tokens may come next. The kind of a token follows from its slot; no row looks at another.

    slots 0, 1 (y1, x1)   any bin; and EOS in slot 0, if the model was trained to say it
    slots 2, 3 (y2, x2)   bins not before the row's own y1 or x1
    slot 4 (class)        any class, or NOISE

    EOS is not offered to a model trained with noise objects: it never learnt when to say it.
    """

    def __init__(self, tokenizer: Tokenizer, allow_eos: bool, device: torch.device | str = "cpu"):
        bins = slice(tokenizer.first_bin_id, tokenizer.vocab_size)
        everything = slice(0, tokenizer.vocab_size)
        # What has to be computed of the logits: no more than what may be said, and all where a score is taken.
        self.rows = (everything if allow_eos else bins, bins, bins, bins, everything)
        ids = torch.arange(tokenizer.vocab_size, device=device)
        self.bins = torch.arange(tokenizer.num_bins, device=device)
        self.first_bin_id = tokenizer.first_bin_id
        classes = (ids >= tokenizer.noise_id) & (ids < tokenizer.first_bin_id)
        self.forbidden = {CLASS_SLOT: ~classes}
        if allow_eos:
            self.forbidden[0] = (ids < tokenizer.first_bin_id) & (ids != tokenizer.eos_id)

    def __call__(self, logits: torch.Tensor, slot: int, corner: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, R) of `rows[slot]`, with -inf for every token that may not come. `corner` (B,): the token two
        places before, which in slots 2 and 3 is the box's first corner in the same direction."""
        if slot in self.forbidden:
            return logits.masked_fill(self.forbidden[slot], -torch.inf)
        if slot in (2, 3):
            # A box may be thinner than a bin, but not turned inside out. Its own corner is always a legal answer.
            return logits.masked_fill(self.bins < corner[:, None] - self.first_bin_id, -torch.inf)
        return logits


def sample_top_p(logits: torch.Tensor, top_p: float, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row of logits (B, V), by the authors' rule: of the tokens in order of probability, keep those
    whose cumulative probability, their own included, is at most `top_p`, and the first in any case.

    This drops the token that crosses p, which Hugging Face's TopPLogitsWarper keeps. `uniform` (B,) in [0, 1) is the
    randomness: the token is where it falls in the cumulative distribution of those kept.
    """
    if top_p == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    kept = (probabilities.cumsum(-1) <= top_p) & (probabilities > 0)
    kept[:, 0] = True
    cumulative = (probabilities * kept).cumsum(-1)
    drawn = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, drawn.clamp(max=kept.sum(-1, keepdim=True) - 1)).squeeze(-1)


@torch.inference_mode()
def generate(
    model,
    pixel_values: torch.Tensor,
    tokenizer: Tokenizer,
    options: DecodingOptions,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Detections]:
    """Pixels (B, 3, S, S) -> the objects the model writes for each.

    model   offers `start(pixels, length) -> steps`, `step(ids (B,), position, steps, rows) -> logits (B, V)`, of the
            `rows` of V that are asked for, and `config.noise_objects`; `steps.keep(indices)` goes on with a part of
            the batch. It should be in eval mode

    Before each object asks `interrupted`; at a yes, raises Interrupted. Raises NonFiniteLogits.
    What is sampled depends on the picture and options.seed: not on its batch, its place in a dataset or the device.
    """
    batch, device = len(pixel_values), pixel_values.device
    length = TOKENS_PER_OBJECT * options.max_objects
    may_end, may_stop = not model.config.noise_objects, options.stop_after_noise > 0
    grammar = Grammar(tokenizer, allow_eos=may_end, device=device)
    uniforms = None
    if options.top_p > 0:
        keys = _keys(pixel_values)
        uniforms = np.stack([np.random.default_rng((options.seed, key)).random(length) for key in keys])
        uniforms = torch.from_numpy(uniforms).to(device, torch.float32)
    is_class = slice(tokenizer.first_class_id, tokenizer.first_bin_id)

    steps = model.start(pixel_values, length)
    token = torch.full((batch,), tokenizer.bos_id, device=device)
    writing = _Sentences(
        torch.arange(batch, device=device),
        torch.full((batch, length), tokenizer.eos_id, device=device),
        torch.zeros(batch, options.max_objects, dtype=torch.long, device=device),
        torch.zeros(batch, options.max_objects, device=device),
    )
    done = []
    noise_in_a_row = torch.zeros(batch, dtype=torch.long, device=device)
    for position in range(length):
        number, slot = divmod(position, TOKENS_PER_OBJECT)
        if slot == 0 and interrupted():
            raise Interrupted
        logits = model.step(token, position, steps, grammar.rows[slot])
        if slot == CLASS_SLOT:
            score, label = logits.softmax(-1)[:, is_class].max(-1)
            writing.scores[:, number], writing.labels[:, number] = score, label
        allowed = grammar(logits, slot, writing.tokens[:, position - 2] if slot in (2, 3) else None)
        uniform = None if uniforms is None else uniforms[:, position]
        token = sample_top_p(allowed, options.top_p, options.temperature, uniform) + grammar.rows[slot].start
        writing.tokens[:, position] = token
        ended = None
        if may_end and slot == 0:
            ended = token == tokenizer.eos_id
        elif may_stop and slot == CLASS_SLOT:
            noise_in_a_row = torch.where(score < options.noise_score, noise_in_a_row + 1, 0)
            ended = noise_in_a_row >= options.stop_after_noise
        if ended is not None and ended.any():
            done.append(writing.of(ended.nonzero()[:, 0]))
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                break
            writing, token, noise_in_a_row = writing.of(going), token[going], noise_in_a_row[going]
            uniforms = None if uniforms is None else uniforms[going]
            steps.keep(going)
    else:
        done.append(writing)
    return _detections(done, tokenizer)


def _keys(pixel_values: torch.Tensor) -> list[int]:
    """A number for each picture that tells it from others."""
    rows = pixel_values.detach().cpu().contiguous().view(torch.uint8)
    return [zlib.crc32(row.numpy()) for row in rows]


@dataclass
class _Sentences:
    """Of some of the pictures, which, what was written (R, L), EOS where nothing was, and labels and scores (R, N)."""

    rows: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor

    def of(self, indices: torch.Tensor) -> "_Sentences":
        return _Sentences(*(part[indices] for part in (self.rows, self.tokens, self.labels, self.scores)))


def _detections(parts: list[_Sentences], tokenizer: Tokenizer) -> list[Detections]:
    """The objects of all pictures, in the order of their rows. A sentence ends at its first EOS."""
    rows, tokens, labels, scores = (
        torch.cat([getattr(part, name) for part in parts]).cpu().numpy()
        for name in ("rows", "tokens", "labels", "scores")
    )
    if not np.isfinite(scores).all():
        raise NonFiniteLogits(sorted(rows[~np.isfinite(scores).all(axis=1)].tolist()))
    tokens = tokens.reshape(len(rows), -1, TOKENS_PER_OBJECT)
    written = (tokens != tokenizer.eos_id).all(axis=-1).cumprod(axis=1).astype(bool)
    boxes = tokenizer.dequantize(tokens[..., [1, 0, 3, 2]])
    scores = scores.astype(np.float64)
    return [Detections(boxes[i][written[i]], labels[i][written[i]], scores[i][written[i]]) for i in np.argsort(rows)]
