"""The detector: a picture becomes visual tokens, the decoder reads them and says the sentence.

    pixels -> backbone -> projection + 2-D position code -> encoder layers -> bridge -> decoder

What the two decoders have in common: `read` a whole sentence, or `start` and then `step` token by token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torchvision.ops import StochasticDepth, stochastic_depth
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from pix2seq.generation import DecodingOptions, Detections, generate
from pix2seq.models.backbone import VisionBackbone
from pix2seq.models.configuration_pix2seq import Pix2SeqConfig
from pix2seq.models.kv_cache import FusedLinear
from pix2seq.models.llama_decoder import LlamaDecoder
from pix2seq.models.loss import token_cross_entropy
from pix2seq.models.position_embedding import coordinate_embedding, position_embedding_2d
from pix2seq.models.transformer_decoder import TransformerDecoder
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer

NORM_EPS = 1e-6  # the authors', in the layer norms of projection, encoder and bridge

# By the decoder config's model_type: the class, and the layers that end its residual branches.
DECODERS = {
    "llama": (LlamaDecoder, ("self_attn.o_proj", "mlp.down_proj")),
    "blenderbot": (TransformerDecoder, ("self_attn.out_proj", "encoder_attn.out_proj", "fc2")),
}


@dataclass
class Pix2SeqOutput(ModelOutput):
    """With labels: loss, a scalar, and logits (T, V) and token_losses (T,) at the T positions whose weight is not 0,
    in row-major order. With input_ids alone: logits (B, L, V).

    With pictures alone, the objects the detector writes, N for each picture, best score first: pred_boxes (B, N, 4)
    float64 xyxy in [0, 1] of the canvas, pred_labels (B, N), -1 where a picture has fewer, and pred_scores (B, N).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_labels: torch.Tensor | None = None
    pred_scores: torch.Tensor | None = None


class EncoderLayer(GradientCheckpointingLayer, nn.TransformerEncoderLayer):
    """The authors' block: norms come first, dropout only inside the MLP, and whole residual branches drop out."""

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


class Projector(nn.Module):
    """From the encoder's width to the decoder's and, if the config says so, one more MLP."""

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

    def forward(self, tokens: torch.Tensor, position_embedding: torch.Tensor) -> torch.Tensor:
        # The code a second time: attention in the decoder should not have to recover it.
        tokens = self.norm(self.projection(tokens)) + position_embedding
        return tokens if self.mlp is None else tokens + self.mlp(tokens)


class Pix2SeqPreTrainedModel(PreTrainedModel):
    config_class = Pix2SeqConfig
    base_model_prefix = "pix2seq"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = False  # the classic decoder's mask is not for it; a backbone may use it


