"""A classic decoder that looks at the picture through cross-attention."""

from dataclasses import dataclass

import torch
from transformers import BlenderbotConfig, BlenderbotForCausalLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache


@dataclass
class CrossAttentionCache:
    """The visual tokens (B, N, D), and the keys and values made of them and of the sentence so far."""

    visual: torch.Tensor
    keys_and_values: EncoderDecoderCache


class TransformerDecoder(BlenderbotForCausalLM):
    """Self-attention over the sentence, cross-attention to the visual tokens, MLP: the authors' decoder.

    Blenderbot is transformers' decoder with their choices: layer norm before each block and at the end, GELU, learned
    positions, embeddings shared with the output.
    """

    config: BlenderbotConfig

    def read(self, visual: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, N, D) and a sentence (B, L) -> what the decoder thinks after each token, (B, L, D)."""
        length = input_ids.shape[1]
        minimum = torch.finfo(visual.dtype).min
        mask = torch.full((length, length), minimum, dtype=visual.dtype, device=visual.device).triu(1)
        return self._decode(input_ids, visual, mask)

    def start(self, visual: torch.Tensor) -> CrossAttentionCache:
        """The cache that `step` continues. The keys of the visual tokens (B, N, D) are made in the first step."""
        return CrossAttentionCache(visual, EncoderDecoderCache(DynamicCache(), DynamicCache()))

    def step(self, ids: torch.Tensor, position: int, cache: CrossAttentionCache) -> torch.Tensor:
        """Reads one more token per row, ids (B,), the `position`-th of the sentence (BOS is 0): (B, D)."""
        mask = torch.zeros(1, position + 1, dtype=cache.visual.dtype, device=ids.device)
        return self._decode(ids[:, None], cache.visual, mask, cache.keys_and_values)[:, -1]

    def _decode(self, ids: torch.Tensor, visual: torch.Tensor, mask: torch.Tensor, cache=None) -> torch.Tensor:
        # With a mask of ours, transformers makes none and does not stop to ask the device what it hides.
        return self.model.decoder(
            input_ids=ids,
            attention_mask=mask[None, None],
            encoder_hidden_states=visual,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
