"""Training metrics: loss and accuracy by kind of token, box errors, and speed.

All of them are teacher-forced: each token is predicted from the true tokens before it. Every metric is a mean that is
carried as a sum and a count, so that it adds up over micro-batches, steps and processes, and nothing waits for the
device before a row is written. docs/what-to-expect.md explains each metric and its healthy values.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pix2seq.tokenizer import CLASS_SLOT, SLOTS, TOKENS_PER_OBJECT, Tokenizer

KINDS = (*SLOTS, "real", "noise", "eos")  # a token of the class slot is also either real or noise
OBJECT_GROUPS = {1: "1", 2: "2_4", 5: "5_9", 10: "10_19", 20: "20_up"}  # first position of a group -> its name

# In the order of the columns that the functions below return.
NAMES = (
    *("train/loss", "train/loss_coord", *(f"train/loss_{kind}" for kind in KINDS)),
    *(f"train/acc_{kind}" for kind in KINDS),
    *(f"train/bin_error_{slot}" for slot in SLOTS[:CLASS_SLOT]),
    *("train/object_acc", "train/iou", "train/sequence_acc", "train/noise_predicted", "train/noise_true"),
    *(f"train/loss_object_{group}" for group in OBJECT_GROUPS.values()),
    # Checks of the labels alone: 0 in every healthy run.
    *("data/misplaced_tokens", "data/supervised_noise", "data/inverted_boxes", "data/boxes_in_padding"),
)
ALWAYS_REPORTED = (
    "train/loss",
    "train/loss_coord",
    "train/loss_class",
    "train/acc_class",
)  # for the log and the progress bar


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
    """Sums and counts of all metrics over the tokens with a loss weight.

    Args:
        logits: (T, V), of the tokens at `loss_positions`.
        token_losses: (T,), cross entropy of these tokens.
        labels: (B, L), target token ids.
        token_weights: (B, L), loss weights.
        loss_positions: (T,), positions with weight in the flattened labels.
        tokenizer: tokenizer of the model.
        valid_fraction: (B, 2), height and width of the image as fractions of the padded square.

    Returns:
        float64 (2, len(NAMES)): sums and counts.
    """
    predicted, predicted_bins = _predictions(logits, tokenizer)
    batch, length = labels.shape
    label, weight = labels.flatten()[loss_positions], token_weights.flatten()[loss_positions]
    values = (torch.ones_like(weight), label, predicted, predicted_bins, weight, weight * token_losses)
    columns = torch.stack([value.double() for value in values])
    # Scatter to five tokens per object; tokens without weight are 0.
    num_objects = -(-length // TOKENS_PER_OBJECT)
    positions = loss_positions + loss_positions // length * (num_objects * TOKENS_PER_OBJECT - length)
    table = columns.new_zeros(len(columns), batch * num_objects * TOKENS_PER_OBJECT).index_copy_(1, positions, columns)
    counted, label, predicted, predicted_bins, weight, loss = table.view(-1, batch, num_objects, TOKENS_PER_OBJECT)
    tokens = TokenBatch(
        counted=counted.bool(),
        label=label,
        predicted=predicted,
        predicted_bins=predicted_bins,
        weight=weight,
        loss=loss,
        tokenizer=tokenizer,
    )
    columns_of = (_loss_and_accuracy, _bin_errors, _object_metrics, _noise_rates, _loss_by_position)
    return torch.cat([*(f(tokens) for f in columns_of), _label_errors(tokens, valid_fraction)], dim=1)


def _predictions(logits: torch.Tensor, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens and the most probable bins (T,), both as token ids, in one pass over the logits."""
    bin_logits, bins = logits[:, tokenizer.first_bin_id :].max(-1)
    other_logits, others = logits[:, : tokenizer.first_bin_id].max(-1)
    bins = bins + tokenizer.first_bin_id
    return torch.where(bin_logits > other_logits, bins, others), bins


