"""Decoder-only language model with the visual tokens as its prefix."""

import inspect

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from pix2seq.models.attention import add_modulation, additive_mask, prefix_mask
from pix2seq.models.spatial_modulation import DecodedBoxes, SpatialModulation

# The name of the cache argument of transformers' models, which depends on the version.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class PrefixTrimmedLayer(LlamaDecoderLayer):
    """Last layer of the decoder. It can leave out the outputs of the visual tokens, which nothing uses in training.

    The visual tokens are then only keys and values of the other tokens, as in a cache.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        num_trimmed: int = 0,
        **kwargs,
    ):
        if num_trimmed == 0:
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
            )
        assert position_embeddings is not None
        attention, normed = self.self_attn, self.input_layernorm(hidden_states[:, :num_trimmed])
        key, value = (
            projection(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.k_proj, attention.v_proj)
        )
        cos = position_embeddings[0][:, None, :num_trimmed]  # the rotary position of visual tokens is 0, so sin is 0
        cache = DynamicCache()
        cache.update(key * cos, value, attention.layer_idx)
        return super().forward(
            hidden_states[:, num_trimmed:],
            attention_mask=None if attention_mask is None else attention_mask[:, :, num_trimmed:],
            position_embeddings=tuple(table[:, num_trimmed:] for table in position_embeddings),
            **kwargs | {CACHE: cache},
        )


class LlamaDecoder(LlamaForCausalLM):
    """Self-attention over the concatenation of visual tokens and token sequence.

    Visual tokens attend to all visual tokens. With `causal_prefix` in the config, they attend only to the ones before
    them, as in a language model. With `spatial_modulation`, the attention of the sequence to the visual tokens is
    modulated, see `SpatialModulation`. The default attention implementation is "prefix".
    """

    config: LlamaConfig
    _supports_flash_attn = False  # they accept no mask
    _supports_flex_attn = False

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model.layers[-1] = PrefixTrimmedLayer(config, config.num_hidden_layers - 1)
        self.spatial_modulation = SpatialModulation.from_config(config)
        self.post_init()

    def _init_weights(self, module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpatialModulation):
            module.reset_parameters()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Returns "prefix" by default. Other implementations get a mask."""
        return super().get_correct_attn_implementation(requested_attention or "prefix", is_init_check)

    def forward(
        self,
        visual_tokens: torch.Tensor,
        input_ids: torch.Tensor,
        cache: Cache | None = None,
        positions: torch.Tensor | None = None,
        decoded: DecodedBoxes | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Computes the hidden states of a token sequence. It replaces the `forward` of `LlamaForCausalLM`.

        Args:
            visual_tokens: Visual tokens (B, N, D).
            input_ids: Token ids (B, L); with a cache, the next token (B, 1) of each sequence.
            cache: The result of `prefill`, which is updated.
            positions: With a cache, the positions (B,) or (1,) of the tokens in the sequence; BOS is at 0.
            decoded: With a cache, the state of the spatial modulation, which is updated.
            kwargs: `output_hidden_states` and `output_attentions`, as in transformers. Their lists include the visual
                tokens.

        Returns:
            Output of transformers with the hidden states (B, L, D), the input of `lm_head`.
        """
        num_visual, length = visual_tokens.shape[1], input_ids.shape[1]
        modulation = None
        if self.spatial_modulation is not None:
            modulation = self.spatial_modulation(input_ids, num_visual, positions, decoded).to(visual_tokens.dtype)
        if cache is not None:
            assert positions is not None
            embeddings = self.get_input_embeddings()(input_ids).to(visual_tokens.dtype)
            keys = torch.arange(cache.get_max_length(), device=embeddings.device)
            is_visible = (keys <= num_visual + positions[:, None])[:, None, None]
            return self.model(
                inputs_embeds=embeddings,
                attention_mask=add_modulation(additive_mask(is_visible, embeddings.dtype), modulation),
                position_ids=1 + positions[:, None],
                use_cache=True,
                return_dict=True,
                **{CACHE: cache},
            )
        embeddings = self.get_input_embeddings()(input_ids).to(visual_tokens.dtype)
        can_trim = self.training and not self._causal_prefix and not any(kwargs.values())
        output = self._run(
            torch.cat([visual_tokens, embeddings], dim=1),
            num_visual,
            modulation,
            num_trimmed=num_visual if can_trim else 0,
            use_cache=False,
            **kwargs,
        )
        output.last_hidden_state = output.last_hidden_state[:, -length:]
        return output

    def prefill(self, visual_tokens: torch.Tensor, max_length: int) -> StaticCache:
        """Returns a cache that holds visual tokens (B, N, D) and has space for `max_length` tokens."""
        cache = StaticCache(config=self.config, max_cache_len=visual_tokens.shape[1] + max_length)
        for index, layer in enumerate(self.encode_prefix(visual_tokens).layers):
            cache.update(layer.keys, layer.values, index)
        return cache

    def encode_prefix(self, visual_tokens: torch.Tensor) -> DynamicCache:
        """Returns the keys and values of visual tokens (B, N, D)."""
        cache = DynamicCache(config=self.config)
        self._run(visual_tokens, visual_tokens.shape[1], use_cache=True, **{CACHE: cache})
        return cache

    def _run(
        self, inputs_embeds: torch.Tensor, num_visual: int, modulation: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPast:
        """Runs the model on N visual tokens and a sequence, (B, N + L, D)."""
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        num_bidirectional = 0 if self._causal_prefix else num_visual
        mask = token_mask = None
        if self.config._attn_implementation != "prefix" or (modulation is not None and not num_bidirectional):
            mask = additive_mask(prefix_mask(length, length, num_bidirectional, device), inputs_embeds.dtype)
            mask = add_modulation(mask[None, None], modulation)
        elif modulation is not None:
            token_mask = additive_mask(prefix_mask(length - num_visual, length, 0, device), inputs_embeds.dtype)
            token_mask = add_modulation(token_mask[None, None], modulation)
        return self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=prefix_positions(num_visual, length - num_visual, device),
            num_visual=num_bidirectional,
            token_mask=token_mask,
            return_dict=True,
            **kwargs,
        )

    @property
    def _causal_prefix(self) -> bool:
        return getattr(self.config, "causal_prefix", False)


def prefix_positions(num_visual: int, length: int, device) -> torch.Tensor:
    """Returns the rotary positions (1, N + L) of N visual tokens and L tokens of a sequence.

    All visual tokens have position 0, because their 2-D position embedding distinguishes them, and the sequence starts
    at 1. A model therefore works with another image size, which has another number of visual tokens.
    """
    visual = torch.zeros(num_visual, device=device)
    return torch.cat([visual, torch.arange(1, length + 1, device=device)]).long()[None]
