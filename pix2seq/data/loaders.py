"""The order of training examples, and the data loaders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Sampler, default_collate

from pix2seq.data.datasets import EvalDataset, TrainDataset
from pix2seq.data.repeat_factors import draw_epoch, epoch_length


@dataclass
class StepSampler(Sampler):
    """Endless micro-batches of (epoch, index, copy) for one process, from any optimizer step on.

    All samples form one stream of epochs, each in its own order, which depends on (seed, epoch) only. Each optimizer
    step takes the next `samples_per_step` samples. Which samples it takes does not depend on how this number is split
    into micro-batches and processes.

    Args:
        num_images: Number of images.
        batch_size: Size of a micro-batch.
        accumulation: Micro-batches per optimizer step and process.
        rank: Rank of this process.
        world_size: Number of processes.
        seed: Seed of the order.
        start_step: First optimizer step.
        repetition: Consecutive samples of each image, numbered as `copy` (batch repetition, Hoffer et al. 2020).
        factors: How often each image occurs in an epoch on average, see `repeat_factors`; None for once. The samples
            of an image are numbered as `copy` over all its occurrences in an epoch.
    """

    num_images: int
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    start_step: int = 0
    repetition: int = 1
    factors: np.ndarray | None = None

    @property
    def images_per_epoch(self) -> int:
        """Images of an epoch, counted as often as they occur."""
        return self.num_images if self.factors is None else epoch_length(self.factors)

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step, over all processes."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per epoch, not rounded."""
        return self.images_per_epoch * self.repetition / self.samples_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        micro_batch = self.start_step * self.accumulation
        images_per_epoch = self.images_per_epoch
        orders: dict[int, np.ndarray] = {}
        while True:
            first = (micro_batch * self.world_size + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                image, copy = divmod(position, self.repetition)
                epoch, offset = divmod(image, images_per_epoch)
                if epoch not in orders:
                    orders = {e: order for e, order in orders.items() if e >= epoch - 1}
                    orders[epoch] = self._order(epoch)
                index, occurrence = orders[epoch][offset].tolist()
                keys.append((epoch, index, occurrence * self.repetition + copy))
            yield keys
            micro_batch += 1

    def _order(self, epoch: int) -> np.ndarray:
        """Index and number of the occurrence of each image of an epoch, (images_per_epoch, 2)."""
        rng = np.random.default_rng((self.seed, epoch))
        counts = np.ones(self.num_images, np.int64) if self.factors is None else draw_epoch(self.factors, rng)
        images = np.repeat(np.arange(self.num_images), counts)
        occurrences = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([images, occurrences], axis=1)[rng.permutation(len(images))]


def collate(examples: list[dict]) -> dict:
    """Applies `default_collate`, but gives pixel_values (B, 3, S, S) the memory format channels_last."""
    pixels = default_collate([example["pixel_values"].permute(1, 2, 0) for example in examples])
    rest = [{name: value for name, value in example.items() if name != "pixel_values"} for example in examples]
    return {"pixel_values": pixels.permute(0, 3, 1, 2)} | default_collate(rest)


def train_loader(dataset: TrainDataset, sampler: StepSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """Loads the batches of a sampler; endless."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_process_group,
    )


def eval_loader(dataset: EvalDataset, batch_size: int, rank: int, world_size: int, num_workers: int = 0) -> DataLoader:
    """Loads every `world_size`-th batch of images.

    The images of a batch do not depend on the number of processes, and every image is loaded by one process only. The
    processes can have different numbers of batches.
    """
    starts = range(0, len(dataset), batch_size)
    batches = [list(range(start, min(start + batch_size, len(dataset)))) for start in starts][rank::world_size]
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=min(num_workers, len(batches)),
        worker_init_fn=_leave_process_group,
    )


def _leave_process_group(worker: int) -> None:
    """Moves a worker into its own process group.

    Schedulers and shells send signals to a whole process group. A worker that dies of one would end training before a
    checkpoint is saved. Training stops its workers itself.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
