"""The detector: a picture becomes visual tokens, the decoder reads them and says the sentence.

    pixels -> backbone -> projection + 2-D position code -> encoder layers -> bridge -> decoder

Knows token ids and sizes only through its config: what they mean is the tokenizer's business.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from pix2seq.model.backbone import VisionBackbone
from pix2seq.model.configuration import Pix2SeqConfig
from pix2seq.model.llama import LlamaDecoder
from pix2seq.model.positions import coordinate_code, position_code_2d


@dataclass
class Pix2SeqOutput(ModelOutput):
    """loss: scalar, or None without labels. logits and token_losses: only at the T positions whose weight is not 0,
    in row-major order: (T, V) and (T,); logits without weights are (B, L, V)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None


def _encoder_layer(config: Pix2SeqConfig) -> nn.Module:
    return nn.TransformerEncoderLayer(
        config.hidden_size,
        config.encoder_heads,
        config.encoder_mlp_size,
        dropout=config.dropout,
        activation="gelu",
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    )


class Pix2SeqPreTrainedModel(PreTrainedModel):
    config_class = Pix2SeqConfig
    base_model_prefix = "pix2seq"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer", "TransformerEncoderLayer", "ResNetStage", "ViTLayer"]


class Pix2SeqForObjectDetection(Pix2SeqPreTrainedModel):
    def __init__(self, config: Pix2SeqConfig):
        super().__init__(config)
        width, decoder_width = config.hidden_size, config.decoder_config.hidden_size
        self.backbone = VisionBackbone(config.backbone_config)
        self.projection = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(self.backbone.num_channels, width),
            nn.LayerNorm(width, eps=1e-6),
        )
        self.encoder = nn.Sequential(*(_encoder_layer(config) for _ in range(config.encoder_layers)))
        if config.encoder_layers:
            self.encoder.append(nn.LayerNorm(width, eps=1e-6))
        self.bridge = nn.Sequential(nn.Linear(width, decoder_width), nn.LayerNorm(decoder_width, eps=1e-6))
        self.decoder = LlamaDecoder(config.decoder_config)
        self.post_init()
        if config.position_code == "ruler":
            self._lay_ruler()

    @torch.no_grad()
    def _lay_ruler(self) -> None:
        """Bins (the last ids of the vocabulary) start as the code of their coordinate, as y and as x."""
        embeddings = self.decoder.get_input_embeddings().weight
        coordinates = torch.linspace(0, 1, self.config.num_bins, device=embeddings.device)
        code = coordinate_code(coordinates, embeddings.shape[1] // 2, "ruler")
        scale = math.sqrt(2) * self.config.initializer_range  # sines have a variance of a half
        embeddings[-self.config.num_bins :] = scale * torch.cat([code, code], dim=1)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, S, S) -> visual tokens (B, N, D).

        uint8 pixels are scaled and normalised here, on the device; floats are taken as normalised already.
        """
        if pixel_values.dtype == torch.uint8:
            mean, std = (
                torch.tensor(values, device=pixel_values.device).view(3, 1, 1)
                for values in (self.config.image_mean, self.config.image_std)
            )
            pixel_values = ((pixel_values / 255 - mean) / std).to(self.dtype)
        features = self.backbone(pixel_values)  # (B, C, h, w)
        height, width = features.shape[-2:]
        tokens = self.projection(features.flatten(2).transpose(1, 2))
        tokens = self.encoder(tokens + self._position_code(height, width, tokens))
        tokens = self.bridge(tokens)
        # The code a second time, as in the authors' code: attention in the decoder should not have to recover it.
        return tokens + self._position_code(height, width, tokens)

    def _position_code(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        return position_code_2d(height, width, like.shape[-1], self.config.position_code, like.device).to(like.dtype)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        normalizer: torch.Tensor | float | None = None,
        return_dict: bool = True,
    ) -> Pix2SeqOutput:
        """Teacher-forced pass: what the model says after each token of `input_ids` (B, L).

        labels (B, L)    what it should say there        weights (B, L)   what that counts; 0 is not computed at all
        normalizer       the loss is sum(weights * cross entropy) / normalizer. Default: the sum of these weights;
                         pass the sum over all ranks and micro-batches of a step for a loss that does not depend on
                         how the step was split.
        """
        hidden = self.decoder.read(self.encode(pixel_values), input_ids)
        if labels is None:
            return Pix2SeqOutput(logits=self.decoder.lm_head(hidden))
        counted = weights > 0
        weights = weights[counted]
        # Cross entropy in float32 whatever the model runs in: sums over thousands of tokens lose bits otherwise.
        logits = self.decoder.lm_head(hidden[counted]).float()
        token_losses = F.cross_entropy(logits, labels[counted], reduction="none")
        normalizer = weights.sum().clamp(min=1e-9) if normalizer is None else normalizer
        return Pix2SeqOutput(
            loss=(weights * token_losses).sum() / normalizer, logits=logits, token_losses=token_losses
        )

    def start(self, pixel_values: torch.Tensor) -> Cache:
        """Reads the pictures (B, 3, S, S): the cache that `step` continues."""
        return self.decoder.start(self.encode(pixel_values))

    def step(self, ids: torch.Tensor, position: int, cache: Cache) -> torch.Tensor:
        """Reads one more token per row, ids (B,), the `position`-th of the sentence (BOS is 0).

        Returns what may follow: logits (B, V), float32.
        """
        return self.decoder.lm_head(self.decoder.step(ids, position, cache)).float()
