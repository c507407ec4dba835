"""Cross entropy of tokens, with optional soft targets."""

import math

import torch
import torch.nn.functional as F

from pix2seq.tokenizer import Tokenizer


def token_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    tokenizer: Tokenizer,
    label_smoothing: float = 0.0,
    coordinate_sigma: float = 0.0,
    noise_objects: bool = True,
) -> torch.Tensor:
    """Computes the cross entropy of each token (Pix2Seq section 2.2), over the whole vocabulary.

    Args:
        logits: Logits (T, V).
        labels: Target token ids (T,).
        tokenizer: Defines which ids are bins and classes.
        label_smoothing: Probability that is spread evenly: for a coordinate over all bins, for a class over all
            classes, with NOISE if there are `noise_objects`. The target EOS is not smoothed.
        coordinate_sigma: Standard deviation, in bins, of the Gaussian that replaces the one-hot target of a
            coordinate. It is truncated at three sigma and at the first and last bin. 0 disables it.
        noise_objects: Whether the sequences contain noise objects.

    Returns:
        Losses (T,), not weighted.
    """
    if not label_smoothing and not coordinate_sigma:
        return F.cross_entropy(logits, labels, reduction="none")
    log_probs = logits.log_softmax(-1)
    is_bin = labels >= tokenizer.first_bin_id
    losses = -log_probs.gather(1, labels[:, None])[:, 0]
    if coordinate_sigma:
        reach = math.ceil(3 * coordinate_sigma)
        offsets = torch.arange(-reach, reach + 1, device=labels.device)
        neighbors = labels[:, None] + offsets
        neighbor_is_bin = (neighbors >= tokenizer.first_bin_id) & (neighbors < tokenizer.vocab_size)
        targets = torch.exp(-0.5 * (offsets / coordinate_sigma) ** 2) * neighbor_is_bin
        targets = targets / targets.sum(-1, keepdim=True).clamp(min=1e-9)  # the sum may be 0 where `is_bin` is False
        neighbor_log_probs = log_probs.gather(1, neighbors.clamp(0, tokenizer.vocab_size - 1))
        losses = torch.where(is_bin, -(targets * neighbor_log_probs).sum(-1), losses)
    if label_smoothing:
        first_class = tokenizer.noise_id if noise_objects else tokenizer.first_class_id
        uniform_log_probs = torch.where(
            is_bin,
            log_probs[:, tokenizer.first_bin_id :].mean(-1),
            log_probs[:, first_class : tokenizer.first_bin_id].mean(-1),
        )
        smoothing = label_smoothing * (labels != tokenizer.eos_id)
        losses = (1 - smoothing) * losses - smoothing * uniform_log_probs
    return losses
