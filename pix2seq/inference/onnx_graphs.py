"""Exports a model as two ONNX graphs: one for an image, one for a decoding step."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pix2seq.errors import UserError
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.models.llama_decoder import CACHE, prefix_positions
from pix2seq.tokenizer import TOKENS_PER_OBJECT

ENCODER_FILE, STEP_FILE = "encoder.onnx", "decoder_step.onnx"
DESCRIPTION = """\
    encoder.onnx        pixel_values (B, 3, S, S) -> visual_key_values (B, L, 2 H, N, d)
    decoder_step.onnx   input_ids (B,), position (B,), visual_key_values, past_key_values (B, L, 2 H, T, d)
                        -> logits (B, V), present_key_values (B, L, 2 H, T, d)

B images, S pixels, L decoder layers, H heads (the keys first, then the values), N visual tokens, T cached tokens,
d head width, V tokens of the vocabulary. B and T are dynamic.
"""


def encode_llama(model: Pix2SeqForObjectDetection, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encodes images for the Llama decoder.

    Args:
        model: Model with a Llama decoder.
        pixel_values: uint8 (B, 3, S, S).

    Returns:
        The keys and values of the visual tokens in the self-attention of each layer, (B, L, 2 H, N, d).
    """
    decoder, visual_tokens = model.decoder, model.encode(pixel_values)
    cache = DynamicCache(config=decoder.config)
    decoder.model(
        inputs_embeds=visual_tokens,
        position_ids=prefix_positions(visual_tokens.shape[1], 0, visual_tokens.device),
        num_visual=decoder.num_bidirectional(visual_tokens),
        use_cache=True,
        **{CACHE: cache},
    )
    return torch.stack([torch.cat([layer.keys, layer.values], dim=1) for layer in cache.layers], dim=1)


def encode_transformer(model: Pix2SeqForObjectDetection, pixel_values: torch.Tensor) -> torch.Tensor:
    """As `encode_llama`, with the keys and values of the cross-attention."""
    visual_tokens, key_values = model.encode(pixel_values), []
    for layer in model.decoder.model.decoder.layers:
        attention = layer.encoder_attn
        key_values.append(torch.cat(_split_heads(attention, visual_tokens, "k_proj", "v_proj"), dim=2).transpose(1, 2))
    return torch.stack(key_values, dim=1)


