"""Incremental decoders that read the weights of a decoder instead of calling its modules, which is faster.

At this size, the modules and caches of transformers take longer than the matrix products. Here projections of the same
input are one product, weights have the dtype and memory layout that is fastest for the batch size, and the steps can
be captured as a CUDA graph. `can_fuse` tells whether the modules of a decoder are unchanged, so that the result is the
same except for rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.blenderbot.modeling_blenderbot import (
    BlenderbotAttention,
    BlenderbotDecoder,
    BlenderbotDecoderLayer,
    BlenderbotDecoderWrapper,
    BlenderbotLearnedPositionalEmbedding,
    BlenderbotScaledWordEmbedding,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from pix2seq.models.fused_modulation import FusedModulation
from pix2seq.models.kv_cache import StaticKVCache, aligned_length
from pix2seq.models.llama_decoder import LlamaDecoder, PrefixTrimmedLayer, prefix_positions
from pix2seq.models.plain_modules import is_plain
from pix2seq.models.spatial_modulation import SpatialModulation
from pix2seq.models.transformer_decoder import TransformerDecoder

MIN_PACKED_BATCH = 4  # batch size from which packing weights pays off
MIN_SPLIT_WEIGHTS = 2**16  # number of weights from which splitting a product pays off

ACTIVATIONS = ("act_fn", "activation_fn")  # names of the activation functions
# The modules whose computation the fused decoders repeat, and their `forward`.
FUSED_MODULES = {
    module: module.forward
    for module in (
        nn.Linear,
        nn.LayerNorm,
        nn.ModuleList,
        LlamaDecoder,
        LlamaModel,
        LlamaDecoderLayer,
        PrefixTrimmedLayer,
        LlamaAttention,
        LlamaMLP,
        LlamaRMSNorm,
        LlamaRotaryEmbedding,
        nn.Embedding,
        TransformerDecoder,
        BlenderbotDecoderWrapper,
        BlenderbotDecoder,
        BlenderbotDecoderLayer,
        BlenderbotAttention,
        BlenderbotScaledWordEmbedding,
        BlenderbotLearnedPositionalEmbedding,
        SpatialModulation,
    )
}


def can_fuse(decoder: LlamaDecoder | TransformerDecoder) -> bool:
    """Returns whether a fused decoder computes what the modules of a decoder compute.

    This is the case in eval mode with the default attention implementation if all modules are plain, see `is_plain`,
    their attributes are those of the config, and their parameters have one dtype and device.
    """
    return (
        not decoder.training
        and decoder.config._attn_implementation in ("prefix", "sdpa")
        and all(
            is_plain(module, FUSED_MODULES)
            for name, module in decoder.named_modules()
            if not name.endswith(ACTIVATIONS)  # fused decoders call them
        )
        and _matches_config(decoder)
        and len({(parameter.dtype, parameter.device) for parameter in decoder.parameters()}) == 1
    )


def _matches_config(decoder: LlamaDecoder | TransformerDecoder) -> bool:
    """Whether attributes of modules that the fused decoders do not read have the values of the config."""
    config, modules = decoder.config, list(decoder.modules())
    attentions = [module for module in modules if isinstance(module, LlamaAttention | BlenderbotAttention)]
    norms = [module for module in modules if isinstance(module, LlamaRMSNorm)]
    num_layers = getattr(config, "decoder_layers", config.num_hidden_layers)
    return (
        list(dict.fromkeys(attention.layer_idx for attention in attentions)) == list(range(num_layers))
        and all(attention.scaling == attention.head_dim**-0.5 for attention in attentions)
        and all(norm.variance_epsilon == config.rms_norm_eps for norm in norms)
    )


def compute_dtype(like: torch.Tensor) -> torch.dtype:
    """Returns the dtype of matrix products: that of autocast if it is enabled, else that of the tensor."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


class UnscaledRMSNorm:
    """RMS norm without its weight and without a factor of sqrt(D): x / sqrt(sum(x^2) + D eps).

    Both are folded into the weights of the following linear layer, see `FusedLinear.from_linears`.

    Args:
        width: Number of channels D.
        eps: The epsilon of the RMS norm.
        like: A tensor of the dtype and device of the inputs.
    """

    def __init__(self, width: int, eps: float, like: torch.Tensor):
        self.eps, self.scale = eps, like.new_full((width,), width**-0.5)
        self.min_norm = like.new_tensor(math.sqrt(width * eps))

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.is_cuda:
            return F.rms_norm(hidden_states, self.scale.shape, self.scale, self.eps)
        return hidden_states / torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True).hypot_(self.min_norm)


