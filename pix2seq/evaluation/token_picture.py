"""How one object was written, as a picture: a row for each of its five tokens."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pix2seq.charts import to_image
from pix2seq.evaluation.tokens import WrittenObject
from pix2seq.tokenizer import CLASS_SLOT, SLOTS, Tokenizer
from pix2seq.visualize import PALETTE, draw_boxes, enlarge

SAID, LOOKED, OTHER = PALETTE[0], PALETTE[2], PALETTE[4]  # orange, green, blue
EDGES = ("top", "left", "bottom", "right")  # of the box, in the order of the slots
MOST_CLASSES = 5
SIDE = 480  # pixels of the canvas
MASS, LEAST_BINS = 0.98, 100  # a ruler is shown where so much of the probability lies, and at least so many bins of it


def token_picture(
    written: WrittenObject, image: Image.Image, tokenizer: Tokenizer, class_names: Sequence[str]
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


def _word(token: int, tokenizer: Tokenizer, class_names: Sequence[str]) -> str:
    if token >= tokenizer.first_bin_id:
        return str(token - tokenizer.first_bin_id)
    return "NOISE" if token == tokenizer.noise_id else class_names[token - tokenizer.first_class_id]


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _introduction(axis, written: WrittenObject, tokenizer: Tokenizer, class_names: Sequence[str]) -> None:
    axis.axis("off")
    axis.text(0, 1, f"Object {written.number} of the {written.count} that were written", fontsize=13, va="top")
    for place, (slot, token) in enumerate(zip(SLOTS, written.tokens, strict=True)):
        axis.text(0.15 * place, 0.78, slot, fontsize=9, va="top", color="#777777")
        word = _word(token, tokenizer, class_names)
        axis.text(0.15 * place, 0.68, word, fontsize=13, va="top", weight="bold", parse_math=False)
    axis.text(
        *(0, 0.45),
        "A row below is a token, chosen by the picture and the tokens above it.\n"
        "Left: how likely each token was; the one that was written is orange.\n"
        f"Edges are bins of a ruler: 0 is the top or left of the canvas, {tokenizer.num_bins - 1} its other end.\n"
        "Right: where the last layer of the decoder looked, the greener the more.",
        **{"fontsize": 9, "va": "top", "linespacing": 1.5},
    )


def _ruler(axis, slot: int, written: WrittenObject, tokenizer: Tokenizer) -> None:
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


def _class_bars(axis, written: WrittenObject, tokenizer: Tokenizer, class_names: Sequence[str]) -> None:
    """The likeliest classes, NOISE whatever it has, and what was written."""
    probabilities, said = written.probabilities[CLASS_SLOT], int(written.tokens[CLASS_SLOT])
    classes = np.arange(tokenizer.first_class_id, tokenizer.first_bin_id)
    likeliest = classes[np.argsort(-probabilities[classes], kind="stable")[:MOST_CLASSES]].tolist()
    shown = list(dict.fromkeys([*likeliest, said, tokenizer.noise_id]))
    axis.barh(range(len(shown)), probabilities[shown], 0.8, color=[SAID if i == said else OTHER for i in shown])
    for place, token in enumerate(shown):
        axis.text(probabilities[token] + 0.01, place, f"{probabilities[token]:.2f}", va="center", fontsize=8)
    names = [_short(_word(token, tokenizer, class_names)) for token in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=9, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1)
    word = _word(said, tokenizer, class_names)
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
