"""Fine-tuning: transfers a trained model to other classes, image sizes, numbers of bins and sequence lengths."""

import copy

import torch

from pix2seq.models.build import check_image_size
from pix2seq.models.modeling_pix2seq import Pix2SeqForObjectDetection
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer

# Suffixes of parameter names.
TOKEN_PARAMETERS = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # one row per token
POSITION_PARAMETER = "embed_positions.weight"  # one row per position


def adapt_to_classes(
    source: Pix2SeqForObjectDetection,
    *,
    category_ids: tuple[int, ...],
    class_names: tuple[str, ...],
    image_size: int,
    num_bins: int,
    max_objects: int,
    noise_objects: bool,
    dropout: float,
    drop_path: float,
    label_smoothing: float,
    coordinate_sigma: float,
    decoding: dict,
) -> tuple[Pix2SeqForObjectDetection, list[str]]:
    """Builds a model for other classes with the architecture and the weights of a trained model.

    Classes are matched by name and keep their embeddings; new classes get random embeddings. For another number of
    bins, the embeddings of the bins are interpolated. The position embeddings of the visual tokens are relative to the
    image, and backbones interpolate theirs, so the image size can change. The arguments are described in
    `Pix2SeqConfig`.

    Returns:
        The model in training mode, and a report in lines of text: which classes are kept, new or dropped, and which
        sizes changed.

    Raises:
        UserError: The backbone cannot process an image of this size.
    """
    old = source.config
    config = copy.deepcopy(old)
    tokenizer = Tokenizer(len(category_ids), num_bins)
    config.image_size, config.num_bins, config.max_objects = image_size, num_bins, max_objects
    config.noise_objects, config.dropout, config.drop_path = noise_objects, dropout, drop_path
    config.label_smoothing, config.coordinate_sigma = label_smoothing, coordinate_sigma
    config.category_ids, config.decoding = list(category_ids), decoding
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: label for label, name in enumerate(class_names)}
    config.decoder_config.vocab_size = tokenizer.vocab_size
    config.decoder_config.max_position_embeddings = TOKENS_PER_OBJECT * max_objects + 2
    if hasattr(config.decoder_config, "activation_dropout"):
        config.decoder_config.activation_dropout = dropout
    model = Pix2SeqForObjectDetection(config)

    kept = {label: old.class_names.index(name) for label, name in enumerate(class_names) if name in old.class_names}
    state = model.state_dict()
    with torch.no_grad():
        for name, value in source.state_dict().items():
            if name.endswith(TOKEN_PARAMETERS):
                _copy_token_rows(value, state[name], source.tokenizer, tokenizer, kept)
            elif name.endswith(POSITION_PARAMETER):
                length = min(len(value), len(state[name]))
                state[name][:length] = value[:length]
            else:
                state[name].copy_(value)

    report = [
        f"classes kept: {_join(class_names[label] for label in kept)}",
        f"new classes: {_join(name for name in class_names if name not in old.class_names)}",
        f"classes dropped: {_join(name for name in old.class_names if name not in class_names)}",
    ]
    report += [
        f"{name}: changed from {getattr(old, name)} to {getattr(config, name)}"
        for name in ("image_size", "num_bins", "max_objects", "noise_objects")
        if getattr(old, name) != getattr(config, name)
    ]
    check_image_size(model)
    return model.train(), report


def _join(names) -> str:
    return ", ".join(names) or "none"


def _copy_token_rows(
    old: torch.Tensor, new: torch.Tensor, old_tokenizer: Tokenizer, tokenizer: Tokenizer, kept: dict[int, int]
) -> None:
    """Copies the rows of special tokens, kept classes (new label -> old label) and bins between vocabularies."""
    num_specials = tokenizer.first_class_id
    new[:num_specials] = old[:num_specials]
    for label, old_label in kept.items():
        new[num_specials + label] = old[num_specials + old_label]
    bins = old[old_tokenizer.first_bin_id :]
    if old_tokenizer.num_bins != tokenizer.num_bins:
        positions = torch.linspace(0, old_tokenizer.num_bins - 1, tokenizer.num_bins)
        lower = positions.floor().long().clamp(max=old_tokenizer.num_bins - 2)
        fraction = (positions - lower).to(bins).view(-1, *[1] * (bins.ndim - 1))
        bins = torch.lerp(bins[lower], bins[lower + 1], fraction)
    new[tokenizer.first_bin_id :] = bins
