"""How a detector wrote one object: what it thought of every token it could have said, and where it looked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pix2seq.charts import to_image
from pix2seq.errors import UserError
from pix2seq.generation import NonFiniteLogits, write
from pix2seq.tokenizer import CLASS_SLOT, SLOTS, TOKENS_PER_OBJECT, Tokenizer
from pix2seq.visualization import PALETTE, draw_boxes, enlarge

SAID, LOOKED, OTHER = PALETTE[0], PALETTE[2], PALETTE[4]  # orange, green, blue
EDGES = ("top", "left", "bottom", "right")  # of the box, in the order of the slots
MOST_CLASSES = 5
SIDE = 480  # pixels of the canvas
MASS, LEAST_BINS = 0.98, 100  # a ruler is shown where so much of the probability lies, and at least so many bins of it


@dataclass(frozen=True)
class TracedObject:
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
def trace_object(model, pixel_values: torch.Tensor, number: int | None = None) -> TracedObject:
    """Lets the detector write what is in a picture (1, 3, S, S), as it always does, then read its own words once more
    up to the end of the object, by default the one of highest score. Raises UserError."""
    tokenizer, options = model.tokenizer, model.decoding_options
    writing = write(model, pixel_values, tokenizer, options)
    try:
        found = writing.detections(tokenizer, options.box_score_power)[0]
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
    return TracedObject(
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


def token_figure(
    written: TracedObject, image: Image.Image, tokenizer: Tokenizer, class_names: Sequence[str]
) -> Image.Image:
    """On the left the probability of each bin, and of the likeliest classes; on the right where the decoder looked
    meanwhile. `image`: the canvas. What was written is orange."""
    figure = Figure(figsize=(10.5, 14), dpi=85, layout="constrained")
    axes = figure.subplots(1 + len(SLOTS), 2, width_ratios=(2.1, 1))
    edges = tokenizer.dequantize(written.tokens[:CLASS_SLOT])
    image, (box,) = enlarge(image, edges[[1, 0, 3, 2]] * image.width, SIDE)
    name = f"{_short(class_names[written.label], 12)} {written.score:.2f}"
    _introduction(axes[0, 0], written, tokenizer, class_names)
    _show(axes[0, 1], draw_boxes(image, [box], [name], [SAID], font_size=40, width=6))
    for slot, (left, right) in enumerate(axes[1:]):
        _show(right, _heat(image, written.attention[slot]))
        if slot == CLASS_SLOT:
            _class_bars(left, written, tokenizer, class_names)
        else:
            _ruler(left, slot, written, tokenizer)
            line = right.axvline if slot % 2 else right.axhline
            line(SIDE * edges[slot], color=SAID, linewidth=2)
        share = written.attention[slot].sum()
        elsewhere = "" if share > 0.995 else f" ({1 - share:.0%} went to its words)"
        right.set_title(f"where it looked{elsewhere}", fontsize=9)
    return to_image(figure)


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _introduction(axis, written: TracedObject, tokenizer: Tokenizer, class_names: Sequence[str]) -> None:
    axis.axis("off")
    axis.text(0, 1, f"Object {written.number} of the {written.count} that were written", fontsize=13, va="top")
    for place, (slot, token) in enumerate(zip(SLOTS, written.tokens, strict=True)):
        axis.text(0.15 * place, 0.78, slot, fontsize=9, va="top", color="#777777")
        word = tokenizer.token_to_str(token, class_names)
        axis.text(0.15 * place, 0.68, word, fontsize=13, va="top", weight="bold", parse_math=False)
    axis.text(
        *(0, 0.45),
        "A row below is a token, chosen by the picture and the tokens above it.\n"
        "Left: how likely each token was; the one that was written is orange.\n"
        f"Edges are bins of a ruler: 0 is the top or left of the canvas, {tokenizer.num_bins - 1} its other end.\n"
        "Right: where the last layer of the decoder looked, the greener the more.",
        **{"fontsize": 9, "va": "top", "linespacing": 1.5},
    )


def _ruler(axis, slot: int, written: TracedObject, tokenizer: Tokenizer) -> None:
    probabilities = written.probabilities[slot, tokenizer.first_bin_id :]
    chosen = int(written.tokens[slot]) - tokenizer.first_bin_id
    low, high = _part(probabilities, chosen)
    bins = np.arange(low, high)
    width = 0.9 if len(bins) <= LEAST_BINS else 1  # gaps between bars thinner than a pixel make patterns
    axis.bar(bins, probabilities[low:high], width, color=OTHER)
    axis.bar(chosen, probabilities[chosen], max(width, len(bins) / 200), color=SAID)
    axis.set_xlim(low - 1, high)
    axis.margins(y=0.15)
    axis.set_title(
        f"{SLOTS[slot]}, the {EDGES[slot]} edge: bin {chosen}, probability {probabilities[chosen]:.2f}",
        **{"fontsize": 10, "loc": "left"},
    )
    _plain(axis)


def _part(probabilities: np.ndarray, chosen: int) -> tuple[int, int]:
    """From and to which bin a ruler is shown."""
    if len(probabilities) <= LEAST_BINS:
        return 0, len(probabilities)
    cumulative = probabilities.cumsum() / probabilities.sum()
    low, high = np.searchsorted(cumulative, [(1 - MASS) / 2, (1 + MASS) / 2])
    low, high = min(low, chosen), max(high, chosen) + 1
    wider = max(LEAST_BINS - (high - low), 0) // 2
    low, high = low - wider, high + wider
    return max(int(low), 0), min(int(high), len(probabilities))


def _class_bars(axis, written: TracedObject, tokenizer: Tokenizer, class_names: Sequence[str]) -> None:
    """The likeliest classes, NOISE whatever it has, and what was written."""
    probabilities, said = written.probabilities[CLASS_SLOT], int(written.tokens[CLASS_SLOT])
    classes = np.arange(tokenizer.first_class_id, tokenizer.first_bin_id)
    likeliest = classes[np.argsort(-probabilities[classes], kind="stable")[:MOST_CLASSES]].tolist()
    shown = list(dict.fromkeys([*likeliest, said, tokenizer.noise_id]))
    axis.barh(range(len(shown)), probabilities[shown], 0.8, color=[SAID if i == said else OTHER for i in shown])
    for place, token in enumerate(shown):
        axis.text(probabilities[token] + 0.01, place, f"{probabilities[token]:.2f}", va="center", fontsize=8)
    names = [_short(tokenizer.token_to_str(token, class_names)) for token in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=9, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1)
    word = tokenizer.token_to_str(said, class_names)
    title = f"class: {word}, probability {probabilities[said]:.2f}"
    axis.set_title(title, fontsize=10, loc="left", parse_math=False)
    _plain(axis)


def _plain(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _heat(image: Image.Image, attention: np.ndarray) -> Image.Image:
    """The picture, pale and grey, with colour where attention (h, w) is: full where it is highest."""
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.35)
    shares = Image.fromarray(np.uint8(255 * 0.85 * attention / max(attention.max(), 1e-9)))
    return Image.composite(Image.new("RGB", image.size, LOOKED), pale, shares.resize(image.size, Image.NEAREST))


def _show(axis, image: Image.Image) -> None:
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
