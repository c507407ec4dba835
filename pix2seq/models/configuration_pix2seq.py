"""Configuration of a Pix2Seq model."""

from typing import ClassVar

from transformers import AutoConfig, BlenderbotConfig, LlamaConfig
from transformers.configuration_utils import PretrainedConfig

from pix2seq.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from pix2seq.models.position_embedding import BinInit, PositionEmbeddingType
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer


class Pix2SeqConfig(PretrainedConfig):
    """Configuration of a `Pix2SeqForObjectDetection`: everything that is needed to rebuild it from its folder.

    `id2label` holds the class names, ordered by label.

    Args:
        backbone_config: Config of any Hugging Face vision model, or a dict with its `model_type`. Defaults to a
            ResNet-50.
        decoder_config: A `LlamaConfig`, or a `BlenderbotConfig` for the encoder-decoder of the paper. A dict without
            `model_type` is a `LlamaConfig`. Its `vocab_size` is that of the tokenizer. Defaults to a Llama of 6 layers
            with the widths of the encoder layers, see `create_decoder_config`.
        backbone_dilated: Dilate the last stage of a ResNet instead of striding it (DC5).
        pyramid_level: If the backbone returns several feature maps, the index of the one at whose stride they are
            fused, see `FeaturePyramid`.
        neck_layers: Number of residual convolutions between backbone and encoder, see `FeaturePyramid`.
        projector_mlp: Add an MLP block to the projector between encoder and decoder, as the authors do.
        output_bias: Add a bias to the output layer, whose weights are tied to the token embeddings.
        hidden_size: Width of the encoder layers.
        encoder_layers: Number of transformer layers between backbone and decoder.
        encoder_heads: Number of attention heads of each encoder layer.
        encoder_mlp_size: Width of the MLPs of the encoder layers.
        dropout: Dropout on the backbone features and in the MLPs of encoder, projector and encoder-decoder.
        drop_path: Probability of dropping a residual branch of encoder and decoder (stochastic depth), the same in
            all layers.
        position_embedding: Variant of the 2-D position embedding of the visual tokens, see `coordinate_embedding`.
        bin_init: Initialization of the bin embeddings: "random" as for all tokens, or "sine", the embedding of the
            bin's coordinate, so that a bin is similar to the position embedding of visual tokens at its coordinate.
        image_size: Side S of the padded square image, in pixels.
        image_mean: Mean for the normalization of RGB pixels in [0, 1].
        image_std: Standard deviation for the normalization of RGB pixels in [0, 1].
        num_bins: Number of bins of a coordinate, see `Tokenizer`.
        max_objects: Number of object slots of the training sequences, see `SequenceBuilder`.
        noise_objects: Whether training sequences were filled with noise objects, see `SequenceBuilder`.
        category_ids: Category id in the annotation file of each label. Defaults to the labels of `id2label`.
        decoding: Defaults of `DecodingOptions`, such as `top_p` and `temperature`: those of the evaluations in
            training.
        label_smoothing: Label smoothing of the loss, see `token_cross_entropy`.
        coordinate_sigma: Standard deviation of soft coordinate targets, see `token_cross_entropy`.
        initializer_range: Standard deviation of the weight initialization.
    """

    model_type = "pix2seq"
    sub_configs: ClassVar = {"backbone_config": AutoConfig, "decoder_config": AutoConfig}
    # What compute_metrics of transformers' Trainer does not get: it gets the boxes, labels and scores.
    keys_to_ignore_at_inference: ClassVar = ["logits", "token_losses", "encoder_last_hidden_state"]

    def __init__(
        self,
        backbone_config: dict | PretrainedConfig | None = None,
        decoder_config: dict | PretrainedConfig | None = None,
        backbone_dilated: bool = False,
        pyramid_level: int = 0,
        neck_layers: int = 0,
        projector_mlp: bool = False,
        output_bias: bool = False,
        hidden_size: int = 256,
        encoder_layers: int = 6,
        encoder_heads: int = 8,
        encoder_mlp_size: int = 1024,
        dropout: float = 0.1,
        drop_path: float = 0.1,
        position_embedding: PositionEmbeddingType = "original",
        bin_init: BinInit = "random",
        image_size: int = 640,
        image_mean: tuple[float, ...] = IMAGENET_MEAN,
        image_std: tuple[float, ...] = IMAGENET_STD,
        num_bins: int = 1000,
        max_objects: int = 100,
        noise_objects: bool = True,
        category_ids: tuple[int, ...] | None = None,
        decoding: dict | None = None,
        label_smoothing: float = 0.0,
        coordinate_sigma: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        if backbone_config is None:
            backbone_config = {"model_type": "resnet"}
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        if category_ids is None:
            category_ids = tuple(range(len(kwargs.get("id2label") or range(kwargs.get("num_labels") or 1))))
        if not {"id2label", "num_labels"} & set(kwargs):
            kwargs["num_labels"] = len(category_ids)
        if decoder_config is None:
            decoder_config = create_decoder_config(
                "llama",
                Tokenizer(len(category_ids), num_bins),
                hidden_size=hidden_size,
                num_layers=6,
                num_heads=encoder_heads,
                mlp_size=encoder_mlp_size,
                max_objects=max_objects,
            )
        if isinstance(decoder_config, dict):
            decoder_config = AutoConfig.for_model(**{"model_type": "llama"} | decoder_config)
        self.backbone_config: PretrainedConfig = backbone_config
        self.decoder_config: PretrainedConfig = decoder_config
        self.decoder_config.update({"num_bins": num_bins})  # which the spatial modulation needs
        self.tie_word_embeddings = getattr(self.decoder_config, "tie_word_embeddings", False)
        self.backbone_dilated = backbone_dilated
        self.pyramid_level = pyramid_level
        self.neck_layers = neck_layers
        self.projector_mlp = projector_mlp
        self.output_bias = output_bias
        self.hidden_size = hidden_size
        self.encoder_layers = encoder_layers
        self.encoder_heads = encoder_heads
        self.encoder_mlp_size = encoder_mlp_size
        self.dropout = dropout
        self.drop_path = drop_path
        self.position_embedding = position_embedding
        self.bin_init = bin_init
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.num_bins = num_bins
        self.max_objects = max_objects
        self.noise_objects = noise_objects
        self.category_ids = list(category_ids)
        self.decoding = decoding or {}
        self.label_smoothing = label_smoothing
        self.coordinate_sigma = coordinate_sigma
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, ordered by label."""
        return tuple(self.id2label[label] for label in range(len(self.category_ids)))


def create_decoder_config(
    decoder: str,
    tokenizer: Tokenizer,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    mlp_size: int,
    max_objects: int,
    dropout: float = 0.0,
    causal_prefix: bool = False,
    spatial_modulation: bool = True,
) -> PretrainedConfig:
    """Returns the config of a decoder that is trained from scratch. The arguments are those of `build_model`."""
    common = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": TOKENS_PER_OBJECT * max_objects + 2,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "spatial_modulation": spatial_modulation,
    }
    if decoder == "llama":
        return LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=mlp_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            causal_prefix=causal_prefix,
            **common,
        )
    return BlenderbotConfig(
        d_model=hidden_size,
        decoder_layers=num_layers,
        decoder_attention_heads=num_heads,
        decoder_ffn_dim=mlp_size,
        # There is no encoder, but some functions of transformers read these values.
        encoder_layers=num_layers,
        encoder_attention_heads=num_heads,
        encoder_ffn_dim=mlp_size,
        # Whole residual branches are dropped instead, see Pix2SeqForObjectDetection.add_drop_path.
        dropout=0.0,
        activation_dropout=dropout,
        is_decoder=True,
        is_encoder_decoder=False,
        **common,
    )
