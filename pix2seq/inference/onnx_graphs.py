"""Exports a model as two ONNX graphs: one for an image, one for a decoding step."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from pix2seq.errors import UserError
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.models.llama_decoder import LlamaDecoder
from pix2seq.models.spatial_modulation import DecodedBoxes
from pix2seq.tokenizer import TOKENS_PER_OBJECT

ENCODER_FILE, STEP_FILE = "encoder.onnx", "decoder_step.onnx"
DESCRIPTION = """\
    encoder.onnx        pixel_values (B, 3, S, S) -> visual_key_values (B, L, 2 H, N, d)
    decoder_step.onnx   input_ids (B,), position (B,), visual_key_values, past_key_values (B, L, 2 H, T, d),
                        past_tokens (B, 5), past_coverage (B, N)
                        -> logits (B, V), present_key_values, present_tokens, present_coverage

past_* are the present_* of the step before; at first, they are 0.
B images, S pixels, L decoder layers, H heads (the keys first, then the values), N visual tokens, T cached tokens,
d head width, V tokens of the vocabulary. B and T are dynamic.
"""


class ExportCache(Cache):
    """A cache of transformers whose keys and values are inputs and outputs of the graph of a step.

    Args:
        past_key_values: (B, L, 2 H, T, d), of the tokens before `position`; what is behind them is ignored.
        position: Position (B,) of the new token in the sequence of each row.
        prefix: Keys and values (B, L, 2 H, N, d) that precede the sequence, or None.

    Attributes:
        present: For each layer, `past_key_values` (B, 2 H, T, d) with those of the new token.
    """

    def __init__(self, past_key_values: torch.Tensor, position: torch.Tensor, prefix: torch.Tensor | None):
        super().__init__(layers=[])
        self.past_key_values, self.position, self.prefix = past_key_values, position, prefix
        self.present: list[torch.Tensor] = []
        is_position = torch.arange(past_key_values.shape[3], device=position.device) == position[:, None]
        self.is_position = is_position[:, None, :, None]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        new = torch.cat([key_states, value_states], dim=1)
        self.present.append(torch.where(self.is_position, new, self.past_key_values[:, layer_idx]))
        key_values = self.present[-1]
        if self.prefix is not None:
            key_values = torch.cat([self.prefix[:, layer_idx], key_values], dim=2)
        return key_values.chunk(2, dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        return self.position[:, None]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        num_visual = 0 if self.prefix is None else self.prefix.shape[3]
        return num_visual + self.past_key_values.shape[3]


def encode(model: Pix2SeqForObjectDetection, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encodes images.

    Args:
        model: The model.
        pixel_values: uint8 (B, 3, S, S).

    Returns:
        The keys and values of the visual tokens in each layer, (B, L, 2 H, N, d): in the self-attention of the Llama
        decoder, in the cross-attention of the encoder-decoder.
    """
    visual_tokens = model.encode(pixel_values)
    if isinstance(model.decoder, LlamaDecoder):
        layers: list[tuple[torch.Tensor, ...]] = [
            (layer.keys, layer.values) for layer in model.decoder.encode_prefix(visual_tokens).layers
        ]
    else:
        layers = model.decoder.cross_key_values(visual_tokens)
    return torch.stack([torch.cat(key_values, dim=1) for key_values in layers], dim=1)


def decode_step(
    model: Pix2SeqForObjectDetection,
    input_ids: torch.Tensor,
    position: torch.Tensor,
    visual_key_values: torch.Tensor,
    past_key_values: torch.Tensor,
    past_tokens: torch.Tensor,
    past_coverage: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decodes one token in each row.

    Args:
        model: The model.
        input_ids: int64 (B,), the last token.
        position: int64 (B,), its position in the sequence; BOS is at 0. Rows may be at different positions.
        visual_key_values: (B, L, 2 H, N, d), the output of `encode`.
        past_key_values: (B, L, 2 H, T, d), of the tokens before `position`; what is behind them is ignored.
        past_tokens: int64 (B, 5), the tokens before it, and zeros before BOS.
        past_coverage: (B, N), see `DecodedBoxes`; zeros before the first token.

    Returns:
        The logits of the next token (B, V), and the inputs from `past_key_values` on, updated by this token.
    """
    decoder = model.decoder
    if isinstance(decoder, LlamaDecoder):
        self_cache = cache = ExportCache(past_key_values, position, visual_key_values)
    else:
        self_cache = ExportCache(past_key_values, position, None)
        cross_cache = DynamicCache()
        for index in range(visual_key_values.shape[1]):
            cross_cache.update(*visual_key_values[:, index].chunk(2, dim=1), index)
        cache = EncoderDecoderCache(self_cache, cross_cache)
    # The decoder uses the shape and the dtype of the visual tokens only: their keys and values are in the cache.
    visual_tokens = visual_key_values[:, 0, 0, :, :1]
    decoded = DecodedBoxes(past_tokens.clone(), past_coverage.clone())
    output = decoder(visual_tokens, input_ids[:, None], cache=cache, positions=position, decoded=decoded)
    logits, present_key_values = (
        decoder.lm_head(output.last_hidden_state[:, 0]),
        torch.stack(self_cache.present, dim=1),
    )
    return logits, present_key_values, decoded.last_tokens, decoded.coverage


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
    side = model.config.image_size
    pixel_values = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with torch.inference_mode():
        visual_key_values = torch.zeros_like(encode(model, pixel_values))
    batch, layers, heads, _, width = visual_key_values.shape
    input_ids = torch.full((batch,), model.tokenizer.bos_id)
    decoded = DecodedBoxes.empty(visual_key_values[:, 0, 0])
    past_key_values = torch.zeros(batch, layers, heads, TOKENS_PER_OBJECT * model.config.max_objects, width)
    batch_axis, tokens_axis = torch.export.Dim("batch"), torch.export.Dim("max_tokens")
    _export(
        _Graph(model, encode),
        folder / ENCODER_FILE,
        inputs={"pixel_values": (pixel_values, {0: batch_axis})},
        output_names=["visual_key_values"],
        opset=opset,
    )
    # For one query per row, "eager" is faster than the operators of sdpa, which also scale all keys.
    implementation = model.decoder.config._attn_implementation
    model.decoder.set_attn_implementation("eager")
    _export(
        _Graph(model, decode_step),
        folder / STEP_FILE,
        inputs={
            "input_ids": (input_ids, {0: batch_axis}),
            "position": (torch.zeros_like(input_ids), {0: batch_axis}),
            "visual_key_values": (visual_key_values, {0: batch_axis}),
            "past_key_values": (past_key_values, {0: batch_axis, 3: tokens_axis}),
            "past_tokens": (decoded.last_tokens, {0: batch_axis}),
            "past_coverage": (decoded.coverage, {0: batch_axis}),
        },
        output_names=["logits", *(f"present_{name}" for name in ("key_values", "tokens", "coverage"))],
        opset=opset,
    )
    model.decoder.set_attn_implementation(implementation)


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
