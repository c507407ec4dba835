"""Fine-tuning: a trained detector for another list of classes, and other sizes of canvas, bins and sentences."""

import copy

import torch

from pix2seq.models.build import check_canvas
from pix2seq.models.modeling_pix2seq import Pix2SeqForObjectDetection
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer

# By what the names of its tensors end in.
BY_TOKEN = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
BY_POSITION = "embed_positions.weight"


def adapt(
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
    """A detector of the shape and weights of `source` for these classes; and what became of what, in words.

    Rows of classes with the same name are kept exactly. Another number of bins gets embeddings interpolated between
    those of the old bins' places. The 2-D position code depends on the place on the canvas alone and position tables
    of backbones are interpolated, so the canvas may have any size the backbone can take; another raises UserError. In
    training mode.
    """
    old = source.config
    config = copy.deepcopy(old)
    before, after = source.tokenizer, Tokenizer(len(category_ids), num_bins)
    config.image_size, config.num_bins, config.max_objects = image_size, num_bins, max_objects
    config.noise_objects, config.dropout, config.drop_path = noise_objects, dropout, drop_path
    config.label_smoothing, config.coordinate_sigma = label_smoothing, coordinate_sigma
    config.category_ids, config.decoding = list(category_ids), decoding
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: label for label, name in enumerate(class_names)}
    config.decoder_config.vocab_size = after.vocab_size
    config.decoder_config.max_position_embeddings = TOKENS_PER_OBJECT * max_objects + 2
    if hasattr(config.decoder_config, "activation_dropout"):
        config.decoder_config.activation_dropout = dropout
    model = Pix2SeqForObjectDetection(config)

    kept = {label: old.class_names.index(name) for label, name in enumerate(class_names) if name in old.class_names}
    state = model.state_dict()
    with torch.no_grad():
        for name, value in source.state_dict().items():
            if name.endswith(BY_TOKEN):
                _copy_tokens(value, state[name], before, after, kept)
            elif name.endswith(BY_POSITION):
                length = min(len(value), len(state[name]))
                state[name][:length] = value[:length]
            else:
                state[name].copy_(value)

    def listed(names):
        return ", ".join(names) or "none"

    report = [
        f"classes kept: {listed(class_names[label] for label in kept)}",
        f"new classes: {listed(name for name in class_names if name not in old.class_names)}",
        f"classes left out: {listed(name for name in old.class_names if name not in class_names)}",
    ]
    for name in ("image_size", "num_bins", "max_objects", "noise_objects"):
        if getattr(old, name) != getattr(config, name):
            report.append(f"{name}: {getattr(old, name)} became {getattr(config, name)}")
    check_canvas(model)
    return model.train(), report


def _copy_tokens(
    value: torch.Tensor, target: torch.Tensor, before: Tokenizer, after: Tokenizer, kept: dict[int, int]
) -> None:
    """Rows (V, ...) of one vocabulary into another; rows of new classes stay as they are."""
    specials = before.first_class_id
    target[:specials] = value[:specials]
    for label, old_label in kept.items():
        target[after.first_class_id + label] = value[before.first_class_id + old_label]
    bins = value[before.first_bin_id :]
    if before.num_bins == after.num_bins:
        target[after.first_bin_id :] = bins
        return
    places = torch.linspace(0, before.num_bins - 1, after.num_bins)
    lower = places.floor().long().clamp(max=before.num_bins - 2)
    share = (places - lower).to(bins).view(-1, *[1] * (bins.ndim - 1))
    target[after.first_bin_id :] = torch.lerp(bins[lower], bins[lower + 1], share)
