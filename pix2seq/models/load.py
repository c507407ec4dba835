"""Loads trained models from a folder or the hub, with errors that name the flag."""

from pathlib import Path

from pix2seq import manifest
from pix2seq.errors import UserError
from pix2seq.generation import DecodingOptions
from pix2seq.models.configuration_pix2seq import Pix2SeqConfig
from pix2seq.models.modeling_pix2seq import Pix2SeqForObjectDetection
from pix2seq.starter import resolve_model_name


def load_model(name: str | Path, flag: str) -> Pix2SeqForObjectDetection:
    """Loads a model and verifies that it is complete.

    Args:
        name: A folder written by `save_pretrained` or by training, the name of a repository on the hub, or "starter".
        flag: The flag that named it, for error messages.

    Returns:
        The model in eval mode.

    Raises:
        UserError: It is not a Pix2Seq model, a file is missing or damaged, or config and weights do not match.
    """
    source, name = f"{flag} {name}", resolve_model_name(name)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{source}: has no config.json; name OUT/best, OUT/final or a checkpoint folder")
    try:
        model_type = Pix2SeqConfig.get_config_dict(str(name))[0].get("model_type")
    except Exception as error:  # a missing, damaged or unreachable file
        if not folder.is_dir():
            raise UserError(f"{source}: no such folder and no such model on the hub") from None
        raise UserError(f"{source}: config.json cannot be read ({error})") from None
    if model_type != Pix2SeqConfig.model_type:
        raise UserError(f"{source}: holds a model of type {model_type!r}, not {Pix2SeqConfig.model_type!r}")
    if (folder / manifest.MANIFEST).is_file() and (problem := manifest.verify(folder)):
        raise UserError(f"{source}: {problem}")
    try:
        model, loading = Pix2SeqForObjectDetection.from_pretrained(name, output_loading_info=True)
        DecodingOptions(**model.config.decoding)
    except Exception as error:  # a damaged file raises many types of exceptions
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: config.json or the weights cannot be loaded ({reason})") from None
    if loading["missing_keys"]:
        names = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"{source}: lacks the weights {names}; was it written by another version of pix2seq?")
    # Loaded tensors are aligned as in the file. Aligned as torch allocates them, they give bit-exact results.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
