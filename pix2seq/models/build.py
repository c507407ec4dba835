"""A new detector from plain values: the names are those of the flags."""

import torch
from transformers import BlenderbotConfig, LlamaConfig
from transformers.configuration_utils import PretrainedConfig

from pix2seq.errors import UserError
from pix2seq.models.backbone import choose_backbone
from pix2seq.models.configuration_pix2seq import Pix2SeqConfig
from pix2seq.models.modeling_pix2seq import Pix2SeqForObjectDetection
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer


def build_model(
    *,
    category_ids: tuple[int, ...],
    class_names: tuple[str, ...],
    backbone: str,
    backbone_stage: str = "c5",
    decoder: str = "llama",
    hidden_size: int = 256,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    num_heads: int = 8,
    mlp_size: int = 1024,
    decoder_size: int | None = None,
    decoder_heads: int | None = None,
    decoder_mlp_size: int | None = None,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    position_embedding: str = "original",
    bin_init: str = "random",
    causal_prefix: bool = False,
    image_size: int = 640,
    num_bins: int = 1000,
    max_objects: int = 100,
    noise_objects: bool = True,
    label_smoothing: float = 0.0,
    coordinate_sigma: float = 0.0,
    decoding: dict | None = None,
    load_pretrained: bool = True,
) -> Pix2SeqForObjectDetection:
    """A detector with new weights, but for a pretrained backbone; in training mode.

    category_ids, class_names   original id and name of each label        decoding   see Pix2SeqConfig
    decoder_size, decoder_heads, decoder_mlp_size   default to those of the encoder
    load_pretrained             False: a pretrained backbone's shape without its weights (for counting, say)
    Raises UserError if there is no such backbone, or it does not turn pictures of this size into features.
    """
    choice = choose_backbone(backbone, backbone_stage)
    config = Pix2SeqConfig(
        backbone_config=choice.config,
        backbone_dilated=backbone_stage == "dc5",
        decoder_config=_decoder_config(
            decoder,
            Tokenizer(len(category_ids), num_bins),
            size=decoder_size or hidden_size,
            heads=decoder_heads or num_heads,
            mlp_size=decoder_mlp_size or mlp_size,
            layers=decoder_layers,
            max_objects=max_objects,
            dropout=dropout,
            causal_prefix=causal_prefix,
        ),
        # As the authors have. Llama does without: its own layers work on the visual tokens.
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
        image_mean=choice.image_mean,
        image_std=choice.image_std,
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
    except Exception as error:  # whatever a model that is no vision model raises
        raise UserError(f"--backbone {backbone}: cannot be built ({error})") from None
    if choice.pretrained is not None and load_pretrained:
        model.backbone.load_pretrained(choice.pretrained)
    check_canvas(model)
    return model.train()


def check_canvas(model: Pix2SeqForObjectDetection) -> None:
    """Raises UserError if the backbone does not see the whole canvas, or nothing comes out of it."""
    side, patch = model.config.image_size, getattr(model.config.backbone_config, "patch_size", None)
    if isinstance(patch, int) and side % patch:
        raise UserError(f"--image_size {side}: must be a multiple of {patch}, the patch size of the backbone")
    try:
        with torch.no_grad():
            model.eval().encode(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=model.device))
    except Exception as error:  # whatever a model that is no vision model, or of another size, raises
        raise UserError(
            f"--backbone, --image_size {side}: pictures of this size do not become features ({error})"
        ) from None


def _decoder_config(
    kind: str,
    tokenizer: Tokenizer,
    *,
    size: int,
    heads: int,
    mlp_size: int,
    layers: int,
    max_objects: int,
    dropout: float,
    causal_prefix: bool,
) -> PretrainedConfig:
    common = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": TOKENS_PER_OBJECT * max_objects + 2,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    if kind == "llama":
        return LlamaConfig(
            hidden_size=size,
            intermediate_size=mlp_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            causal_prefix=causal_prefix,
            **common,
        )
    return BlenderbotConfig(
        d_model=size,
        decoder_layers=layers,
        decoder_attention_heads=heads,
        decoder_ffn_dim=mlp_size,
        # It has no encoder, but some code takes its number of layers and heads from there.
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=mlp_size,
        # Branches drop out as a whole instead: see Pix2SeqForObjectDetection.
        dropout=0.0,
        activation_dropout=dropout,
        is_decoder=True,
        is_encoder_decoder=False,
        **common,
    )
