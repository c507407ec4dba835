"""Builds new models from plain values, which have the names of the flags."""

from pix2seq.errors import UserError
from pix2seq.models.backbone import PYRAMID_LEVELS, Stage, check_image_size, resolve_backbone
from pix2seq.models.configuration_pix2seq import Pix2SeqConfig, create_decoder_config
from pix2seq.models.modeling_pix2seq import Pix2SeqForObjectDetection
from pix2seq.models.position_embedding import BinInit, PositionEmbeddingType
from pix2seq.tokenizer import Tokenizer


def build_model(
    *,
    category_ids: tuple[int, ...],
    class_names: tuple[str, ...],
    backbone: str,
    backbone_stage: Stage = "c5",
    decoder: str = "llama",
    neck_layers: int = 0,
    hidden_size: int = 256,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    num_heads: int = 8,
    mlp_size: int = 1024,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    position_embedding: PositionEmbeddingType = "original",
    bin_init: BinInit = "random",
    causal_prefix: bool = False,
    spatial_modulation: bool = True,
    image_size: int = 640,
    num_bins: int = 1000,
    max_objects: int = 100,
    noise_objects: bool = True,
    label_smoothing: float = 0.0,
    coordinate_sigma: float = 0.0,
    decoding: dict | None = None,
    load_pretrained: bool = True,
) -> Pix2SeqForObjectDetection:
    """Builds a model with random weights and, if it is a pretrained one, the weights of the backbone.

    The arguments that are not listed are described in `Pix2SeqConfig`.

    Args:
        category_ids: Category id in the annotation file of each label.
        class_names: Class name of each label.
        backbone: Hub name, local folder, EfficientNet-Lite name or inline config, see `resolve_backbone`.
        backbone_stage: Last stage of the backbone to use, "c3", "c4", "c5" or "dc5"; or the level of a feature
            pyramid, "p3" or "p4".
        decoder: "llama" (visual tokens are the prefix of a decoder-only model) or "transformer" (cross-attention, as
            in the paper).
        hidden_size: Width of encoder and decoder.
        decoder_layers: Number of decoder layers.
        num_heads: Number of attention heads of each layer of encoder and decoder.
        mlp_size: Width of the MLPs of encoder and decoder.
        causal_prefix: Use causal attention among the visual tokens of the "llama" decoder.
        spatial_modulation: Modulate the attention of the sequence to the visual tokens, see `SpatialModulation`.
        load_pretrained: If False, the backbone gets random weights too.

    Returns:
        The model in training mode.

    Raises:
        UserError: There is no such backbone, or it cannot process an image of this size.
    """
    spec = resolve_backbone(backbone, backbone_stage)
    config = Pix2SeqConfig(
        backbone_config=spec.config,
        backbone_dilated=backbone_stage == "dc5",
        pyramid_level=PYRAMID_LEVELS.get(backbone_stage, 0),
        neck_layers=neck_layers,
        decoder_config=create_decoder_config(
            decoder,
            Tokenizer(len(category_ids), num_bins),
            hidden_size=hidden_size,
            num_layers=decoder_layers,
            num_heads=num_heads,
            mlp_size=mlp_size,
            max_objects=max_objects,
            dropout=dropout,
            causal_prefix=causal_prefix,
            spatial_modulation=spatial_modulation,
        ),
        # As in the authors' code. The Llama decoder's own layers process the visual tokens instead.
        projector_mlp=decoder == "transformer",
        output_bias=decoder == "transformer",
        hidden_size=hidden_size,
        encoder_layers=encoder_layers,
        encoder_heads=num_heads,
        encoder_mlp_size=mlp_size,
        dropout=dropout,
        drop_path=drop_path,
        position_embedding=position_embedding,
        bin_init=bin_init,
        image_size=image_size,
        image_mean=spec.image_mean,
        image_std=spec.image_std,
        num_bins=num_bins,
        max_objects=max_objects,
        noise_objects=noise_objects,
        category_ids=category_ids,
        id2label=dict(enumerate(class_names)),
        label2id={name: label for label, name in enumerate(class_names)},
        decoding=decoding,
        label_smoothing=label_smoothing,
        coordinate_sigma=coordinate_sigma,
    )
    try:
        model = Pix2SeqForObjectDetection(config)
    except Exception as error:  # models that are not vision models raise any type of exception
        raise UserError(f"--backbone {backbone}: cannot be built as a vision model ({error})") from None
    if spec.pretrained is not None and load_pretrained:
        model.backbone.load_pretrained(spec.pretrained)
    check_image_size(model)
    return model.train()
