"""A classic decoder that looks at the picture through cross-attention."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BlenderbotConfig, BlenderbotForCausalLM
from transformers.models.blenderbot.modeling_blenderbot import BlenderbotDecoder

from pix2seq.models.kv_cache import FusedLinear, StaticKVCache, step_dtype


class TransformerDecoder(BlenderbotForCausalLM):
    """Self-attention over the sentence, cross-attention to the visual tokens, MLP: the authors' decoder.

    Blenderbot is transformers' decoder with their choices: layer norm before each block and at the end, GELU, learned
    positions, embeddings shared with the output.
    """

    config: BlenderbotConfig

    def forward(self, visual: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Visual tokens (B, N, D) and a sentence (B, L) -> what the decoder thinks after each token, (B, L, D)."""
        length = input_ids.shape[1]
        minimum = torch.finfo(visual.dtype).min
        mask = torch.full((length, length), minimum, dtype=visual.dtype, device=visual.device).triu(1)
        # With a mask of ours, transformers makes none and does not stop to ask the device what it hides.
        return self.model.decoder(
            input_ids=input_ids, attention_mask=mask[None, None], encoder_hidden_states=visual, use_cache=False
        ).last_hidden_state

    def prefill(self, visual: torch.Tensor, length: int) -> "TransformerIncrementalDecoder":
        """Looks at the visual tokens (B, N, D), and makes room for a sentence of `length` tokens."""
        return TransformerIncrementalDecoder(self.model.decoder, visual, length)


class TransformerIncrementalDecoder:
    """Reads a sentence bit by bit: BlenderbotDecoder's layers, laid out for it, and what they have read so far."""

    def __init__(self, decoder: BlenderbotDecoder, visual: torch.Tensor, length: int):
        attention = decoder.layers[0].self_attn
        self.decoder, self.heads = decoder, (attention.num_heads, attention.head_dim)
        self.output: dict[tuple, FusedLinear] = {}  # of the parts of the vocabulary that were asked for
        self.layers, count = [], len(visual)
        for layer in decoder.layers:
            own, cross = layer.self_attn, layer.encoder_attn
            linears = ((own.q_proj, own.k_proj, own.v_proj), (own.out_proj,), (cross.q_proj,), (cross.out_proj,))
            products = [
                FusedLinear.from_linears(*each, like=visual, count=count)
                for each in (*linears, (layer.fc1,), (layer.fc2,))
            ]
            self.layers.append((layer, *products))
        room, dtype = (len(self.layers), (len(visual), attention.num_heads)), step_dtype(visual)
        self.self_cache, self.cross_cache = (
            StaticKVCache.empty(room[0], (*room[1], most, attention.head_dim), dtype, visual.device)
            for most in (length, visual.shape[1])
        )
        for index, layer in enumerate(decoder.layers):
            linears = layer.encoder_attn.k_proj, layer.encoder_attn.v_proj
            self.cross_cache.prefill(
                index, *(linear(visual).unflatten(2, self.heads).transpose(1, 2) for linear in linears)
            )

    def __call__(self, ids: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """Reads one more token in each row, ids (B,), the `position`-th of the sentence (BOS is 0): (B, D). A tensor
        without dimensions is a position that the device alone knows.
        """
        decoder, places = self.decoder, self.self_cache.positions(position)
        if isinstance(position, torch.Tensor):
            position = position.view(1)
        hidden = decoder.embed_tokens(ids) + decoder.embed_positions.weight[position]
        for index, (layer, query_key_value, out, query, picture_out, fc1, fc2) in enumerate(self.layers):
            heads = query_key_value(_norm(hidden, layer.self_attn_layer_norm)).unflatten(1, (-1, self.heads[1]))
            self.self_cache.update(index, places, heads[:, self.heads[0] :])
            hidden = hidden + out(self.self_cache.attend(index, heads[:, : self.heads[0]], places))
            heads = query(_norm(hidden, layer.encoder_attn_layer_norm)).unflatten(1, self.heads)
            hidden = hidden + picture_out(self.cross_cache.attend(index, heads))
            hidden = hidden + fc2(layer.activation_fn(fc1(_norm(hidden, layer.final_layer_norm))))
        return _norm(hidden, decoder.layer_norm)

    def select_batch(self, rows: torch.Tensor) -> None:
        """Goes on with these rows of the batch only."""
        self.self_cache.select_batch(rows)
        self.cross_cache.select_batch(rows)


def _norm(hidden: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    return F.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
