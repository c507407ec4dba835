"""A decoder-only language model that reads the picture as the beginning of its text."""

import inspect
import math

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, apply_rotary_pos_emb

from pix2seq.models.kv_cache import FusedLinear, RMSNorm, StaticKVCache, step_dtype

# What transformers calls a cache that is handed in: the new name came after the oldest version that will do.
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
    """Queries (B, H, Q, d) of the last Q of K tokens, keys and values (B, H, K, d) -> (B, Q, H, d).

    The first `num_visual` tokens see each other, all others what came before them. In two parts: under one mask for
    both, every visual token would look at the sentence and forget it, and no fast kernel takes such a mask.
    """
    behind = key.shape[2] - query.shape[2]  # keys in the cache
    num_picture = max(num_visual - behind, 0)
    picture, said = query[:, :, :num_picture], query[:, :, num_picture:]
    parts = []
    if picture.shape[2]:
        parts.append(F.scaled_dot_product_attention(picture, key[:, :, :num_visual], value[:, :, :num_visual]))
    if said.shape[2]:
        parts.append(F.scaled_dot_product_attention(said, key, value, attn_mask=causal_mask(said, key)))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    length, total = query.shape[2], key.shape[2]
    if length == 1:
        return None
    return torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)


AttentionInterface.register("prefix", prefix_attention)


