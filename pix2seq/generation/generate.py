"""Writing the sentence, token by token.

The loop knows nothing of boxes, the grammar nothing of the model. A row's answer depends on its picture alone, not on
the rows it shares a batch with.
"""

import threading
from collections.abc import Callable

import torch

from pix2seq.generation.decoding_state import DecodingState
from pix2seq.generation.grammar import Grammar, finite_check, neighborhood_mean, sample_top_p
from pix2seq.generation.options import DecodingOptions, Detections, Interrupted
from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT, Tokenizer

ONE_AT_A_TIME = threading.Lock()  # recordings in a process: CUDA does not know whose is whose


def generate(
    model,
    pixel_values: torch.Tensor,
    tokenizer: Tokenizer,
    options: DecodingOptions,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Detections]:
    """Pixels (B, 3, S, S) -> the objects the model writes for each.

    model   offers `start(pixels, length) -> steps`, `step(ids (B,), position, steps, rows) -> logits (B, V)`, of the
            `rows` of V that are asked for, and `config.noise_objects`; `steps.select_batch(indices)` goes on with a part of
            the batch. On a GPU, `position` is a tensor. It should be in eval mode

    At least once an object asks `interrupted`; at a yes, raises Interrupted. Raises NonFiniteLogits.
    What is sampled depends on the picture and options.seed: but for rounding, not on its batch, its place in a dataset
    or the device.
    """
    return write(model, pixel_values, tokenizer, options, interrupted).detections(tokenizer, options.box_score_power)


@torch.inference_mode()
def write(
    model,
    pixel_values: torch.Tensor,
    tokenizer: Tokenizer,
    options: DecodingOptions,
    interrupted: Callable[[], bool] = lambda: False,
    writing: DecodingState | None = None,
) -> DecodingState:
    """As `generate`, but what was written as such.

    writing   new ones, for who wants to look on: whenever `interrupted` is asked, they hold all that is written so
              far. On a CPU that is before each token. Of one picture only: where there are more, rows move as they end
    """
    writing = writing or DecodingState.create(pixel_values, tokenizer, options)
    grammar = Grammar(tokenizer, allow_eos=not model.config.noise_objects, device=pixel_values.device)
    write_all = object_by_object if pixel_values.is_cuda else token_by_token
    return DecodingState.merge(write_all(model, pixel_values, writing, grammar, options, interrupted))


def token_by_token(
    model,
    pixel_values: torch.Tensor,
    writing: DecodingState,
    grammar: Grammar,
    options: DecodingOptions,
    interrupted: Callable[[], bool],
) -> list[DecodingState]:
    """All sentences, in parts: those that ended together."""
    length = TOKENS_PER_OBJECT * options.max_objects
    steps = model.prefill(pixel_values, length)
    token = torch.full_like(writing.rows, grammar.tokenizer.bos_id)
    done, may_end = [], grammar.allow_eos or options.noise_patience > 0
    for position in range(length):
        slot = position % TOKENS_PER_OBJECT
        if interrupted():
            raise Interrupted
        token = _say(model, steps, token, position, slot, writing, grammar, options)
        writing.passes += 1
        if not may_end or not (ended := _ended(writing, token, slot, grammar, options)).any():
            continue
        done.append(writing.select(ended.nonzero()[:, 0]))
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0:
            return done
        writing, token = writing.select(going), token[going]
        steps.select_batch(going)
    return [*done, writing]


