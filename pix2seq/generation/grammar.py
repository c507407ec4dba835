"""The grammar of token sequences: which tokens are allowed at each position."""

import torch

from pix2seq.tokenizer import CLASS_SLOT, Tokenizer


class Grammar:
    """Masks the logits of tokens that are not allowed, for each row of a batch independently.

    The allowed tokens depend on the slot, the index of a token in its object `y1 x1 y2 x2 class`:

        y1, x1    any bin; in slot 0 also EOS, if `allow_eos`
        y2, x2    bins that are not below the row's y1 or x1, so that boxes have no negative size
        class     any class or NOISE

    Args:
        tokenizer: Defines which ids are bins and classes.
        allow_eos: Whether a sequence may end before `max_objects`. A model that was trained with noise objects never
            learned when to end a sequence (Pix2Seq section 2.3).
        device: Device of the logits.

    Attributes:
        vocab_slices: For each slot, the part of the vocabulary whose logits are needed. Slots with a score need the
            whole vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, allow_eos: bool, device: torch.device | str = "cpu"):
        bins = slice(tokenizer.first_bin_id, tokenizer.vocab_size)
        vocabulary = slice(0, tokenizer.vocab_size)
        self.tokenizer, self.allow_eos = tokenizer, allow_eos
        self.vocab_slices = (vocabulary if allow_eos else bins, bins, bins, bins, vocabulary)
        self._bins = torch.arange(tokenizer.num_bins, device=device)
        ids = torch.arange(tokenizer.vocab_size, device=device)
        self._forbidden = {CLASS_SLOT: (ids < tokenizer.noise_id) | (ids >= tokenizer.first_bin_id)}
        if allow_eos:
            self._forbidden[0] = (ids < tokenizer.first_bin_id) & (ids != tokenizer.eos_id)

    def __call__(self, logits: torch.Tensor, slot: int, min_token_ids: torch.Tensor | None) -> torch.Tensor:
        """Masks logits.

        Args:
            logits: Logits (B, R) of `vocab_slices[slot]`.
            slot: Index of the token in its object.
            min_token_ids: Token ids (B,) of y1 in slot y2 and of x1 in slot x2: the smallest allowed bins. Not used in
                other slots.

        Returns:
            Logits (B, R), -inf for tokens that are not allowed.
        """
        if slot in self._forbidden:
            return logits.masked_fill(self._forbidden[slot], -torch.inf)
        if slot in (2, 3):
            assert min_token_ids is not None
            return logits.masked_fill(self._bins < min_token_ids[:, None] - self.tokenizer.first_bin_id, -torch.inf)
        return logits

    def best_class(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the most probable class of logits (B, V): its probability among all tokens, and its label, (B,)."""
        classes = slice(self.tokenizer.first_class_id, self.tokenizer.first_bin_id)
        return logits.softmax(-1)[:, classes].max(-1)
