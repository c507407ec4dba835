"""What training says about its sentences while it learns, and how fast it is.

All of it is teacher-forced: what the model would say next after the right words so far. Every metric is a mean, and is
carried as a sum and a count, so that it adds up over micro-batches, steps and processes, and nothing waits for the
device before a row is written. docs/what-to-expect.md says what each one means and which values are healthy.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pix2seq.tokenizer import CLASS_SLOT, SLOTS, TOKENS_PER_OBJECT, Tokenizer

KINDS = (*SLOTS, "real", "noise", "eos")  # of tokens; one of the class slot is also either real or noise
OBJECT_GROUPS = {1: "1", 2: "2_4", 5: "5_9", 10: "10_19", 20: "20_up"}  # places in the sentence, by the first of them

# In the order of the columns that the functions below return.
NAMES = (
    *("train/loss", "train/loss_coord", *(f"train/loss_{kind}" for kind in KINDS)),
    *(f"train/acc_{kind}" for kind in KINDS),
    *(f"train/bin_error_{slot}" for slot in SLOTS[:CLASS_SLOT]),
    *("train/object_acc", "train/iou", "train/sequence_acc", "train/noise_predicted", "train/noise_true"),
    *(f"train/loss_object_{group}" for group in OBJECT_GROUPS.values()),
    # Of the targets, whatever the model says: 0 in every healthy run.
    *("data/misplaced_tokens", "data/supervised_noise", "data/inverted_boxes", "data/boxes_in_padding"),
)
PRINTED = ("train/loss", "train/loss_coord", "train/loss_class", "train/acc_class")  # by train.py, in every line


@torch.no_grad()
def token_statistics(
    logits: torch.Tensor,
    token_losses: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    loss_positions: torch.Tensor,
    tokenizer: Tokenizer,
    valid_fraction: torch.Tensor,
) -> torch.Tensor:
    """Sums and counts of NAMES over the tokens with weight: float64 (2, len(NAMES)).

    labels, weights (B, L) and targets (T,) as in Pix2SeqForObjectDetection.forward; logits (T, V) and token_losses
    (T,) as in Pix2SeqOutput; valid_fraction (B, 2): height and width of what the picture covers, as shares of the canvas.
    """
    said, said_bins = _answers(logits, tokenizer)
    batch, length = labels.shape
    label, weight = labels.flatten()[loss_positions], token_weights.flatten()[loss_positions]
    columns = (torch.ones_like(weight), label, said, said_bins, weight, weight * token_losses)
    columns = torch.stack([column.double() for column in columns])
    # To a row of five for each object; what has no weight is 0 there.
    num_objects = -(-length // TOKENS_PER_OBJECT)
    positions = loss_positions + loss_positions // length * (num_objects * TOKENS_PER_OBJECT - length)
    table = columns.new_zeros(len(columns), batch * num_objects * TOKENS_PER_OBJECT).index_copy_(1, positions, columns)
    sentences = TokenBatch(*table.view(-1, batch, num_objects, TOKENS_PER_OBJECT), tokenizer)
    parts = (_by_kind, _bin_errors, _of_objects, _shares_of_noise, _by_place)
    return torch.cat([*(part(sentences) for part in parts), _faults(sentences, valid_fraction)], dim=1)


def _answers(logits: torch.Tensor, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens and the likeliest bins (T,), both as ids, with one look at the logits."""
    bin_logits, bins = logits[:, tokenizer.first_bin_id :].max(-1)
    other_logits, others = logits[:, : tokenizer.first_bin_id].max(-1)
    bins = bins + tokenizer.first_bin_id
    return torch.where(bin_logits > other_logits, bins, others), bins


@dataclass
class TokenBatch:
    """A batch as objects: (B, N, 5) each, float64. `counted` is 1 for tokens with weight; the others are 0 throughout.

    label, said   the right token, and the model's       said_bins   the likeliest of the bins
    weight, loss  the weight, and the loss times it
    """

    counted: torch.Tensor
    label: torch.Tensor
    said: torch.Tensor
    said_bins: torch.Tensor
    weight: torch.Tensor
    loss: torch.Tensor
    tokenizer: Tokenizer

    def __post_init__(self):
        tokenizer, classes = self.tokenizer, self.label[..., CLASS_SLOT]
        self.counted = self.counted.bool()
        self.right = self.counted & (self.said == self.label)
        self.eos = self.label == tokenizer.eos_id
        self.noise = self.counted[..., CLASS_SLOT] & (classes == tokenizer.noise_id)  # (B, N)
        self.has_class = (classes >= tokenizer.first_class_id) & (classes < tokenizer.first_bin_id)
        self.real = self.counted.all(-1) & self.has_class
        # In bins, y1 x1 y2 x2.
        self.boxes, self.said_boxes = (
            ids[..., :CLASS_SLOT] - tokenizer.first_bin_id for ids in (self.label, self.said_bins)
        )


