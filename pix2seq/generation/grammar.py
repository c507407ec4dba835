"""Which tokens may come next, and which of them does."""

import torch

from pix2seq.tokenizer import CLASS_SLOT, Tokenizer


class Grammar:
    """Which tokens may come next. The kind of a token follows from its slot; no row looks at another.

    slots 0, 1 (y1, x1)   any bin; and EOS in slot 0, if the model was trained to say it
    slots 2, 3 (y2, x2)   bins not before the row's own y1 or x1
    slot 4 (class)        any class, or NOISE

    EOS is not offered to a model trained with noise objects: it never learnt when to say it.
    """

    def __init__(self, tokenizer: Tokenizer, allow_eos: bool, device: torch.device | str = "cpu"):
        bins = slice(tokenizer.first_bin_id, tokenizer.vocab_size)
        everything = slice(0, tokenizer.vocab_size)
        # What has to be computed of the logits: no more than what may be said, and all where a score is taken.
        self.rows = (everything if allow_eos else bins, bins, bins, bins, everything)
        self.ids = ids = torch.arange(tokenizer.vocab_size, device=device)
        self.tokenizer, self.allow_eos = tokenizer, allow_eos
        self.bins = torch.arange(tokenizer.num_bins, device=device)
        self.first_bin_id = tokenizer.first_bin_id
        classes = (ids >= tokenizer.noise_id) & (ids < tokenizer.first_bin_id)
        self.forbidden = {CLASS_SLOT: ~classes}
        if allow_eos:
            self.forbidden[0] = (ids < tokenizer.first_bin_id) & (ids != tokenizer.eos_id)

    def __call__(self, logits: torch.Tensor, slot: int, corner: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, R) of `rows[slot]`, with -inf for every token that may not come. `corner` (B,): the token two
        places before, which in slots 2 and 3 is the box's first corner in the same direction."""
        if slot in self.forbidden:
            return logits.masked_fill(self.forbidden[slot], -torch.inf)
        if slot in (2, 3):
            # A box may be thinner than a bin, but not turned inside out. Its own corner is always a legal answer.
            return logits.masked_fill(self.bins < corner[:, None] - self.first_bin_id, -torch.inf)
        return logits

    def best_class(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of logits (B, V) at a class slot: the probability among all tokens of the likeliest class, and its label."""
        classes = slice(self.tokenizer.first_class_id, self.first_bin_id)
        return logits.softmax(-1)[:, classes].max(-1)


def finite_check(logits: torch.Tensor) -> torch.Tensor:
    """What stands for the score (B,) of an object of which only the beginning is known, logits (B, V): 0, or NaN if
    they are not finite. It may end the sentence, and then nothing else would tell."""
    return 0 * logits.sum(-1)


def sample_top_p(logits: torch.Tensor, top_p: float, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row of logits (B, V), by the authors' rule: of the tokens in order of probability, keep those
    whose cumulative probability, their own included, is at most `top_p`, and the first in any case.

    This drops the token that crosses p, which Hugging Face's TopPLogitsWarper keeps. `uniform` (B,) in [0, 1) is the
    randomness: the token is where it falls in the cumulative distribution of those kept.
    """
    if top_p == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    kept = (probabilities.cumsum(-1) <= top_p) & (probabilities > 0)
    kept[:, 0] = True
    cumulative = (probabilities * kept).cumsum(-1)
    drawn = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, drawn.clamp(max=kept.sum(-1, keepdim=True) - 1)).squeeze(-1)


def neighborhood_mean(logits: torch.Tensor, chosen: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits (B, V) and a chosen token (B,), what lies at most `reach` from it: the mean, as an offset from the
    chosen one, weighted by probability, and the probability of all of them."""
    reach = min(reach, logits.shape[1] - 1)
    offsets = torch.arange(-reach, reach + 1, device=logits.device)
    places = chosen[:, None] + offsets
    there = (places >= 0) & (places < logits.shape[1])
    weights = logits.softmax(-1).gather(1, places.clamp(0, logits.shape[1] - 1)) * there
    mass = weights.sum(-1)
    # At a high temperature, what is chosen may be so unlikely that its probability is 0.
    return (weights * offsets).sum(-1) / mass.clamp(min=torch.finfo(mass.dtype).tiny), mass