def step_llama(
    model: Pix2SeqForObjectDetection,
    input_ids: torch.Tensor,
    position: torch.Tensor,
    visual_key_values: torch.Tensor,
    past_key_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes one token in each row with the Llama decoder.

    Args:
        model: Model with a Llama decoder.
        input_ids: int64 (B,), the last token.
        position: int64 (B,), its position in the sequence; BOS is at 0. Rows may be at different positions.
        visual_key_values: (B, L, 2 H, N, d), the output of `encode_llama`.
        past_key_values: (B, L, 2 H, T, d), of the tokens before `position`; what is behind them is ignored.

    Returns:
        The logits of the next token (B, V), and `past_key_values` with those of this token at its position.
    """
    decoder, new_key_values = model.decoder.model, []
    is_past = torch.arange(past_key_values.shape[3], device=position.device) < position[:, None]
    hidden_states = decoder.embed_tokens(input_ids)
    # Visual tokens have the rotary position 0.
    cos, sin = (part[:, 0] for part in decoder.rotary_emb(hidden_states, 1 + position[:, None]))
    for index, layer in enumerate(decoder.layers):
        normed = layer.input_layernorm(hidden_states)
        query, key, value = _split_heads(layer.self_attn, normed, "q_proj", "k_proj", "v_proj")
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        new_key_values.append(torch.cat([key, value], dim=1)[:, :, None])
        attended = attend(
            query,
            (visual_key_values[:, index], None),
            (past_key_values[:, index], is_past),
            (new_key_values[-1], None),
        )
        hidden_states = hidden_states + layer.self_attn.o_proj(attended)
        hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
    logits = model.decoder.lm_head(decoder.norm(hidden_states))
    return logits, update_cache(past_key_values, new_key_values, position)


def step_transformer(
    model: Pix2SeqForObjectDetection,
    input_ids: torch.Tensor,
    position: torch.Tensor,
    visual_key_values: torch.Tensor,
    past_key_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `step_llama`, with the encoder-decoder transformer's decoder."""
    decoder, new_key_values = model.decoder.model.decoder, []
    is_past = torch.arange(past_key_values.shape[3], device=position.device) < position[:, None]
    hidden_states = decoder.embed_tokens(input_ids) + decoder.embed_positions.weight[position]
    for index, layer in enumerate(decoder.layers):
        normed = layer.self_attn_layer_norm(hidden_states)
        query, key, value = _split_heads(layer.self_attn, normed, "q_proj", "k_proj", "v_proj")
        new_key_values.append(torch.cat([key, value], dim=1)[:, :, None])
        attended = attend(query, (past_key_values[:, index], is_past), (new_key_values[-1], None))
        hidden_states = hidden_states + layer.self_attn.out_proj(attended)
        (query,) = _split_heads(layer.encoder_attn, layer.encoder_attn_layer_norm(hidden_states), "q_proj")
        attended = attend(query, (visual_key_values[:, index], None))
        hidden_states = hidden_states + layer.encoder_attn.out_proj(attended)
        normed = layer.final_layer_norm(hidden_states)
        hidden_states = hidden_states + layer.fc2(layer.activation_fn(layer.fc1(normed)))
    logits = model.decoder.lm_head(decoder.layer_norm(hidden_states))
    return logits, update_cache(past_key_values, new_key_values, position)


def _split_heads(attention: nn.Module, hidden_states: torch.Tensor, *projections: str) -> list[torch.Tensor]:
    """Applies linear layers of an attention module: (..., D) -> (..., heads, d) each."""
    return [
        getattr(attention, projection)(hidden_states).unflatten(-1, (-1, attention.head_dim))
        for projection in projections
    ]


def attend(query: torch.Tensor, *parts: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    """Attention of one query per row over keys and values in several tensors, which are not concatenated.

    Args:
        query: (B, Q, d), Q heads, a multiple of the H key-value heads.
        parts: Pairs of keys and values (B, 2 H, n, d) and a mask (B, n) of those that are used, or None for all.

    Returns:
        (B, Q d).
    """
    num_heads = parts[0][0].shape[1] // 2
    query = query.unflatten(1, (num_heads, -1)) / math.sqrt(query.shape[-1])
    scores = []
    for key_values, mask in parts:
        score = query @ key_values[:, :num_heads].transpose(2, 3)
        scores.append(score if mask is None else score.masked_fill(~mask[:, None, None], -torch.inf))
    lengths = [key_values.shape[2] for key_values, _ in parts]
    weights = torch.cat(scores, dim=-1).softmax(-1).split(lengths, dim=-1)
    return sum(
        weight @ key_values[:, num_heads:] for weight, (key_values, _) in zip(weights, parts, strict=True)
    ).flatten(1)


def update_cache(
    past_key_values: torch.Tensor, new_key_values: list[torch.Tensor], position: torch.Tensor
) -> torch.Tensor:
    """Writes the new keys and values of each layer, (B, 2 H, 1, d), at the position (B,) of a row."""
    is_position = torch.arange(past_key_values.shape[3], device=position.device) == position[:, None]
    return torch.where(is_position[:, None, None, :, None], torch.stack(new_key_values, dim=1), past_key_values)


# By the model_type of the decoder's config.
GRAPH_FUNCTIONS = {"llama": (encode_llama, step_llama), "blenderbot": (encode_transformer, step_transformer)}


class _Graph(nn.Module):
    """A function of a model as a module, for the exporter."""

    def __init__(self, model: Pix2SeqForObjectDetection, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: torch.Tensor):
        return self.function(self.model, *inputs)


def export_graphs(model: Pix2SeqForObjectDetection, folder: Path, opset: int) -> None:
    """Writes encoder.onnx and decoder_step.onnx with dynamic B and T.

    Args:
        model: Model in float32 and eval mode.
        folder: Existing folder.
        opset: Version of the ONNX operators.

    Raises:
        UserError: The exporter does not support a part of the model.
    """
    encode, step = GRAPH_FUNCTIONS[model.config.decoder_config.model_type]
    side = model.config.image_size
    pixel_values = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with torch.inference_mode():
        visual_key_values = torch.zeros_like(encode(model, pixel_values))
    batch, layers, heads, _, width = visual_key_values.shape
    input_ids = torch.full((batch,), model.tokenizer.bos_id)
    past_key_values = torch.zeros(batch, layers, heads, TOKENS_PER_OBJECT * model.config.max_objects, width)
    batch_axis, tokens_axis = torch.export.Dim("batch"), torch.export.Dim("max_tokens")
    _export(
        _Graph(model, encode),
        folder / ENCODER_FILE,
        inputs={"pixel_values": (pixel_values, {0: batch_axis})},
        output_names=["visual_key_values"],
        opset=opset,
    )
    _export(
        _Graph(model, step),
        folder / STEP_FILE,
        inputs={
            "input_ids": (input_ids, {0: batch_axis}),
            "position": (torch.zeros_like(input_ids), {0: batch_axis}),
            "visual_key_values": (visual_key_values, {0: batch_axis}),
            "past_key_values": (past_key_values, {0: batch_axis, 3: tokens_axis}),
        },
        output_names=["logits", "present_key_values"],
        opset=opset,
    )


def _export(
    graph: nn.Module,
    path: Path,
    *,
    inputs: dict[str, tuple[torch.Tensor, dict]],
    output_names: list[str],
    opset: int,
) -> None:
    """Exports a module. `inputs`: name -> (example, dynamic axes)."""
    examples, dynamic_axes = zip(*inputs.values(), strict=True)
    try:
        with warnings.catch_warnings(action="ignore"):  # of the exporter about its dependencies
            program = torch.onnx.export(
                graph.eval(),
                examples,
                input_names=list(inputs),
                output_names=output_names,
                dynamic_shapes=(dynamic_axes,),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        assert program is not None  # dynamo=True
        program.save(path)
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"--checkpoint: torch.onnx cannot export {path.name} ({str(error)[:300]})") from None
