"""Cross entropy of tokens, with soft targets as options."""

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
    """Logits (T, V) and the right tokens (T,) -> losses (T,). Pix2Seq section 2.2, without the options.

    coordinate_sigma   the target of a coordinate is a Gaussian around its bin, of this deviation in bins, cut off at
                       three of them and at the ends of the ruler
    label_smoothing    this share of the target is spread evenly: that of a coordinate over all bins, that of a class
                       over all classes, NOISE among them if there are `noise_objects`. EOS stays as it is
    """
    if not label_smoothing and not coordinate_sigma:
        return F.cross_entropy(logits, labels, reduction="none")
    log_probabilities = logits.log_softmax(-1)
    is_bin = labels >= tokenizer.first_bin_id
    losses = -log_probabilities.gather(1, labels[:, None])[:, 0]
    if coordinate_sigma:
        reach = math.ceil(3 * coordinate_sigma)
        offsets = torch.arange(-reach, reach + 1, device=labels.device)
        neighbours = labels[:, None] + offsets
        on_ruler = (neighbours >= tokenizer.first_bin_id) & (neighbours < tokenizer.vocab_size)
        shares = torch.exp(-0.5 * (offsets / coordinate_sigma) ** 2) * on_ruler
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-9)  # rows of other tokens may have none
        neighborhood_mean = log_probabilities.gather(1, neighbours.clamp(0, tokenizer.vocab_size - 1))
        losses = torch.where(is_bin, -(shares * neighborhood_mean).sum(-1), losses)
    if label_smoothing:
        first_class = tokenizer.noise_id if noise_objects else tokenizer.first_class_id
        spread = torch.where(
            is_bin,
            log_probabilities[:, tokenizer.first_bin_id :].mean(-1),
            log_probabilities[:, first_class : tokenizer.first_bin_id].mean(-1),
        )
        share = label_smoothing * (labels != tokenizer.eos_id)
        losses = (1 - share) * losses - share * spread
    return losses