class Pix2SeqForObjectDetection(Pix2SeqPreTrainedModel):
    def __init__(self, config: Pix2SeqConfig):
        super().__init__(config)
        width = config.hidden_size
        self.backbone = VisionBackbone(config.backbone_config, config.backbone_dilated)
        self.projection = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(self.backbone.num_channels, width),
            nn.LayerNorm(width, eps=NORM_EPS),
        )
        self.encoder = nn.Sequential(*(EncoderLayer(config) for _ in range(config.encoder_layers)))
        if config.encoder_layers:
            self.encoder.append(nn.LayerNorm(width, eps=NORM_EPS))
        self.projector = Projector(config)
        decoder_class, branch_ends = DECODERS[config.decoder_config.model_type]
        self.decoder = decoder_class(config.decoder_config)
        if config.output_bias:
            head = self.decoder.lm_head
            self.decoder.lm_head = nn.Linear(head.in_features, head.out_features, bias=True)
        self.post_init()
        if config.bin_init == "sine":
            self.init_bin_embeddings()
        self.add_drop_path(branch_ends)
        # What FSDP shards and device maps place as one.
        self._no_split_modules = {
            type(m).__name__ for m in self.modules() if isinstance(m, GradientCheckpointingLayer)
        }

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head

    @torch.no_grad()
    def init_bin_embeddings(self) -> None:
        """Bins (the last ids of the vocabulary) start as the code of their coordinate, as y and as x."""
        embeddings = self.decoder.get_input_embeddings().weight
        coordinates = torch.linspace(0, 1, self.config.num_bins, device=embeddings.device)
        code = coordinate_embedding(coordinates, embeddings.shape[1] // 2, "fine")
        scale = math.sqrt(2) * self.config.initializer_range  # sines have a variance of a half
        embeddings[-self.config.num_bins :] = scale * torch.cat([code, code], dim=1)

    def add_drop_path(self, branch_ends: tuple[str, ...]) -> None:
        """Drop path in the decoder, whose layers are transformers' and know none."""
        for name, module in self.decoder.named_modules():
            if name.endswith(branch_ends):
                module.register_forward_hook(partial(_drop, self.config))

    @property
    def decoding_options(self) -> DecodingOptions:
        """How the detector was evaluated while it was trained."""
        return DecodingOptions(**{"max_objects": self.config.max_objects} | self.config.decoding)

    def override_options(self, **given) -> DecodingOptions:
        """`decoding_options`, but for those given. Raises ValueError for what this detector cannot do."""
        return self.validate_options(replace(self.decoding_options, **given))

    def validate_options(self, options: DecodingOptions) -> DecodingOptions:
        if options.max_objects > self.max_decodable_objects:
            raise ValueError(
                f"max_objects {options.max_objects}: this detector can write {self.max_decodable_objects}"
            )
        return options

    @property
    def max_decodable_objects(self) -> float:
        """How many objects it can write: as many as its learned positions, if it has such."""
        if isinstance(self.decoder, LlamaDecoder):
            return math.inf
        return self.config.decoder_config.max_position_embeddings // TOKENS_PER_OBJECT

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(len(self.config.category_ids), self.config.num_bins)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, S, S) -> visual tokens (B, N, D).

        uint8 pixels are scaled and normalised here, on the device; floats are taken as normalised already.
        """
        if pixel_values.dtype == torch.uint8:
            mean, std = (
                torch.tensor(values, device=pixel_values.device).view(3, 1, 1)
                for values in (self.config.image_mean, self.config.image_std)
            )
            # Loaders leave the three values of a pixel side by side, as decoders do; turning is the device's work.
            pixel_values = ((pixel_values.contiguous() / 255 - mean) / std).to(self.dtype)
        features = self.backbone(pixel_values)  # (B, C, h, w)
        height, width = features.shape[-2:]
        tokens = self.projection(features.flatten(2).transpose(1, 2))
        tokens = self.encoder(tokens + self._position_embedding(height, width, self.config.hidden_size, tokens))
        decoder_width = self.config.decoder_config.hidden_size
        return self.projector(tokens, self._position_embedding(height, width, decoder_width, tokens))

    def _position_embedding(self, height: int, width: int, channels: int, like: torch.Tensor) -> torch.Tensor:
        return position_embedding_2d(height, width, channels, self.config.position_embedding, like.device).to(
            like.dtype
        )

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
        """Teacher-forced pass: what the model says after each token of `input_ids` (B, L).

        labels (B, L)    what it should say there        weights (B, L)   what that counts; 0 is not computed at all
        normalizer       the loss is sum(weights * cross entropy) / normalizer. Default: the sum of these weights;
                         pass the sum over all ranks and micro-batches of a step for a loss that does not depend on
                         how the step was split.
        loss_positions (T,)     weights.flatten().nonzero(), for callers who know it: asking a GPU means waiting for it

        Without `input_ids`: the objects in the pictures, see `detect`.
        """
        if input_ids is None:
            return self._as_output(self.detect(pixel_values))
        hidden = self.decoder(self.encode(pixel_values), input_ids)
        if labels is None:
            return Pix2SeqOutput(logits=self.decoder.lm_head(hidden))
        if token_weights is None:
            token_weights = torch.ones_like(labels, dtype=torch.float32)
        if loss_positions is None:
            loss_positions = token_weights.flatten().nonzero()[:, 0]
        weights = token_weights.flatten()[loss_positions]
        # Cross entropy in float32 whatever the model runs in: sums over thousands of tokens lose bits otherwise.
        logits = self.decoder.lm_head(hidden.flatten(0, 1)[loss_positions]).float()
        token_losses = token_cross_entropy(
            *(logits, labels.flatten()[loss_positions], self.tokenizer),
            label_smoothing=self.config.label_smoothing,
            coordinate_sigma=self.config.coordinate_sigma,
            noise_objects=self.config.noise_objects,
        )
        num_items_in_batch = weights.sum().clamp(min=1e-9) if num_items_in_batch is None else num_items_in_batch
        return Pix2SeqOutput(
            loss=(weights * token_losses).sum() / num_items_in_batch, logits=logits, token_losses=token_losses
        )

    def detect(
        self,
        pixel_values: torch.Tensor,
        options: DecodingOptions | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[Detections]:
        """Pixels (B, 3, S, S) -> the objects of each picture, in the order they were written, in [0, 1] of the canvas.

        By default as the detector was evaluated while it was trained. Call it in eval mode. `interrupted`: see
        generate.
        """
        options = self.validate_options(options or self.decoding_options)
        return generate(self, pixel_values, self.tokenizer, options, interrupted)

    def _as_output(self, found: list[Detections]) -> Pix2SeqOutput:
        count = max((len(detections.scores) for detections in found), default=0)
        boxes, scores = np.zeros((len(found), count, 4)), np.zeros((len(found), count))
        labels = np.full((len(found), count), -1)
        for row, detections in enumerate(found):
            order = np.argsort(-detections.scores, kind="stable")
            boxes[row, : len(order)] = detections.boxes[order]
            scores[row, : len(order)] = detections.scores[order]
            labels[row, : len(order)] = detections.labels[order]
        tensors = (torch.from_numpy(values).to(self.device) for values in (boxes, labels, scores))
        return Pix2SeqOutput(**dict(zip(("pred_boxes", "pred_labels", "pred_scores"), tensors, strict=True)))

    def prefill(self, pixel_values: torch.Tensor, length: int):
        """Reads the pictures (B, 3, S, S), and makes room for a sentence of `length` tokens: what `step` continues."""
        return self.decoder.prefill(self.encode(pixel_values), length)

    def decode_step(
        self, ids: torch.Tensor, position: int | torch.Tensor, steps, rows: slice = slice(None)
    ) -> torch.Tensor:
        """Reads one more token per row, ids (B,), the `position`-th of the sentence (BOS is 0), which may be a tensor
        without dimensions: then the device alone knows it.

        Returns what may follow: logits (B, V), float32; with `rows`, only those of these tokens.
        """
        hidden, part = steps(ids, position), (rows.start, rows.stop)
        if part not in steps.output:
            steps.output[part] = FusedLinear.from_linears(
                self.decoder.lm_head, like=hidden, count=len(hidden), rows=rows
            )
        return steps.output[part](hidden).float()


def _drop(config: Pix2SeqConfig, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """A forward hook; no closure, so that a detector can be pickled."""
    return stochastic_depth(output, config.drop_path, "row", module.training)
