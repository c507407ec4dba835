"""Pix2Seq model: backbone, projection, encoder layers, projector and autoregressive decoder."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torchvision.ops import StochasticDepth, stochastic_depth
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from pix2seq.generation import DecodingOptions, generate_tokens
from pix2seq.models.backbone import VisionBackbone
from pix2seq.models.configuration_pix2seq import Pix2SeqConfig
from pix2seq.models.detections import Detections, pad_detections, to_detections
from pix2seq.models.kv_cache import FusedLinear
from pix2seq.models.llama_decoder import LlamaDecoder, LlamaIncrementalDecoder
from pix2seq.models.loss import token_cross_entropy
from pix2seq.models.position_embedding import coordinate_embedding, position_embedding_2d
from pix2seq.models.transformer_decoder import TransformerDecoder, TransformerIncrementalDecoder
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer

NORM_EPS = 1e-6  # of the layer norms in projection, encoder and projector, as in the authors' code

# For each model type of the decoder config: the class, and the last layers of its residual branches.
DECODERS = {
    "llama": (LlamaDecoder, ("self_attn.o_proj", "mlp.down_proj")),
    "blenderbot": (TransformerDecoder, ("self_attn.out_proj", "encoder_attn.out_proj", "fc2")),
}


@dataclass
class Pix2SeqOutput(ModelOutput):
    """Output of `Pix2SeqForObjectDetection`.

    Args:
        loss: The loss, a scalar. Returned with `labels`.
        logits: With `labels`, logits (T, V) at the T positions whose weight is not 0, in row-major order. With
            `input_ids` alone, logits (B, L, V).
        token_losses: Cross entropy (T,) at the T positions, not weighted. Returned with `labels`.
        pred_boxes: Boxes (B, N, 4), xyxy in [0, 1] of the padded square (DETR: cxcywh of the image), float64,
            sorted by descending score. Returned without `input_ids`.
        pred_labels: Labels (B, N), -1 where an image has fewer than N objects. Returned without `input_ids`.
        pred_scores: Scores (B, N), float64. Returned without `input_ids`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_labels: torch.Tensor | None = None
    pred_scores: torch.Tensor | None = None


