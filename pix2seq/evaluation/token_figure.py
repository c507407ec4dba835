"""Draws how a model predicted one object: the probabilities of its tokens, and the attention to the image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pix2seq.errors import UserError
from pix2seq.generation import NonFiniteLogits, generate_tokens
from pix2seq.models.detections import to_detections
from pix2seq.tokenizer import CLASS_SLOT, SLOTS, TOKENS_PER_OBJECT, Tokenizer
from pix2seq.visualization import BLUE, GREEN, ORANGE, TEXT_GREY, draw_boxes, enlarge, figure_to_image

EDGES = ("top", "left", "bottom", "right")  # of the box, in the order of the slots
MAX_CLASSES = 5
SIDE = 480  # of the drawn images, in pixels
SHOWN_PROBABILITY, MIN_BINS = 0.98, 100  # of more bins, those are drawn that hold this probability


@dataclass(frozen=True)
class TracedObject:
    """The predictions of one object.

    Args:
        number: Number of the object in the sequence, from 1.
        count: Number of objects in the sequence.
        tokens: int (5,), the generated tokens.
        label: Label of the object.
        score: Score of the object.
        probabilities: (5, V), the probabilities of all tokens before grammar and sampling.
        attention: (5, h, w), the attention weights of each visual token in the last decoder layer, a mean over the
            heads. They sum to 1 in the encoder-decoder; the Llama decoder also attends to the generated tokens.
    """

    number: int
    count: int
    tokens: np.ndarray
    label: int
    score: float
    probabilities: np.ndarray
    attention: np.ndarray


@torch.inference_mode()
def trace_object(model, pixel_values: torch.Tensor, number: int | None = None) -> TracedObject:
    """Generates the sequence of an image, and computes its logits and attention weights in a second forward pass.

    Args:
        model: A Pix2SeqForObjectDetection in eval mode.
        pixel_values: uint8 (1, 3, S, S).
        number: Number of the object in the sequence, from 1. Default: the object with the highest score.

    Raises:
        UserError: There is no such object.
    """
    tokenizer, options = model.tokenizer, model.decoding_options
    state = generate_tokens(model, pixel_values, tokenizer, options)
    try:
        detections = to_detections(state, tokenizer, options.box_score_power)[0]
    except NonFiniteLogits as error:
        raise UserError(f"--checkpoint: {error}") from None
    count = len(detections.scores)
    if count == 0:
        raise UserError("--image: the model predicts no objects")
    if number is not None and not 1 <= number <= count:
        raise UserError(f"--object {number}: must be 1 to {count}, the number of predicted objects")
    index = int(detections.scores.argmax()) if number is None else number - 1
    end = TOKENS_PER_OBJECT * (index + 1)
    bos = torch.full_like(state.tokens[:, :1], tokenizer.bos_id)
    logits, attention = logits_and_attention(model, pixel_values, torch.cat([bos, state.tokens[:, : end - 1]], dim=1))
    side = math.isqrt(attention.shape[1])  # padded images and features are square
    return TracedObject(
        number=index + 1,
        count=count,
        tokens=state.tokens[0, end - TOKENS_PER_OBJECT : end].cpu().numpy(),
        label=int(detections.labels[index]),
        score=float(detections.scores[index]),
        probabilities=logits[-TOKENS_PER_OBJECT:].softmax(-1).cpu().numpy(),
        attention=attention[-TOKENS_PER_OBJECT:, : side * side].unflatten(1, (side, side)).cpu().numpy(),
    )


@torch.inference_mode()
def logits_and_attention(
    model, pixel_values: torch.Tensor, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the logits and the attention weights of the last decoder layer.

    Args:
        model: A Pix2SeqForObjectDetection in eval mode.
        pixel_values: uint8 (1, 3, S, S).
        input_ids: int (1, L), BOS first.

    Returns:
        Logits (L, V), and attention weights, a mean over the heads: (L, N) for the N visual tokens, or (L, N + L) for
        the Llama decoder, which attends to visual tokens and input tokens. Each row sums to 1.
    """
    layer = model.decoder.get_decoder().layers[-1]
    attention = getattr(layer, "encoder_attn", layer.self_attn)
    inputs = []
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    try:
        logits = model(pixel_values, input_ids).logits[0].float()
    finally:
        hook.remove()
    return logits, attention_weights(attention, **inputs[0])[0, :, -input_ids.shape[1] :].mean(0)


