"""Pix2Seq model: backbone, projection, encoder layers, projector and autoregressive decoder."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torchvision.ops import StochasticDepth
from transformers import BlenderbotConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.blenderbot.modeling_blenderbot import BlenderbotAttention, BlenderbotEncoderLayer
from transformers.utils import ModelOutput, logging
from transformers.utils.output_capturing import capture_outputs

from pix2seq.generation import DecodingOptions, generate_tokens
from pix2seq.models.backbone import VisionBackbone
from pix2seq.models.configuration_pix2seq import Pix2SeqConfig
from pix2seq.models.detections import Detections, pad_detections, to_detections
from pix2seq.models.drop_path import DropPathHook
from pix2seq.models.feature_pyramid import FeaturePyramid
from pix2seq.models.fine_tuning import load_pretrained
from pix2seq.models.fused_decoders import FusedDecoder
from pix2seq.models.incremental_decoder import IncrementalDecoder, create_incremental_decoder
from pix2seq.models.labels import IGNORE_INDEX, build_sequences, check_token_ids, default_token_weights, shift_right
from pix2seq.models.llama_decoder import LlamaDecoder
from pix2seq.models.loss import token_cross_entropy
from pix2seq.models.position_embedding import coordinate_embedding, position_embedding_2d
from pix2seq.models.transformer_decoder import TransformerDecoder
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer

logger = logging.get_logger(__name__)

MAX_NORMALIZED = 50.0  # above the absolute value of any normalized pixel, below that of a pixel in 0 ... 255
NORM_EPS = 1e-6  # of the layer norms in projection, encoder and projector, as in the authors' code

# For each model type of the decoder config: the class, and the last layers of its residual branches.
DECODERS: dict[str, tuple[type[LlamaDecoder] | type[TransformerDecoder], tuple[str, ...]]] = {
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
        pred_boxes: Boxes (B, N, 4), xyxy in [0, 1] of the padded square (DETR: cxcywh of the image), float64, sorted
            by descending score. N is the `max_objects` of the decoding options.
        pred_labels: Labels (B, N), -1 where an image has fewer than N objects.
        pred_scores: Scores (B, N), float64.
        token_losses: Cross entropy (T,) at the T positions, not weighted. Returned with `labels`.
        encoder_last_hidden_state: Visual tokens (B, N, C) after the encoder layers.
        encoder_hidden_states: The same before the first and after each encoder layer. Returned with
            `output_hidden_states`.
        encoder_attentions: Attention weights of each encoder layer. Returned with `output_attentions`.
        decoder_hidden_states: Hidden states before the first and after each decoder layer. Returned with
            `output_hidden_states` and `input_ids` or `labels`. The Llama decoder also returns those of visual tokens.
        decoder_attentions: Attention weights of the self-attention of each decoder layer.
        cross_attentions: Attention weights of the cross-attention of each layer of the encoder-decoder.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_labels: torch.Tensor | None = None
    pred_scores: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class Pix2SeqEncoderLayer(BlenderbotEncoderLayer):
    """Pre-norm encoder layer with dropout inside the MLP and drop path on both residual branches."""

    def __init__(self, config: Pix2SeqConfig):
        super().__init__(
            BlenderbotConfig(
                d_model=config.hidden_size,
                encoder_attention_heads=config.encoder_heads,
                encoder_ffn_dim=config.encoder_mlp_size,
                dropout=0.0,
                activation_dropout=config.dropout,
            )
        )
        self.self_attn.config = config  # which contains the attention implementation
        for norm in (self.self_attn_layer_norm, self.final_layer_norm):
            norm.eps = NORM_EPS
        for branch_end in (self.self_attn.out_proj, self.fc2):
            branch_end.register_forward_hook(DropPathHook(config))

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Processes hidden states (B, N, C)."""
        return super().forward(hidden_states, attention_mask=None, **kwargs)


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
    _supports_flash_attn = False  # the decoders pass a mask; the backbone may use it
    _can_compile_fullgraph = False  # decoding is not part of the graph

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Pix2SeqEncoderLayer):  # initialized like nn.MultiheadAttention
            attention = module.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                init.xavier_uniform_(projection.weight, gain=2**-0.5)


