"""Selection of the next token from logits."""

import torch


def sample_top_p(logits: torch.Tensor, top_p: float, uniform: torch.Tensor | None) -> torch.Tensor:
    """Samples one token per row by nucleus sampling, with the rule of the authors' code (Pix2Seq section 2.2).

    Tokens are sorted by probability. Those whose cumulative probability, their own included, is at most `top_p` are
    kept, and the first one in any case. transformers' TopPLogitsWarper also keeps the token that crosses `top_p`.

    Args:
        logits: Logits (B, V). Tokens with -inf are never sampled.
        top_p: Probability mass of the kept tokens. 0 selects the most probable token.
        uniform: Random numbers (B,) in [0, 1), which select a token by its cumulative probability among the kept
            tokens. Not used if `top_p` is 0.

    Returns:
        Indices (B,) into the V logits.
    """
    if top_p == 0:
        return logits.argmax(-1)
    assert uniform is not None
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    kept = probabilities > 0
    if top_p < 1:  # the cumulative probability of all tokens may be rounded to above 1
        kept &= probabilities.cumsum(-1) <= top_p
    kept[:, 0] = True
    cumulative = (probabilities * kept).cumsum(-1)
    index = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, index.clamp(max=kept.sum(-1, keepdim=True) - 1)).squeeze(-1)


def neighborhood_mean(logits: torch.Tensor, tokens: torch.Tensor, radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the mean of the tokens around a token, weighted by their probabilities.

    Args:
        logits: Logits (B, V).
        tokens: Indices (B,) of the tokens in the centre.
        radius: Maximum distance of a token from the centre.

    Returns:
        The mean (B,), relative to the centre, and the sum of the probabilities (B,).
    """
    radius = min(radius, logits.shape[1] - 1)
    offsets = torch.arange(-radius, radius + 1, device=logits.device)
    neighbors = tokens[:, None] + offsets
    is_inside = (neighbors >= 0) & (neighbors < logits.shape[1])
    weights = logits.softmax(-1).gather(1, neighbors.clamp(0, logits.shape[1] - 1)) * is_inside
    mass = weights.sum(-1)
    # At a high temperature, the sampled token may be so improbable that its probability is rounded to 0.
    return (weights * offsets).sum(-1) / mass.clamp(min=torch.finfo(mass.dtype).tiny), mass


def finite_check(logits: torch.Tensor) -> torch.Tensor:
    """Returns 0 for each row of logits (B, V), or NaN if the row is not finite."""
    return 0 * logits.sum(-1)
