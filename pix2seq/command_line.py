"""From words to flags: one parsing path, one line for a mistake.

A recipe is a YAML file of flags. It is turned into command-line words placed in front of the real ones, so types,
choices and unknown names are checked in one place and the command line wins.
"""

import dataclasses
import difflib
import json
import math
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser
from transformers.utils import cached_file

from pix2seq.errors import UserError

FLAGS_FILE = "training.yaml"


class _Parser(HfArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(kind: type, argv: list[str] | None = None, program: str | None = None):
    """The dataclass `kind` from command-line words. A mistake ends the `program` with one line and exit code 2.

    kind.PRESETS, if it has one, names flags whose value stands for other flags: {"size": value -> {flag: value}}.
    The command line wins over the recipe, and either over what its own presets stand for. kind.DEFAULTS is the same,
    but for that anything wins over it. kind.WORDS, if it has one, names the list that words without a flag belong to.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(kind, prog=program, allow_abbrev=False)
    try:
        recipe, presets = _recipe_words(argv, parser), getattr(kind, "PRESETS", {})
        words = _expanded(recipe, presets) + _expanded(argv, presets)
        for name, flags_of in getattr(kind, "DEFAULTS", {}).items():
            if (value := _last_value(name, recipe + argv)) is not None:
                words = _flag_words(flags_of(value)) + words
        arguments, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    for name, value in vars(arguments).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name} {value}: must be a finite number")
        if value == "":
            parser.error(f"--{name}: is empty; leave it out, or name something")
    names = [name for action in parser._actions for name in action.option_strings]
    for word in unknown:
        if word.startswith("--"):
            parser.error(f"{word}: no such flag{nearest(word.split('=')[0], names)}")
        if not hasattr(kind, "WORDS"):
            parser.error(f"{word!r}: does not belong to any flag")
        getattr(arguments, kind.WORDS).append(word)
    return arguments


def _expanded(words: list[str], presets: dict) -> list[str]:
    """The words, and in front of them what the presets among them stand for."""
    for name, flags_of in presets.items():
        if (value := _last_value(name, words)) is not None:
            words = _flag_words(flags_of(value)) + words
    return words


def _last_value(name: str, words: list[str]) -> str | None:
    """What a flag is set to by the last word that does, before any parsing."""
    value = None
    for index, word in enumerate(words):
        if word == f"--{name}" and index + 1 < len(words):
            value = words[index + 1]
        elif word.startswith(f"--{name}="):
            value = word.split("=", 1)[1]
    return value


def _recipe_words(argv: list[str], parser: _Parser) -> list[str]:
    """The YAML recipe named by --config as command-line words."""
    path = _last_value("config", argv)
    if path is None:
        return []
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: must be a list of 'flag: value' lines")
    names = {action.dest for action in parser._actions} - {"help", "config"}
    for name in recipe:
        if name not in names:
            raise ValueError(f"--config {path}: {name!r} is not a flag{nearest(str(name), names)}")
    return _flag_words(recipe)


def _flag_words(flags: dict) -> list[str]:
    words = []
    for name, value in flags.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(_word, value)]
        elif value is not None:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict | bool) else str(value)


def nearest(word: str, names) -> str:
    """ " (did you mean NAME?)", or nothing if no name is like the word."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def to_yaml(arguments) -> str:
    """The flags as a recipe that parses back to the same values."""
    values = {k: v for k, v in dataclasses.asdict(arguments).items() if v is not None and k != "config"}
    values["report_to"] = values.get("report_to") or ["none"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def changed_flags(then: dict, arguments, free: set[str]) -> str:
    """What differs between the flags of a run and these, but for those `free` to: "--lr 0.5 (was 0.1)", or ""."""
    now = yaml.safe_load(to_yaml(arguments))
    # A flag that is newer than the run had its default's effect.
    then = {f.name: f.default for f in dataclasses.fields(arguments) if f.name in now and f.name not in free} | then
    names = [name for name in then | now if name not in free and then.get(name) != now.get(name)]
    return ", ".join(f"--{name} {now.get(name)} (was {then.get(name)})" for name in names)


def write_flags(arguments, folder: Path) -> None:
    """The flags a detector was trained with, beside its weights."""
    (folder / FLAGS_FILE).write_text(to_yaml(arguments))


def read_flags(name: str | Path, flag: str) -> dict:
    """The flags that the detector in a folder or on the hub was trained with; {} if they are not beside it.

    Raises UserError naming the `flag`.
    """
    try:
        path = cached_file(str(name), FLAGS_FILE, _raise_exceptions_for_missing_entries=False)
    except OSError:  # neither a folder nor a name of the hub's
        path = None
    if path is None:
        return {}
    try:
        flags = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{flag} {name}: {FLAGS_FILE} cannot be read ({error})") from None
    if not isinstance(flags, dict):
        raise UserError(f"{flag} {name}: {FLAGS_FILE} holds no flags")
    return flags
