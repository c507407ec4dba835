"""Writing the sentence: a grammar, a sampling rule and a loop over single tokens with a key-value cache.

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
    """top_p 0 is greedy decoding, 1 samples from the whole distribution; the authors found 0.4 best."""

    max_objects: int = 100
    top_p: float = 0.4
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_objects < 1:
            raise ValueError(f"max_objects is {self.max_objects}: at least 1 is needed")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must lie in 0 ... 1 (0 is greedy)")
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


class Grammar:
    """Which tokens may come next. The kind of a token follows from its slot; no row looks at another.

    slots 0, 1 (y1, x1)   any bin; and EOS in slot 0, if the model was trained to say it
    slots 2, 3 (y2, x2)   bins not before the row's own y1 or x1
    slot 4 (class)        any class, or NOISE

    EOS is not offered to a model trained with noise objects: it never learnt when to say it.
    """

    def __init__(self, tokenizer: Tokenizer, allow_eos: bool, device: torch.device | str = "cpu"):
        self.ids = torch.arange(tokenizer.vocab_size, device=device)
        bins = self.ids >= tokenizer.first_bin_id
        first = bins | (self.ids == tokenizer.eos_id) if allow_eos else bins
        classes = (self.ids >= tokenizer.noise_id) & (self.ids < tokenizer.first_bin_id)
        self.kinds = torch.stack([first, bins, bins, bins, classes])

    def __call__(self, logits: torch.Tensor, sentence: list[torch.Tensor]) -> torch.Tensor:
        """Logits (B, V) with -inf for every token that may not follow `sentence`, a list of (B,) ids without BOS."""
        slot = len(sentence) % TOKENS_PER_OBJECT
        allowed = self.kinds[slot]
        if slot in (2, 3):
            # A box may be thinner than a bin, but not turned inside out. Its own corner is always a legal answer.
            allowed = allowed & (self.ids >= sentence[-2][:, None])
        return logits.masked_fill(~allowed, -torch.inf)


def sample_top_p(logits: torch.Tensor, top_p: float, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row of logits (B, V), by the authors' rule: of the tokens in order of probability, keep those
    whose cumulative probability, their own included, is at most `top_p`, and the first in any case.

    This drops the token that crosses p, which Hugging Face's TopPLogitsWarper keeps. `uniform` (B,) in [0, 1) is the
    randomness: the token is where it falls in the cumulative distribution of those kept.
    """
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

    model   offers `start(pixels) -> cache`, `step(ids (B,), position, cache) -> logits (B, V)`, and
            `config.noise_objects`; it should be in eval mode

    Before each object asks `interrupted`; at a yes, raises Interrupted.
    What is sampled depends on the picture and options.seed: not on its batch, its place in a dataset or the device.
    """
    batch, device = len(pixel_values), pixel_values.device
    length = TOKENS_PER_OBJECT * options.max_objects
    may_end = not model.config.noise_objects
    grammar = Grammar(tokenizer, allow_eos=may_end, device=device)
    uniforms = np.stack([np.random.default_rng((options.seed, key)).random(length) for key in _keys(pixel_values)])
    uniforms = torch.from_numpy(uniforms).to(device, torch.float32)
    is_class = slice(tokenizer.first_class_id, tokenizer.first_bin_id)

    cache = model.start(pixel_values)
    token = torch.full((batch,), tokenizer.bos_id, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    sentence: list[torch.Tensor] = []
    scores, labels = [], []
    for position in range(length):
        if position % TOKENS_PER_OBJECT == 0 and interrupted():
            raise Interrupted
        logits = model.step(token, position, cache)
        if position % TOKENS_PER_OBJECT == CLASS_SLOT:
            score, label = logits.softmax(-1)[:, is_class].max(-1)
            scores.append(score)
            labels.append(label)
        token = sample_top_p(grammar(logits, sentence), options.top_p, options.temperature, uniforms[:, position])
        if may_end:
            ended |= token == tokenizer.eos_id
            token = token.masked_fill(ended, tokenizer.eos_id)
            if ended.all():
                break
        sentence.append(token)
    return _detections(sentence, labels, scores, tokenizer, batch)


def _keys(pixel_values: torch.Tensor) -> list[int]:
    """A number for each picture that tells it from others."""
    rows = pixel_values.detach().cpu().contiguous().view(torch.uint8)
    return [zlib.crc32(row.numpy()) for row in rows]


def _detections(sentence, labels, scores, tokenizer: Tokenizer, batch: int) -> list[Detections]:
    count = len(scores)
    if count == 0:
        return [Detections(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0)) for _ in range(batch)]
    tokens = torch.stack(sentence[: count * TOKENS_PER_OBJECT], dim=1).cpu().numpy()
    tokens = tokens.reshape(batch, count, TOKENS_PER_OBJECT)
    labels = torch.stack(labels, dim=1).cpu().numpy()
    scores = torch.stack(scores, dim=1).cpu().double().numpy()
    boxes = tokenizer.dequantize(tokens[..., [1, 0, 3, 2]])
    # Objects after a row's EOS exist only because other rows went on.
    written = (tokens != tokenizer.eos_id).all(-1).cumprod(1).astype(bool)
    return [Detections(boxes[i][w], labels[i][w], scores[i][w]) for i, w in enumerate(written)]
