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


class _Parser(HfArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(kind: type, argv: list[str] | None = None):
    """The dataclass `kind` from command-line words. A mistake ends the program with one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(kind, allow_abbrev=False)
    names = [name for action in parser._actions for name in action.option_strings]
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            _recipe_words(argv, parser) + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    for name, value in vars(arguments).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name} {value}: must be a finite number")
    for word in unknown:
        if word.startswith("--"):
            parser.error(f"{word}: no such flag{_nearest(word.split('=')[0], names)}")
        parser.error(f"{word!r}: does not belong to any flag")
    return arguments


def _recipe_words(argv: list[str], parser: _Parser) -> list[str]:
    """The YAML recipe named by --config as command-line words."""
    path = None
    for index, word in enumerate(argv):
        if word == "--config" and index + 1 < len(argv):
            path = argv[index + 1]
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
    if path is None:
        return []
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--config {path}: cannot be read ({error})")
    except yaml.YAMLError as error:
        parser.error(f"--config {path}: is not YAML ({' '.join(str(error).split())})")
    if not isinstance(recipe, dict):
        parser.error(f"--config {path}: must be a list of 'flag: value' lines")
    names = {action.dest for action in parser._actions} - {"help", "config"}
    words = []
    for name, value in recipe.items():
        if name not in names:
            parser.error(f"--config {path}: {name!r} is not a flag{_nearest(str(name), names)}")
        if value is None:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *map(_word, value)]
        else:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def _nearest(word: str, names) -> str:
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def to_yaml(arguments) -> str:
    """The flags as a recipe that parses back to the same values."""
    values = {k: v for k, v in dataclasses.asdict(arguments).items() if v is not None and k != "config"}
    values["report_to"] = values.get("report_to") or ["none"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def changed_flags(then: str, now: str, free: set[str]) -> str:
    """What differs between two recipes, but for the flags that are `free` to: "--lr 0.5 (was 0.1)", or ""."""
    before, after = yaml.safe_load(then), yaml.safe_load(now)
    names = [name for name in before | after if name not in free and before.get(name) != after.get(name)]
    return ", ".join(f"--{name} {after.get(name)} (was {before.get(name)})" for name in names)