def attention_weights(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    key_value_states: torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **_,
) -> torch.Tensor:
    """Computes the weights of an attention layer of transformers from its inputs; fused kernels do not return them.

    Args:
        attention: The layer.
        hidden_states: (B, Q, D).
        key_value_states: (B, K, D) for cross-attention. Default: causal self-attention. (Visual tokens attend to each
            other in both directions, so their rows are not valid.)
        position_embeddings: Cosine and sine of rotary position embeddings.

    Returns:
        (B, H, Q, K).
    """
    query = attention.q_proj(hidden_states)
    key = attention.k_proj(hidden_states if key_value_states is None else key_value_states)
    query, key = (states.unflatten(2, (-1, attention.head_dim)).transpose(1, 2) for states in (query, key))
    if position_embeddings is not None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped-query attention
    scores = attention.scaling * query @ key.transpose(2, 3)
    if key_value_states is None:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return scores.float().softmax(-1)


def token_figure(
    traced: TracedObject, image: Image.Image, tokenizer: Tokenizer, class_names: Sequence[str]
) -> Image.Image:
    """Draws the probabilities of the tokens (left) and the attention (right). The generated tokens are orange.

    Args:
        traced: The object.
        image: The padded square image.
        tokenizer: The tokenizer of the model.
        class_names: Class names by label.
    """
    figure = Figure(figsize=(10.5, 14), dpi=85, layout="constrained")
    axes = figure.subplots(1 + len(SLOTS), 2, width_ratios=(2.1, 1))
    coordinates = tokenizer.dequantize(traced.tokens[:CLASS_SLOT])
    image, boxes = enlarge(image, coordinates[[1, 0, 3, 2]] * image.width, SIDE)
    name = f"{_shorten(class_names[traced.label], 12)} {traced.score:.2f}"
    _draw_summary(axes[0, 0], traced, tokenizer, class_names)
    _draw_image(axes[0, 1], draw_boxes(image, boxes, [name], [ORANGE], font_size=40, width=6))
    for slot, (left, right) in enumerate(axes[1:]):
        _draw_image(right, _overlay_attention(image, traced.attention[slot]))
        if slot == CLASS_SLOT:
            _draw_classes(left, traced, tokenizer, class_names)
        else:
            _draw_bins(left, slot, traced, tokenizer)
            draw_line = right.axvline if slot % 2 else right.axhline
            draw_line(SIDE * coordinates[slot], color=ORANGE, linewidth=2)
        share = traced.attention[slot].sum()
        title = "attention of the last layer" if share < 0.995 else "cross-attention of the last layer"
        right.set_title(title + (f" ({share:.0%} on the image)" if share < 0.995 else ""), fontsize=9)
    return figure_to_image(figure)


