"""Training examples and evaluation images.

Randomness is keyed, not remembered: what the c-th copy of image i looks like in epoch e depends on (seed, e, i, c)
alone, whichever worker or rank makes it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from pix2seq.data.coco import Annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.errors import UserError
from pix2seq.sequence import SequenceBuilder
from pix2seq.transforms import PAD_VALUE, ColorAugmentation, EvalTransform, TrainTransform

MAX_ATTEMPTS = 100  # images in a row that cannot be read, before somebody has to look


@dataclass
class TrainDataset(Dataset):
    """Augmented training examples. Keys are (epoch, index, copy): see StepSampler."""

    annotations: Annotations
    transform: TrainTransform
    sequence_builder: SequenceBuilder
    seed: int
    colors: ColorAugmentation | None = None

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        """pixel_values uint8 (3, S, S), image_id, size (2,): (height, width) of what the picture covers of the canvas,
        and SequenceBuilder's input_ids, labels, weights, each (L,).

        Another image, the same in every run, stands in for one that cannot be read; `unreadable` then has a line for
        each that was tried, its file and the reason, and is "" otherwise. With colour augmentation also `colors`, to
        be painted on the device: see colors.paint.
        """
        unreadable = []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng((self.seed, *key, *[attempt] * bool(attempt)))
            index = int(rng.integers(len(self.annotations))) if attempt else key[1]
            try:
                return self._example(index, rng) | {"unreadable": "\n".join(unreadable)}
            except BadImageError as bad:
                unreadable.append(f"{self.annotations.name(index)}: {bad}")
        raise UserError(f"{MAX_ATTEMPTS} images in a row cannot be read, the last: {unreadable[-1]}")

    def _example(self, index: int, rng: np.random.Generator) -> dict:
        boxes, labels = self.annotations.objects(index)
        canvas = self.transform(self.annotations.image_file(index), boxes, rng)
        image_id, size = self.annotations.image_ids[index], np.array(canvas.valid_size)
        example = {"pixel_values": canvas.image, "image_id": image_id, "size": size}
        if self.colors is not None:
            example["color_ops"] = self.colors.draw(rng)
        return example | self.sequence_builder(canvas.boxes, labels[canvas.kept], rng, canvas.valid_fraction)


@dataclass
class EvalDataset(Dataset):
    """Whole images without their annotations, and what is needed to bring boxes back to their pixels."""

    annotations: Annotations
    transform: EvalTransform

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict:
        """pixel_values uint8 (3, S, S), image_id, size and original_size (height, width): see transforms.Canvas.

        An image that cannot be read is an empty canvas; `unreadable` is its file and the reason, and "" otherwise.
        """
        item = {"image_id": self.annotations.image_ids[index], "unreadable": ""}
        try:
            picture = self.annotations.image_file(index)
            canvas = self.transform(picture)
        except BadImageError as bad:
            side = self.transform.image_size
            size = np.array([side, side])
            blank = torch.full((3, side, side), PAD_VALUE, dtype=torch.uint8)
            item["unreadable"] = f"{self.annotations.name(index)}: {bad}"
            return item | {"pixel_values": blank, "size": size, "original_size": size}
        size, original_size = np.array(canvas.valid_size), np.array(picture.shape[-2:])
        return item | {"pixel_values": canvas.image, "size": size, "original_size": original_size}
