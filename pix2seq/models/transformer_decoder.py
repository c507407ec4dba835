"""Decoder of an encoder-decoder transformer, with cross-attention to the visual tokens."""

import torch
from transformers import BlenderbotConfig, BlenderbotForCausalLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from pix2seq.models.attention import additive_mask, prefix_mask
from pix2seq.models.llama_decoder import CACHE


class TransformerDecoder(BlenderbotForCausalLM):
    """Self-attention over the token sequence, cross-attention to the visual tokens, MLP: the decoder of the paper.

    Blenderbot has the architecture of the authors' code: layer norm before each block and after the last one, GELU,
    learned positions, token embeddings shared with the output layer.
    """

    config: BlenderbotConfig
    _supports_flash_attn = False  # they accept no mask
    _supports_flex_attn = False

    def forward(
        self, visual_tokens: torch.Tensor, input_ids: torch.Tensor, **kwargs
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Computes the hidden states of a token sequence. It replaces the `forward` of `BlenderbotForCausalLM`.

        Args:
            visual_tokens: Visual tokens (B, N, D).
            input_ids: Token ids (B, L).
            kwargs: `output_hidden_states` and `output_attentions`, as in transformers.

        Returns:
            Output of transformers with the hidden states (B, L, D), the input of `lm_head`.
        """
        length = input_ids.shape[1]
        # Given a 4-D mask, transformers creates none, which would wait for the device.
        mask = additive_mask(prefix_mask(length, length, 0, visual_tokens.device), visual_tokens.dtype)
        return self.model.decoder(
            input_ids=input_ids,
            attention_mask=mask[None, None],
            encoder_hidden_states=visual_tokens,
            use_cache=False,
            return_dict=True,
            **kwargs,
        )

    def prefill(self, visual_tokens: torch.Tensor, max_length: int) -> EncoderDecoderCache:
        """Returns an empty cache for `max_length` tokens. The first step adds keys and values of the visual tokens."""
        return EncoderDecoderCache(StaticCache(config=self.config, max_cache_len=max_length), DynamicCache())

    def cross_key_values(self, visual_tokens: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Returns the keys and values (B, H, N, d) of visual tokens (B, N, D) in the cross-attention of each layer."""
        return [
            tuple(
                projection(visual_tokens).unflatten(2, (-1, layer.encoder_attn.head_dim)).transpose(1, 2)
                for projection in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
            )
            for layer in self.model.decoder.layers
        ]

    def decode_step(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        visual_tokens: torch.Tensor,
        cache: EncoderDecoderCache,
    ) -> torch.Tensor:
        """Processes one token per row.

        Args:
            token_ids: Token ids (B,).
            positions: Positions (B,) or (1,) of the tokens in the sequence; BOS is at 0. The cache counts them too.
            visual_tokens: Visual tokens (B, N, D).
            cache: The result of `prefill`, which is updated.

        Returns:
            Hidden states (B, D), the input of `lm_head`.
        """
        max_length = cache.self_attention_cache.get_max_length()
        is_visible = torch.arange(max_length, device=token_ids.device) <= positions[:, None]
        output = self.model.decoder(
            input_ids=token_ids[:, None],
            attention_mask=additive_mask(is_visible, visual_tokens.dtype)[:, None, None],
            encoder_hidden_states=visual_tokens,
            use_cache=True,
            return_dict=True,
            **{CACHE: cache},
        )
        return output.last_hidden_state[:, 0]