class Pix2SeqEncoder(Pix2SeqPreTrainedModel):
    """Transformer encoder between backbone and decoder."""

    _can_record_outputs = {"hidden_states": Pix2SeqEncoderLayer, "attentions": BlenderbotAttention}  # noqa: RUF012

    def __init__(self, config: Pix2SeqConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(Pix2SeqEncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS) if config.encoder_layers else nn.Identity()
        self.post_init()

    @capture_outputs
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> BaseModelOutput:
        """Processes visual tokens (B, N, C).

        Args:
            hidden_states: Visual tokens.
            kwargs: `output_hidden_states` and `output_attentions`, as in transformers.
        """
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class Pix2SeqForObjectDetection(Pix2SeqPreTrainedModel):
    """Pix2Seq (arXiv 2109.10852): predicts the objects of an image as a token sequence, five tokens per object.

        pixels -> backbone (-> pyramid) -> projection + position embedding -> encoder layers -> projector -> decoder

    `forward` computes the loss in training, `detect` the objects at inference.

    Args:
        config: Configuration. The weights are random; `from_pretrained` loads a trained model and
            `pix2seq.models.build_model` builds a new one with a pretrained backbone.

    Raises:
        ValueError: The vocabulary of the decoder config is not that of the classes and bins.
    """

    def __init__(self, config: Pix2SeqConfig):
        super().__init__(config)
        if sorted(config.id2label) != list(range(len(config.category_ids))):
            raise ValueError(
                f"id2label has the labels {sorted(config.id2label)}: must be those of the "
                f"{len(config.category_ids)} category_ids, from 0"
            )
        if (vocab_size := config.decoder_config.vocab_size) != self.tokenizer.vocab_size:
            raise ValueError(
                f"decoder_config.vocab_size is {vocab_size}, but {len(config.category_ids)} classes and "
                f"{config.num_bins} bins have {self.tokenizer.vocab_size} tokens"
            )
        width = config.hidden_size
        self.backbone = VisionBackbone(config.backbone_config, config.backbone_dilated)
        self.pyramid = None
        num_channels = self.backbone.num_channels
        if config.neck_layers or len(num_channels) > 1:
            self.pyramid = FeaturePyramid(num_channels, config.pyramid_level, width, config.neck_layers)
            num_channels = [width]
        self.projection = nn.Sequential(  # from the channels of the backbone to the width of the encoder
            nn.Dropout(config.dropout),
            nn.Linear(num_channels[-1], width),
            nn.LayerNorm(width, eps=NORM_EPS),
        )
        self.encoder = Pix2SeqEncoder(config)
        self.projector = Pix2SeqProjector(config)  # from the width of the encoder to that of the decoder
        decoder_class, branch_ends = DECODERS[config.decoder_config.model_type]
        self.decoder = decoder_class(config.decoder_config)
        if config.output_bias:
            head = self.decoder.lm_head
            self.decoder.lm_head = nn.Linear(head.in_features, head.out_features, bias=True)
        # Read by PEFT, which looks for tied weights in the outermost model.
        embeddings = {id(m): name for name, m in self.named_modules()}[id(self.get_input_embeddings())]
        self._tied_weights_keys = {"decoder.lm_head.weight": f"{embeddings}.weight"}
        self.post_init()
        if config.bin_init == "sine":
            self.init_bin_embeddings()
        self.add_drop_path(branch_ends)
        # FSDP and device maps keep each of these layers on one device.
        self._no_split_modules = {
            type(module).__name__ for module in self.modules() if isinstance(module, GradientCheckpointingLayer)
        }

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *, config=None, ignore_mismatched_sizes: bool = False, **kwargs
    ) -> "Pix2SeqForObjectDetection":
        """Loads a trained model, see `PreTrainedModel.from_pretrained`.

        `id2label` and `label2id` (or a config that contains them) change the classes. The same number of names renames
        the classes. With `ignore_mismatched_sizes`, the classes are matched by name: those of the trained model keep
        their embeddings and new ones get random embeddings; their category ids are 0 ... C-1. Create the image
        processor with `Pix2SeqImageProcessor.from_model_config(model.config)` then.

        Raises:
            ValueError: The number of classes differs and `ignore_mismatched_sizes` is False, or the folder holds the
                weights of another architecture.
        """
        load, name = super().from_pretrained, pretrained_model_name_or_path
        if name is None:  # the weights are in kwargs
            return load(name, config=config, ignore_mismatched_sizes=ignore_mismatched_sizes, **kwargs)
        return load_pretrained(load, name, config, match_classes=ignore_mismatched_sizes, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head

    def enable_input_require_grads(self) -> None:
        """Also lets gradients flow to the encoder if all weights before it are frozen, see `PreTrainedModel`."""
        super().enable_input_require_grads()
        self._require_grads_hooks.append(
            self.projection.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
        )

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Sets the attention implementation of encoder, decoder and backbone, see `PreTrainedModel`."""
        known = {"", *self.config.sub_configs}
        if isinstance(attn_implementation, dict) and (unknown := set(attn_implementation) - known):
            raise ValueError(f"attn_implementation has the keys {sorted(unknown)}: must be of {sorted(known)}")
        if attn_implementation == "sdpa" and not self.backbone.model._supports_sdpa:  # such as a ResNet
            attn_implementation = {"": "sdpa", "decoder_config": "sdpa", "backbone_config": "eager"}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Not supported: the vocabulary consists of the classes and bins.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "resize_token_embeddings: the vocabulary consists of the classes and bins; change the classes with "
            "from_pretrained(..., id2label=..., label2id=..., ignore_mismatched_sizes=True)"
        )

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
                module.register_forward_hook(DropPathHook(self.config))

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
        if self.config.decoder_config.model_type == "llama":
            return math.inf
        return self.config.decoder_config.max_position_embeddings // TOKENS_PER_OBJECT

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes the visual tokens of images.

        Args:
            pixel_values: Padded square images (B, 3, S, S). uint8 pixels are normalized with the mean and standard
                deviation of the config; float pixels must be normalized already.

        Returns:
            Visual tokens (B, N, D) of the decoder's width, row by row.

        Raises:
            ValueError: The images are not square, or their values are neither uint8 nor normalized.
        """
        return self._encode(pixel_values)[0]

    def _encode(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, BaseModelOutput]:
        """Computes the visual tokens (B, N, D) of the decoder's width, and the output of the encoder."""
        check_pixels(pixel_values)
        if pixel_values.dtype == torch.uint8:
            mean, std = (
                torch.tensor(values, device=pixel_values.device).view(3, 1, 1)
                for values in (self.config.image_mean, self.config.image_std)
            )
            # Data loaders return channels-last memory; `contiguous` converts it on the device.
            pixel_values = ((pixel_values.contiguous() / 255 - mean) / std).to(self.dtype)
        feature_maps = self.backbone(pixel_values)  # each (B, C_i, h_i, w_i)
        features = feature_maps[-1] if self.pyramid is None else self.pyramid(feature_maps)
        height, width = features.shape[-2:]
        hidden_states = self.projection(features.flatten(2).transpose(1, 2))
        encoded = self.encoder(
            hidden_states + self._position_embedding(height, width, self.config.hidden_size, hidden_states),
            return_dict=True,
            **kwargs,
        )
        decoder_width, hidden_states = self.config.decoder_config.hidden_size, encoded.last_hidden_state
        position_embedding = self._position_embedding(height, width, decoder_width, hidden_states)
        return self.projector(hidden_states, position_embedding), encoded

    def _position_embedding(self, height: int, width: int, channels: int, like: torch.Tensor) -> torch.Tensor:
        embedding = position_embedding_2d(height, width, channels, self.config.position_embedding, like.device)
        return embedding.to(like.dtype)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | list | None = None,
        token_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        loss_positions: torch.Tensor | None = None,
        return_boxes: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Pix2SeqOutput | tuple:
        """Computes the loss with teacher forcing, detects objects, or both.

        `SequenceBuilder` creates `input_ids`, `labels` and `token_weights`. The loss is
        sum(token_weights * cross entropy) / num_items_in_batch, computed in float32 (Pix2Seq section 2.2).

        Args:
            pixel_values: Padded square images (B, 3, S, S), see `encode`.
            input_ids: Input token ids (B, L), BOS first.
            labels: Without labels, no loss is computed. One of:

                - Target token ids (B, L), already shifted: `labels[:, i]` follows `input_ids[:, i]`. Those of -100 are
                  ignored. Without `input_ids`, the input is the targets, shifted right by one token.
                - A dict for each image, as for DETR: `class_labels` (M,) and `boxes` (M, 4), cxcywh in [0, 1] of the
                  padded square; `size`, the (height, width) of the image in the square in pixels, is optional.
                  `SequenceBuilder` builds the sequences, in training with random order and class corruption.
            token_weights: Loss weights (B, L). Logits are not computed where the weight is 0. Default: those of
                `SequenceBuilder`, 0 for PAD and the coordinates of noise objects, 0.1 for EOS, else 1.
            num_items_in_batch: Divisor of the loss. Default: the sum of `token_weights`. Pass the sum over all
                processes and accumulation steps for a loss that does not depend on how a batch is divided.
            loss_positions: `token_weights.flatten().nonzero()[:, 0]` (T,), if known: computing it waits for the GPU.
                Token ids are then not checked.
            return_boxes: Whether objects are detected. Default: with labels in eval mode, as DETR does, and without
                labels if there are no `input_ids`.
            output_attentions: Return attention weights, which only the attention implementation "eager" computes.
            output_hidden_states: Return hidden states.
            return_dict: Whether to return a `Pix2SeqOutput` or a tuple. Default: `config.return_dict`.

        Returns:
            The output, see `Pix2SeqOutput`.

        Raises:
            ValueError: Pixels are not valid, see `encode`, or labels do not fit the model.
        """
        config = self.config
        recorded = {
            "output_attentions": config.output_attentions if output_attentions is None else output_attentions,
            "output_hidden_states": (
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        }
        if recorded["output_attentions"] and config._attn_implementation != "eager":
            logger.warning_once("output_attentions: only attn_implementation='eager' computes attention weights")
        if return_boxes is None:
            return_boxes = input_ids is None if labels is None else not self.training
        if loss_positions is not None and (input_ids is None or labels is None or token_weights is None):
            raise ValueError("loss_positions need input_ids, labels and token_weights")
        visual_tokens, encoded = self._encode(pixel_values, **recorded)
        output = {
            "encoder_last_hidden_state": encoded.last_hidden_state,
            "encoder_hidden_states": encoded.hidden_states,
            "encoder_attentions": encoded.attentions,
        }
        if labels is not None and loss_positions is None:
            input_ids, labels, token_weights = self._prepare_labels(pixel_values, input_ids, labels, token_weights)
        if input_ids is not None:
            decoded = self.decoder(visual_tokens, input_ids, **recorded)
            output |= {
                "decoder_hidden_states": decoded.hidden_states,
                "decoder_attentions": decoded.attentions,
                "cross_attentions": decoded.get("cross_attentions"),
            }
            if labels is None:
                output["logits"] = self.decoder.lm_head(decoded.last_hidden_state)
            else:
                hidden_states = decoded.last_hidden_state
                output |= self._compute_loss(hidden_states, labels, token_weights, num_items_in_batch, loss_positions)
        if return_boxes:
            detections = pad_detections(self.detect(pixel_values), self.decoding_options.max_objects)
            output |= {f"pred_{name}": torch.from_numpy(a).to(pixel_values.device) for name, a in detections.items()}
        return_dict = config.return_dict if return_dict is None else return_dict
        return Pix2SeqOutput(**output) if return_dict else Pix2SeqOutput(**output).to_tuple()

    def _prepare_labels(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor | list,
        token_weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns input ids, labels and token weights, each (B, L), for the labels that `forward` accepts."""
        device, tokenizer = pixel_values.device, self.tokenizer
        if not isinstance(labels, torch.Tensor | list | tuple):
            raise ValueError(
                f"labels are a {type(labels).__name__}: a tensor, or a list with an item per image, is needed"
            )
        if len(labels) != len(pixel_values):
            raise ValueError(f"{len(pixel_values)} images, but labels of {len(labels)}")
        if not isinstance(labels, torch.Tensor) and all(isinstance(image, Mapping) for image in labels):
            if input_ids is not None or token_weights is not None:
                raise ValueError("labels are boxes: input_ids and token_weights are built from them, omit them")
            seed = int(torch.randint(2**62, ())) if self.training else None
            sequences = build_sequences(labels, self.config, pixel_values.shape[-1], seed)
            input_ids, tokens, token_weights = (torch.from_numpy(values).to(device) for values in sequences)
            return input_ids, tokens, token_weights
        tokens = labels if isinstance(labels, torch.Tensor) else torch.stack([torch.as_tensor(row) for row in labels])
        is_ignored = tokens == IGNORE_INDEX
        tokens = tokens.masked_fill(is_ignored, tokenizer.pad_id)
        check_token_ids(tokens, input_ids, None if token_weights is None else token_weights * ~is_ignored, tokenizer)
        tokens = tokens.long()
        if token_weights is None:
            token_weights = default_token_weights(tokens, tokenizer)
        token_weights = token_weights.masked_fill(is_ignored, 0)
        return shift_right(tokens, tokenizer) if input_ids is None else input_ids, tokens, token_weights

    def _compute_loss(
        self,
        hidden_states: torch.Tensor,
        labels,
        token_weights,
        num_items_in_batch: torch.Tensor | float | None,
        loss_positions: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Returns the loss, the logits (T, V) and the cross entropy (T,) of the T tokens whose weight is not 0."""
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
        return {"loss": loss, "logits": logits, "token_losses": token_losses}

    @torch.compiler.disable
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
            NotImplementedError: The model is being exported or traced.
        """
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise NotImplementedError(
                "the decoding loop cannot be exported or traced: export.py writes ONNX graphs of the encoder and of a "
                "decoding step; with input_ids, the teacher-forced pass can be exported"
            )
        options = self.validate_options(options or self.decoding_options)
        state = generate_tokens(self, pixel_values, self.tokenizer, options, interrupted)
        return to_detections(state, self.tokenizer, options)

    def prefill(self, pixel_values: torch.Tensor, max_length: int) -> IncrementalDecoder | FusedDecoder:
        """Encodes images (B, 3, S, S) and returns an incremental decoder for at most `max_length` tokens."""
        return create_incremental_decoder(self.decoder, self.encode(pixel_values), max_length)

    def decode_step(
        self,
        token_ids: torch.Tensor,
        position: int | torch.Tensor,
        incremental_decoder: IncrementalDecoder | FusedDecoder,
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
        return incremental_decoder(token_ids, position, vocab_slice).float()


def check_pixels(pixel_values: torch.Tensor) -> None:
    """Checks that images are square and that their values are uint8 or normalized.

    Raises:
        ValueError: They are not.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or pixel_values.shape[2] != pixel_values.shape[3]:
        raise ValueError(f"pixel_values have the shape {tuple(pixel_values.shape)}: (B, 3, S, S) is needed")
    if pixel_values.dtype == torch.uint8:
        return
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values have the type {pixel_values.dtype}: uint8, or normalized floats, are needed")
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or pixel_values.is_meta or not pixel_values.numel():
        return  # there are no values
    if (largest := pixel_values.abs().max()) > MAX_NORMALIZED:
        raise ValueError(
            f"pixel_values reach {largest.item():.0f}: uint8 pixels, or floats that are normalized as by "
            "do_normalize=True of the image processor, are needed"
        )
