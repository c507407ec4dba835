"""Soft targets against distributions written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from pix2seq.models.loss import token_cross_entropy
from pix2seq.tokenizer import Tokenizer

TOKENIZER = Tokenizer(num_classes=3, num_bins=20)
FIRST = TOKENIZER.first_bin_id
LABELS = torch.tensor([FIRST, FIRST + 9, TOKENIZER.vocab_size - 1, TOKENIZER.noise_id, FIRST - 1, TOKENIZER.eos_id])


@pytest.fixture
def logits():
    return torch.randn(len(LABELS), TOKENIZER.vocab_size, generator=torch.Generator().manual_seed(0)).double()


def against(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    torch.testing.assert_close(targets.sum(-1), torch.ones(len(targets)).double())
    return -(targets * logits.log_softmax(-1)).sum(-1)


def gaussian(sigma: float) -> torch.Tensor:
    """Targets (T, V) of soft coordinates: on the ruler only, one-hot for other tokens."""
    targets = F.one_hot(LABELS, TOKENIZER.vocab_size).double()
    for row, label in enumerate(LABELS.tolist()):
        if label >= FIRST:
            reach = math.ceil(3 * sigma)
            for token in range(max(FIRST, label - reach), min(TOKENIZER.vocab_size, label + reach + 1)):
                targets[row, token] = math.exp(-(((token - label) / sigma) ** 2) / 2)
            targets[row] /= targets[row].sum()
    return targets


def test_without_options_it_is_cross_entropy(logits):
    expected = against(F.one_hot(LABELS, TOKENIZER.vocab_size).double(), logits)
    torch.testing.assert_close(token_cross_entropy(logits, LABELS, TOKENIZER), expected)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 50.0])
def test_soft_coordinates(logits, sigma):
    losses = token_cross_entropy(logits, LABELS, TOKENIZER, coordinate_sigma=sigma)
    torch.testing.assert_close(losses, against(gaussian(sigma), logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise_objects", [True, False])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_smoothing_stays_among_bins_or_among_classes(logits, sigma, noise_objects):
    targets = 0.9 * (gaussian(sigma) if sigma else F.one_hot(LABELS, TOKENIZER.vocab_size).double())
    for row, label in enumerate(LABELS.tolist()):
        classes = slice(TOKENIZER.noise_id if noise_objects else TOKENIZER.first_class_id, FIRST)
        alike = slice(FIRST, None) if label >= FIRST else classes
        if label == TOKENIZER.eos_id:
            alike = slice(label, label + 1)
        targets[row, alike] += 0.1 / len(range(TOKENIZER.vocab_size)[alike])
    losses = token_cross_entropy(logits, LABELS, TOKENIZER, 0.1, sigma, noise_objects)
    torch.testing.assert_close(losses, against(targets, logits), rtol=1e-6, atol=1e-6)


def test_no_tokens_at_all():
    empty = torch.zeros(0, TOKENIZER.vocab_size), torch.zeros(0, dtype=torch.long)
    assert token_cross_entropy(*empty, TOKENIZER, 0.1, 1.0).shape == (0,)
