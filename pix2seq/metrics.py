"""What training says about its tokens, by slot: loss and accuracy of y1, x1, y2, x2 and class."""

import torch

from pix2seq.tokenizer import CLASS_SLOT, SLOTS


def token_statistics(
    logits: torch.Tensor, token_losses: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sums over the tokens with weight, by slot: float64 (4, 5), rows (weighted loss, weight, right answers, tokens).

    EOS, where sentences end in it, stands in the slot of a y1 and is counted there.
    labels and weights (B, L); logits (T, V) and token_losses (T,) as in Pix2SeqOutput. Sums can be added over
    micro-batches and ranks; nothing here waits for the device.
    """
    counted = weights > 0
    slots = torch.arange(labels.shape[1], device=labels.device).remainder(len(SLOTS)).expand_as(labels)[counted]
    weights = weights[counted]
    right = logits.argmax(-1) == labels[counted]
    rows = torch.stack([token_losses * weights, weights, right, torch.ones_like(weights)]).detach().double()
    return torch.zeros(4, len(SLOTS), dtype=torch.float64, device=labels.device).index_add_(1, slots, rows)


def describe(statistics: torch.Tensor) -> dict[str, float]:
    """The (4, 5) sums as named metrics. A slot without tokens has loss and accuracy 0."""
    loss, weight, right, tokens = statistics.cpu()
    coordinates = slice(0, CLASS_SLOT)

    def ratio(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a / b) if b > 0 else 0.0

    metrics = {
        "train/loss": ratio(loss.sum(), weight.sum()),
        "train/loss_coord": ratio(loss[coordinates].sum(), weight[coordinates].sum()),
        "train/loss_class": ratio(loss[CLASS_SLOT], weight[CLASS_SLOT]),
    }
    return metrics | {f"train/acc_{name}": ratio(right[slot], tokens[slot]) for slot, name in enumerate(SLOTS)}
