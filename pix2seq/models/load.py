"""Trained detectors, from their folders or the hub."""

from pathlib import Path

from pix2seq import manifest
from pix2seq.errors import UserError
from pix2seq.generation import DecodingOptions
from pix2seq.models.configuration_pix2seq import Pix2SeqConfig
from pix2seq.models.modeling_pix2seq import Pix2SeqForObjectDetection


def load_model(name: str | Path, flag: str) -> Pix2SeqForObjectDetection:
    """The detector in a folder or on the hub, with every weight it should have. Raises UserError naming the `flag`."""
    folder, where = Path(name), f"{flag} {name}"
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{where}: no config.json in it; name OUT/best, OUT/final or a checkpoint folder")
    try:
        kind = Pix2SeqConfig.get_config_dict(str(name))[0].get("model_type")
    except Exception as error:  # a missing, damaged or unreachable file
        if not folder.is_dir():
            raise UserError(f"{where}: no such folder, nor a detector on the hub") from None
        raise UserError(f"{where}: config.json cannot be read ({error})") from None
    if kind != Pix2SeqConfig.model_type:
        raise UserError(f"{where}: holds a model of type {kind!r}, not {Pix2SeqConfig.model_type!r}")
    if (folder / manifest.MANIFEST).is_file() and (fault := manifest.verify(folder)):
        raise UserError(f"{where}: {fault}")
    try:
        model, loading = Pix2SeqForObjectDetection.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # a damaged file may fail anywhere in the library
        raise UserError(f"{where}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    if loading["missing_keys"]:
        raise UserError(f"{where}: lacks the weights {', '.join(sorted(loading['missing_keys'])[:3])}")
    config = model.config
    try:
        DecodingOptions(**config.decoding)
        fits = config.decoder_config.vocab_size == model.tokenizer.vocab_size and bool(config.class_names)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: config.json does not describe a detector ({error!r})") from None
    if not fits:
        raise UserError(f"{where}: config.json has classes and bins for another vocabulary than its weights")
    # Loaded tensors lie in memory as they lie in the file. Only aligned as torch allocates them do they give what the
    # trained ones gave, to the last digit.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
