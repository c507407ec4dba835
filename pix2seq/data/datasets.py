"""Training and evaluation datasets.

Every training sample seeds its own generator from (seed, epoch, index, copy), so that it does not depend on the worker
or process that makes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from pix2seq.color_augmentation import ColorAugmentation
from pix2seq.data.coco import Annotations
from pix2seq.data.image_files import BadImageError, ImageFile
from pix2seq.errors import UserError
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import NOISE_LABEL
from pix2seq.transforms import PAD_VALUE, EvalTransform, PaddedImage, TrainTransform, join_quadrants

MAX_ATTEMPTS = 100  # images in a row that cannot be read, before training stops


@dataclass
class TrainDataset(Dataset):
    """Augmented training examples with their token sequences.

    Args:
        annotations: Images and objects.
        transform: Geometric augmentation.
        sequence_builder: Builds the token sequences.
        seed: Seed of all randomness.
        colors: Color augmentation, None for none.
        hard_negatives: False detections (K, 4), xyxy in pixels, by image id. They become noise objects.
        mosaic: Probability that an example consists of crops of four images, see `join_quadrants`. The last three are
            random ones.
    """

    annotations: Annotations
    transform: TrainTransform
    sequence_builder: SequenceBuilder
    seed: int
    colors: ColorAugmentation | None = None
    mosaic: float = 0.0
    hard_negatives: dict[int, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        """Makes a training example.

        An image that cannot be read is replaced by a random one, which depends on the seed and the key only.

        Args:
            key: (epoch, index of the image, number of the copy), see `StepSampler`.

        Returns:
            A dictionary with

            - pixel_values: uint8 (3, S, S), the padded image.
            - image_id: Id of the image.
            - size: int (2,), the (height, width) of the part of the padded square that the image covers.
            - input_ids, labels, token_weights: (L,), see `SequenceBuilder`.
            - color_ops: With color augmentation only, see `apply_color_ops`.
            - unreadable: A line "path: reason" for each image that was replaced.
        """
        unreadable: list[str] = []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng((self.seed, *key) if attempt == 0 else (self.seed, *key, attempt))
            index = key[1] if attempt == 0 else int(rng.integers(len(self.annotations)))
            try:
                return self._make_example(index, rng) | {"unreadable": "\n".join(unreadable)}
            except BadImageError as error:
                unreadable.append(f"{self.annotations.name(index)}: {error}")
        raise UserError(f"{MAX_ATTEMPTS} images in a row cannot be read, the last one is {unreadable[-1]}")

    def _make_example(self, index: int, rng: np.random.Generator) -> dict:
        if self.mosaic and rng.random() < self.mosaic:
            indices = [index, *rng.integers(len(self.annotations), size=3).tolist()]
            transform = self.transform.of_quadrant()
            parts = [self._augment(part, transform, rng) for part in indices]
            padded, labels = join_quadrants([part for part, _ in parts]), np.concatenate([part for _, part in parts])
        else:
            padded, labels = self._augment(index, self.transform, rng)
        example = {
            "pixel_values": padded.image,
            "image_id": self.annotations.image_ids[index],
            "size": np.array(padded.valid_size),
        }
        if self.colors is not None:
            example["color_ops"] = self.colors.draw(rng)
        is_object = labels != NOISE_LABEL
        return example | self.sequence_builder(
            padded.boxes[is_object], labels[is_object], rng, padded.valid_fraction, padded.boxes[~is_object]
        )

    def _augment(
        self, index: int, transform: TrainTransform, rng: np.random.Generator
    ) -> tuple[PaddedImage, np.ndarray]:
        """Transforms an image. Returns it with the labels of its boxes, NOISE_LABEL for hard negatives."""
        boxes, labels = self.annotations.objects(index)
        hard_negatives = self.hard_negatives.get(int(self.annotations.image_ids[index]), torch.zeros(0, 4)).numpy()
        boxes = np.concatenate([boxes, hard_negatives], dtype=np.float64)
        padded = transform(self.annotations.image_file(index), boxes, rng)
        return padded, np.concatenate([labels, np.full(len(hard_negatives), NOISE_LABEL)])[padded.kept]


class ImageCollection(Protocol):
    """Interface of the images of an `EvalDataset`, for example `Annotations`."""

    @property
    def image_ids(self) -> Sequence[int] | np.ndarray:
        """Id of each image."""

    def __len__(self) -> int: ...

    def image_file(self, index: int) -> ImageFile | torch.Tensor:
        """Opens an image. Raises BadImageError if it cannot be read."""

    def name(self, index: int) -> str:
        """Returns the name of an image in messages."""


Images = TypeVar("Images", bound=ImageCollection)


@dataclass
class EvalDataset(Dataset, Generic[Images]):
    """Whole images without annotations, and the sizes that map predicted boxes to their pixels.

    Args:
        annotations: The images.
        transform: Resizes and pads them.
    """

    annotations: Images
    transform: EvalTransform

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict:
        """Loads an image.

        Returns:
            A dictionary with

            - pixel_values: uint8 (3, S, S), the padded image; gray if the image cannot be read.
            - image_id: Id of the image.
            - size: int (2,), the (height, width) of the part of the padded square that the image covers.
            - original_size: int (2,), the (height, width) of the image file.
            - unreadable: "path: reason" if the image cannot be read, otherwise "".
        """
        unreadable = ""
        try:
            file = self.annotations.image_file(index)
            padded = self.transform(file)
            pixels, size, original_size = padded.image, padded.valid_size, file.shape[-2:]
        except BadImageError as error:
            unreadable = f"{self.annotations.name(index)}: {error}"
            side = self.transform.image_size
            pixels = torch.full((3, side, side), PAD_VALUE, dtype=torch.uint8)
            size = original_size = (side, side)
        return {
            "pixel_values": pixels,
            "image_id": self.annotations.image_ids[index],
            "size": np.array(size),
            "original_size": np.array(original_size),
            "unreadable": unreadable,
        }