@dataclass
class TokenBatch:
    """Labels and predictions of a batch, grouped by object.

    Attributes:
        counted: bool (B, N, 5), tokens with a loss weight. The tensors below are 0 elsewhere.
        label: float64 (B, N, 5), target token ids.
        predicted: float64 (B, N, 5), most probable token ids.
        predicted_bins: float64 (B, N, 5), most probable among the bins.
        weight: float64 (B, N, 5), loss weights.
        loss: float64 (B, N, 5), weighted losses.
        tokenizer: tokenizer of the model.
    """

    counted: torch.Tensor
    label: torch.Tensor
    predicted: torch.Tensor
    predicted_bins: torch.Tensor
    weight: torch.Tensor
    loss: torch.Tensor
    tokenizer: Tokenizer

    def __post_init__(self):
        tokenizer, classes = self.tokenizer, self.label[..., CLASS_SLOT]
        self.correct = self.counted & (self.predicted == self.label)
        self.eos = self.label == tokenizer.eos_id
        self.noise = self.counted[..., CLASS_SLOT] & (classes == tokenizer.noise_id)  # (B, N)
        self.has_class = (classes >= tokenizer.first_class_id) & (classes < tokenizer.first_bin_id)
        self.real = self.counted.all(-1) & self.has_class
        # In bins, y1 x1 y2 x2.
        self.boxes = self.label[..., :CLASS_SLOT] - tokenizer.first_bin_id
        self.predicted_boxes = self.predicted_bins[..., :CLASS_SLOT] - tokenizer.first_bin_id


def _masked_sums(values: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Sum of each value over the mask, and the number of elements of the mask: (2, len(values))."""
    sums = (torch.stack([value.double() for value in values]) * mask).flatten(1).sum(1)
    return torch.stack([sums, mask.sum().expand(len(values)).double()])


def _loss_and_accuracy(tokens: TokenBatch) -> torch.Tensor:
    """Loss of all tokens and of the coordinates, then loss and accuracy of each kind."""
    # (4, B, N, 5)
    values = torch.stack([tokens.loss, tokens.weight, tokens.correct.double(), tokens.counted.double()])
    slots = (values * ~tokens.eos).sum((1, 2))
    noise = (values[..., CLASS_SLOT] * tokens.noise).sum((1, 2))
    eos = (values * tokens.eos).sum((1, 2, 3))
    kinds = torch.stack([*slots.T, ((values[..., CLASS_SLOT]) * ~tokens.noise).sum((1, 2)), noise, eos], dim=1)
    total, coordinates = slots.sum(1) + eos, slots[:, :CLASS_SLOT].sum(1)
    return torch.cat([torch.stack([total, coordinates], dim=1)[:2], kinds[:2], kinds[2:]], dim=1)


def _bin_errors(tokens: TokenBatch) -> torch.Tensor:
    """Distance from the most probable bin to the true bin, for each coordinate."""
    counted = tokens.counted[..., :CLASS_SLOT] & (tokens.boxes >= 0)
    errors = (tokens.predicted_boxes - tokens.boxes).abs() * counted
    return torch.stack([errors.sum((0, 1)), counted.sum((0, 1)).double()])


def _object_metrics(tokens: TokenBatch) -> torch.Tensor:
    """Share of real objects with all tokens correct, their mean IoU, and share of images with all objects correct."""
    correct = tokens.correct.all(-1)
    sequences = _masked_sums([(correct | ~tokens.real).all(1)], tokens.real.any(1))
    objects = _masked_sums([correct, _paired_iou(tokens.boxes, tokens.predicted_boxes)], tokens.real)
    return torch.cat([objects, sequences], dim=1)


def _paired_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU (...) of pairs of boxes (..., 4) in bins, y1 x1 y2 x2; 0 with a box without area."""
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    overlap, a, b = (
        sides.clamp(min=0).prod(-1) for sides in (overlap, a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2])
    )
    return overlap / (a + b - overlap).clamp(min=1)


def _noise_rates(tokens: TokenBatch) -> torch.Tensor:
    """Share of class tokens predicted as NOISE, and share that is NOISE."""
    predicted = tokens.predicted[..., CLASS_SLOT] == tokens.tokenizer.noise_id
    return _masked_sums([predicted, tokens.noise], tokens.counted[..., CLASS_SLOT])