class PrefixTrimmedLayer(LlamaDecoderLayer):
    """Of the last layer, only what it makes of the sentence is needed: the visual tokens are keys and values."""

    def forward(self, hidden_states: torch.Tensor, position_embeddings=None, num_visual: int = 0, **kwargs):
        if not self.training or num_visual in (0, hidden_states.shape[1]):
            return super().forward(
                hidden_states, position_embeddings=position_embeddings, num_visual=num_visual, **kwargs
            )
        attention, cos_sin = self.self_attn, position_embeddings
        tokens = self.input_layernorm(hidden_states)
        query, key, value = (
            projection(inputs).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for projection, inputs in (
                (attention.q_proj, tokens[:, num_visual:]),
                (attention.k_proj, tokens),
                (attention.v_proj, tokens),
            )
        )
        query, _ = apply_rotary_pos_emb(query, query, *(part[:, num_visual:] for part in cos_sin))
        key, _ = apply_rotary_pos_emb(key, key, *cos_sin)
        seen, _ = prefix_attention(attention, query, key, value, num_visual=num_visual)
        hidden_states = hidden_states[:, num_visual:] + attention.o_proj(seen.flatten(2))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlamaDecoder(LlamaForCausalLM):
    """Self-attention over visual tokens and sentence together: the visual tokens are the prefix of the sequence.

    `causal_prefix` in its config lets a visual token see only those before it, as in a text; without it, all of them.
    """

    config: LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.set_attn_implementation("prefix")
        self.model.layers[-1] = PrefixTrimmedLayer(config, config.num_hidden_layers - 1)
        self.post_init()

    def forward(self, visual: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, N, D) and a sentence (B, L) -> what the decoder thinks after each token, (B, L, D)."""
        said = self.get_input_embeddings()(input_ids).to(visual.dtype)
        num_visual, length = visual.shape[1], said.shape[1]
        return self.model(
            inputs_embeds=torch.cat([visual, said], dim=1),
            position_ids=prefix_positions(num_visual, length, visual.device),
            num_visual=self.num_bidirectional(visual),
            use_cache=False,
        ).last_hidden_state[:, -length:]

    def prefill(self, visual: torch.Tensor, length: int) -> "LlamaIncrementalDecoder":
        """Reads the visual tokens (B, N, D), and makes room for a sentence of `length` tokens."""
        cache = DynamicCache(config=self.config)
        self.model(
            inputs_embeds=visual,
            position_ids=prefix_positions(visual.shape[1], 0, visual.device),
            num_visual=self.num_bidirectional(visual),
            use_cache=True,
            **{CACHE: cache},
        )
        return LlamaIncrementalDecoder(self.model, visual, length, cache)

    def num_bidirectional(self, visual: torch.Tensor) -> int:
        return 0 if getattr(self.config, "causal_prefix", False) else visual.shape[1]


class LlamaIncrementalDecoder:
    """Reads a sentence bit by bit: LlamaModel's layers, laid out for it, and what they have read so far.

    Says what LlamaModel says with a cache, but for rounding.
    """

    def __init__(self, model: LlamaModel, visual: torch.Tensor, length: int, prefix: DynamicCache):
        attention, shape = model.layers[0].self_attn, {"like": visual, "count": len(visual)}
        self.head_width = attention.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_width
        self.num_visual = visual.shape[1]
        self.embeddings, width = model.embed_tokens.weight, model.config.hidden_size
        self.unit, root = RMSNorm(width, model.config.rms_norm_eps, self.embeddings), math.sqrt(width)
        self.norm = root * model.norm.weight
        # The weights of norms are part of the products that read them: see Unit.
        self.layers = [
            (
                layer.mlp.act_fn.forward,
                FusedLinear.from_linears(
                    own.q_proj, own.k_proj, own.v_proj, scale=root * layer.input_layernorm.weight, **shape
                ),
                FusedLinear.from_linears(own.o_proj, **shape),
                FusedLinear.from_linears(
                    *(layer.mlp.gate_proj, layer.mlp.up_proj),
                    scale=root * layer.post_attention_layernorm.weight,
                    **shape,
                ),
                FusedLinear.from_linears(layer.mlp.down_proj, **shape),
            )
            for layer, own in ((layer, layer.self_attn) for layer in model.layers)
        ]
        self.output: dict[tuple, FusedLinear] = {}  # of the parts of the vocabulary that were asked for
        num_kv_heads = attention.k_proj.out_features // self.head_width
        room = (len(visual), num_kv_heads, self.num_visual + length, self.head_width)
        self.kv_cache = StaticKVCache.empty(len(self.layers), room, step_dtype(visual), visual.device)
        for index, layer in enumerate(prefix.layers):
            self.kv_cache.prefill(index, layer.keys, layer.values)
        cos, sin = model.rotary_emb(visual, prefix_positions(0, length, visual.device))
        half = self.head_width // 2
        # Queries and keys are turned, values are not: the three lie side by side. Rolling swaps a head's halves.
        still = torch.ones_like(cos[0, :, None]), torch.zeros_like(sin[0, :, None])
        turning = cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=2)
        counts = self.num_heads + self.kv_cache.num_heads, self.kv_cache.num_heads
        self.cos, self.sin = (
            torch.cat([turn.expand(-1, counts[0], -1), stay.expand(-1, counts[1], -1)], dim=1).to(step_dtype(visual))
            for turn, stay in zip(turning, still, strict=True)
        )

    def __call__(self, ids: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """Reads one more token in each row, ids (B,), the `position`-th of the sentence (BOS is 0): (B, D). A tensor
        without dimensions is a position that the device alone knows.
        """
        places = self.kv_cache.positions(self.num_visual + position)
        hidden = self.embeddings[ids]
        if isinstance(position, torch.Tensor):
            position = position.view(1)
        cos, sin = self.cos[position], self.sin[position]
        for index, (act, query_key_value, out, gate_up, down) in enumerate(self.layers):
            heads = query_key_value(self.unit(hidden)).view(-1, *cos.shape[-2:])
            turned = torch.addcmul(heads * cos, heads.roll(self.head_width // 2, dims=-1), sin)
            self.kv_cache.update(index, places, turned[:, self.num_heads :])
            hidden = hidden + out(self.kv_cache.attend(index, turned[:, : self.num_heads], places))
            gate, up = gate_up(self.unit(hidden)).chunk(2, dim=-1)
            hidden = hidden + down(act(gate) * up)
        return self.unit(hidden) * self.norm

    def select_batch(self, rows: torch.Tensor) -> None:
        """Goes on with these rows of the batch only."""
        self.kv_cache.select_batch(rows)


def prefix_positions(num_visual: int, length: int, device) -> torch.Tensor:
    """Rotary positions (1, T). All visual tokens stand at 0 (the 2-D code tells them apart) and the sentence starts
    at 1, so a model can be moved to another image size, with another number of visual tokens."""
    return torch.cat([torch.zeros(num_visual, device=device), torch.arange(1, length + 1, device=device)]).long()[None]
