"""Training examples and evaluation images, their samplers and loaders.

Randomness is keyed, not remembered: what the c-th copy of image i looks like in epoch e depends on (seed, e, i, c)
alone, whichever worker or rank makes it, and the order of an epoch on (seed, e).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2.functional import pil_to_tensor

from pix2seq.coco import Annotations
from pix2seq.errors import UserError
from pix2seq.sequence import SequenceBuilder
from pix2seq.transforms import EvalTransform, TrainTransform


def load_image(path: Path) -> torch.Tensor:
    """An image file as uint8 RGB (3, H, W). Raises UserError naming the file."""
    try:
        with Image.open(path) as image:
            return pil_to_tensor(image.convert("RGB"))
    # Pillow raises the middle two for damaged chunks and headers.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


@dataclass
class TrainDataset(Dataset):
    """Augmented training examples. Keys are (epoch, index, copy): see StepSampler."""

    annotations: Annotations
    transform: TrainTransform
    build: SequenceBuilder
    seed: int

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        """pixel_values uint8 (3, S, S), image_id, and SequenceBuilder's input_ids, labels, weights, each (L,)."""
        epoch, index, copy = key
        rng = np.random.default_rng((self.seed, epoch, index, copy))
        boxes, labels = self.annotations.objects(index)
        canvas = self.transform(load_image(self.annotations.path(index)), boxes, rng)
        sentence = self.build(canvas.boxes, labels[canvas.kept], rng, canvas.content)
        return {"pixel_values": canvas.image, "image_id": self.annotations.image_ids[index]} | sentence


@dataclass
class EvalDataset(Dataset):
    """Whole images without their annotations, and what is needed to bring boxes back to their pixels."""

    annotations: Annotations
    transform: EvalTransform

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> dict:
        """pixel_values uint8 (3, S, S), image_id, size and original_size (height, width): see transforms.Canvas."""
        image = load_image(self.annotations.path(index))
        canvas = self.transform(image)
        return {
            "pixel_values": canvas.image,
            "image_id": self.annotations.image_ids[index],
            "size": np.array(canvas.size),
            "original_size": np.array(image.shape[-2:]),
        }


@dataclass
class StepSampler(Sampler):
    """Endless micro-batches of (epoch, index, copy) for one rank, from any step on, without reading what lies before.

    All samples form one stream, epoch after epoch, each in an order of its own. Optimizer step s takes the next
    `batch_size * accumulation * world_size` of it, so the same samples make up a step however that product is split.
    Each image gives `repetition` samples in a row (batch repetition, Hoffer et al. 2020).
    """

    num_images: int
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    start_step: int = 0
    repetition: int = 1

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> float:
        return self.num_images * self.repetition / self.samples_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        micro_batch = self.start_step * self.accumulation
        orders: dict[int, np.ndarray] = {}
        while True:
            first = (micro_batch * self.world_size + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                image, copy = divmod(position, self.repetition)
                epoch, offset = divmod(image, self.num_images)
                if epoch not in orders:
                    orders = {e: order for e, order in orders.items() if e >= epoch - 1}
                    orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
                keys.append((epoch, int(orders[epoch][offset]), copy))
            yield keys
            micro_batch += 1


def train_loader(dataset: TrainDataset, sampler: StepSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_group_signals_to_the_trainer,
    )


def _leave_group_signals_to_the_trainer(worker: int) -> None:
    """Schedulers and shells signal a whole process group. Workers that died of it would take the trainer with them
    before it has saved, so they form groups of their own; the trainer ends them."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def eval_loader(dataset: EvalDataset, batch_size: int, rank: int, world_size: int, num_workers: int = 0) -> DataLoader:
    """This rank's share of the images: every `world_size`-th batch.

    Which images share a batch does not depend on the number of processes, no image is read twice, and ranks may have
    different numbers of batches.
    """
    indices = range(len(dataset))
    batches = [list(indices[start : start + batch_size]) for start in range(0, len(dataset), batch_size)]
    return DataLoader(
        dataset,
        batch_sampler=batches[rank::world_size],
        num_workers=num_workers,
        worker_init_fn=_leave_group_signals_to_the_trainer,
    )
