"""What the model will see: images as annotated, as augmented, and as the sentence they become."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.data.datasets import TrainDataset
from pix2seq.data.image_files import BadImageError
from pix2seq.tokenizer import NOISE_LABEL, TOKENS_PER_OBJECT
from pix2seq.transforms import apply_color_ops
from pix2seq.visualization import GREY, color_of, draw_boxes, enlarge, grid, paragraph, sequence_table

SIDE = 400  # of a picture
MOST_OBJECTS, MOST_NOISE = 6, 3  # rows of the table
NOISE_DRAWN = 10  # more of it hides the picture


def show(dataset: TrainDataset, indices: Sequence[int], epoch: int = 0) -> Image.Image:
    """A row for each image: the file with its annotations, the canvas with the boxes decoded back from the tokens
    (noise objects dashed), and the sentence, an object a line, pale where a token has no weight."""
    rows = [[_annotated(dataset, index), *_example(dataset, (epoch, index, 0))] for index in indices]
    sheet = grid(rows, ("the file and its annotations", "what the model sees", "what it learns to say"), SIDE)
    bins = dataset.sequence_builder.tokenizer.num_bins
    return _with_caption(
        sheet,
        f"A line is an object, five tokens; the lines, one after the other, are the sentence. Numbers are bins: 0 is "
        f"the top or left edge of the canvas, {bins - 1} the bottom or right. Pale tokens have no weight: where noise "
        f"lies is never learnt, only that it is noise. Of noise, {NOISE_DRAWN} objects are drawn at most.",
    )


def _annotated(dataset: TrainDataset, index: int) -> Image.Image:
    annotations = dataset.annotations
    try:
        image = to_pil_image(annotations.image_file(index).pixels())
    except BadImageError:
        return Image.new("RGB", (SIDE, SIDE), GREY)
    boxes, labels = annotations.objects(index)
    large, boxes = enlarge(image, boxes, SIDE)
    names = [annotations.categories.names[label] for label in labels]
    return draw_boxes(large, boxes, names, [color_of(label) for label in labels])


def _example(dataset: TrainDataset, key: tuple[int, int, int]) -> tuple[Image.Image, Image.Image]:
    example, tokenizer = dataset[key], dataset.sequence_builder.tokenizer
    pixels = example["pixel_values"]
    if "color_ops" in example:
        pixels = apply_color_ops(pixels[None], example["size"][None], example["color_ops"][None])[0]
    names = dataset.annotations.categories.names
    boxes, labels = tokenizer.decode(example["labels"])
    captions = ["" if label == NOISE_LABEL else f"{n + 1} {names[label]}" for n, label in enumerate(labels)]
    # Noise first, so that it lies under the objects.
    order = np.concatenate(
        [np.flatnonzero(labels == NOISE_LABEL)[:NOISE_DRAWN], np.flatnonzero(labels != NOISE_LABEL)]
    )
    canvas, scaled = enlarge(to_pil_image(pixels), boxes[order] * pixels.shape[-1], SIDE)
    colors = [color_of(labels[n]) for n in order]
    canvas = draw_boxes(canvas, scaled, [captions[n] for n in order], colors, labels[order] == NOISE_LABEL)

    count = len(labels)
    tokens = example["labels"][: count * TOKENS_PER_OBJECT].reshape(count, -1)
    weights = example["token_weights"][: count * TOKENS_PER_OBJECT].reshape(count, -1)
    real, noise = np.flatnonzero(labels != NOISE_LABEL), np.flatnonzero(labels == NOISE_LABEL)
    lines = []
    for n in sorted([*real[:MOST_OBJECTS], *noise[:MOST_NOISE]]):
        is_noise = labels[n] == NOISE_LABEL
        cells = [str(token - tokenizer.first_bin_id) for token in tokens[n, :-1]]
        cells.append("noise" if is_noise else names[labels[n]])
        lines.append(
            (cells, weights[n] > 0, color_of(labels[n]), "nothing is there" if is_noise else f"object {n + 1}")
        )
    left_out = [
        f"{extra} more {what}"
        for extra, what in ((len(real) - MOST_OBJECTS, "objects"), (len(noise) - MOST_NOISE, "noise objects"))
        if extra > 0
    ]
    ends = [] if dataset.sequence_builder.noise_objects else ["the end of the sentence"]
    return canvas, sequence_table(lines, " and ".join(left_out + ends), SIDE)


def _with_caption(sheet: Image.Image, text: str) -> Image.Image:
    caption = paragraph(text, sheet.width)
    whole = Image.new("RGB", (sheet.width, sheet.height + caption.height), "white")
    whole.paste(sheet, (0, 0))
    whole.paste(caption, (0, sheet.height))
    return whole
