"""Draws images/sentence.png: how an image becomes a sentence. `python images/draw.py`

Everything in it comes from the project's own code: the picture from shapes.py, the tokens from sequence.py.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))

from pix2seq.sequence import SequenceBuilder
from pix2seq.shapes import SHAPES, draw_picture
from pix2seq.tokenizer import NOISE_LABEL, SLOTS, TOKENS_PER_OBJECT, Tokenizer
from pix2seq.visualize import color_of, draw_boxes

SIDE, CELL_WIDTH, CELL_HEIGHT = 420, 74, 30
INK, FAINT = "black", "#777777"


def main(path: Path) -> None:
    image, objects = draw_picture(np.random.default_rng((0, 0, 9)), size=128, max_shapes=5)
    boxes = np.array([box for _, box in objects]) / 128
    labels = np.array([label for label, _ in objects])
    tokenizer = Tokenizer(num_classes=len(SHAPES), num_bins=64)
    sentence = SequenceBuilder(tokenizer, max_objects=len(objects) + 3)(boxes, labels, np.random.default_rng(3))
    boxes, labels = tokenizer.decode(sentence["labels"])
    rows = sentence["labels"].reshape(-1, TOKENS_PER_OBJECT)
    weights = sentence["weights"].reshape(-1, TOKENS_PER_OBJECT)

    names = [f"{i + 1} {SHAPES[label]}" if label >= 0 else "" for i, label in enumerate(labels)]
    picture = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    picture = draw_boxes(picture, boxes * SIDE, names, [color_of(label) for label in labels], labels < 0, font_size=16)

    left = SIDE + 60
    sheet = Image.new("RGB", (left + CELL_WIDTH * 5 + 190, SIDE + 40), "white")
    sheet.paste(picture, (20, 20))
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(13)
    for slot, name in enumerate(SLOTS):
        draw.text((left + slot * CELL_WIDTH + 8, 20), name, fill=FAINT, font=small)
    draw.text((left + 5 * CELL_WIDTH + 14, 20), "what it teaches", fill=FAINT, font=small)
    for row, label in enumerate(labels):
        y = 42 + row * (CELL_HEIGHT + 8)
        for slot, token in enumerate(rows[row]):
            x = left + slot * CELL_WIDTH
            fill = color_of(label) if weights[row, slot] > 0 else "#EEEEEE"
            draw.rectangle((x, y, x + CELL_WIDTH - 6, y + CELL_HEIGHT), fill=fill)
            text = str(token - tokenizer.first_bin_id) if slot < 4 else ("noise" if label < 0 else SHAPES[label])
            draw.text((x + 6, y + 6), text, fill=INK if weights[row, slot] > 0 else "#AAAAAA", font=small)
        text = f"object {row + 1}" if label != NOISE_LABEL else "noise object: nothing is there"
        draw.text((left + 5 * CELL_WIDTH + 14, y + 6), text, fill=INK if label >= 0 else FAINT, font=small)
    y = 42 + len(labels) * (CELL_HEIGHT + 8) + 12
    for line in (
        "One row is five tokens; the rows, one after the other, are the sentence.",
        "Numbers are bins: 0 is the top or left edge, 63 the bottom or right.",
        "Pale cells have weight 0: where noise lies is never learnt.",
    ):
        draw.text((left, y), line, fill=INK, font=font)
        y += 24
    sheet.save(path)


if __name__ == "__main__":
    main(Path(__file__).with_name("sentence.png"))