def object_by_object(
    model,
    pixel_values: torch.Tensor,
    writing: DecodingState,
    grammar: Grammar,
    options: DecodingOptions,
    interrupted: Callable[[], bool],
) -> list[DecodingState]:
    """As token_by_token, for a GPU: an object's steps are recorded once and then replayed as one.

    A GPU is done with a kernel before Python has asked for the next. Where in the sentence a step is, the device
    counts itself. A sentence that has ended stays in the batch until half of them have: a smaller batch is recorded
    anew.
    """
    steps = model.prefill(pixel_values, TOKENS_PER_OBJECT * options.max_objects)
    token = torch.full_like(writing.rows, grammar.tokenizer.bos_id)
    position, ended = torch.zeros_like(writing.rows[0]), torch.zeros_like(token, dtype=torch.bool)
    may_end = grammar.allow_eos or options.noise_patience > 0
    done, replay = [], None

    def write_object() -> None:
        for slot in range(TOKENS_PER_OBJECT):
            said = _say(model, steps, token, position, slot, writing, grammar, options, ended if may_end else None)
            writing.passes.add_(~ended if may_end else 1)
            token.copy_(said)
            if may_end:
                ended.logical_or_(_ended(writing, token, slot, grammar, options))
            position.add_(1)

    for number in range(options.max_objects):
        if interrupted():
            raise Interrupted
        if number == 0:
            write_object()  # not recorded: what is made at first use is made now
        else:
            replay = replay or capture_cuda_graph(write_object, pixel_values.device)
            replay()
        if not may_end:
            continue
        count = int(ended.sum())
        if count == len(ended):
            break
        if 2 * count >= len(ended):
            done.append(writing.select(ended.nonzero()[:, 0]))
            going = (~ended).nonzero()[:, 0]
            writing, token, ended, replay = writing.select(going), token[going], ended[going], None
            steps.select_batch(going)
    return [*done, writing]


def capture_cuda_graph(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What does the same work again, on a GPU: its kernels as a CUDA graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    # What a loader's thread asks of the device meanwhile is no part of it.
    recording = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
    with ONE_AT_A_TIME, torch.cuda.device(device), recording:
        work()
    return graph.replay


def _say(
    model,
    steps,
    token: torch.Tensor,
    position: int | torch.Tensor,
    slot: int,
    writing: DecodingState,
    grammar: Grammar,
    options: DecodingOptions,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reads the `token` (B,) at a position and writes the one after it, (B,); nothing in rows that have `ended`."""

    def read(values: torch.Tensor, place: int | torch.Tensor) -> torch.Tensor:
        return values[:, place] if isinstance(place, int) else values[:, place.view(1)][:, 0]

    def write(values: torch.Tensor, place: int | torch.Tensor, new: torch.Tensor) -> None:
        if ended is not None:
            new = torch.where(ended, read(values, place), new)
        if isinstance(place, int):
            values[:, place] = new
        else:
            values[:, place.view(1)] = new[:, None].to(values.dtype)

    logits = model.decode_step(token, position, steps, grammar.rows[slot])
    if slot == 0 and grammar.allow_eos:
        write(writing.scores, position // TOKENS_PER_OBJECT, finite_check(logits))
    if slot == CLASS_SLOT:
        number, (score, label) = position // TOKENS_PER_OBJECT, grammar.best_class(logits)
        write(writing.scores, number, score)
        write(writing.labels, number, label)
        writing.noise.copy_(torch.where(score < options.noise_threshold, writing.noise + 1, 0))
    corner = read(writing.tokens, position - 2) if slot in (2, 3) else None
    allowed = grammar(logits, slot, corner)
    uniform = None if writing.uniforms is None else read(writing.uniforms, position)
    said = sample_top_p(allowed, options.top_p, options.temperature, uniform)
    if options.needs_neighborhood and slot != CLASS_SLOT:
        offsets, masses = neighborhood_mean(allowed, said, options.expectation_radius)
        write(writing.offsets, position, offsets)
        write(writing.masses, position, masses)
    said = said + grammar.rows[slot].start
    write(writing.tokens, position, said)
    return said


def _ended(
    writing: DecodingState, token: torch.Tensor, slot: int, grammar: Grammar, options: DecodingOptions
) -> torch.Tensor:
    """Which sentences (B,) end with this token."""
    if slot == CLASS_SLOT and options.noise_patience:
        return writing.noise >= options.noise_patience
    return token == grammar.tokenizer.eos_id