def _shorten(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _draw_summary(axis: Axes, traced: TracedObject, tokenizer: Tokenizer, class_names: Sequence[str]) -> None:
    axis.axis("off")
    axis.text(0, 1, f"Object {traced.number} of {traced.count}, score {traced.score:.2f}", fontsize=13, va="top")
    for column, (slot, token) in enumerate(zip(SLOTS, traced.tokens, strict=True)):
        axis.text(0.15 * column, 0.78, slot, fontsize=9, va="top", color=TEXT_GREY)
        text = tokenizer.token_to_str(token, class_names)
        axis.text(0.15 * column, 0.68, text, fontsize=13, va="top", weight="bold", parse_math=False)
    text = (
        "Each row shows one token, predicted from the image and the tokens above.\n"
        "Left: probability of each token. Orange: the generated token.\n"
        f"Bin 0 is the top or left edge of the padded image, bin {tokenizer.num_bins - 1} the opposite edge.\n"
        "Right: attention to the visual tokens, a mean over the heads."
    )
    axis.text(0, 0.45, text, fontsize=9, va="top", linespacing=1.5)


def _draw_bins(axis: Axes, slot: int, traced: TracedObject, tokenizer: Tokenizer) -> None:
    probabilities = traced.probabilities[slot, tokenizer.first_bin_id :]
    generated = int(traced.tokens[slot]) - tokenizer.first_bin_id
    low, high = probable_range(probabilities, generated)
    bins = np.arange(low, high)
    width = 0.9 if len(bins) <= MIN_BINS else 1  # gaps thinner than a pixel cause moire patterns
    axis.bar(bins, probabilities[low:high], width, color=BLUE)
    axis.bar(generated, probabilities[generated], max(width, len(bins) / 200), color=ORANGE)
    axis.set_xlim(low - 1, high)
    axis.margins(y=0.15)
    title = f"{SLOTS[slot]} ({EDGES[slot]}), probability of each bin: {probabilities[generated]:.2f} for {generated}"
    axis.set_title(title, fontsize=10, loc="left")
    _style(axis)


def probable_range(probabilities: np.ndarray, generated: int) -> tuple[int, int]:
    """Returns the range of bins that is drawn: most of the probability, and the generated bin."""
    if len(probabilities) <= MIN_BINS:
        return 0, len(probabilities)
    cumulative = probabilities.cumsum() / probabilities.sum()
    low, high = np.searchsorted(cumulative, [(1 - SHOWN_PROBABILITY) / 2, (1 + SHOWN_PROBABILITY) / 2])
    low, high = min(low, generated), max(high, generated) + 1
    margin = max(MIN_BINS - (high - low), 0) // 2
    return max(int(low - margin), 0), min(int(high + margin), len(probabilities))


def _draw_classes(axis: Axes, traced: TracedObject, tokenizer: Tokenizer, class_names: Sequence[str]) -> None:
    """Draws the most probable classes, the generated token and NOISE."""
    probabilities, generated = traced.probabilities[CLASS_SLOT], int(traced.tokens[CLASS_SLOT])
    classes = np.arange(tokenizer.first_class_id, tokenizer.first_bin_id)
    best = classes[np.argsort(-probabilities[classes], kind="stable")[:MAX_CLASSES]].tolist()
    tokens = list(dict.fromkeys([*best, generated, tokenizer.noise_id]))
    colors = [ORANGE if token == generated else BLUE for token in tokens]
    bars = axis.barh(range(len(tokens)), probabilities[tokens], 0.8, color=colors)
    axis.bar_label(bars, [f"{probabilities[token]:.2f}" for token in tokens], padding=4, fontsize=8)
    names = [_shorten(tokenizer.token_to_str(token, class_names)) for token in tokens]
    axis.set_yticks(range(len(tokens)), names, fontsize=9, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1)
    name = tokenizer.token_to_str(generated, class_names)
    title = f"class, probability of each token: {probabilities[generated]:.2f} for {name}"
    axis.set_title(title, fontsize=10, loc="left", parse_math=False)
    _style(axis)


def _style(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _overlay_attention(image: Image.Image, attention: np.ndarray) -> Image.Image:
    """Colors a pale gray image green in proportion to attention (h, w), relative to its maximum."""
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.35)
    mask = Image.fromarray(np.uint8(255 * 0.85 * attention / max(attention.max(), 1e-9)))
    return Image.composite(
        Image.new("RGB", image.size, GREEN), pale, mask.resize(image.size, Image.Resampling.NEAREST)
    )


def _draw_image(axis: Axes, image: Image.Image) -> None:
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
