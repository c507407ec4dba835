"""The vocabulary, and the codec between boxes and token ids.

Deterministic, and knows numbers only: no images, no randomness, no model. Boxes are always xyxy here and
normalised by the canvas, so 0 is the left or top edge of the square the model sees and 1 its right or bottom edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SLOTS = ("y1", "x1", "y2", "x2", "class")
TOKENS_PER_OBJECT = len(SLOTS)
CLASS_SLOT = SLOTS.index("class")
NOISE_LABEL = -1


@dataclass(frozen=True)
class Tokenizer:
    """Writes an object as five tokens, `y1 x1 y2 x2 class` (Pix2Seq section 2.1), and reads them back.

    The vocabulary, in order of ids (C classes, B bins):

        0               PAD     fills short rows; never a target with weight
        1               BOS     the prompt that starts every sentence
        2               EOS     ends a sentence; used only when no noise objects fill the slots
        3               NOISE   the class of an object that is not there (label -1)
        4 ... 3+C       classes, by contiguous label 0 ... C-1
        4+C ... 3+C+B   bins, shared by y and x

    NOISE directly before the classes makes label -1 its natural label; bins at the end make "this coordinate is not
    smaller than that one" a comparison of ids.
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
        """Coordinates in [0, 1] -> bin ids. Rounds to the bin centres k / (B-1): the error is at most half a bin."""
        bins = np.rint(np.asarray(coordinates, dtype=np.float64) * (self.num_bins - 1))
        return self.first_bin_id + np.clip(bins, 0, self.num_bins - 1).astype(np.int64)

    def dequantize(self, ids: np.ndarray) -> np.ndarray:
        """Bin ids -> coordinates in [0, 1]; ids that are no bins are clipped to the nearest end."""
        return np.clip((np.asarray(ids, dtype=np.float64) - self.first_bin_id) / (self.num_bins - 1), 0.0, 1.0)

    def encode(self, boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) xyxy in [0, 1] and labels (N,) in -1 ... C-1 -> token ids (N, 5), int64.

        Raises ValueError for coordinates that are not finite and for labels out of range.
        """
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        labels = np.asarray(labels, dtype=np.int64).reshape(-1)
        if not np.isfinite(boxes).all():
            raise ValueError("boxes hold values that are not finite")
        if len(labels) and not (labels.min() >= NOISE_LABEL and labels.max() < self.num_classes):
            raise ValueError(f"labels must lie in {NOISE_LABEL} ... {self.num_classes - 1}")
        yxyx = boxes[:, [1, 0, 3, 2]]
        return np.concatenate([self.quantize(yxyx), (self.first_class_id + labels)[:, None]], axis=1)

    def decode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Any token ids, without the BOS -> boxes (N, 4) xyxy in [0, 1] and labels (N,), -1 for noise objects.

        Never raises: reading stops at the first EOS or PAD, an unfinished object at the end is left out, and so is
        any group of five that is not four bins and a class.
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

    def token_to_str(self, token: int, names: Sequence[str]) -> str:
        """A bin's number, or the name of a class, of `names` (C,), or NOISE."""
        if token >= self.first_bin_id:
            return str(token - self.first_bin_id)
        return "NOISE" if token == self.noise_id else names[token - self.first_class_id]
