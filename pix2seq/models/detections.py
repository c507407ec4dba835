"""Detected objects, and their computation from generated tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import batched_nms

from pix2seq.generation import DecodingOptions, DecodingState, NonFiniteLogits
from pix2seq.tokenizer import CLASS_SLOT, TOKENS_PER_OBJECT, Tokenizer

MERGE_IOU = 0.6  # between boxes of the same class, above which they count as the same object


@dataclass
class Detections:
    """The detected objects of one image, in the order of generation, or of their scores if sequences were merged.

    Args:
        boxes: Boxes (N, 4), xyxy in [0, 1] of the padded square, float64.
        labels: Contiguous labels (N,), int64.
        scores: Scores (N,), float64. The probability of the label among all tokens: the probability of NOISE lowers
            it. With `box_score_power`, it is multiplied by the probability of the coordinates.
        num_steps: Number of decoder steps.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    num_steps: int = 0


def to_detections(state: DecodingState, tokenizer: Tokenizer, options: DecodingOptions) -> list[Detections]:
    """Converts token sequences to objects. A sequence ends at its first EOS; an incomplete object is dropped.

    The objects of several sequences of an image are merged.

    Args:
        state: The result of `generate_tokens`, or a state while tokens are generated.
        tokenizer: Defines the vocabulary.
        options: Decoding options of the state.

    Returns:
        The objects of each image.

    Raises:
        NonFiniteLogits: The logits of an image were not finite.
    """
    labels, scores, num_steps = (values.cpu().numpy() for values in (state.labels, state.scores, state.num_steps))
    tokens, offsets, neighborhood_probs = (
        values.cpu().numpy().reshape(len(values), -1, TOKENS_PER_OBJECT)
        for values in (state.tokens, state.offsets, state.neighborhood_probs)
    )
    finite = np.isfinite(scores).all(axis=1) & np.isfinite(offsets + neighborhood_probs).all(axis=(1, 2))
    if not finite.all():
        raise NonFiniteLogits(sorted(set(((~finite).nonzero()[0] // options.num_samples).tolist())))
    is_complete = (tokens != tokenizer.eos_id).all(axis=-1).cumprod(axis=1).astype(bool)
    boxes = tokenizer.dequantize((tokens + offsets)[..., [1, 0, 3, 2]])
    # The means of two corners that are close to each other may be in the wrong order.
    boxes[..., 2:] = np.maximum(boxes[..., :2], boxes[..., 2:])
    scores = scores.astype(np.float64)
    if options.box_score_power:
        scores *= neighborhood_probs[..., :CLASS_SLOT].prod(axis=-1) ** options.box_score_power
    samples = [
        Detections(boxes[row][mask], labels[row][mask], scores[row][mask], int(num_steps[row]))
        for row, mask in enumerate(is_complete)
    ]
    if options.num_samples == 1:
        return samples
    starts = range(0, len(samples), options.num_samples)
    return [merge_samples(samples[start : start + options.num_samples], options.max_objects) for start in starts]


def merge_samples(samples: list[Detections], max_objects: int) -> Detections:
    """Merges the objects of several sequences of an image by non-maximum suppression.

    Args:
        samples: The objects of each sequence.
        max_objects: Maximum number of objects that remain.

    Returns:
        The remaining objects, highest score first.
    """
    boxes, labels, scores = (
        np.concatenate([getattr(sample, name) for sample in samples]) for name in ("boxes", "labels", "scores")
    )
    kept = batched_nms(torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels), MERGE_IOU)
    kept = kept[:max_objects].numpy()
    return Detections(boxes[kept], labels[kept], scores[kept], sum(sample.num_steps for sample in samples))


def pad_detections(detections: list[Detections], count: int) -> dict[str, np.ndarray]:
    """Stacks the objects of images, sorted by descending score and padded to the same number N.

    Args:
        detections: The objects of each of B images.
        count: Number N, at least that of the objects of each image.

    Returns:
        `boxes` (B, N, 4), `labels` (B, N), -1 where an image has fewer objects, and `scores` (B, N).
    """
    boxes, scores = np.zeros((len(detections), count, 4)), np.zeros((len(detections), count))
    labels = np.full((len(detections), count), -1)
    for row, image in enumerate(detections):
        order = np.argsort(-image.scores, kind="stable")
        boxes[row, : len(order)] = image.boxes[order]
        scores[row, : len(order)] = image.scores[order]
        labels[row, : len(order)] = image.labels[order]
    return {"boxes": boxes, "labels": labels, "scores": scores}
