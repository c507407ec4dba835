"""Soft targets, compared with explicit target distributions."""

import math

import pytest
import torch
import torch.nn.functional as F

from pix2seq.models.loss import token_cross_entropy
from pix2seq.tokenizer import Tokenizer

TOKENIZER = Tokenizer(num_classes=3, num_bins=20)
FIRST_BIN, VOCAB_SIZE = TOKENIZER.first_bin_id, TOKENIZER.vocab_size
LABELS = torch.tensor([FIRST_BIN, FIRST_BIN + 9, VOCAB_SIZE - 1, TOKENIZER.noise_id, FIRST_BIN - 1, TOKENIZER.eos_id])
LOGITS = torch.randn(len(LABELS), VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).double()


def cross_entropy(targets: torch.Tensor) -> torch.Tensor:
    torch.testing.assert_close(targets.sum(-1), torch.ones(len(targets)).double())
    return -(targets * LOGITS.log_softmax(-1)).sum(-1)


def soft_targets(sigma: float) -> torch.Tensor:
    """Targets (T, V): a Gaussian over the bins around each coordinate, one-hot for other tokens."""
    targets = F.one_hot(LABELS, VOCAB_SIZE).double()
    for index, label in enumerate(LABELS.tolist()):
        if sigma and label >= FIRST_BIN:
            reach = math.ceil(3 * sigma)
            for token in range(max(FIRST_BIN, label - reach), min(VOCAB_SIZE, label + reach + 1)):
                targets[index, token] = math.exp(-(((token - label) / sigma) ** 2) / 2)
            targets[index] /= targets[index].sum()
    return targets


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0, 2.5, 50.0])
def test_coordinate_sigma(sigma):
    losses = token_cross_entropy(LOGITS, LABELS, TOKENIZER, coordinate_sigma=sigma)
    torch.testing.assert_close(losses, cross_entropy(soft_targets(sigma)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise_objects", [True, False])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_label_smoothing_stays_among_bins_or_among_classes(sigma, noise_objects):
    targets = 0.9 * soft_targets(sigma)
    first_class = TOKENIZER.noise_id if noise_objects else TOKENIZER.first_class_id
    for index, label in enumerate(LABELS.tolist()):
        group = range(FIRST_BIN, VOCAB_SIZE) if label >= FIRST_BIN else range(first_class, FIRST_BIN)
        if label == TOKENIZER.eos_id:
            group = [label]
        targets[index, list(group)] += 0.1 / len(group)
    losses = token_cross_entropy(LOGITS, LABELS, TOKENIZER, 0.1, sigma, noise_objects)
    torch.testing.assert_close(losses, cross_entropy(targets), rtol=1e-6, atol=1e-6)


def test_no_tokens():
    assert token_cross_entropy(LOGITS[:0], LABELS[:0], TOKENIZER, 0.1, 1.0).shape == (0,)
