"""Decoder-only language model with the visual tokens as its prefix."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, apply_rotary_pos_emb

from pix2seq.models.kv_cache import FusedLinear, StaticKVCache, UnscaledRMSNorm, compute_dtype

# The name of the cache argument of transformers' models, which depends on the version.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def prefix_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask=None,
    num_visual: int = 0,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function "prefix": bidirectional among the visual tokens, causal for all other tokens.

    The two parts are computed separately: fast kernels do not accept a mask of both.

    Args:
        query: Queries (B, H, Q, d) of the last Q of K tokens.
        key: Keys (B, H, K, d).
        value: Values (B, H, K, d).
        num_visual: Number of tokens at the beginning of the K tokens that attend to each other.

    Returns:
        The outputs (B, Q, H, d), and None for the attention weights.
    """
    num_cached = key.shape[2] - query.shape[2]
    num_visual_queries = max(num_visual - num_cached, 0)
    visual_query, token_query = query[:, :, :num_visual_queries], query[:, :, num_visual_queries:]
    outputs = []
    if visual_query.shape[2]:
        outputs.append(F.scaled_dot_product_attention(visual_query, key[:, :, :num_visual], value[:, :, :num_visual]))
    if token_query.shape[2]:
        mask = causal_mask(token_query, key)
        outputs.append(F.scaled_dot_product_attention(token_query, key, value, attn_mask=mask))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Returns the causal mask (Q, K) of queries (B, H, Q, d) that are the last of K tokens, or None if Q is 1."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == 1:
        return None
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)


AttentionInterface.register("prefix", prefix_attention)


