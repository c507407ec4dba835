"""Training metrics, on rows small enough to count by hand and against plain loops on random rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import SLOTS, Tokenizer
from pix2seq.training.metrics import ALWAYS_REPORTED, NAMES, Meter, compute_means, token_statistics

TOKENIZER = Tokenizer(num_classes=2, num_bins=6)  # NOISE is 3, the classes are 4 and 5, bins 6 to 11


def statistics(labels, weights, predicted, losses, valid_fraction=(1.0, 1.0)) -> torch.Tensor:
    """Token statistics of labels and weights (B, L), and of predictions and losses of all B * L tokens.

    `predicted` is the most probable token; the most probable bin is the last one if that token is not a bin.
    """
    labels, weights = torch.tensor(labels), torch.tensor(weights, dtype=torch.float32)
    counted = weights > 0
    logits = 2 * torch.nn.functional.one_hot(torch.tensor(predicted), TOKENIZER.vocab_size).float()[counted]
    logits[:, -1] += 1
    loss_positions = weights.flatten().nonzero()[:, 0]
    losses = torch.tensor(losses, dtype=torch.float32)[counted]
    valid_fraction = torch.tensor([[float(fraction) for fraction in valid_fraction]] * len(labels))
    return token_statistics(logits, losses, labels, weights, loss_positions, TOKENIZER, valid_fraction)


# One real object, one noise object; then two real ones. Losses are powers of two, so that any sum tells its parts.
LABELS = [[6, 7, 8, 9, 4, 6, 6, 7, 7, 3], [6, 7, 11, 11, 5, 6, 7, 8, 9, 4]]
WEIGHTS = [[1, 1, 1, 1, 1, 0, 0, 0, 0, 0.5], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
PREDICTED = [[6, 7, 8, 9, 4, 0, 0, 0, 0, 3], [6, 7, 9, 11, 3, 0, 7, 8, 9, 4]]
LOSSES = [[1, 2, 4, 8, 16, 999, 999, 999, 999, 32], [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]]


def test_means_of_a_batch_counted_by_hand():
    """Coordinates of noise objects are not counted, and slots do not drift from row to row."""
    metrics = compute_means(statistics(LABELS, WEIGHTS, PREDICTED, LOSSES))
    coordinates = sum(2**k for k in (0, 1, 2, 3, 6, 7, 8, 9, 11, 12, 13, 14))
    classes = 16 + 16 + 1024 + 32768
    assert metrics == pytest.approx(
        {
            "train/loss": (coordinates + classes) / 15.5,
            "train/loss_coord": coordinates / 12,
            "train/loss_y1": (1 + 64 + 2048) / 3,
            "train/loss_x1": (2 + 128 + 4096) / 3,
            "train/loss_y2": (4 + 256 + 8192) / 3,
            "train/loss_x2": (8 + 512 + 16384) / 3,
            "train/loss_class": classes / 3.5,
            "train/loss_real": (16 + 1024 + 32768) / 3,
            "train/loss_noise": 32,
            "train/acc_y1": 2 / 3,
            "train/acc_x1": 1,
            "train/acc_y2": 2 / 3,
            "train/acc_x2": 1,
            "train/acc_class": 3 / 4,
            "train/acc_real": 2 / 3,
            "train/acc_noise": 1,
            "train/bin_error_y1": 5 / 3,  # 0, 0, and the last bin where the first was right
            "train/bin_error_x1": 0,
            "train/bin_error_y2": 2 / 3,
            "train/bin_error_x2": 0,
            "train/object_acc": 1 / 3,
            "train/iou": (1 + 12 / 20 + 0) / 3,  # 3 x 4 bins of 5 x 4; a box upside down has no area
            "train/sequence_acc": 1 / 2,
            "train/noise_predicted": 2 / 4,
            "train/noise_true": 1 / 4,
            "train/loss_object_1": (31 + 64 + 128 + 256 + 512 + 1024) / 10,
            "train/loss_object_2_4": (2048 + 4096 + 8192 + 16384 + 32768) / 5,
            "data/misplaced_tokens": 0,
            "data/supervised_noise": 0,
            "data/inverted_boxes": 0,
            "data/boxes_in_padding": 0,
        }
    )
    assert all(type(value) is float for value in metrics.values())


def test_all_classes_wrong_and_all_coordinates_right():
    labels = [[6, 7, 8, 9, 4] * 3] * 4
    predicted = [[6, 7, 8, 9, 5] * 3] * 4
    metrics = compute_means(statistics(labels, [[1] * 15] * 4, predicted, [[1] * 15] * 4))
    assert [metrics[f"train/acc_{slot}"] for slot in SLOTS] == [1, 1, 1, 1, 0]
    assert metrics["train/iou"] == 1
    assert metrics["train/object_acc"] == metrics["train/sequence_acc"] == 0


def test_sequences_that_end_with_eos():
    """Rows have 5 k + 1 tokens: the slots of each row start at y1, and EOS does not count as y1."""
    labels = [[6, 7, 8, 9, 4, 2]] * 3
    metrics = compute_means(statistics(labels, [[1, 1, 1, 1, 1, 0.5]] * 3, labels, [[1, 1, 1, 1, 1, 8]] * 3))
    assert [metrics[f"train/acc_{slot}"] for slot in (*SLOTS, "eos")] == [1] * 6
    assert metrics["train/loss_eos"] == 8
    assert metrics["train/loss_y1"] == metrics["train/loss_coord"] == 1
    assert metrics["train/loss"] == (5 + 4) / 5.5
    assert metrics["data/misplaced_tokens"] == 0
    assert metrics["train/sequence_acc"] == 1


def test_impossible_labels_are_counted():
    shifted = [7, 8, 9, 4, 6]
    assert compute_means(statistics([shifted], [[1] * 5], [shifted], [[1] * 5]))["data/misplaced_tokens"] == 2 / 5
    noise = [6, 6, 7, 7, 3]
    metrics = compute_means(statistics([[6, 7, 8, 9, 4, *noise]], [[1] * 10], [[6] * 10], [[1] * 10]))
    assert metrics["data/supervised_noise"] == 1 / 2
    inverted, good = [8, 7, 6, 9, 4], [6, 7, 8, 9, 4]
    metrics = compute_means(statistics([inverted + good], [[1] * 10], [[6] * 10], [[1] * 10]))
    assert metrics["data/inverted_boxes"] == 1 / 2
    outside, inside = [6, 6, 10, 7, 4], [6, 6, 9, 7, 4]  # bins 4 and 3 of 0 to 5: the image ends at 2.5
    metrics = compute_means(
        statistics([outside + inside], [[1] * 10], [[6] * 10], [[1] * 10], valid_fraction=(0.5, 1.0))
    )
    assert metrics["data/boxes_in_padding"] == 1 / 2


@given(seed=st.integers(0, 10**6), noise_objects=st.booleans(), jitter=st.sampled_from([0.0, 0.2]))
def test_built_sequences_have_no_label_errors(seed, noise_objects, jitter):
    """Their metrics equal those of plain loops over the tokens."""
    rng = np.random.default_rng(seed)
    builder = SequenceBuilder(TOKENIZER, 7, noise_objects=noise_objects, box_jitter=jitter, mix_rate=0.5)
    valid_fraction = rng.uniform(0.2, 1, 2)
    sequences = []
    for _ in range(3):
        corners = np.sort(rng.random((rng.integers(0, 9), 2, 2)), axis=1) * valid_fraction
        boxes = corners.reshape(-1, 4)
        sequences.append(builder(boxes, rng.integers(0, 2, len(boxes)), rng, tuple(valid_fraction)))
    labels, weights = (np.stack([sequence[name] for sequence in sequences]) for name in ("labels", "token_weights"))
    predicted = np.where(rng.random(labels.shape) < 0.8, labels, rng.integers(0, 12, labels.shape))
    losses = rng.integers(0, 9, labels.shape)
    metrics = compute_means(
        statistics(labels.tolist(), weights.tolist(), predicted.tolist(), losses.tolist(), valid_fraction[::-1])
    )
    assert {metrics[name] for name in NAMES if name.startswith("data/") and name in metrics} <= {0.0}

    correct, objects, classes = {}, [], []
    for row in range(3):
        for start in range(0, labels.shape[1], 5):
            tokens = range(start, min(start + 5, labels.shape[1]))
            for slot, token in zip(SLOTS, tokens, strict=False):
                if weights[row, token]:
                    kind = "eos" if labels[row, token] == 2 else slot
                    correct.setdefault(kind, []).append(predicted[row, token] == labels[row, token])
            if len(tokens) == 5 and weights[row, tokens[4]]:
                classes.append((labels[row, tokens[4]] == 3, predicted[row, tokens[4]] == 3))
            if len(tokens) == 5 and weights[row, tokens].all():
                objects.append((row, (predicted[row, tokens] == labels[row, tokens]).all()))
    for kind, values in correct.items():
        assert metrics[f"train/acc_{kind}"] == pytest.approx(np.mean(values))
    assert metrics["train/loss"] == pytest.approx((weights * losses).sum() / weights.sum())
    if classes:
        true_noise, predicted_noise = np.mean(classes, axis=0)
        assert metrics["train/noise_true"] == pytest.approx(true_noise)
        assert metrics["train/noise_predicted"] == pytest.approx(predicted_noise)
    if objects:
        assert metrics["train/object_acc"] == pytest.approx(np.mean([good for _, good in objects]))
        rows = {row for row, _ in objects}
        all_correct = [all(good for index, good in objects if index == row) for row in rows]
        assert metrics["train/sequence_acc"] == pytest.approx(np.mean(all_correct))


def test_loss_by_position_of_the_object():
    labels = [[6, 7, 8, 9, 4] * 25]
    losses = [[position for position in range(1, 26) for _ in range(5)]]
    metrics = compute_means(statistics(labels, [[1] * 125], labels, losses))
    groups = {"1": 1, "2_4": 3, "5_9": 7, "10_19": 14.5, "20_up": 22.5}
    assert {group: metrics[f"train/loss_object_{group}"] for group in groups} == groups


def test_statistics_of_parts_add_up():
    parts = sum(statistics(*([rows[i]] for rows in (LABELS, WEIGHTS, PREDICTED, LOSSES))) for i in range(2))
    assert torch.equal(parts, statistics(LABELS, WEIGHTS, PREDICTED, LOSSES))


def test_metrics_without_a_count_are_omitted():
    metrics = compute_means(statistics([[6, 7, 8, 9, 4]], [[0, 0, 0, 0, 1]], [[0] * 5], [[1] * 5]))
    assert metrics["train/loss"] == metrics["train/loss_class"] == metrics["train/loss_real"] == 1
    assert math.isnan(metrics["train/loss_coord"])
    assert not {"train/acc_y1", "train/iou", "train/acc_noise", "train/object_acc"} & metrics.keys()
    empty = compute_means(torch.zeros(2, len(NAMES), dtype=torch.float64))
    assert empty.keys() == set(ALWAYS_REPORTED)
    assert all(map(math.isnan, empty.values()))


def test_statistics_carry_no_gradient():
    losses = torch.ones(5, requires_grad=True)
    sequence = torch.zeros(1, 5).long(), torch.ones(1, 5), torch.arange(5)
    sums = token_statistics(torch.zeros(5, 12), losses * 2, *sequence, TOKENIZER, torch.ones(1, 2))
    assert not sums.requires_grad
    assert sums.dtype == torch.float64


def test_meter_accumulates_and_restarts():
    meter = Meter(torch.device("cpu"))
    for _ in range(2):
        meter.add(statistics(LABELS, WEIGHTS, PREDICTED, LOSSES), images=2)
    assert torch.equal(meter.statistics, 2 * statistics(LABELS, WEIGHTS, PREDICTED, LOSSES))
    assert meter.images == 4
    meter.restart()
    assert meter.images == 0
    assert not meter.statistics.any()


def test_meter_excludes_pauses_and_measures_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pix2seq.training.metrics.time.perf_counter", lambda: now[0])
    meter = Meter(torch.device("cpu"))
    meter.images = 30

    def advance(seconds):
        now[0] += seconds

    advance(4)
    with meter.waiting():
        advance(1)
    with meter.paused():
        advance(1000)
    rates = meter.rates(num_processes=2, tokens_per_image=10)
    assert rates == {"perf/images_per_s": 12, "perf/tokens_per_s": 120, "perf/data_wait_frac": 0.2}
    meter.mfu_factor = 0.05
    assert meter.rates(num_processes=2, tokens_per_image=10)["perf/mfu"] == pytest.approx(6 * 0.05)