class Pix2SeqEncoderLayer(GradientCheckpointingLayer, nn.TransformerEncoderLayer):
    """Pre-norm encoder layer with dropout inside the MLP and drop path on both residual branches."""

    def __init__(self, config: Pix2SeqConfig):
        nn.TransformerEncoderLayer.__init__(
            self,
            config.hidden_size,
            config.encoder_heads,
            config.encoder_mlp_size,
            activation="gelu",
            layer_norm_eps=NORM_EPS,
            batch_first=True,
            norm_first=True,
            dropout=0.0,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.dropout1 = StochasticDepth(config.drop_path, "row")
        self.dropout2 = StochasticDepth(config.drop_path, "row")


class Pix2SeqProjector(nn.Module):
    """Projects visual tokens from the width of the encoder to that of the decoder.

    With `projector_mlp` in the config, an MLP block follows.
    """

    def __init__(self, config: Pix2SeqConfig):
        super().__init__()
        width = config.decoder_config.hidden_size
        inner = width * config.encoder_mlp_size // config.hidden_size
        self.projection = nn.Linear(config.hidden_size, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = None
        if config.projector_mlp:
            self.mlp = nn.Sequential(
                nn.LayerNorm(width, eps=NORM_EPS),
                nn.Linear(width, inner),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(inner, width),
                StochasticDepth(config.drop_path, "row"),
            )

    def forward(self, visual_tokens: torch.Tensor, position_embedding: torch.Tensor) -> torch.Tensor:
        """Projects visual tokens (B, N, C) to (B, N, D) and adds the decoder's position embedding (N, D)."""
        visual_tokens = self.norm(self.projection(visual_tokens)) + position_embedding
        return visual_tokens if self.mlp is None else visual_tokens + self.mlp(visual_tokens)


class Pix2SeqPreTrainedModel(PreTrainedModel):
    """Base class that defines loading, saving and weight initialization."""

    config_class = Pix2SeqConfig
    base_model_prefix = "pix2seq"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = False  # TransformerDecoder passes a mask; the backbone may use it


class Pix2SeqForObjectDetection(Pix2SeqPreTrainedModel):
    """Pix2Seq (arXiv 2109.10852): predicts the objects of an image as a token sequence, five tokens per object.

        pixels -> backbone -> projection + position embedding -> encoder layers -> projector -> decoder

    `forward` computes the loss in training, `detect` the objects at inference.

    Args:
        config: Configuration. The weights are random; `from_pretrained` loads a trained model and
            `pix2seq.models.build_model` builds a new one with a pretrained backbone.
    """

    def __init__(self, config: Pix2SeqConfig):
        super().__init__(config)
        width = config.hidden_size
        self.backbone = VisionBackbone(config.backbone_config, config.backbone_dilated)
        self.projection = nn.Sequential(  # from the channels of the backbone to the width of the encoder
            nn.Dropout(config.dropout),
            nn.Linear(self.backbone.num_channels, width),
            nn.LayerNorm(width, eps=NORM_EPS),
        )
        self.encoder = nn.Sequential(*(Pix2SeqEncoderLayer(config) for _ in range(config.encoder_layers)))
        if config.encoder_layers:
            self.encoder.append(nn.LayerNorm(width, eps=NORM_EPS))
        self.projector = Pix2SeqProjector(config)  # from the width of the encoder to that of the decoder
        decoder_class, branch_ends = DECODERS[config.decoder_config.model_type]
        self.decoder = decoder_class(config.decoder_config)
        if config.output_bias:
            head = self.decoder.lm_head
            self.decoder.lm_head = nn.Linear(head.in_features, head.out_features, bias=True)
        self.post_init()
        if config.bin_init == "sine":
            self.init_bin_embeddings()
        self.add_drop_path(branch_ends)
        # FSDP and device maps keep each of these layers on one device.
        self._no_split_modules = {
            type(module).__name__ for module in self.modules() if isinstance(module, GradientCheckpointingLayer)
        }

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head

    @torch.no_grad()
    def init_bin_embeddings(self) -> None:
        """Initializes the embeddings of the bins with the sine embedding of their coordinate, for y and for x."""
        embeddings = self.decoder.get_input_embeddings().weight
        coordinates = torch.linspace(0, 1, self.config.num_bins, device=embeddings.device)
        sines = coordinate_embedding(coordinates, embeddings.shape[1] // 2, "fine")
        scale = math.sqrt(2) * self.config.initializer_range  # the variance of sines is 1/2
        embeddings[-self.config.num_bins :] = scale * torch.cat([sines, sines], dim=1)

    def add_drop_path(self, branch_ends: tuple[str, ...]) -> None:
        """Adds drop path to the decoder layers of transformers, which have none.

        Args:
            branch_ends: Suffixes of the names of the last layers of the residual branches.
        """
        for name, module in self.decoder.named_modules():
            if name.endswith(branch_ends):
                module.register_forward_hook(partial(_drop_path_hook, self.config))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model's classes and bins."""
        return Tokenizer(len(self.config.category_ids), self.config.num_bins)

    @property
    def decoding_options(self) -> DecodingOptions:
        """The default decoding options: those of the evaluations in training."""
        return DecodingOptions(**{"max_objects": self.config.max_objects} | self.config.decoding)

    def override_options(self, **overrides) -> DecodingOptions:
        """Returns `decoding_options` with other values.

        Raises:
            ValueError: A value is out of range, or `max_objects` exceeds `max_decodable_objects`.
        """
        return self.validate_options(replace(self.decoding_options, **overrides))

    def validate_options(self, options: DecodingOptions) -> DecodingOptions:
        """Returns the options. Raises ValueError if `max_objects` exceeds `max_decodable_objects`."""
        if options.max_objects > self.max_decodable_objects:
            raise ValueError(
                f"max_objects {options.max_objects}: this model can predict at most {self.max_decodable_objects}"
            )
        return options

    @property
    def max_decodable_objects(self) -> float:
        """The largest possible `max_objects`: limited by learned positions, unlimited with rotary positions."""
        if isinstance(self.decoder, LlamaDecoder):
            return math.inf
        return self.config.decoder_config.max_position_embeddings // TOKENS_PER_OBJECT

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes the visual tokens of images.

        Args:
            pixel_values: Padded square images (B, 3, S, S). uint8 pixels are normalized with the mean and standard
                deviation of the config; float pixels must be normalized already.

        Returns:
            Visual tokens (B, N, D) of the decoder's width, row by row.
        """
        if pixel_values.dtype == torch.uint8:
            mean, std = (
                torch.tensor(values, device=pixel_values.device).view(3, 1, 1)
                for values in (self.config.image_mean, self.config.image_std)
            )
            # Data loaders return channels-last memory; `contiguous` converts it on the device.
            pixel_values = ((pixel_values.contiguous() / 255 - mean) / std).to(self.dtype)
        features = self.backbone(pixel_values)  # (B, C, h, w)
        height, width = features.shape[-2:]
        hidden_states = self.projection(features.flatten(2).transpose(1, 2))
        hidden_states = self.encoder(
            hidden_states + self._position_embedding(height, width, self.config.hidden_size, hidden_states)
        )
        decoder_width = self.config.decoder_config.hidden_size
        return self.projector(hidden_states, self._position_embedding(height, width, decoder_width, hidden_states))

    def _position_embedding(self, height: int, width: int, channels: int, like: torch.Tensor) -> torch.Tensor:
        embedding = position_embedding_2d(height, width, channels, self.config.position_embedding, like.device)
        return embedding.to(like.dtype)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        loss_positions: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Pix2SeqOutput:
        """Computes the loss with teacher forcing, or detects objects if there are no `input_ids`.

        `SequenceBuilder` creates `input_ids`, `labels` and `token_weights`. The loss is
        sum(token_weights * cross entropy) / num_items_in_batch, computed in float32 (Pix2Seq section 2.2).

        Args:
            pixel_values: Padded square images (B, 3, S, S), see `encode`.
            input_ids: Input token ids (B, L), BOS first. Without them, the result is that of `detect`.
            labels: Target token ids (B, L), already shifted: `labels[:, i]` follows `input_ids[:, i]`. `token_weights`
                replaces the ignore index -100. Without labels, no loss is computed.
            token_weights: Loss weights (B, L). Logits are not computed where the weight is 0. Default: 1.
            num_items_in_batch: Divisor of the loss. Default: the sum of `token_weights`. Pass the sum over all
                processes and accumulation steps for a loss that does not depend on how a batch is divided.
            loss_positions: `token_weights.flatten().nonzero()[:, 0]` (T,), if known: computing it waits for the GPU.
            return_dict: Ignored. The output is always a `Pix2SeqOutput`.

        Returns:
            The output, see `Pix2SeqOutput`.
        """
        if input_ids is None:
            padded = pad_detections(self.detect(pixel_values))
            tensors = {f"pred_{name}": torch.from_numpy(values).to(self.device) for name, values in padded.items()}
            return Pix2SeqOutput(**tensors)
        hidden_states = self.decoder(self.encode(pixel_values), input_ids)
        if labels is None:
            return Pix2SeqOutput(logits=self.decoder.lm_head(hidden_states))
        if token_weights is None:
            token_weights = torch.ones_like(labels, dtype=torch.float32)
        if loss_positions is None:
            loss_positions = token_weights.flatten().nonzero()[:, 0]
        weights = token_weights.flatten()[loss_positions]
        # float32 also under autocast: a sum over thousands of tokens in half precision is not accurate.
        logits = self.decoder.lm_head(hidden_states.flatten(0, 1)[loss_positions]).float()
        token_losses = token_cross_entropy(
            logits,
            labels.flatten()[loss_positions],
            self.tokenizer,
            label_smoothing=self.config.label_smoothing,
            coordinate_sigma=self.config.coordinate_sigma,
            noise_objects=self.config.noise_objects,
        )
        num_items_in_batch = weights.sum().clamp(min=1e-9) if num_items_in_batch is None else num_items_in_batch
        loss = (weights * token_losses).sum() / num_items_in_batch
        return Pix2SeqOutput(loss=loss, logits=logits, token_losses=token_losses)

    def detect(
        self,
        pixel_values: torch.Tensor,
        options: DecodingOptions | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[Detections]:
        """Detects the objects of images. The model should be in eval mode.

        Args:
            pixel_values: Padded square images (B, 3, S, S), see `encode`.
            options: Decoding options. Default: `decoding_options`.
            interrupted: Called at least once per object. If it returns True, decoding ends.

        Returns:
            The objects of each image, with boxes in [0, 1] of the padded square.

        Raises:
            ValueError: `max_objects` exceeds `max_decodable_objects`.
            Interrupted: `interrupted` returned True.
            NonFiniteLogits: The logits of an image were not finite.
        """
        options = self.validate_options(options or self.decoding_options)
        state = generate_tokens(self, pixel_values, self.tokenizer, options, interrupted)
        return to_detections(state, self.tokenizer, options.box_score_power)

    def prefill(
        self, pixel_values: torch.Tensor, max_length: int
    ) -> LlamaIncrementalDecoder | TransformerIncrementalDecoder:
        """Encodes images (B, 3, S, S) and returns an incremental decoder for at most `max_length` tokens."""
        return self.decoder.prefill(self.encode(pixel_values), max_length)

    def decode_step(
        self,
        token_ids: torch.Tensor,
        position: int | torch.Tensor,
        incremental_decoder: LlamaIncrementalDecoder | TransformerIncrementalDecoder,
        vocab_slice: slice = slice(None),
    ) -> torch.Tensor:
        """Processes one token per row and computes the logits of the next one.

        Args:
            token_ids: Token ids (B,).
            position: Position of the tokens in the sequence; BOS is at 0. A 0-d tensor keeps its value on the device.
            incremental_decoder: The result of `prefill`, which is updated.
            vocab_slice: The R tokens of the vocabulary whose logits are computed.

        Returns:
            Logits (B, R), float32.
        """
        hidden_states = incremental_decoder(token_ids, position)
        key, lm_heads = (vocab_slice.start, vocab_slice.stop), incremental_decoder.lm_heads
        if key not in lm_heads:
            lm_heads[key] = FusedLinear.from_linears(
                self.decoder.lm_head, like=hidden_states, output_slice=vocab_slice
            )
        return lm_heads[key](hidden_states).float()


def _drop_path_hook(config: Pix2SeqConfig, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """A forward hook. It is not a closure, because a closure cannot be pickled."""
    return stochastic_depth(output, config.drop_path, "row", module.training)