class PrefixTrimmedLayer(LlamaDecoderLayer):
    """Last layer of the decoder. In training it computes no outputs of the visual tokens, because nothing uses them.

    The visual tokens are keys and values of the other tokens.
    """

    def forward(self, hidden_states: torch.Tensor, position_embeddings=None, num_visual: int = 0, **kwargs):
        if not self.training or num_visual in (0, hidden_states.shape[1]):
            return super().forward(
                hidden_states, position_embeddings=position_embeddings, num_visual=num_visual, **kwargs
            )
        attention, cos_sin = self.self_attn, position_embeddings
        normed = self.input_layernorm(hidden_states)
        query, key, value = (
            projection(inputs).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for projection, inputs in (
                (attention.q_proj, normed[:, num_visual:]),
                (attention.k_proj, normed),
                (attention.v_proj, normed),
            )
        )
        query, _ = apply_rotary_pos_emb(query, query, *(table[:, num_visual:] for table in cos_sin))
        key, _ = apply_rotary_pos_emb(key, key, *cos_sin)
        outputs, _ = prefix_attention(attention, query, key, value, num_visual=num_visual)
        hidden_states = hidden_states[:, num_visual:] + attention.o_proj(outputs.flatten(2))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlamaDecoder(LlamaForCausalLM):
    """Self-attention over the concatenation of visual tokens and token sequence.

    Visual tokens attend to all visual tokens. With `causal_prefix` in the config, they attend only to the ones before
    them, as in a language model.
    """

    config: LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.set_attn_implementation("prefix")
        self.model.layers[-1] = PrefixTrimmedLayer(config, config.num_hidden_layers - 1)
        self.post_init()

    def forward(self, visual_tokens: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Computes the hidden states of a token sequence. It replaces the `forward` of `LlamaForCausalLM`.

        Args:
            visual_tokens: Visual tokens (B, N, D).
            input_ids: Token ids (B, L).

        Returns:
            Hidden states (B, L, D), the input of `lm_head`.
        """
        embeddings = self.get_input_embeddings()(input_ids).to(visual_tokens.dtype)
        num_visual, length = visual_tokens.shape[1], embeddings.shape[1]
        return self.model(
            inputs_embeds=torch.cat([visual_tokens, embeddings], dim=1),
            position_ids=prefix_positions(num_visual, length, visual_tokens.device),
            num_visual=self.num_bidirectional(visual_tokens),
            use_cache=False,
        ).last_hidden_state[:, -length:]

    def prefill(self, visual_tokens: torch.Tensor, max_length: int) -> "LlamaIncrementalDecoder":
        """Processes visual tokens (B, N, D) and allocates the cache for sequences of `max_length` tokens."""
        cache = DynamicCache(config=self.config)
        self.model(
            inputs_embeds=visual_tokens,
            position_ids=prefix_positions(visual_tokens.shape[1], 0, visual_tokens.device),
            num_visual=self.num_bidirectional(visual_tokens),
            use_cache=True,
            **{CACHE: cache},
        )
        return LlamaIncrementalDecoder(self.model, visual_tokens, max_length, cache)

    def num_bidirectional(self, visual_tokens: torch.Tensor) -> int:
        """Returns the number of visual tokens (B, N, D) that attend to each other: N, or 0 with `causal_prefix`."""
        return 0 if getattr(self.config, "causal_prefix", False) else visual_tokens.shape[1]


@dataclass
class FusedLlamaLayer:
    """The linear layers of a Llama layer, with the weights of its norms folded into them."""

    qkv_proj: FusedLinear
    o_proj: FusedLinear
    gate_up_proj: FusedLinear
    down_proj: FusedLinear
    act_fn: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def from_layer(cls, layer: LlamaDecoderLayer, like: torch.Tensor) -> "FusedLlamaLayer":
        attention, mlp = layer.self_attn, layer.mlp
        root = math.sqrt(layer.hidden_size)  # the factor that UnscaledRMSNorm leaves out
        return cls(
            qkv_proj=FusedLinear.from_linears(
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                like=like,
                input_scale=root * layer.input_layernorm.weight,
            ),
            o_proj=FusedLinear.from_linears(attention.o_proj, like=like),
            gate_up_proj=FusedLinear.from_linears(
                mlp.gate_proj, mlp.up_proj, like=like, input_scale=root * layer.post_attention_layernorm.weight
            ),
            down_proj=FusedLinear.from_linears(mlp.down_proj, like=like),
            act_fn=mlp.act_fn.forward,
        )


class LlamaIncrementalDecoder:
    """Computes what `LlamaModel` computes with a cache, one token per step, except for rounding.

    Args:
        model: The model.
        visual_tokens: Visual tokens (B, N, D).
        max_length: Maximum number of tokens of a sequence.
        prefix_cache: Keys and values of the visual tokens.
    """

    def __init__(self, model: LlamaModel, visual_tokens: torch.Tensor, max_length: int, prefix_cache: DynamicCache):
        attention, config = model.layers[0].self_attn, model.config
        dtype, device = compute_dtype(visual_tokens), visual_tokens.device
        self.head_dim = attention.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_visual = visual_tokens.shape[1]
        self.embeddings = model.embed_tokens.weight
        self.layers = [FusedLlamaLayer.from_layer(layer, like=visual_tokens) for layer in model.layers]
        self.norm = UnscaledRMSNorm(config.hidden_size, config.rms_norm_eps, self.embeddings)
        self.norm_weight = math.sqrt(config.hidden_size) * model.norm.weight
        self.lm_heads: dict[tuple, FusedLinear] = {}  # see Pix2SeqForObjectDetection.decode_step
        self.kv_cache = StaticKVCache(
            num_layers=len(self.layers),
            batch_size=len(visual_tokens),
            num_heads=attention.k_proj.out_features // self.head_dim,
            max_length=self.num_visual + max_length,
            head_dim=self.head_dim,
            dtype=dtype,
            device=device,
        )
        for index, layer in enumerate(prefix_cache.layers):
            self.kv_cache.prefill(index, layer.keys, layer.values)
        cos, sin = model.rotary_emb(visual_tokens, prefix_positions(0, max_length, device))
        self.cos, self.sin = self._rotary_tables(cos[0, :, None], sin[0, :, None], dtype)

    def _rotary_tables(
        self, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Expands tables (L, 1, d) to the fused heads (L, H_q + H_k + H_v, d).

        The rotation swaps the halves of a head by `roll`, so the first half of the sine is negated. Queries and keys
        are rotated; values have cosine 1 and sine 0.
        """
        half, num_kv_heads = self.head_dim // 2, self.kv_cache.num_heads
        signed_sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=2)
        cos, sin = (
            torch.cat(
                [rotated.expand(-1, self.num_heads + num_kv_heads, -1), fixed.expand(-1, num_kv_heads, -1)], dim=1
            ).to(dtype)
            for rotated, fixed in ((cos, torch.ones_like(cos)), (signed_sin, torch.zeros_like(sin)))
        )
        return cos, sin

    def __call__(self, token_ids: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """Processes one token per row.

        Args:
            token_ids: Token ids (B,).
            position: Position of the tokens in the sequence; BOS is at 0. A 0-d tensor keeps its value on the device,
                so that the step can be captured as a CUDA graph.

        Returns:
            Hidden states (B, D), the input of `lm_head`.
        """
        cache_positions = self.kv_cache.positions(self.num_visual + position)
        hidden_states = self.embeddings[token_ids]
        if isinstance(position, torch.Tensor):
            position = position.view(1)
        cos, sin = self.cos[position], self.sin[position]
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv_proj(self.norm(hidden_states)).view(-1, *cos.shape[-2:])
            qkv = torch.addcmul(qkv * cos, qkv.roll(self.head_dim // 2, dims=-1), sin)
            query, keys_and_values = qkv[:, : self.num_heads], qkv[:, self.num_heads :]
            self.kv_cache.update(index, cache_positions, keys_and_values)
            hidden_states = hidden_states + layer.o_proj(self.kv_cache.attend(index, query, cache_positions))
            gate, up = layer.gate_up_proj(self.norm(hidden_states)).chunk(2, dim=-1)
            hidden_states = hidden_states + layer.down_proj(layer.act_fn(gate) * up)
        return self.norm(hidden_states) * self.norm_weight

    def select_batch(self, rows: torch.Tensor) -> None:
        """Keeps only these rows of the batch."""
        self.kv_cache.select_batch(rows)


def prefix_positions(num_visual: int, length: int, device) -> torch.Tensor:
    """Returns the rotary positions (1, N + L) of N visual tokens and L tokens of a sequence.

    All visual tokens have position 0, because their 2-D position embedding distinguishes them, and the sequence starts
    at 1. A model therefore works with another image size, which has another number of visual tokens.
    """
    visual = torch.zeros(num_visual, device=device)
    return torch.cat([visual, torch.arange(1, length + 1, device=device)]).long()[None]
