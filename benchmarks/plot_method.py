"""Draws what docs/method.md tells: a sentence as it is read, said and weighed, and what each decoder looks at.

python -m benchmarks.plot_method images/said.png images/looks.png
"""

import sys

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pix2seq.charts import to_image
from pix2seq.data.shapes import SHAPES
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import SLOTS, TOKENS_PER_OBJECT, Tokenizer
from pix2seq.visualization import GREY, PALETTE

BINS, OBJECTS = 64, 3
PICTURE, SENTENCE = 6, 6  # tokens in the drawings of attention
NOTHING, PALE = "white", "#EEEEEE"


def word(token: int, tokenizer: Tokenizer) -> str:
    if token >= tokenizer.first_bin_id:
        return str(token - tokenizer.first_bin_id)
    if token >= tokenizer.first_class_id:
        return SHAPES[token - tokenizer.first_class_id]
    return {tokenizer.bos_id: "BOS", tokenizer.noise_id: "NOISE"}[token]


def said() -> Figure:
    """Two real objects and a noise object of the training code's own making."""
    tokenizer = Tokenizer(len(SHAPES), BINS)
    build = SequenceBuilder(tokenizer, max_objects=OBJECTS, order="none")
    boxes, labels = np.array([[0.16, 0.62, 0.44, 1.0], [0.3, 0.0, 0.71, 0.29]]), np.array([2, 3])
    sentence = build(boxes, labels, np.random.default_rng(6))
    length = TOKENS_PER_OBJECT * OBJECTS
    figure = Figure(figsize=(12, 2.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    for place in range(length):
        color = (PALETTE[2], PALETTE[1], GREY)[place // TOKENS_PER_OBJECT]
        weight = sentence["token_weights"][place]
        axis.text(place + 0.45, 3.2, SLOTS[place % TOKENS_PER_OBJECT], ha="center", color="#777777", fontsize=9)
        for row, name in ((2, "input_ids"), (1, "labels")):
            shown = PALE if row == 2 or not weight else color
            axis.add_patch(_cell(place, row, shown))
            text = word(int(sentence[name][place]), tokenizer)
            axis.text(place + 0.45, row + 0.45, text, ha="center", va="center", fontsize=9)
        axis.text(place + 0.45, 0.45, f"{weight:g}", ha="center", va="center", fontsize=9)
    for row, name in ((2, "reads"), (1, "has to say"), (0, "weight")):
        axis.text(-0.15, row + 0.45, name, ha="right", va="center", fontsize=10)
    axis.set(xlim=(-1.4, length + 0.05), ylim=(0, 3.6))
    axis.axis("off")
    return figure


def looks() -> Figure:
    """A row is a token, and what it looks at is coloured."""
    figure = Figure(figsize=(11, 4.4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"p{n + 1}" for n in range(PICTURE)] + ["BOS", *SLOTS]
    for axis, title, of_the_picture in (
        (left, "--decoder llama: picture and sentence are one text", PALETTE[2]),
        (right, "--decoder transformer: the picture is looked up", PALE),
    ):
        total = PICTURE + SENTENCE
        for row in range(total):
            for column in range(total):
                if column < PICTURE:
                    color = of_the_picture if row < PICTURE else PALETTE[1]
                else:
                    color = PALETTE[0] if column <= row else NOTHING
                axis.add_patch(_cell(column, total - 1 - row, color))
            axis.text(-0.15, total - 0.55 - row, names[row], ha="right", va="center", fontsize=9)
            axis.text(row + 0.45, total + 0.1, names[row], ha="center", fontsize=9)
        if of_the_picture == PALE:
            axis.text(PICTURE / 2, total - PICTURE / 2, "no part of the decoder", ha="center", va="center", fontsize=9)
        axis.axhline(SENTENCE - 0.05, color="black", linewidth=0.8)
        axis.axvline(PICTURE - 0.05, color="black", linewidth=0.8)
        axis.set(xlim=(-1, total), ylim=(-0.1, total + 0.7), aspect="equal")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    return figure


def _cell(x: float, y: float, color: str) -> Rectangle:
    return Rectangle((x, y), 0.9, 0.9, facecolor=color, edgecolor="#CCCCCC", linewidth=0.5)


def main(*paths: str) -> None:
    for figure, path in zip((said(), looks()), paths, strict=True):
        to_image(figure).save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
