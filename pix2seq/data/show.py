"""Draws training examples: images as annotated, as augmented, and as the token sequences that the model learns."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.color_augmentation import apply_color_ops
from pix2seq.data.datasets import TrainDataset
from pix2seq.data.image_files import BadImageError
from pix2seq.tokenizer import NOISE_LABEL, TOKENS_PER_OBJECT
from pix2seq.visualization import (
    GREY,
    TableRow,
    color_of,
    draw_boxes,
    enlarge,
    grid,
    paragraph,
    sequence_table,
    stack,
)

SIDE = 400  # of an image in the figure
MAX_OBJECT_ROWS, MAX_NOISE_ROWS = 6, 3  # of the table
MAX_NOISE_BOXES = 10  # more would hide the image


def draw_training_examples(dataset: TrainDataset, indices: Sequence[int], epoch: int = 0) -> Image.Image:
    """Draws a row for each image: the annotated file, the augmented input, and the target sequence.

    The boxes on the input are decoded from the target tokens. Noise objects are dashed.

    Args:
        dataset: The training set.
        indices: Indices of the images.
        epoch: Epoch of the augmentation.
    """
    rows = [[_draw_annotated_image(dataset, index), *_draw_example(dataset, (epoch, index, 0))] for index in indices]
    figure = grid(rows, titles=("annotated image", "model input", "target sequence"), cell=SIDE)
    caption = (
        "Each row of the table is an object of five tokens; the target sequence is all rows in order. The numbers are "
        f"coordinate bins: 0 is the top or left edge of the input, {dataset.sequence_builder.tokenizer.num_bins - 1} "
        "the bottom or right edge. Pale tokens have no weight in the loss: the model learns to recognize noise "
        f"objects, not their coordinates. At most {MAX_NOISE_BOXES} noise objects are drawn, as dashed boxes."
    )
    return stack([figure, paragraph(caption, figure.width)])


def _draw_annotated_image(dataset: TrainDataset, index: int) -> Image.Image:
    annotations = dataset.annotations
    try:
        image = to_pil_image(annotations.image_file(index).pixels())
    except BadImageError:
        return Image.new("RGB", (SIDE, SIDE), GREY)
    boxes, labels = annotations.objects(index)
    image, boxes = enlarge(image, boxes, SIDE)
    names = [annotations.categories.names[label] for label in labels]
    return draw_boxes(image, boxes, names, [color_of(label) for label in labels])


def _draw_example(dataset: TrainDataset, key: tuple[int, int, int]) -> tuple[Image.Image, Image.Image]:
    """Draws the model input and the table of its target sequence."""
    example, tokenizer = dataset[key], dataset.sequence_builder.tokenizer
    pixels = example["pixel_values"]
    if "color_ops" in example:
        pixels = apply_color_ops(pixels[None], example["size"][None], example["color_ops"][None])[0]
    names = dataset.annotations.categories.names
    boxes, labels = tokenizer.decode(example["labels"])
    real, noise = np.flatnonzero(labels != NOISE_LABEL), np.flatnonzero(labels == NOISE_LABEL)
    captions = ["" if label == NOISE_LABEL else f"{n + 1} {names[label]}" for n, label in enumerate(labels)]
    order = np.concatenate([noise[:MAX_NOISE_BOXES], real])  # real objects are drawn over noise
    image, scaled = enlarge(to_pil_image(pixels), boxes[order] * pixels.shape[-1], SIDE)
    colors = [color_of(labels[n]) for n in order]
    image = draw_boxes(image, scaled, [captions[n] for n in order], colors, dashed=labels[order] == NOISE_LABEL)

    num_tokens = len(labels) * TOKENS_PER_OBJECT
    tokens = example["labels"][:num_tokens].reshape(-1, TOKENS_PER_OBJECT)
    weights = example["token_weights"][:num_tokens].reshape(-1, TOKENS_PER_OBJECT)
    rows = []
    for n in sorted([*real[:MAX_OBJECT_ROWS], *noise[:MAX_NOISE_ROWS]]):
        is_noise = labels[n] == NOISE_LABEL
        cells = [str(token - tokenizer.first_bin_id) for token in tokens[n, :-1]]
        cells.append("noise" if is_noise else names[labels[n]])
        description = "noise object" if is_noise else f"object {n + 1}"
        rows.append(TableRow(cells, weights[n] > 0, color_of(labels[n]), description))
    omitted = ((len(real) - MAX_OBJECT_ROWS, "object"), (len(noise) - MAX_NOISE_ROWS, "noise object"))
    footer = [f"{count} more {name}{'s' * (count > 1)}" for count, name in omitted if count > 0]
    footer += [] if dataset.sequence_builder.noise_objects else ["end of sequence"]
    return image, sequence_table(rows, f"... {', '.join(footer)}" if footer else "", SIDE)
