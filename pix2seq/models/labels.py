"""Labels of the forward pass: token sequences, or boxes and classes in the form of DETR."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pix2seq.models.configuration_pix2seq import Pix2SeqConfig
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT, Tokenizer

IGNORE_INDEX = -100  # the label of tokens without loss in transformers
HOW_TO_CREATE = "Create the image processor with Pix2SeqImageProcessor.from_model_config(model.config)"
MAX_OVERHANG = 0.01  # how far a box may reach over the padded square, as a fraction of its side


def build_sequences(
    labels: Sequence[Mapping[str, Any]],
    config: Pix2SeqConfig,
    image_size: int,
    seed: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Builds the sequences of a batch from boxes and classes, see `Pix2SeqForObjectDetection.forward`.

    Args:
        labels: The dict of each of B images.
        config: Config of the model.
        image_size: Side of the padded square, in pixels.
        seed: Seed of a random order, class corruption and random noise objects, as in training. None: the objects keep
            their order, and the noise objects of an image are always the same.

    Returns:
        Input ids, labels and token weights, each (B, L).

    Raises:
        ValueError: A dict has no `class_labels` or `boxes`, a class does not exist, or a box is not valid.
    """
    num_classes = len(config.category_ids)
    build_sequence = SequenceBuilder(
        Tokenizer(num_classes, config.num_bins),
        max_objects=config.max_objects,
        noise_objects=config.noise_objects,
        order="none" if seed is None else "random",
        class_corruption="none" if seed is None else "rand_n_fake_cls",
    )
    rows = []
    for index, image in enumerate(labels):
        boxes, classes = _read_objects(image, f"labels[{index}]", num_classes)
        height, width = (int(side) for side in image.get("size", (image_size, image_size)))
        if not (0 < height <= image_size and 0 < width <= image_size):
            raise ValueError(
                f"labels[{index}]: size {(height, width)} is not that of an image in a square of {image_size}"
            )
        rng = np.random.default_rng(0 if seed is None else (seed, index))
        rows.append(build_sequence(boxes, classes, rng, (width / image_size, height / image_size)))
    input_ids, targets, token_weights = (np.stack([row[name] for row in rows]) for name in rows[0])
    return input_ids, targets, token_weights


def _read_objects(image: Mapping[str, Any], name: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the boxes (M, 4), xyxy in [0, 1], and the classes (M,) of an image. `name` is for error messages."""
    if missing := {"class_labels", "boxes"} - set(image):
        raise ValueError(f"{name}: lacks {' and '.join(sorted(missing))}; found {', '.join(map(str, image))}")
    boxes, classes = (torch.as_tensor(image[key]).detach().cpu().numpy() for key in ("boxes", "class_labels"))
    is_empty = boxes.size == classes.size == 0
    if classes.ndim != 1 or (boxes.shape != (len(classes), 4) and not is_empty):
        raise ValueError(f"{name}: class_labels {classes.shape} and boxes {boxes.shape} must be (M,) and (M, 4)")
    if len(classes) and (classes.dtype.kind != "i" or classes.min() < 0 or classes.max() >= num_classes):
        raise ValueError(f"{name}: class_labels {classes.tolist()} must be integers in 0 ... {num_classes - 1}")
    boxes = boxes.astype(np.float64).reshape(-1, 4)
    half = boxes[:, 2:] / 2
    corners = np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)
    is_inside = (corners >= -MAX_OVERHANG) & (corners <= 1 + MAX_OVERHANG)
    is_valid = (half > 0).all(axis=1) & is_inside.all(axis=1)
    if not is_valid.all():
        raise ValueError(
            f"{name}: box {boxes[~is_valid][0].tolist()} is not (center x, center y, width, height) in [0, 1] of the "
            "padded square"
        )
    return corners.clip(0, 1), classes.astype(np.int64)


def default_token_weights(labels: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Returns the default weights of `SequenceBuilder` (B, L) for labels (B, L)."""
    weights = (labels != tokenizer.pad_id).float()
    weights[labels == tokenizer.eos_id] = SequenceBuilder.eos_weight
    is_noise = labels[:, CLASS_SLOT::TOKENS_PER_OBJECT] == tokenizer.noise_id
    for slot in range(CLASS_SLOT):
        weights[:, slot::TOKENS_PER_OBJECT][:, : is_noise.shape[1]].masked_fill_(is_noise, 0)
    return weights


def shift_right(labels: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Returns the input ids (B, L) of labels (B, L): BOS, then all labels but the last."""
    bos = torch.full_like(labels[:, :1], tokenizer.bos_id)
    return torch.cat([bos, labels[:, :-1]], dim=1)


def check_token_ids(
    labels: torch.Tensor, input_ids: torch.Tensor | None, token_weights: torch.Tensor | None, tokenizer: Tokenizer
) -> None:
    """Verifies labels (B, L).

    Raises:
        ValueError: They are not token ids, a token is not in the vocabulary or cannot be a target, or the input ids or
            weights have another shape.
    """
    if labels.ndim != 2 or labels.is_floating_point():
        raise ValueError(
            f"labels have the shape {tuple(labels.shape)} and type {labels.dtype}: token ids (B, L) are needed, or a "
            "dict of class_labels and boxes for each image"
        )
    for name, values in (("input_ids", input_ids), ("token_weights", token_weights)):
        if values is not None and values.shape != labels.shape:
            raise ValueError(f"labels have the shape {tuple(labels.shape)}, but {name} {tuple(values.shape)}")
    vocabulary = f"{tokenizer.num_classes} classes and {tokenizer.num_bins} bins have {tokenizer.vocab_size} tokens"
    if labels.numel() and not (labels.min() >= 0 and labels.max() < tokenizer.vocab_size):
        raise ValueError(
            f"labels lie in {labels.min().item()} ... {labels.max().item()}, but {vocabulary}. {HOW_TO_CREATE}"
        )
    if (labels == tokenizer.bos_id).any():
        raise ValueError(
            "labels contain BOS, which cannot be predicted: labels[:, i] is the token after input_ids[:, i]"
        )
    if token_weights is None:
        return
    is_bin = labels >= tokenizer.first_bin_id
    must_be_bin = torch.arange(labels.shape[1], device=labels.device) % TOKENS_PER_OBJECT != CLASS_SLOT
    is_target = (token_weights > 0) & (labels != tokenizer.eos_id)
    if (is_target & (is_bin != must_be_bin)).any():
        raise ValueError(f"labels are not sequences of four bins and a class, where {vocabulary}. {HOW_TO_CREATE}")
