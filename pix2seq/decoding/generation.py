"""Writing the sentence, token by token.

The loop knows nothing of boxes, the grammar nothing of the model. A row's answer depends on its picture alone, not on
the rows it shares a batch with.
"""

from collections.abc import Callable

import torch

from pix2seq.decoding.drafting import with_drafts
from pix2seq.decoding.grammar import Grammar, around, sample_top_p
from pix2seq.decoding.options import DecodingOptions, Detections, Interrupted
from pix2seq.decoding.sentences import Sentences
from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT, Tokenizer


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
            the batch. With a `drafter`, what drafting.py asks of it too. It should be in eval mode

    At least once an object asks `interrupted`; at a yes, raises Interrupted. Raises NonFiniteLogits.
    What is sampled depends on the picture and options.seed: but for rounding, not on its batch, its place in a dataset
    or the device.
    """
    return write(model, pixel_values, tokenizer, options, interrupted).detections(tokenizer, options.sharpness)


@torch.inference_mode()
def write(
    model,
    pixel_values: torch.Tensor,
    tokenizer: Tokenizer,
    options: DecodingOptions,
    interrupted: Callable[[], bool] = lambda: False,
) -> Sentences:
    """As `generate`, but what was written as such."""
    writing = Sentences.new(pixel_values, tokenizer, options)
    grammar = Grammar(tokenizer, allow_eos=not model.config.noise_objects, device=pixel_values.device)
    write_all = token_by_token if options.draft == "off" else with_drafts
    return Sentences.together(write_all(model, pixel_values, writing, grammar, options, interrupted))


def token_by_token(
    model,
    pixel_values: torch.Tensor,
    writing: Sentences,
    grammar: Grammar,
    options: DecodingOptions,
    interrupted: Callable[[], bool],
) -> list[Sentences]:
    """All sentences, in parts: those that ended together."""
    tokenizer, length = grammar.tokenizer, TOKENS_PER_OBJECT * options.max_objects
    steps = model.start(pixel_values, length)
    token = torch.full_like(writing.rows, tokenizer.bos_id)
    done = []
    for position in range(length):
        number, slot = divmod(position, TOKENS_PER_OBJECT)
        if slot == 0 and interrupted():
            raise Interrupted
        logits = model.step(token, position, steps, grammar.rows[slot])
        writing.passes += 1
        if slot == CLASS_SLOT:
            writing.scores[:, number], writing.labels[:, number] = score, _ = grammar.best_class(logits)
        allowed = grammar(logits, slot, writing.tokens[:, position - 2] if slot in (2, 3) else None)
        uniform = None if writing.uniforms is None else writing.uniforms[:, position]
        token = sample_top_p(allowed, options.top_p, options.temperature, uniform) + grammar.rows[slot].start
        writing.tokens[:, position] = token
        if options.looks_around and slot != CLASS_SLOT:
            writing.offsets[:, position], writing.masses[:, position] = around(
                allowed, token - grammar.rows[slot].start, options.expected_bins
            )
        ended = None
        if grammar.allow_eos and slot == 0:
            ended = token == tokenizer.eos_id
        elif options.stop_after_noise and slot == CLASS_SLOT:
            writing.noise = torch.where(score < options.noise_score, writing.noise + 1, 0)
            ended = writing.noise >= options.stop_after_noise
        if ended is not None and ended.any():
            done.append(writing.of(ended.nonzero()[:, 0]))
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                break
            writing, token = writing.of(going), token[going]
            steps.keep(going)
    else:
        done.append(writing)
    return done
