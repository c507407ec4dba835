"""A decoder-only language model that reads the picture as the beginning of its text."""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb


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
        parts.append(F.scaled_dot_product_attention(said, key, value, attn_mask=_what_came_before(said, key)))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _what_came_before(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    length, total = query.shape[2], key.shape[2]
    if length == 1:
        return None
    return torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)


AttentionInterface.register("prefix", prefix_attention)


class LastLayer(LlamaDecoderLayer):
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
        self.model.layers[-1] = LastLayer(config, config.num_hidden_layers - 1)
        self.post_init()

    def read(self, visual: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, N, D) and a sentence (B, L) -> what the decoder thinks after each token, (B, L, D)."""
        said = self.get_input_embeddings()(input_ids).to(visual.dtype)
        num_visual, length = visual.shape[1], said.shape[1]
        return self.model(
            inputs_embeds=torch.cat([visual, said], dim=1),
            position_ids=prefix_positions(num_visual, length, visual.device),
            num_visual=self._num_seen_whole(visual),
            use_cache=False,
        ).last_hidden_state[:, -length:]

    def start(self, visual: torch.Tensor) -> DynamicCache:
        """Reads the visual tokens (B, N, D): the cache that `step` continues."""
        cache = DynamicCache(config=self.config)
        self.model(
            inputs_embeds=visual,
            position_ids=prefix_positions(visual.shape[1], 0, visual.device),
            num_visual=self._num_seen_whole(visual),
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

    def _num_seen_whole(self, visual: torch.Tensor) -> int:
        return 0 if getattr(self.config, "causal_prefix", False) else visual.shape[1]


def prefix_positions(num_visual: int, length: int, device) -> torch.Tensor:
    """Rotary positions (1, T). All visual tokens stand at 0 (the 2-D code tells them apart) and the sentence starts
    at 1, so a model can be moved to another image size, with another number of visual tokens."""
    return torch.cat([torch.zeros(num_visual, device=device), torch.arange(1, length + 1, device=device)]).long()[None]
