"""The config of a detector: everything needed to rebuild it from its folder."""

from transformers import AutoConfig, LlamaConfig
from transformers.configuration_utils import PretrainedConfig

from pix2seq.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from pix2seq.models.position_embedding import BinInit, PositionEmbeddingType


class Pix2SeqConfig(PretrainedConfig):
    """Everything needed to rebuild a trained detector from its folder.

    backbone_config   any Hugging Face vision model's config, with its model_type
    backbone_dilated  the last stage of a ResNet is dilated instead of strided
    decoder_config    a LlamaConfig, or a BlenderbotConfig for the classic decoder; its vocab_size is the tokenizer's
    projector_mlp        one more MLP between encoder and decoder, as the authors have
    output_bias       the output layer, whose weights are the embeddings', has a bias
    encoder_layers    transformer layers between backbone and decoder, of width `hidden_size`
    dropout           on visual features, and inside the MLPs of the encoder and of the classic decoder
    drop_path         probability with which a residual branch of encoder and decoder is left out, the same in all
    position_embedding     of visual tokens: see coordinate_embedding
    bin_init          how the embeddings of the bins start: "random" like the others, or on the "ruler": as the code
                      of their coordinate, so that a coordinate's token and the visual tokens there are alike at once
    image_size        side S of the square canvas, in pixels
    image_mean, image_std   of the pixels the backbone expects, for pixels in [0, 1]
    num_bins, max_objects, noise_objects   how sentences were built: see Tokenizer and SequenceBuilder
    category_ids      original id of each label; `id2label` holds the names
    decoding          top_p and temperature this detector was evaluated with: see DecodingOptions
    label_smoothing, coordinate_sigma   soft targets of the loss: see token_cross_entropy
    """

    model_type = "pix2seq"
    sub_configs = {"backbone_config": AutoConfig, "decoder_config": AutoConfig}

    def __init__(
        self,
        backbone_config: dict | PretrainedConfig | None = None,
        decoder_config: dict | PretrainedConfig | None = None,
        backbone_dilated: bool = False,
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
        category_ids: tuple[int, ...] = (0,),
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
        if isinstance(decoder_config, dict):
            decoder_config = AutoConfig.for_model(**{"model_type": "llama"} | decoder_config)
        self.backbone_config = backbone_config
        self.decoder_config = decoder_config or LlamaConfig(hidden_size=hidden_size)
        self.backbone_dilated = backbone_dilated
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
        """By label."""
        return tuple(self.id2label[label] for label in range(len(self.category_ids)))