def _loss_by_position(tokens: TokenBatch) -> torch.Tensor:
    """Loss of real objects by their position in the sequence, in OBJECT_GROUPS."""
    losses = (torch.stack([tokens.loss, tokens.weight]) * tokens.real[..., None]).sum((1, 3))  # (2, N)
    groups = torch.zeros(2, len(OBJECT_GROUPS), dtype=losses.dtype, device=losses.device)
    ends = [*list(OBJECT_GROUPS)[1:], None]
    for column, (first, end) in enumerate(zip(OBJECT_GROUPS, ends, strict=True)):
        groups[:, column] = losses[:, first - 1 : end and end - 1].sum(1)
    return groups


def _label_errors(tokens: TokenBatch, valid_fraction: torch.Tensor) -> torch.Tensor:
    """Impossible labels: tokens of another slot's kind, coordinates of noise objects with a weight, boxes whose second
    corner precedes the first, and boxes that extend into the padding."""
    coordinates = tokens.counted[..., :CLASS_SLOT]
    is_misplaced_coordinate = (tokens.boxes < 0) & ~tokens.eos[..., :CLASS_SLOT]
    is_misplaced_class = ~(tokens.has_class | tokens.noise)
    misplaced = torch.cat([is_misplaced_coordinate, is_misplaced_class[..., None]], dim=-1)
    inverted = (tokens.boxes[..., 2:] < tokens.boxes[..., :2]).any(-1)
    limits = valid_fraction.double() * (tokens.tokenizer.num_bins - 1) + 1  # + 1: coordinates are rounded
    in_padding = (tokens.boxes[..., 2:] > limits[:, None]).any(-1)
    return torch.cat(
        [
            _masked_sums([misplaced], tokens.counted),
            _masked_sums([tokens.noise[..., None].expand_as(coordinates)], coordinates),
            _masked_sums([inverted, in_padding], tokens.real),
        ],
        dim=1,
    )


def compute_means(statistics: torch.Tensor) -> dict[str, float]:
    """The means of `token_statistics` by name. Without a count, a metric is omitted, or NaN if in ALWAYS_REPORTED."""
    means = {
        name: total / count if count else math.nan
        for name, total, count in zip(NAMES, *statistics.tolist(), strict=True)
    }
    return {name: mean for name, mean in means.items() if name in ALWAYS_REPORTED or not math.isnan(mean)}


class Meter:
    """Accumulates statistics, images and seconds between two rows of metrics.jsonl, without waiting for the device.

    Args:
        device: device of the statistics.
        mfu_factor: FLOPs of a training step per image, divided by the peak FLOP/s of the GPU; 0 if unknown.
    """

    def __init__(self, device: torch.device, mfu_factor: float = 0.0):
        self.mfu_factor = mfu_factor
        self.statistics = torch.zeros(2, len(NAMES), dtype=torch.float64, device=device)
        self.restart()

    def restart(self) -> None:
        """Starts a new row."""
        self.statistics.zero_()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Resets the time and the number of images, but not the statistics."""
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()

    def add(self, statistics: torch.Tensor, images: int) -> None:
        """Adds the `token_statistics` and the number of images of this process's part of a step."""
        self.statistics += statistics
        self.images += images

    @contextmanager
    def waiting(self):
        """Measures time spent waiting for data."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    @contextmanager
    def paused(self):
        """Excludes time of evaluation, samples and checkpoints."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started

    def rates(self, num_processes: int, tokens_per_image: int) -> dict[str, float]:
        """Throughput of all processes together, waiting time, peak GPU memory in GiB and model FLOPs utilisation."""
        seconds = time.perf_counter() - self.started
        images = self.images * num_processes / seconds
        rates = {
            "perf/images_per_s": images,
            "perf/tokens_per_s": images * tokens_per_image,
            "perf/data_wait_frac": self.waited / seconds,
        }
        if self.statistics.device.type == "cuda":
            rates["perf/gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 2**30
        if self.mfu_factor:
            rates["perf/mfu"] = images / num_processes * self.mfu_factor
        return rates
