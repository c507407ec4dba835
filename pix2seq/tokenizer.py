"""The vocabulary, and the conversion between boxes and token ids (Pix2Seq section 2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SLOTS = ("y1", "x1", "y2", "x2", "class")  # the tokens of one object, in order
TOKENS_PER_OBJECT = len(SLOTS)
CLASS_SLOT = SLOTS.index("class")
NOISE_LABEL = -1


@dataclass(frozen=True)
class Tokenizer:
    """Encodes each object as the five tokens `y1 x1 y2 x2 class`, and decodes tokens to boxes and labels.

    The vocabulary, ordered by id, for C classes and B bins:

        0                PAD     fills sequences up to the same length; never has weight in the loss
        1                BOS     the prompt, first token of every input sequence
        2                EOS     ends a sequence; used only without noise objects
        3                NOISE   the class of a noise object (label -1)
        4 ... 3+C        classes, ordered by contiguous label 0 ... C-1
        4+C ... 3+C+B    bins, shared by y and x

    NOISE precedes the classes, so that `first_class_id + label` is also right for label -1. Bins come last, so that
    comparing two coordinates is comparing their ids.

    Boxes are xyxy and normalized by the side of the padded square image: 0 is its left or top edge, 1 its right or
    bottom edge.

    Args:
        num_classes: Number of classes C, at least 1.
        num_bins: Number of bins B that a coordinate is quantized to, at least 2.
    """

    num_classes: int
    num_bins: int = 1000

    pad_id = 0
    bos_id = 1
    eos_id = 2
    noise_id = 3
    first_class_id = 4

    def __post_init__(self):
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}: at least 1 class is needed")
        if self.num_bins < 2:
            raise ValueError(f"num_bins is {self.num_bins}: at least 2 bins are needed")

    @property
    def first_bin_id(self) -> int:
        return self.first_class_id + self.num_classes

    @property
    def vocab_size(self) -> int:
        return self.first_bin_id + self.num_bins

    def quantize(self, coordinates: np.ndarray) -> np.ndarray:
        """Quantizes coordinates to bin ids.

        The bin centers are k / (B - 1), and a coordinate takes the nearest one: the error is at most half a bin and
        has no bias. Coordinates outside [0, 1] are clipped.

        Args:
            coordinates: Coordinates in [0, 1], any shape.

        Returns:
            Token ids of the same shape, int64.
        """
        bins = np.rint(np.asarray(coordinates, dtype=np.float64) * (self.num_bins - 1))
        return self.first_bin_id + np.clip(bins, 0, self.num_bins - 1).astype(np.int64)

    def dequantize(self, ids: np.ndarray) -> np.ndarray:
        """Converts bin ids to coordinates in [0, 1], float64. Ids that are not bins are clipped to 0 or 1."""
        return np.clip((np.asarray(ids, dtype=np.float64) - self.first_bin_id) / (self.num_bins - 1), 0.0, 1.0)

    def encode(self, boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Encodes objects as tokens.

        Args:
            boxes: Boxes (N, 4), xyxy in [0, 1].
            labels: Labels (N,) in -1 ... C-1; -1 is a noise object.

        Returns:
            Token ids (N, 5), int64, in the order of `SLOTS`.

        Raises:
            ValueError: A coordinate is not finite or a label is out of range.
        """
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        labels = np.asarray(labels, dtype=np.int64).reshape(-1)
        if not np.isfinite(boxes).all():
            raise ValueError("boxes contain values that are not finite")
        if len(labels) and not (labels.min() >= NOISE_LABEL and labels.max() < self.num_classes):
            raise ValueError(f"labels must lie in {NOISE_LABEL} ... {self.num_classes - 1}")
        yxyx = boxes[:, [1, 0, 3, 2]]
        return np.concatenate([self.quantize(yxyx), (self.first_class_id + labels)[:, None]], axis=1)

    def decode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decodes any token ids to objects, and never raises.

        Decoding stops at the first EOS or PAD. An incomplete object at the end is dropped, and so is each group of
        five tokens that is not four bins and a class.

        Args:
            ids: Token ids without BOS, any shape.

        Returns:
            Boxes (N, 4), xyxy in [0, 1], float64; and labels (N,), int64, -1 for noise objects.
        """
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        ends = np.flatnonzero((ids == self.eos_id) | (ids == self.pad_id))
        length = ends[0] if len(ends) else len(ids)
        objects = ids[: length - length % TOKENS_PER_OBJECT].reshape(-1, TOKENS_PER_OBJECT)
        bins, classes = objects[:, :CLASS_SLOT], objects[:, CLASS_SLOT]
        is_bin = (bins >= self.first_bin_id) & (bins < self.vocab_size)
        well_formed = is_bin.all(axis=1) & (classes >= self.noise_id) & (classes < self.first_bin_id)
        boxes = self.dequantize(bins[well_formed])[:, [1, 0, 3, 2]]
        return boxes, classes[well_formed] - self.first_class_id

    def token_to_str(self, token: int, class_names: Sequence[str]) -> str:
        """Returns a bin's number, a class's name or the name of a special token.

        Args:
            token: A token id of the vocabulary.
            class_names: The C class names, ordered by label.
        """
        if token >= self.first_bin_id:
            return str(token - self.first_bin_id)
        if token >= self.first_class_id:
            return class_names[token - self.first_class_id]
        return ("PAD", "BOS", "EOS", "NOISE")[token]
