"""Statistics by slot, on rows small enough to count by hand."""

import math

import pytest
import torch

from pix2seq.metrics import Meter, describe, token_statistics
from pix2seq.tokenizer import TOKENS_PER_OBJECT

VOCABULARY = 12


def targets(weights: torch.Tensor) -> torch.Tensor:
    return weights.flatten().nonzero()[:, 0]


def statistics(labels, weights, said, losses) -> torch.Tensor:
    """labels, weights (B, L); said and losses for all B * L tokens, of which only those with weight reach us."""
    labels, weights = torch.tensor(labels), torch.tensor(weights, dtype=torch.float32)
    counted = weights > 0
    logits = torch.nn.functional.one_hot(torch.tensor(said), VOCABULARY).float()[counted]
    return token_statistics(
        logits, torch.tensor(losses, dtype=torch.float32)[counted], labels, weights, targets(weights)
    )


# One real object, one noise object; then two real ones. Losses are powers of two, so that any sum tells its parts.
LABELS = [[5, 6, 7, 8, 1, 5, 5, 6, 6, 3], [9, 8, 9, 9, 2, 5, 6, 7, 8, 0]]
WEIGHTS = [[1, 1, 1, 1, 1, 0, 0, 0, 0, 0.5], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
SAID = [[5, 0, 7, 8, 1, 0, 0, 0, 0, 3], [9, 8, 0, 9, 0, 5, 6, 7, 0, 0]]
LOSSES = [[1, 2, 4, 8, 16, 999, 999, 999, 999, 32], [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]]


def test_sums_by_slot():
    """A bug others shipped: position modulo 5 was taken on the flattened batch, so slots drifted; noise counted."""
    assert statistics(LABELS, WEIGHTS, SAID, LOSSES).tolist() == [
        [1 + 64 + 2048, 2 + 128 + 4096, 4 + 256 + 8192, 8 + 512 + 16384, 16 + 0.5 * 32 + 1024 + 32768],
        [3, 3, 3, 3, 3.5],
        [3, 2, 2, 2, 3],
        [3, 3, 3, 3, 4],
    ]


def test_described():
    metrics = describe(statistics(LABELS, WEIGHTS, SAID, LOSSES))
    coordinates = sum(2**k for k in (0, 1, 2, 3, 6, 7, 8, 9, 11, 12, 13, 14))
    classes = 16 + 16 + 1024 + 32768
    assert metrics == pytest.approx(
        {
            "train/loss": (coordinates + classes) / 15.5,
            "train/loss_coord": coordinates / 12,
            "train/loss_class": classes / 3.5,
            "train/acc_y1": 1,
            "train/acc_x1": 2 / 3,
            "train/acc_y2": 2 / 3,
            "train/acc_x2": 2 / 3,
            "train/acc_class": 3 / 4,
        }
    )
    assert all(type(value) is float for value in metrics.values())


def test_all_classes_wrong_and_all_coordinates_right():
    """A bug others shipped: this came out as class .67 and coordinates .85."""
    labels = [[5, 6, 7, 8, 1] * 3] * 4
    said = [[5, 6, 7, 8, 2] * 3] * 4
    metrics = describe(statistics(labels, [[1] * 15] * 4, said, [[1] * 15] * 4))
    assert [metrics[f"train/acc_{slot}"] for slot in ("y1", "x1", "y2", "x2", "class")] == [1, 1, 1, 1, 0]


def test_rows_that_are_no_multiple_of_five():
    """With EOS a row has 5 k + 1 tokens: the next row's slots start at y1 again."""
    labels = [[5, 6, 7, 8, 1, 2]] * 3
    said = [[5, 0, 0, 0, 0, 0]] * 3
    sums = statistics(labels, [[1, 1, 1, 1, 1, 0]] * 3, said, [[1] * 6] * 3)
    assert sums[2].tolist() == [3, 0, 0, 0, 0]
    assert sums[3].tolist() == [3, 3, 3, 3, 3]


def test_statistics_of_parts_add_up():
    parts = sum(statistics(*([rows[i]] for rows in (LABELS, WEIGHTS, SAID, LOSSES))) for i in range(2))
    assert torch.equal(parts, statistics(LABELS, WEIGHTS, SAID, LOSSES))


def test_slots_without_tokens_are_zero():
    sums = statistics([[5, 6, 7, 8, 1]], [[0, 0, 0, 0, 1]], [[0] * 5], [[1] * 5])
    metrics = describe(sums)
    assert metrics["train/loss_coord"] == 0
    assert metrics["train/acc_y1"] == 0
    assert metrics["train/loss"] == metrics["train/loss_class"] == 1
    nothing = describe(torch.zeros(4, TOKENS_PER_OBJECT, dtype=torch.float64))
    assert math.isnan(nothing.pop("train/loss")), "the loss of no token at all is no good loss"
    assert set(nothing.values()) == {0.0}


def test_statistics_carry_no_gradient():
    losses = torch.ones(5, requires_grad=True)
    sums = token_statistics(
        torch.zeros(5, VOCABULARY), losses * 2, torch.zeros(1, 5).long(), torch.ones(1, 5), torch.arange(5)
    )
    assert not sums.requires_grad
    assert sums.dtype == torch.float64


def test_a_meter_adds_up_and_starts_again():
    meter = Meter(torch.device("cpu"))
    for _ in range(2):
        meter.add(statistics(LABELS, WEIGHTS, SAID, LOSSES), images=2)
    assert torch.equal(meter.statistics, 2 * statistics(LABELS, WEIGHTS, SAID, LOSSES))
    assert meter.images == 4
    meter.restart()
    assert meter.images == 0
    assert not meter.statistics.any()


def test_a_meters_clock_leaves_out_pauses_and_knows_waits(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pix2seq.metrics.time.perf_counter", lambda: now[0])
    meter = Meter(torch.device("cpu"))
    meter.images = 30

    def passes(seconds):
        now[0] += seconds

    passes(4)
    with meter.waiting():
        passes(1)
    with meter.paused():
        passes(1000)
    rates = meter.rates(num_processes=2, tokens_per_image=10)
    assert rates == {"perf/images_per_s": 12, "perf/tokens_per_s": 120, "perf/data_wait_frac": 0.2}
