"""A decoder-only language model that reads the picture as the beginning of its text."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache


class LlamaDecoder(LlamaForCausalLM):
    """Self-attention over visual tokens and sentence together: the visual tokens are the prefix of the sequence.

    `causal_prefix` in its config lets a visual token see only those before it, as in a text; without it, all of them.
    """

    config: LlamaConfig

    def read(self, visual: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, N, D) and a sentence (B, L) -> what the decoder thinks after each token, (B, L, D)."""
        said = self.get_input_embeddings()(input_ids).to(visual.dtype)
        num_visual, length = visual.shape[1], said.shape[1]
        return self.model(
            inputs_embeds=torch.cat([visual, said], dim=1),
            attention_mask=self._mask(num_visual, length, visual),
            position_ids=prefix_positions(num_visual, length, visual.device),
            use_cache=False,
        ).last_hidden_state[:, num_visual:]

    def start(self, visual: torch.Tensor) -> DynamicCache:
        """Reads the visual tokens (B, N, D): the cache that `step` continues."""
        num_visual = visual.shape[1]
        cache = DynamicCache(config=self.config)
        self.model(
            inputs_embeds=visual,
            attention_mask=self._mask(num_visual, 0, visual),
            position_ids=prefix_positions(num_visual, 0, visual.device),
            past_key_values=cache,
            use_cache=True,
        )
        return cache

    def step(self, ids: torch.Tensor, position: int, cache: DynamicCache) -> torch.Tensor:
        """Reads one more token per row, ids (B,), the `position`-th of the sentence (BOS is 0): (B, D)."""
        return self.model(
            inputs_embeds=self.get_input_embeddings()(ids[:, None]),
            position_ids=torch.full((1, 1), position + 1, device=ids.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def _mask(self, num_visual: int, length: int, like: torch.Tensor) -> torch.Tensor:
        return prefix_mask(num_visual, length, like, getattr(self.config, "causal_prefix", False))


def prefix_mask(num_visual: int, length: int, like: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Additive mask (1, 1, T, T), T = num_visual + length: the picture sees itself whole (unless it is `causal`), the
    sentence sees the picture and what has been said."""
    total = num_visual + length
    visible = torch.ones(total, total, dtype=torch.bool, device=like.device).tril()
    if not causal:
        visible[:num_visual, :num_visual] = True
    mask = torch.zeros(total, total, dtype=like.dtype, device=like.device)
    return mask.masked_fill(~visible, torch.finfo(like.dtype).min)[None, None]


def prefix_positions(num_visual: int, length: int, device) -> torch.Tensor:
    """Rotary positions (1, T). All visual tokens stand at 0 (the 2-D code tells them apart) and the sentence starts
    at 1, so a model can be moved to another image size, with another number of visual tokens."""
    return torch.cat([torch.zeros(num_visual, device=device), torch.arange(1, length + 1, device=device)]).long()[None]