@dataclass
class FusedLinear:
    """One matrix product for several linear layers that have the same input: x W^T + b.

    On a CPU in float32, the weight is stored in the layout that is fastest for the batch size:

    - packed by oneDNN for `MIN_PACKED_BATCH` rows or more,
    - otherwise split into one part per thread. PyTorch computes a product with few rows on one core; a batch of
      smaller products uses all cores. Small weights and weights that cannot be divided are not split.

    Args:
        weight: Weight (out, in).
        bias: Bias (out,).
        packed_weight: The weight in oneDNN's layout, or None.
        split_weight: The weight as (parts, in, out / parts), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    packed_weight: torch.Tensor | None = None
    split_weight: torch.Tensor | None = None

    @classmethod
    def from_linears(
        cls,
        *linears: nn.Linear,
        like: torch.Tensor,
        output_slice: slice = slice(None),
        input_scale: torch.Tensor | None = None,
    ) -> "FusedLinear":
        """Fuses linear layers.

        Args:
            linears: Layers with the same number of input features.
            like: A tensor of the batch size, dtype and device of the inputs.
            output_slice: The output features to compute, of each layer.
            input_scale: Factors (in,) of the input features, which are folded into the weight.
        """
        dtype, batch_size, on_cpu = compute_dtype(like), len(like), like.device.type == "cpu"
        weight = torch.cat([linear.weight[output_slice] for linear in linears])
        weight = (weight if input_scale is None else weight * input_scale).to(dtype)
        bias = None
        if linears[0].bias is not None:
            bias = torch.cat([linear.bias[output_slice] for linear in linears]).to(dtype)
        packed = split = None
        parts = math.gcd(len(weight), torch.get_num_threads())
        fast = on_cpu and dtype == torch.float32
        if fast and batch_size >= MIN_PACKED_BATCH and torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch_size)
        elif fast and parts > 1 and weight.numel() >= MIN_SPLIT_WEIGHTS:
            split = weight.unflatten(0, (parts, -1)).transpose(1, 2).contiguous()
        elif on_cpu and weight.shape[0] > weight.shape[1]:
            weight = weight.t().contiguous().t()  # products are fastest along the longer side
        return cls(weight, bias, packed, split)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Computes outputs (B, out) from inputs (B, in). The outputs of the layers are concatenated."""
        if self.packed_weight is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed_weight, self.bias, "none", [], "")
        if self.split_weight is not None:
            batch_size, width = x.shape  # len(x) takes longer than the product of a small layer
            product = torch.bmm(x.expand(self.split_weight.shape[0], batch_size, width), self.split_weight)
            product = product.view(1, -1) if batch_size == 1 else product.transpose(0, 1).flatten(1)
            return product if self.bias is None else product + self.bias
        return F.linear(x if x.dtype == self.weight.dtype else x.to(self.weight.dtype), self.weight, self.bias)


