"""Fine-tuning: transfers a trained model to other classes, image sizes, numbers of bins and sequence lengths."""

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file, logging

from pix2seq.models.backbone import check_image_size
from pix2seq.models.configuration_pix2seq import Pix2SeqConfig
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that select files, and others that are not values of the config.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
CLASS_ARGUMENTS = {"id2label", "label2id", "num_labels"}
LOADING_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config")

HOW_TO_MATCH = (
    "pass ignore_mismatched_sizes=True to keep the embeddings of classes with the same name and to initialize others"
)

# Suffixes of parameter names.
TOKEN_PARAMETERS = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # one row per token
POSITION_PARAMETER = "embed_positions.weight"  # one row per position


def adapt_to_classes(
    source: PreTrainedModel,
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
) -> tuple[PreTrainedModel, list[str]]:
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
    config = copy.deepcopy(source.config)
    config.image_size, config.num_bins, config.max_objects = image_size, num_bins, max_objects
    config.noise_objects, config.dropout, config.drop_path = noise_objects, dropout, drop_path
    config.label_smoothing, config.coordinate_sigma = label_smoothing, coordinate_sigma
    config.category_ids, config.decoding = list(category_ids), decoding
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: label for label, name in enumerate(class_names)}
    model, report = _transfer_weights(source, config)
    check_image_size(model)
    return model.train(), report


def _transfer_weights(source: PreTrainedModel, config: Pix2SeqConfig) -> tuple[PreTrainedModel, list[str]]:
    """Builds a model with a config for other classes and the weights of a trained model, see `adapt_to_classes`."""
    old, class_names = source.config, config.class_names
    tokenizer = Tokenizer(len(class_names), config.num_bins)
    config.decoder_config.vocab_size, config.decoder_config.num_bins = tokenizer.vocab_size, tokenizer.num_bins
    config.decoder_config.max_position_embeddings = TOKENS_PER_OBJECT * config.max_objects + 2
    if hasattr(config.decoder_config, "activation_dropout"):
        config.decoder_config.activation_dropout = config.dropout
    model = type(source)(config)
    kept = {label: old.class_names.index(name) for label, name in enumerate(class_names) if name in old.class_names}
    state = model.state_dict()
    if different := sorted(state.keys() ^ source.state_dict().keys()):
        raise ValueError(f"the config defines another architecture than that of the trained model ({different[0]})")
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
    return model, report


def load_pretrained(load: Callable, name: str, config, match_classes: bool, **kwargs):
    """Loads a model and changes its classes, see `Pix2SeqForObjectDetection.from_pretrained`.

    Args:
        load: `PreTrainedModel.from_pretrained`.
        name: Folder or hub name.
        config: A `Pix2SeqConfig`, or its folder or hub name. None: that of `name`.
        match_classes: Whether classes are matched by name.
        kwargs: Other arguments of `load`, and values of the config.

    Returns:
        The model, or the model and a dict with `output_loading_info`.

    Raises:
        ValueError: The number of classes differs and `match_classes` is False, `id2label` or `label2id` is not valid,
            or the folder holds the weights of another architecture.
    """
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    if config is None and not CLASS_ARGUMENTS & set(kwargs) and find_adapter_config_file(name, **hub):
        return load(name, **kwargs)  # loads the model that the adapter names, and the adapter
    with_info = kwargs.pop("output_loading_info", False)
    if not isinstance(config, Pix2SeqConfig):
        not_in_config = {key: kwargs.pop(key) for key in LOADING_ARGUMENTS if key in kwargs}
        config, kwargs = Pix2SeqConfig.from_pretrained(config or name, return_unused_kwargs=True, **kwargs)
        kwargs |= not_in_config | hub
    trained = Pix2SeqConfig.from_pretrained(name, **hub)
    class_names = _read_class_names(config, trained)
    is_adapted = len(class_names) != len(trained.category_ids)
    is_adapted |= match_classes and class_names != trained.class_names
    if not match_classes and is_adapted:
        raise ValueError(
            f"id2label has {len(class_names)} classes, but the model was trained with {len(trained.category_ids)}: "
            f"{HOW_TO_MATCH}"
        )
    moved = [new for new, old in zip(class_names, trained.class_names, strict=False) if new != old in class_names]
    if not match_classes and moved:
        raise ValueError(f"id2label gives {', '.join(moved[:3])} another label than in training: {HOW_TO_MATCH}")
    model, info = load(
        name,
        config=trained if is_adapted else config,
        ignore_mismatched_sizes=match_classes and not is_adapted,
        output_loading_info=True,
        **kwargs,
    )
    if info["missing_keys"] and info["unexpected_keys"]:
        missing, unexpected = (", ".join(sorted(info[key])[:2]) for key in ("missing_keys", "unexpected_keys"))
        raise ValueError(
            f"{name}: holds the weights of another architecture or of another version of pix2seq: lacks {missing} and "
            f"contains {unexpected}"
        )
    if is_adapted:
        model = _with_classes(model, config)
    return (model, info) if with_info else model


def _read_class_names(config: Pix2SeqConfig, trained: Pix2SeqConfig) -> tuple[str, ...]:
    """Returns the class names of a config, and makes its `label2id` the inverse of its `id2label`."""
    config.id2label = {int(label): class_name for label, class_name in dict(config.id2label).items()}
    if sorted(config.id2label) != list(range(len(config.id2label))):
        raise ValueError(f"id2label has the labels {sorted(config.id2label)}: 0 ... C-1 are needed for C classes")
    class_names = tuple(config.id2label[label] for label in range(len(config.id2label)))
    label2id = {class_name: label for label, class_name in enumerate(class_names)}
    if len(label2id) != len(class_names) and class_names != trained.class_names:
        raise ValueError(f"id2label contains a name twice: {', '.join(class_names)}")
    defaults = {f"LABEL_{label}": label for label in range(len(class_names))}
    if config.label2id not in (label2id, trained.label2id, defaults):
        raise ValueError("label2id is not the inverse of id2label")
    config.label2id = label2id
    return class_names


def _with_classes(source: PreTrainedModel, config: Pix2SeqConfig) -> PreTrainedModel:
    """Returns a model with the classes and all other values of a config, and the weights of a trained model."""
    if any(type(parameter) is not torch.nn.Parameter or parameter.is_meta for parameter in source.parameters()):
        raise ValueError("id2label: the classes of a quantized or offloaded model cannot be changed while loading it")
    if config.category_ids == source.config.category_ids or len(config.category_ids) != len(config.id2label):
        config.category_ids = list(range(len(config.id2label)))  # those of the trained model belong to its classes
    model, report = _transfer_weights(source, config)
    logger.warning(f"{'; '.join(report)}. Use Pix2SeqImageProcessor.from_model_config(model.config) with this model.")
    return model.to(source.device, source.dtype).eval()


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