def _shares(those: list[torch.Tensor], among: torch.Tensor) -> torch.Tensor:
    """Sums (len(those),) of what is in `among`, a mask, over the size of `among`: (2, len(those))."""
    sums = (torch.stack([values.double() for values in those]) * among).flatten(1).sum(1)
    return torch.stack([sums, among.sum().expand(len(those)).double()])


def _by_kind(s: TokenBatch) -> torch.Tensor:
    """Loss of all tokens and of the coordinates, then loss and accuracy of each kind."""
    values = torch.stack([s.loss, s.weight, s.right.double(), s.counted.double()])  # (4, B, N, 5)
    slots = (values * ~s.eos).sum((1, 2))
    noise = (values[..., CLASS_SLOT] * s.noise).sum((1, 2))
    eos = (values * s.eos).sum((1, 2, 3))
    kinds = torch.stack([*slots.T, ((values[..., CLASS_SLOT]) * ~s.noise).sum((1, 2)), noise, eos], dim=1)
    everything, coordinates = slots.sum(1) + eos, slots[:, :CLASS_SLOT].sum(1)
    return torch.cat([torch.stack([everything, coordinates], dim=1)[:2], kinds[:2], kinds[2:]], dim=1)


def _bin_errors(s: TokenBatch) -> torch.Tensor:
    """How far the likeliest bin is from the right one, in bins, for each coordinate."""
    counted = s.counted[..., :CLASS_SLOT] & (s.boxes >= 0)
    errors = (s.said_boxes - s.boxes).abs() * counted
    return torch.stack([errors.sum((0, 1)), counted.sum((0, 1)).double()])


def _of_objects(s: TokenBatch) -> torch.Tensor:
    """Real objects all right, their IoU, and pictures all of whose real objects are right."""
    right = s.right.all(-1)
    pictures = _shares([(right | ~s.real).all(1)], s.real.any(1))
    return torch.cat([_shares([right, _iou(s.boxes, s.said_boxes)], s.real), pictures], dim=1)


def _iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU (...) of boxes (..., 4) in bins, y1 x1 y2 x2, one by one; 0 with a box that has no area."""
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    overlap, a, b = (
        sides.clamp(min=0).prod(-1) for sides in (overlap, a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2])
    )
    return overlap / (a + b - overlap).clamp(min=1)


def _shares_of_noise(s: TokenBatch) -> torch.Tensor:
    """Class tokens that are NOISE: as the model has it, and in truth."""
    return _shares([s.said[..., CLASS_SLOT] == s.tokenizer.noise_id, s.noise], s.counted[..., CLASS_SLOT])


def _by_place(s: TokenBatch) -> torch.Tensor:
    """Loss of real objects by their place in the sentence, OBJECT_GROUPS."""
    losses = (torch.stack([s.loss, s.weight]) * s.real[..., None]).sum((1, 3))  # (2, N)
    groups = torch.zeros(2, len(OBJECT_GROUPS), dtype=losses.dtype, device=losses.device)
    for column, (first, after) in enumerate(zip(OBJECT_GROUPS, [*OBJECT_GROUPS][1:] + [None], strict=True)):
        groups[:, column] = losses[:, first - 1 : after and after - 1].sum(1)
    return groups


def _faults(s: TokenBatch, valid_fraction: torch.Tensor) -> torch.Tensor:
    """Targets that cannot be: tokens of another slot's kind, coordinates of noise, boxes inside out, boxes that reach
    into the padding."""
    coordinates = s.counted[..., :CLASS_SLOT]
    misplaced = torch.cat([(s.boxes < 0) & ~s.eos[..., :CLASS_SLOT], ~(s.has_class | s.noise)[..., None]], dim=-1)
    inverted = (s.boxes[..., 2:] < s.boxes[..., :2]).any(-1)
    limits = valid_fraction.double() * (s.tokenizer.num_bins - 1) + 1  # a bin more: coordinates are rounded
    return torch.cat(
        [
            _shares([misplaced], s.counted),
            _shares([s.noise[..., None].expand_as(coordinates)], coordinates),
            _shares([inverted, (s.boxes[..., 2:] > limits[:, None]).any(-1)], s.real),
        ],
        dim=1,
    )


def describe(statistics: torch.Tensor) -> dict[str, float]:
    """The sums and counts as NAMES. What nothing was counted of is left out, or NaN if it is among PRINTED."""
    means = {
        name: total / count if count else math.nan
        for name, total, count in zip(NAMES, *statistics.tolist(), strict=True)
    }
    return {name: mean for name, mean in means.items() if name in PRINTED or not math.isnan(mean)}


class Meter:
    """What training counts between two rows of metrics.jsonl: tokens, images, seconds. Counting never waits for the
    device.

    flops_share   FLOPs of an image's share of a step, over what the GPU can do in a second; 0 if that is not known
    """

    def __init__(self, device: torch.device, flops_share: float = 0.0):
        self.flops_share = flops_share
        self.statistics = torch.zeros(2, len(NAMES), dtype=torch.float64, device=device)
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
        if self.flops_share:
            rates["perf/mfu"] = images / num_processes * self.flops_share
        return rates
