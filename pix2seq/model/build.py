"""A new detector from plain values: the names are those of the flags."""

import torch
from transformers import LlamaConfig

from pix2seq.errors import UserError
from pix2seq.model.backbone import choose_backbone
from pix2seq.model.configuration import Pix2SeqConfig
from pix2seq.model.detector import Pix2SeqForObjectDetection
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer


def build_detector(
    *,
    category_ids: tuple[int, ...],
    class_names: tuple[str, ...],
    backbone: str,
    decoder: str = "llama",
    hidden_size: int = 256,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    num_heads: int = 8,
    mlp_size: int = 1024,
    dropout: float = 0.1,
    position_code: str = "original",
    image_size: int = 640,
    num_bins: int = 1000,
    max_objects: int = 100,
    noise_objects: bool = True,
    decoding: dict | None = None,
) -> Pix2SeqForObjectDetection:
    """A detector with new weights, but for a pretrained backbone; in training mode.

    category_ids, class_names   original id and name of each label        decoding   see Pix2SeqConfig
    Raises UserError if there is no such backbone, or it does not turn pictures of this size into features.
    """
    choice = choose_backbone(backbone)
    tokenizer = Tokenizer(len(category_ids), num_bins)
    decoder_config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=mlp_size,
        num_hidden_layers=decoder_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=TOKENS_PER_OBJECT * max_objects + 2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    config = Pix2SeqConfig(
        backbone_config=choice.config,
        decoder_config=decoder_config,
        hidden_size=hidden_size,
        encoder_layers=encoder_layers,
        encoder_heads=num_heads,
        encoder_mlp_size=mlp_size,
        dropout=dropout,
        position_code=position_code,
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
    )
    model = Pix2SeqForObjectDetection(config)
    if choice.pretrained is not None:
        model.backbone.load_pretrained(choice.pretrained)
    try:
        with torch.no_grad():
            model.eval().encode(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
    except Exception as error:  # whatever a model that is no vision model, or of another size, raises
        raise UserError(f"--backbone {backbone}: does not turn pictures into features ({error})") from None
    return model.train()
