"""Decoder of an encoder-decoder transformer, with cross-attention to the visual tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BlenderbotConfig, BlenderbotForCausalLM
from transformers.models.blenderbot.modeling_blenderbot import BlenderbotDecoder, BlenderbotDecoderLayer

from pix2seq.models.kv_cache import FusedLinear, StaticKVCache, compute_dtype


class TransformerDecoder(BlenderbotForCausalLM):
    """Self-attention over the token sequence, cross-attention to the visual tokens, MLP: the decoder of the paper.

    Blenderbot has the architecture of the authors' code: layer norm before each block and after the last one, GELU,
    learned positions, token embeddings shared with the output layer.
    """

    config: BlenderbotConfig

    def forward(self, visual_tokens: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Computes the hidden states of a token sequence. It replaces the `forward` of `BlenderbotForCausalLM`.

        Args:
            visual_tokens: Visual tokens (B, N, D).
            input_ids: Token ids (B, L).

        Returns:
            Hidden states (B, L, D), the input of `lm_head`.
        """
        length, dtype = input_ids.shape[1], visual_tokens.dtype
        mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=visual_tokens.device).triu(1)
        # Given a 4-D mask, transformers creates none, which would wait for the device.
        return self.model.decoder(
            input_ids=input_ids, attention_mask=mask[None, None], encoder_hidden_states=visual_tokens, use_cache=False
        ).last_hidden_state

    def prefill(self, visual_tokens: torch.Tensor, max_length: int) -> "TransformerIncrementalDecoder":
        """Processes visual tokens (B, N, D) and allocates the cache for sequences of `max_length` tokens."""
        return TransformerIncrementalDecoder(self.model.decoder, visual_tokens, max_length)


@dataclass
class FusedTransformerLayer:
    """The norms and linear layers of a Blenderbot layer."""

    self_attn_norm: nn.LayerNorm
    qkv_proj: FusedLinear
    out_proj: FusedLinear
    cross_attn_norm: nn.LayerNorm
    cross_q_proj: FusedLinear
    cross_out_proj: FusedLinear
    mlp_norm: nn.LayerNorm
    fc1: FusedLinear
    fc2: FusedLinear
    activation_fn: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def from_layer(cls, layer: BlenderbotDecoderLayer, like: torch.Tensor) -> "FusedTransformerLayer":
        self_attn, cross_attn = layer.self_attn, layer.encoder_attn
        return cls(
            self_attn_norm=layer.self_attn_layer_norm,
            qkv_proj=FusedLinear.from_linears(self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, like=like),
            out_proj=FusedLinear.from_linears(self_attn.out_proj, like=like),
            cross_attn_norm=layer.encoder_attn_layer_norm,
            cross_q_proj=FusedLinear.from_linears(cross_attn.q_proj, like=like),
            cross_out_proj=FusedLinear.from_linears(cross_attn.out_proj, like=like),
            mlp_norm=layer.final_layer_norm,
            fc1=FusedLinear.from_linears(layer.fc1, like=like),
            fc2=FusedLinear.from_linears(layer.fc2, like=like),
            activation_fn=layer.activation_fn,
        )


class TransformerIncrementalDecoder:
    """Computes what `BlenderbotDecoder` computes with a cache, one token per step, except for rounding.

    Args:
        decoder: The decoder.
        visual_tokens: Visual tokens (B, N, D).
        max_length: Maximum number of tokens of a sequence.
    """

    def __init__(self, decoder: BlenderbotDecoder, visual_tokens: torch.Tensor, max_length: int):
        attention = decoder.layers[0].self_attn
        self.decoder, self.num_heads, self.head_dim = decoder, attention.num_heads, attention.head_dim
        self.layers = [FusedTransformerLayer.from_layer(layer, like=visual_tokens) for layer in decoder.layers]
        self.lm_heads: dict[tuple, FusedLinear] = {}  # see Pix2SeqForObjectDetection.decode_step
        self.self_cache, self.cross_cache = (
            StaticKVCache(
                num_layers=len(self.layers),
                batch_size=len(visual_tokens),
                num_heads=self.num_heads,
                max_length=length,
                head_dim=self.head_dim,
                dtype=compute_dtype(visual_tokens),
                device=visual_tokens.device,
            )
            for length in (max_length, visual_tokens.shape[1])
        )
        for index, layer in enumerate(decoder.layers):
            keys, values = (
                projection(visual_tokens).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
                for projection in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
            )
            self.cross_cache.prefill(index, keys, values)

    def __call__(self, token_ids: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """Processes one token per row.

        Args:
            token_ids: Token ids (B,).
            position: Position of the tokens in the sequence; BOS is at 0. A 0-d tensor keeps its value on the device,
                so that the step can be captured as a CUDA graph.

        Returns:
            Hidden states (B, D), the input of `lm_head`.
        """
        decoder, cache_positions = self.decoder, self.self_cache.positions(position)
        if isinstance(position, torch.Tensor):
            position = position.view(1)
        hidden_states = decoder.embed_tokens(token_ids) + decoder.embed_positions.weight[position]
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv_proj(_layer_norm(hidden_states, layer.self_attn_norm)).unflatten(1, (-1, self.head_dim))
            query, keys_and_values = qkv[:, : self.num_heads], qkv[:, self.num_heads :]
            self.self_cache.update(index, cache_positions, keys_and_values)
            hidden_states = hidden_states + layer.out_proj(self.self_cache.attend(index, query, cache_positions))
            query = layer.cross_q_proj(_layer_norm(hidden_states, layer.cross_attn_norm))
            query = query.unflatten(1, (self.num_heads, self.head_dim))
            hidden_states = hidden_states + layer.cross_out_proj(self.cross_cache.attend(index, query))
            inner = layer.activation_fn(layer.fc1(_layer_norm(hidden_states, layer.mlp_norm)))
            hidden_states = hidden_states + layer.fc2(inner)
        return _layer_norm(hidden_states, decoder.layer_norm)

    def select_batch(self, rows: torch.Tensor) -> None:
        """Keeps only these rows of the batch."""
        self.self_cache.select_batch(rows)
        self.cross_cache.select_batch(rows)


def _layer_norm(hidden_states: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Applies a layer norm without the overhead of a module call."""
    return F.layer_norm(hidden_states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
