"""Draws the figures of docs/method.md: a training sequence, and the attention masks of the two decoders.

python -m benchmarks.plot_method --output_dir images
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pix2seq.data.shapes import SHAPES
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import SLOTS, TOKENS_PER_OBJECT, Tokenizer
from pix2seq.visualization import GREEN, GREY, LIGHT_GREY, ORANGE, SKY_BLUE, TEXT_GREY

NUM_BINS, MAX_OBJECTS = 64, 3
NUM_VISUAL, NUM_SEQUENCE = 6, 6  # tokens in the attention masks


def inputs_and_labels() -> Figure:
    """Inputs, labels and weights of two real objects and a noise object, from SequenceBuilder."""
    tokenizer = Tokenizer(len(SHAPES), NUM_BINS)
    build = SequenceBuilder(tokenizer, max_objects=MAX_OBJECTS, order="none")
    boxes, labels = np.array([[0.16, 0.62, 0.44, 1.0], [0.3, 0.0, 0.71, 0.29]]), np.array([2, 3])
    sequence = build(boxes, labels, np.random.default_rng(6))
    length = TOKENS_PER_OBJECT * MAX_OBJECTS
    figure = Figure(figsize=(12, 2.6), dpi=100, layout="constrained")
    axis = figure.subplots()
    for number, (name, color) in enumerate((("object 1", GREEN), ("object 2", SKY_BLUE), ("noise object", GREY))):
        start = number * TOKENS_PER_OBJECT
        axis.text(start + TOKENS_PER_OBJECT / 2, 4.0, name, ha="center", color=color, fontsize=10, weight="bold")
        for position in range(start, start + TOKENS_PER_OBJECT):
            weight = sequence["token_weights"][position]
            slot = SLOTS[position % TOKENS_PER_OBJECT]
            axis.text(position + 0.45, 3.2, slot, ha="center", color=TEXT_GREY, fontsize=9)
            for row, key in ((2, "input_ids"), (1, "labels")):
                axis.add_patch(_cell(position, row, color if key == "labels" and weight else LIGHT_GREY))
                token = tokenizer.token_to_str(int(sequence[key][position]), SHAPES)
                axis.text(position + 0.45, row + 0.45, token, ha="center", va="center", fontsize=9)
            axis.text(position + 0.45, 0.45, f"{weight:g}", ha="center", va="center", fontsize=9)
    for row, name in ((2, "input_ids"), (1, "labels"), (0, "token_weights")):
        axis.text(-0.15, row + 0.45, name, ha="right", va="center", fontsize=10, family="monospace")
    axis.set(xlim=(-1.8, length + 0.05), ylim=(0, 4.5))
    axis.axis("off")
    return figure


def attention_masks() -> Figure:
    """A row is a query token; its colored cells are the tokens that it attends to."""
    figure = Figure(figsize=(11, 4.9), dpi=100, layout="constrained")
    names = [f"v{number + 1}" for number in range(NUM_VISUAL)] + ["BOS", *SLOTS]
    total = NUM_VISUAL + NUM_SEQUENCE
    for axis, decoder in zip(figure.subplots(1, 2), ("llama", "transformer"), strict=True):
        for row in range(total):
            for column in range(total):
                if column >= NUM_VISUAL:
                    color = ORANGE if column <= row else "white"
                elif row >= NUM_VISUAL:
                    color = SKY_BLUE
                else:
                    color = GREEN if decoder == "llama" else LIGHT_GREY
                axis.add_patch(_cell(column, total - 1 - row, color))
            axis.text(-0.15, total - 0.55 - row, names[row], ha="right", va="center", fontsize=9)
            axis.text(row + 0.45, total + 0.1, names[row], ha="center", fontsize=9)
        if decoder == "transformer":
            axis.text(
                NUM_VISUAL / 2,
                total - NUM_VISUAL / 2,
                "encoder only",
                ha="center",
                va="center",
                fontsize=9,
            )
        axis.axhline(NUM_SEQUENCE - 0.05, color="black", linewidth=0.8)
        axis.axvline(NUM_VISUAL - 0.05, color="black", linewidth=0.8)
        axis.set(xlim=(-0.9, total), ylim=(-0.1, total + 0.7), aspect="equal")
        axis.set_title(
            {
                "llama": "--decoder llama: visual tokens are a bidirectional prefix",
                "transformer": "--decoder transformer: cross-attention to visual tokens",
            }[decoder],
            fontsize=10,
        )
        axis.axis("off")
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=color, label=label)
        for color, label in (
            (GREEN, "visual tokens to visual tokens"),
            (SKY_BLUE, "sequence to visual tokens"),
            (ORANGE, "sequence to previous tokens"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _cell(x: float, y: float, color: str) -> Rectangle:
    return Rectangle((x, y), 0.9, 0.9, facecolor=color, edgecolor="#CCCCCC", linewidth=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of docs/method.md.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the images")
    args = parser.parse_args()
    for name, figure in (("inputs_and_labels", inputs_and_labels()), ("attention_masks", attention_masks())):
        figure.savefig(args.output_dir / f"{name}.png", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
