"""In which order examples come, and the loaders that make them.

The order of an epoch depends on (seed, epoch) alone.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Sampler, default_collate

from pix2seq.data.datasets import EvalDataset, TrainDataset


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


def collate(examples: list[dict]) -> dict:
    """default_collate, but that pixel_values (B, 3, S, S) keep the three values of a pixel side by side."""
    pixels = default_collate([example["pixel_values"].permute(1, 2, 0) for example in examples])
    rest = [{name: value for name, value in example.items() if name != "pixel_values"} for example in examples]
    return {"pixel_values": pixels.permute(0, 3, 1, 2)} | default_collate(rest)


def train_loader(dataset: TrainDataset, sampler: StepSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
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
    batches = batches[rank::world_size]
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=min(num_workers, len(batches)),
        worker_init_fn=_leave_group_signals_to_the_trainer,
    )
