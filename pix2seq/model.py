"""The model: a picture becomes visual tokens, the decoder reads them and says the sentence.

    pixels -> backbone -> projection + 2-D position code -> encoder layers -> prefix of a LlamaForCausalLM

Knows token ids and sizes only through its config: what they mean is the tokenizer's business.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import ModelOutput

from pix2seq.backbone import IMAGENET_MEAN, IMAGENET_STD, VisionBackbone

PositionCode = Literal["original", "ruler"]


class Pix2SeqConfig(PretrainedConfig):
    """Everything needed to rebuild a trained detector from its folder.

    backbone_config   any Hugging Face vision model's config, with its model_type
    decoder_config    a LlamaConfig; its vocab_size is the tokenizer's
    encoder_layers    transformer layers between backbone and decoder, of width `hidden_size`
    position_code     of visual tokens: see coordinate_code. With "ruler" the bins' embeddings start as the same code,
                      so that a coordinate's token and the visual tokens at that coordinate are alike from the start
    image_size        side S of the square canvas, in pixels
    image_mean, image_std   of the pixels the backbone expects, for pixels in [0, 1]
    num_bins, max_objects, noise_objects   how sentences were built: see Tokenizer and SequenceBuilder
    category_ids      original id of each label; `id2label` holds the names
    decoding          top_p and temperature this detector was evaluated with: see DecodingOptions
    """

    model_type = "pix2seq"
    sub_configs = {"backbone_config": AutoConfig, "decoder_config": LlamaConfig}

    def __init__(
        self,
        backbone_config: dict | PretrainedConfig | None = None,
        decoder_config: dict | PretrainedConfig | None = None,
        hidden_size: int = 256,
        encoder_layers: int = 6,
        encoder_heads: int = 8,
        encoder_mlp_size: int = 1024,
        dropout: float = 0.1,
        position_code: PositionCode = "original",
        image_size: int = 640,
        image_mean: tuple[float, ...] = IMAGENET_MEAN,
        image_std: tuple[float, ...] = IMAGENET_STD,
        num_bins: int = 1000,
        max_objects: int = 100,
        noise_objects: bool = True,
        category_ids: tuple[int, ...] = (0,),
        decoding: dict | None = None,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        if backbone_config is None:
            backbone_config = {"model_type": "resnet"}
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        if isinstance(decoder_config, dict):
            decoder_config = LlamaConfig(**{k: v for k, v in decoder_config.items() if k != "model_type"})
        self.backbone_config = backbone_config
        self.decoder_config = decoder_config or LlamaConfig(hidden_size=hidden_size)
        self.hidden_size = hidden_size
        self.encoder_layers = encoder_layers
        self.encoder_heads = encoder_heads
        self.encoder_mlp_size = encoder_mlp_size
        self.dropout = dropout
        self.position_code = position_code
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.num_bins = num_bins
        self.max_objects = max_objects
        self.noise_objects = noise_objects
        self.category_ids = list(category_ids)
        self.decoding = decoding or {}
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""
        return tuple(self.id2label[label] for label in range(len(self.category_ids)))


@dataclass
class Pix2SeqOutput(ModelOutput):
    """loss: scalar, or None without labels. logits and token_losses: only at the T positions whose weight is not 0,
    in row-major order: (T, V) and (T,); logits without weights are (B, L, V)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None


