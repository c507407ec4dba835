"""How a detector wrote one object: what it thought of every token it could have said, and where it looked."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pix2seq.decoding import NonFiniteLogits, write
from pix2seq.errors import UserError
from pix2seq.tokenizer import TOKENS_PER_OBJECT


@dataclass(frozen=True)
class WrittenObject:
    """The `number`-th of `count` objects of a sentence, from 1.

    tokens (5,)              as they were written                 label, score   of the detector's answer
    probabilities (5, V)     of what could have stood there instead, before the grammar and the sampling
    attention (5, h, w)      how much of the last layer's attention went to each visual token while the token was
                             decided, a mean over the heads. The classic decoder's cross-attention is 1 in all; Llama
                             looks at its own words too
    """

    number: int
    count: int
    tokens: np.ndarray
    label: int
    score: float
    probabilities: np.ndarray
    attention: np.ndarray


@torch.inference_mode()
def read_object(model, pixel_values: torch.Tensor, number: int | None = None) -> WrittenObject:
    """Lets the detector write what is in a picture (1, 3, S, S), as it always does, then read its own words once more
    up to the end of the object, by default the one of highest score. Raises UserError."""
    tokenizer, options = model.tokenizer, model.decoding_options
    writing = write(model, pixel_values, tokenizer, options)
    try:
        found = writing.detections(tokenizer, options.sharpness)[0]
    except NonFiniteLogits as error:
        raise UserError(f"--checkpoint: {error}") from None
    count = len(found.scores)
    if count == 0:
        raise UserError("--image: the detector wrote no object at all")
    if number is not None and not 1 <= number <= count:
        raise UserError(f"--object {number}: must be 1 to {count}, so many objects were written")
    index = int(found.scores.argmax()) if number is None else number - 1
    end = TOKENS_PER_OBJECT * (index + 1)
    # What follows a token is decided when it has been read: the last one of the object need not be.
    words = torch.cat([torch.full_like(writing.tokens[:, :1], tokenizer.bos_id), writing.tokens[:, : end - 1]], dim=1)
    logits, attention = read_again(model, pixel_values, words)
    side = math.isqrt(attention.shape[1])  # canvas and features are square
    return WrittenObject(
        number=index + 1,
        count=count,
        tokens=writing.tokens[0, end - TOKENS_PER_OBJECT : end].cpu().numpy(),
        label=int(found.labels[index]),
        score=float(found.scores[index]),
        probabilities=logits[-TOKENS_PER_OBJECT:].softmax(-1).cpu().numpy(),
        attention=attention[-TOKENS_PER_OBJECT:, : side * side].unflatten(1, (side, side)).cpu().numpy(),
    )


@torch.inference_mode()
def read_again(model, pixel_values: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture (1, 3, S, S) and words (1, L), BOS first -> what may follow each of them, logits (L, V), and what the
    last layer looked at meanwhile, a mean over its heads: (L, N) of N visual tokens, and for Llama (L, N + L), its
    words behind them. Rows of attention sum to 1."""
    last = model.decoder.get_decoder().layers[-1]
    attention = getattr(last, "encoder_attn", last.self_attn)
    asked = []
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)
    try:
        logits = model(pixel_values, words).logits[0].float()
    finally:
        hook.remove()
    return logits, attention_weights(attention, **asked[0])[0, :, -words.shape[1] :].mean(0)


def attention_weights(
    attention, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None = None, position_embeddings=None, **_
) -> torch.Tensor:
    """What one of transformers' attention layers gives to each key, (B, H, Q, K), from what it is called with: fast
    kernels do not tell. Without `key_value_states`, a token sees none that comes after it. (The visual tokens of Llama
    do see each other, but their rows are not asked for.)"""
    sources = hidden_states, hidden_states if key_value_states is None else key_value_states
    query, key = (
        projection(source).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for projection, source in zip((attention.q_proj, attention.k_proj), sources, strict=True)
    )
    if position_embeddings is not None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # several heads may share one
    scores = attention.scaling * query @ key.transpose(2, 3)
    if key_value_states is None:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return scores.float().softmax(-1)
