"""What training says about its tokens, by slot: loss and accuracy of y1, x1, y2, x2 and class."""

import math
import time
from contextlib import contextmanager

import torch

from pix2seq.tokenizer import CLASS_SLOT, SLOTS


def token_statistics(
    logits: torch.Tensor,
    token_losses: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Sums over the tokens with weight, by slot: float64 (4, 5), rows (weighted loss, weight, right answers, tokens).

    EOS, where sentences end in it, stands in the slot of a y1 and is counted there.
    labels, weights (B, L) and targets (T,) as in Pix2SeqForObjectDetection.forward; logits (T, V) and token_losses
    (T,) as in Pix2SeqOutput. Sums can be added over micro-batches and ranks; nothing here waits for the device.
    """
    slots = targets.remainder(labels.shape[1]).remainder(len(SLOTS))
    weights = weights.flatten()[targets]
    right = logits.argmax(-1) == labels.flatten()[targets]
    rows = torch.stack([token_losses * weights, weights, right, torch.ones_like(weights)]).detach().double()
    return torch.zeros(4, len(SLOTS), dtype=torch.float64, device=labels.device).index_add_(1, slots, rows)


def describe(statistics: torch.Tensor) -> dict[str, float]:
    """The (4, 5) sums as named metrics. A slot without tokens has loss and accuracy 0; the loss of no tokens at all,
    of steps that were skipped say, is NaN."""
    loss, weight, right, tokens = statistics.cpu()
    coordinates = slice(0, CLASS_SLOT)

    def ratio(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a / b) if b > 0 else 0.0

    metrics = {
        "train/loss": ratio(loss.sum(), weight.sum()) if weight.sum() > 0 else math.nan,
        "train/loss_coord": ratio(loss[coordinates].sum(), weight[coordinates].sum()),
        "train/loss_class": ratio(loss[CLASS_SLOT], weight[CLASS_SLOT]),
    }
    return metrics | {f"train/acc_{name}": ratio(right[slot], tokens[slot]) for slot, name in enumerate(SLOTS)}


class Meter:
    """What training counts between two rows of metrics.jsonl: tokens, images, seconds. Counting never waits for the
    device."""

    def __init__(self, device: torch.device):
        self.statistics = torch.zeros(4, len(SLOTS), dtype=torch.float64, device=device)
        self.restart()

    def restart(self) -> None:
        self.statistics.zero_()
        self.restart_clock()

    def restart_clock(self) -> None:
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()

    def add(self, statistics: torch.Tensor, images: int) -> None:
        """token_statistics of this process's part of a step, and its images."""
        self.statistics += statistics
        self.images += images

    @contextmanager
    def waiting(self):
        """Time spent waiting for data."""
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    @contextmanager
    def paused(self):
        """Time that is not training's: evaluations, pictures, checkpoints."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def rates(self, num_processes: int, tokens_per_image: int) -> dict[str, float]:
        """Speeds of all processes together."""
        seconds = time.perf_counter() - self.started
        images = self.images * num_processes / seconds
        rates = {
            "perf/images_per_s": images,
            "perf/tokens_per_s": images * tokens_per_image,
            "perf/data_wait_frac": self.waited / seconds,
        }
        if self.statistics.device.type == "cuda":
            rates["perf/gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 2**30
        return rates