def coordinate_code(coordinates: torch.Tensor, channels: int, kind: PositionCode) -> torch.Tensor:
    """Coordinates (N,) in [0, 1] of the canvas -> fixed code (N, channels), all sines before all cosines.

    original   the authors': wave lengths from one canvas to 10000 canvases
    ruler      wave lengths from four canvases to an eighth of one, so that places near each other can be told apart
    """
    steps = torch.arange(channels // 2, device=coordinates.device) / (channels // 2)
    cycles = 10000.0**-steps if kind == "original" else 0.25 * 32.0**steps
    angles = 2 * math.pi * coordinates[:, None] * cycles
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_code_2d(height: int, width: int, channels: int, kind: PositionCode, device=None) -> torch.Tensor:
    """Code of the cells of a grid (height * width, channels): the first half of the channels tells y, the second x.

    Depends on the place on the canvas, not on the canvas size, so weights can be moved to another size. The authors
    put the first and the last cell on the edges; on the ruler a cell lies where its centre is, as a bin does.
    """

    def code(length: int) -> torch.Tensor:
        cells = torch.arange(length, device=device)
        coordinates = cells / max(length - 1, 1) if kind == "original" else (cells + 0.5) / length
        return coordinate_code(coordinates, channels // 2, kind)

    y = code(height)[:, None].expand(height, width, channels // 2)
    x = code(width)[None].expand(height, width, channels // 2)
    return torch.cat([y, x], dim=2).reshape(height * width, channels)


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
        decoder = config.decoder_config
        self.backbone = VisionBackbone(config.backbone_config)
        self.projection = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(self.backbone.num_channels, config.hidden_size),
            nn.LayerNorm(config.hidden_size, eps=1e-6),
        )
        self.encoder = nn.Sequential(*(_encoder_layer(config) for _ in range(config.encoder_layers)))
        if config.encoder_layers:
            self.encoder.append(nn.LayerNorm(config.hidden_size, eps=1e-6))
        self.bridge = nn.Sequential(
            nn.Linear(config.hidden_size, decoder.hidden_size), nn.LayerNorm(decoder.hidden_size, eps=1e-6)
        )
        self.decoder = LlamaForCausalLM(decoder)
        self.post_init()
        if config.position_code == "ruler":
            self._lay_ruler()

    @torch.no_grad()
    def _lay_ruler(self) -> None:
        """Bins (the last ids of the vocabulary) start as the code of their coordinate, as y and as x."""
        embeddings = self.decoder.get_input_embeddings().weight
        coordinates = torch.linspace(0, 1, self.config.num_bins, device=embeddings.device)
        code = coordinate_code(coordinates, embeddings.shape[1] // 2, "ruler")
        scale = math.sqrt(2) * self.config.decoder_config.initializer_range  # sines have a variance of a half
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
        visual = self.encode(pixel_values)
        said = self.decoder.get_input_embeddings()(input_ids)
        num_visual, length = visual.shape[1], said.shape[1]
        hidden = self.decoder.model(
            inputs_embeds=torch.cat([visual, said.to(visual.dtype)], dim=1),
            attention_mask=prefix_mask(num_visual, length, visual),
            position_ids=prefix_positions(num_visual, length, visual.device),
            use_cache=False,
        ).last_hidden_state[:, num_visual:]
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

    def start(self, pixel_values: torch.Tensor) -> DynamicCache:
        """Reads the pictures: the cache that `step` continues."""
        visual = self.encode(pixel_values)
        num_visual = visual.shape[1]
        cache = DynamicCache(config=self.config.decoder_config)
        self.decoder.model(
            inputs_embeds=visual,
            attention_mask=prefix_mask(num_visual, 0, visual),
            position_ids=prefix_positions(num_visual, 0, visual.device),
            past_key_values=cache,
            use_cache=True,
        )
        return cache

    def step(self, ids: torch.Tensor, position: int, cache: DynamicCache) -> torch.Tensor:
        """Reads one more token per row, ids (B,), the `position`-th of the sentence (BOS is 0).

        Returns what may follow: logits (B, V), float32.
        """
        hidden = self.decoder.model(
            inputs_embeds=self.decoder.get_input_embeddings()(ids[:, None]),
            position_ids=torch.full((1, 1), position + 1, device=ids.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return self.decoder.lm_head(hidden).float()


def prefix_mask(num_visual: int, length: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask (1, 1, T, T), T = num_visual + length: the picture sees itself whole, the sentence sees the
    picture and what has been said."""
    total = num_visual + length
    visible = torch.ones(total, total, dtype=torch.bool, device=like.device).tril()
    visible[:num_visual, :num_visual] = True
    mask = torch.zeros(total, total, dtype=like.dtype, device=like.device)
    return mask.masked_fill(~visible, torch.finfo(like.dtype).min)[None, None]


def prefix_positions(num_visual: int, length: int, device) -> torch.Tensor:
    """Rotary positions (1, T). All visual tokens stand at 0 (the 2-D code tells them apart) and the sentence starts
    at 1, so a model can be moved to another image size, with another number of visual tokens."""
    return torch.cat([torch.zeros(num_visual, device=device), torch.arange(1, length + 1, device=device)]).long()[None]


def parameter_groups(
    model: Pix2SeqForObjectDetection, lr: float, lr_backbone: float, weight_decay: float
) -> list[dict]:
    """Optimizer groups: the backbone has its own learning rate, and only kernels decay.

    Kernels are the weights of linear and convolution layers; norms, biases, embeddings (the tied output layer is one)
    and position tables do not decay.
    """
    embedding = model.decoder.get_input_embeddings().weight
    kernels = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            kernels.add(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            kernels.add(module.in_proj_weight)
    kernels.discard(embedding)
    kernels.discard(model.decoder.lm_head.weight)
    groups = []
    for prefix_is_backbone, group_lr in ((True, lr_backbone), (False, lr)):
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if name.startswith("backbone.") == prefix_is_backbone and (parameter in kernels) == decays
            ]
            groups.append({"params": parameters, "lr": group_lr, "weight_decay": weight_decay if decays else 0.0})
    return [group for group in groups if group["params"]]