class FusedDecoder:
    """Base class of the fused decoders, which are used like an `IncrementalDecoder`.

    Args:
        decoder: The decoder.
        visual_tokens: Visual tokens (B, N, D).
    """

    supports_cuda_graph = True

    def __init__(self, decoder: LlamaDecoder | TransformerDecoder, visual_tokens: torch.Tensor):
        self.lm_head, self.modulation = decoder.lm_head, None
        if decoder.spatial_modulation is not None:
            self.modulation = FusedModulation(decoder.spatial_modulation, visual_tokens, compute_dtype(visual_tokens))
        self.lm_heads: dict[tuple, FusedLinear] = {}  # by the slice of the vocabulary

    def __call__(
        self, token_ids: torch.Tensor, position: int | torch.Tensor, vocab_slice: slice = slice(None)
    ) -> torch.Tensor:
        """Processes one token per row and computes the logits of the next one.

        Args:
            token_ids: Token ids (B,).
            position: Position of the tokens in the sequence; BOS is at 0. A 0-d tensor keeps its value on the device,
                so that the step can be captured as a CUDA graph.
            vocab_slice: The R tokens of the vocabulary whose logits are computed.

        Returns:
            Logits (B, R).
        """
        modulation = None if self.modulation is None else self.modulation(token_ids, position)
        hidden_states = self.hidden_states(token_ids, position, modulation)
        key = vocab_slice.start, vocab_slice.stop
        if key not in self.lm_heads:
            self.lm_heads[key] = FusedLinear.from_linears(self.lm_head, like=hidden_states, output_slice=vocab_slice)
        return self.lm_heads[key](hidden_states)

    def hidden_states(
        self, token_ids: torch.Tensor, position: int | torch.Tensor, modulation: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the hidden states (B, D) of one token per row, the input of `lm_head`."""
        raise NotImplementedError

    def select_batch(self, rows: torch.Tensor) -> None:
        """Keeps only these rows of the batch."""
        if self.modulation is not None:
            self.modulation.decoded.select_batch(rows)


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
            act_fn=mlp.act_fn,
        )


class FusedLlamaDecoder(FusedDecoder):
    """Fused decoder of a `LlamaDecoder`.

    Args:
        decoder: The decoder.
        visual_tokens: Visual tokens (B, N, D).
        max_length: Maximum number of tokens of a sequence.
    """

    def __init__(self, decoder: LlamaDecoder, visual_tokens: torch.Tensor, max_length: int):
        super().__init__(decoder, visual_tokens)
        model, config = decoder.model, decoder.config
        attention, dtype, device = model.layers[0].self_attn, compute_dtype(visual_tokens), visual_tokens.device
        self.head_dim = attention.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_visual = visual_tokens.shape[1]
        self.embeddings = model.embed_tokens.weight
        self.layers = [FusedLlamaLayer.from_layer(layer, like=visual_tokens) for layer in model.layers]
        self.norm = UnscaledRMSNorm(config.hidden_size, config.rms_norm_eps, self.embeddings)
        self.norm_weight = math.sqrt(config.hidden_size) * model.norm.weight
        self.kv_cache = StaticKVCache(
            num_layers=len(self.layers),
            batch_size=len(visual_tokens),
            num_heads=attention.k_proj.out_features // self.head_dim,
            max_length=aligned_length(self.num_visual + max_length, device),
            head_dim=self.head_dim,
            dtype=dtype,
            device=device,
        )
        for index, layer in enumerate(decoder.encode_prefix(visual_tokens).layers):
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

    def hidden_states(
        self, token_ids: torch.Tensor, position: int | torch.Tensor, modulation: torch.Tensor | None
    ) -> torch.Tensor:
        cache_positions = self.kv_cache.positions(self.num_visual + position, modulation)
        hidden_states = self.embeddings[token_ids]
        if isinstance(position, torch.Tensor):
            position = position.view(1)
        cos, sin = self.cos[position], self.sin[position]
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv_proj(self.norm(hidden_states)).view(-1, *cos.shape[-2:])
            qkv = torch.addcmul(qkv * cos, qkv.roll(self.head_dim // 2, dims=-1), sin)
            query, keys_and_values = qkv[:, : self.num_heads], qkv[:, self.num_heads :]
            self.kv_cache.update(index, cache_positions, keys_and_values)
            attended = self.kv_cache.attend(index, query, cache_positions)
            hidden_states = hidden_states + layer.o_proj(attended)
            gate, up = layer.gate_up_proj(self.norm(hidden_states)).chunk(2, dim=-1)
            hidden_states = hidden_states + layer.down_proj(layer.act_fn(gate) * up)
        return self.norm(hidden_states) * self.norm_weight

    def select_batch(self, rows: torch.Tensor) -> None:
        super().select_batch(rows)
        self.kv_cache.select_batch(rows)


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


class FusedTransformerDecoder(FusedDecoder):
    """Fused decoder of a `TransformerDecoder`.

    Args:
        decoder: The decoder.
        visual_tokens: Visual tokens (B, N, D).
        max_length: Maximum number of tokens of a sequence.
    """

    def __init__(self, decoder: TransformerDecoder, visual_tokens: torch.Tensor, max_length: int):
        super().__init__(decoder, visual_tokens)
        self.decoder = decoder.model.decoder
        attention = self.decoder.layers[0].self_attn
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.layers = [FusedTransformerLayer.from_layer(layer, like=visual_tokens) for layer in self.decoder.layers]
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
            for length in (aligned_length(max_length, visual_tokens.device), visual_tokens.shape[1])
        )
        for index, (keys, values) in enumerate(decoder.cross_key_values(visual_tokens)):
            self.cross_cache.prefill(index, keys, values)

    def hidden_states(
        self, token_ids: torch.Tensor, position: int | torch.Tensor, modulation: torch.Tensor | None
    ) -> torch.Tensor:
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
            hidden_states = hidden_states + layer.cross_out_proj(
                self.cross_cache.attend(index, query, mask=modulation)
            )
            inner = layer.activation_fn(layer.fc1(_layer_norm(hidden_states, layer.mlp_norm)))
            hidden_states = hidden_states + layer.fc2(inner)
        return _layer_norm(hidden_states, decoder.layer_norm)

    def select_batch(self, rows: torch.Tensor) -> None:
        super().select_batch(rows)
        self.self_cache.select_batch(rows)
        self.cross_cache.select_batch(rows)


def _layer_norm(hidden_states: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Applies a layer norm without the overhead of a module call."""
    return F.layer_norm(hidden_states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
