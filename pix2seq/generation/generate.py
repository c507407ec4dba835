"""Autoregressive generation, token by token (Pix2Seq section 2.2).

The result of an image does not depend on the other images of its batch.
"""

import threading
from collections.abc import Callable

import torch

from pix2seq.generation.decoding_state import DecodingState
from pix2seq.generation.grammar import Grammar
from pix2seq.generation.options import DecodingOptions, Interrupted
from pix2seq.generation.sampling import finite_check, neighborhood_mean, sample_top_p
from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT, Tokenizer

CAPTURE_LOCK = threading.Lock()  # threads must not capture CUDA graphs at the same time


@torch.inference_mode()
def generate_tokens(
    model,
    pixel_values: torch.Tensor,
    tokenizer: Tokenizer,
    options: DecodingOptions,
    interrupted: Callable[[], bool] = lambda: False,
    state: DecodingState | None = None,
) -> DecodingState:
    """Generates the token sequences of a batch of images.

    Sampling depends on the pixels of an image and on `options.seed`. Except for rounding, it does not depend on the
    batch, on the order of the images or on the device.

    Args:
        model: A `Pix2SeqForObjectDetection` in eval mode, or any object with these attributes:

            - `prefill(pixel_values, max_length)` returns an incremental decoder for `max_length` tokens. Its method
              `select_batch(rows)` selects these rows of the batch, which may repeat. Its attribute
              `supports_cuda_graph`, which is read on a GPU only, tells whether its steps can be captured.
            - `decode_step(token_ids, position, incremental_decoder, vocab_slice)` processes one token (B,) per row and
              returns the logits (B, R) of the next token for the R tokens of the slice. If its steps are captured
              as a CUDA graph, `position` is a 0-d tensor.
            - `config.noise_objects`: whether the model was trained with noise objects.
        pixel_values: Pixels (B, 3, S, S).
        tokenizer: Defines the vocabulary.
        options: Decoding options.
        interrupted: Called at least once per object. If it returns True, decoding ends.
        state: A new `DecodingState` that is filled in place, to watch the generation from `interrupted`. It is
            complete for a single image only, because finished rows move to other states.

    Returns:
        The sequences of all images, in the order of the batch; the samples of an image follow each other.

    Raises:
        Interrupted: `interrupted` returned True.
    """
    state = state or DecodingState.create(pixel_values, tokenizer, options)
    grammar = Grammar(tokenizer, allow_eos=not model.config.noise_objects, device=pixel_values.device)
    incremental_decoder = model.prefill(pixel_values, TOKENS_PER_OBJECT * options.max_objects)
    if options.num_samples > 1:
        incremental_decoder.select_batch(state.indices // options.num_samples)
    uses_graph = pixel_values.is_cuda and incremental_decoder.supports_cuda_graph
    decode = decode_by_object if uses_graph else decode_by_token
    return DecodingState.merge(decode(model, incremental_decoder, state, grammar, options, interrupted))


def decode_by_token(
    model,
    incremental_decoder,
    state: DecodingState,
    grammar: Grammar,
    options: DecodingOptions,
    interrupted: Callable[[], bool],
) -> list[DecodingState]:
    """Generates token by token. Rows leave the batch when their sequence ends.

    Returns:
        States that together hold all rows.
    """
    token = torch.full_like(state.indices, grammar.tokenizer.bos_id)
    finished, may_end = [], grammar.allow_eos or options.noise_patience > 0
    for position in range(TOKENS_PER_OBJECT * options.max_objects):
        slot = position % TOKENS_PER_OBJECT
        if interrupted():
            raise Interrupted
        token = decode_one(model, incremental_decoder, token, position, slot, state, grammar, options)
        state.num_steps += 1
        if not may_end or not (ended := sequence_ended(state, token, slot, grammar, options)).any():
            continue
        finished.append(state.select(ended.nonzero()[:, 0]))
        remaining = (~ended).nonzero()[:, 0]
        if len(remaining) == 0:
            return finished
        state, token = state.select(remaining), token[remaining]
        incremental_decoder.select_batch(remaining)
    return [*finished, state]


def decode_by_object(
    model,
    incremental_decoder,
    state: DecodingState,
    grammar: Grammar,
    options: DecodingOptions,
    interrupted: Callable[[], bool],
) -> list[DecodingState]:
    """Generates object by object on a GPU: the five steps of an object are captured as a CUDA graph and replayed.

    Launching the kernels one by one takes longer than running them. The position is counted on the device. Rows whose
    sequence has ended stay in the batch until they are half of it, because a smaller batch needs a new graph.

    Returns:
        States that together hold all rows.
    """
    token = torch.full_like(state.indices, grammar.tokenizer.bos_id)
    position = torch.zeros_like(state.indices[0])
    ended = torch.zeros_like(token, dtype=torch.bool)
    may_end = grammar.allow_eos or options.noise_patience > 0
    finished, replay = [], None

    def decode_object() -> None:
        frozen = ended if may_end else None
        for slot in range(TOKENS_PER_OBJECT):
            next_token = decode_one(model, incremental_decoder, token, position, slot, state, grammar, options, frozen)
            state.num_steps.add_(~ended if may_end else 1)
            token.copy_(next_token)
            if may_end:
                ended.logical_or_(sequence_ended(state, token, slot, grammar, options))
            position.add_(1)

    for number in range(options.max_objects):
        if interrupted():
            raise Interrupted
        if number == 0:
            decode_object()  # not captured: the first call allocates buffers
        else:
            replay = replay or capture_cuda_graph(decode_object, token.device)
            replay()
        if not may_end:
            continue
        num_ended = int(ended.sum())
        if num_ended == len(ended):
            break
        if 2 * num_ended >= len(ended):
            finished.append(state.select(ended.nonzero()[:, 0]))
            remaining = (~ended).nonzero()[:, 0]
            state, token, ended, replay = state.select(remaining), token[remaining], ended[remaining], None
            incremental_decoder.select_batch(remaining)
    return [*finished, state]


def capture_cuda_graph(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures the kernels of a function as a CUDA graph.

    Returns:
        A function that runs the same kernels again, on the same memory.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    # "thread_local": the CUDA calls of other threads, such as those of a data loader, do not break the capture.
    capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
    with CAPTURE_LOCK, torch.cuda.device(device), capture:
        function()
    return graph.replay


def decode_one(
    model,
    incremental_decoder,
    token: torch.Tensor,
    position: int | torch.Tensor,
    slot: int,
    state: DecodingState,
    grammar: Grammar,
    options: DecodingOptions,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs one decoder step, samples the next token of each row and stores it in the state.

    Args:
        model: See `generate_tokens`.
        incremental_decoder: The result of `model.prefill`.
        token: The previous token ids (B,).
        position: Index of the new token in the sequence, also as a 0-d tensor.
        slot: Index of the new token in its object.
        state: Sequences of the B rows; updated in place.
        grammar: Grammar of the sequences.
        options: Decoding options.
        ended: Rows (B,) whose sequence has ended. Their state does not change, except for `num_trailing_noise`.

    Returns:
        The new token ids (B,).
    """
    logits = model.decode_step(token, position, incremental_decoder, grammar.vocab_slices[slot])
    if slot == 0 and grammar.allow_eos:
        # The sequence may end here, before a class score could show that logits are not finite.
        _write_column(state.scores, position // TOKENS_PER_OBJECT, finite_check(logits), ended)
    if slot == CLASS_SLOT:
        object_index, (score, label) = position // TOKENS_PER_OBJECT, grammar.best_class(logits)
        _write_column(state.scores, object_index, score, ended)
        _write_column(state.labels, object_index, label, ended)
        state.num_trailing_noise.copy_(torch.where(score < options.noise_threshold, state.num_trailing_noise + 1, 0))
    min_token_ids = _read_column(state.tokens, position - 2) if slot in (2, 3) else None
    allowed = grammar(logits, slot, min_token_ids)
    uniform = None if state.uniforms is None else _read_column(state.uniforms, position)
    index = sample_top_p(options.process_logits(allowed), options.top_p, uniform)
    if options.needs_neighborhood and slot != CLASS_SLOT:
        offsets, neighborhood_probs = neighborhood_mean(allowed, index, options.expectation_radius)
        _write_column(state.offsets, position, offsets, ended)
        _write_column(state.neighborhood_probs, position, neighborhood_probs, ended)
    next_token = index + grammar.vocab_slices[slot].start
    _write_column(state.tokens, position, next_token, ended)
    return next_token


def sequence_ended(
    state: DecodingState, token: torch.Tensor, slot: int, grammar: Grammar, options: DecodingOptions
) -> torch.Tensor:
    """Returns whether the sequence of each row ends with its new token, (B,)."""
    if slot == CLASS_SLOT and options.noise_patience:
        return state.num_trailing_noise >= options.noise_patience
    return token == grammar.tokenizer.eos_id


def _read_column(values: torch.Tensor, column: int | torch.Tensor) -> torch.Tensor:
    """Returns a column (B,) of values (B, L)."""
    return values[:, column] if isinstance(column, int) else values[:, column.view(1)][:, 0]


def _write_column(
    values: torch.Tensor, column: int | torch.Tensor, new: torch.Tensor, ended: torch.Tensor | None
) -> None:
    """Writes a column (B,) of values (B, L), except in rows that have ended."""
    if ended is not None:
        new = torch.where(ended, _read_column(values, column), new)
    if isinstance(column, int):
        values[:, column] = new
    else:
        values[:, column.view(1)] = new[:, None].to(values.dtype)
