"""Decoder of an encoder-decoder transformer, with cross-attention to the visual tokens."""

import torch
from transformers import BlenderbotConfig, BlenderbotForCausalLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from pix2seq.models.attention import additive_mask, prefix_mask
from pix2seq.models.llama_decoder import CACHE
from pix2seq.models.spatial_modulation import DecodedBoxes, SpatialModulation


class TransformerDecoder(BlenderbotForCausalLM):
    """Self-attention over the token sequence, cross-attention to the visual tokens, MLP: the decoder of the paper.

    Blenderbot has the architecture of the authors' code: layer norm before each block and after the last one, GELU,
    learned positions, token embeddings shared with the output layer. With `spatial_modulation` in the config, its
    cross-attention is modulated, see `SpatialModulation`.
    """

    config: BlenderbotConfig
    _supports_flash_attn = False  # they accept no mask
    _supports_flex_attn = False

    def __init__(self, config: BlenderbotConfig):
        super().__init__(config)
        self.spatial_modulation = SpatialModulation.from_config(config)
        self.post_init()

    def _init_weights(self, module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpatialModulation):
            module.reset_parameters()

    def forward(
        self,
        visual_tokens: torch.Tensor,
        input_ids: torch.Tensor,
        cache: EncoderDecoderCache | None = None,
        positions: torch.Tensor | None = None,
        decoded: DecodedBoxes | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Computes the hidden states of a token sequence. It replaces the `forward` of `BlenderbotForCausalLM`.

        Args:
            visual_tokens: Visual tokens (B, N, D).
            input_ids: Token ids (B, L); with a cache, the next token (B, 1) of each sequence.
            cache: The result of `prefill`, which is updated.
            positions: With a cache, the positions (B,) or (1,) of the tokens in the sequence; BOS is at 0. The
                cache counts them too.
            decoded: With a cache, the state of the spatial modulation, which is updated.
            kwargs: `output_hidden_states` and `output_attentions`, as in transformers.

        Returns:
            Output of transformers with the hidden states (B, L, D), the input of `lm_head`.
        """
        length, device, modulation = input_ids.shape[1], visual_tokens.device, None
        if self.spatial_modulation is not None:
            modulation = self.spatial_modulation(input_ids, visual_tokens.shape[1], positions, decoded)
            modulation = modulation.to(visual_tokens.dtype)
        if cache is None:
            is_visible = prefix_mask(length, length, 0, device)[None]
        else:
            assert positions is not None
            keys = torch.arange(cache.self_attention_cache.get_max_length(), device=device)
            is_visible = (keys <= positions[:, None])[:, None]
        # Given a 4-D mask, transformers creates none, which would wait for the device.
        return self.model(
            input_ids=input_ids,
            attention_mask=additive_mask(is_visible, visual_tokens.dtype)[:, None],
            encoder_hidden_states=visual_tokens,
            encoder_attention_mask=modulation,
            use_cache=cache is not None,
            return_dict=True,
            **{CACHE: cache},
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
