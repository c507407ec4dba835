"""Parses command lines and YAML recipes into dataclasses, and stores the arguments of a training run.

There is one parsing path. A recipe is a YAML file of arguments; it is flattened to command-line words placed in front
of the actual command line. Types, choices and unknown names are therefore checked in one place, and the command line
overrides the recipe.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.utils import cached_file

from pix2seq.errors import UserError
from pix2seq.starter import resolve_model_name

TRAINING_FILE = "training.yaml"
# Arguments that are missing in the training.yaml of older models, which had this value instead of today's default.
ARGUMENTS_OF_OLDER_RUNS = {"spatial_modulation": False}


class LineErrorParser(argparse.ArgumentParser):
    """An ArgumentParser that prints one line, without the usage, for an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def path(text: str) -> Path:
    """Converts the text of an argument to a path; `Path("")` would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return Path(text)


class ShortHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Lists each flag once, without its spelling with hyphens, and no default of None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) < 2 or action.dest == "help":
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return action.option_strings[0]
        arguments = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {arguments}"


class GroupedArgumentParser(HfArgumentParser):
    """An HfArgumentParser that lists the fields of each base dataclass in a group of its own.

    Attributes:
        source: Text in front of error messages: the name of the recipe whose words are parsed.
    """

    source = ""

    def _add_dataclass_arguments(self, dtype: type) -> None:
        type_hints = get_type_hints(dtype)
        added: set[str] = set()
        for base in reversed(dtype.__mro__):
            own = {field.name for field in dataclasses.fields(base)} if dataclasses.is_dataclass(base) else set()
            title = vars(base).get("_argument_group_name")
            group = self.add_argument_group(title) if title and own - added else self
            for field in dataclasses.fields(dtype):
                if field.name in own - added:
                    field.type = type_hints[field.name]
                    self._parse_dataclass_field(group, field)
            added |= own

    def parse_known_args(self, args=None, namespace=None):
        """Also refuses empty texts and numbers that are not finite, before a dataclass sees the values."""
        namespace, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            if isinstance(value, float) and not math.isfinite(value):
                self.error(f"--{name} {value}: must be a finite number")
            if "" in (value if isinstance(value, list) else [value]):
                self.error(f"--{name}: is empty; omit the flag or give a value")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        LineErrorParser.error(self, f"{self.source}{message}")


def parse(kind: type, argv: list[str] | None = None, program: str | None = None):
    """Parses a command line into the dataclass `kind`. An error prints one line and exits with code 2.

    Three optional class attributes of `kind` change the parsing. `PRESETS = {name: value -> {argument: value}}` lists
    arguments that stand for others; explicit arguments win over them. `DEFAULTS` has the same form, and everything
    wins over it. `POSITIONAL` names the list argument that words without a flag are appended to.

    Args:
        kind: dataclass of the arguments.
        argv: words of the command line. Default: `sys.argv[1:]`.
        program: name of the program in messages. Default: that of `sys.argv[0]`.

    Returns:
        An instance of `kind`.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = GroupedArgumentParser(
        [kind],
        prog=program,
        usage="%(prog)s [arguments]",
        allow_abbrev=False,
        formatter_class=ShortHelpFormatter,
    )
    try:
        parser.parse_known_args(argv)  # reports wrong values before files are read
        recipe, presets = _recipe_words(argv, parser), getattr(kind, "PRESETS", {})
        words = _expand_presets(recipe, presets) + _expand_presets(argv, presets)
        for name, arguments_of in getattr(kind, "DEFAULTS", {}).items():
            if (value := _last_value(name, recipe + argv)) is not None:
                words = _to_words(arguments_of(value)) + words
        arguments, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    names = [name for action in parser._actions for name in action.option_strings]
    for word in unknown:
        if word.startswith("--"):
            parser.error(f"{word}: no such flag{did_you_mean(word.split('=')[0], names)}")
        if not hasattr(kind, "POSITIONAL"):
            parser.error(f"{word!r}: does not belong to any flag")
        getattr(arguments, str(kind.POSITIONAL)).append(word)  # type: ignore[attr-defined]  # set by commands with positional words
    return arguments


def run_command(main: Callable[..., int], *arguments, program: str) -> int:
    """Calls `main(*arguments)` and returns its exit code; prints a `UserError` as one line and returns 2."""
    try:
        return main(*arguments)
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2


def _expand_presets(words: list[str], presets: dict) -> list[str]:
    """Puts the arguments that the presets among the words stand for in front of the words."""
    for name, arguments_of in presets.items():
        if (value := _last_value(name, words)) is not None:
            words = _to_words(arguments_of(value)) + words
    return words


def _last_value(name: str, words: list[str]) -> str | None:
    """The value that the last occurrence of a flag sets, before any parsing."""
    value = None
    for index, word in enumerate(words):
        if word == f"--{name}" and index + 1 < len(words):
            value = words[index + 1]
        elif word.startswith(f"--{name}="):
            value = word.split("=", 1)[1]
    return value


def _recipe_words(argv: list[str], parser: GroupedArgumentParser) -> list[str]:
    """The recipe named by --config as command-line words. Raises ValueError."""
    path = _last_value("config", argv)
    if path is None:
        return []
    parser.source = f"--config {path}: "
    try:
        recipe = _read_recipe(_recipe_path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML ({' '.join(str(error).split())})") from None
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("help", "config")}
    words = []
    for name, value in recipe.items():
        if name not in actions:
            raise ValueError(f"{name!r} is not a flag{did_you_mean(name, actions)}")
        words += _entry_words(name, value, actions[name])
    parser.parse_known_args(words)  # reports wrong values under the name of the recipe
    parser.source = ""
    return words


class UniqueKeyLoader(yaml.SafeLoader):
    """Reads YAML. Refuses keys that appear twice, of which PyYAML takes the last one."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            first = seen.setdefault((key.tag, key.value), key)
            if first is not key:
                lines = f"{first.start_mark.line + 1} and {key.start_mark.line + 1}"
                raise yaml.YAMLError(f"the key {key.value!r} appears twice, in lines {lines}")
        return node


def _read_recipe(text: str) -> dict:
    """Parses a recipe into texts, lists of texts, mappings, and None where there is no value.

    The texts are those of the file. YAML 1.1 would read `no` as false, `010` as 8, `1:30` as 90 and `1.10` as 1.1.
    """
    loader = UniqueKeyLoader(text)
    root = loader.get_single_node()
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("must consist of 'flag: value' lines")
    return {str(key.value): _node_value(loader, node) for key, node in root.value}


def _node_value(loader: UniqueKeyLoader, node: yaml.Node):
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_node_value(loader, item) for item in node.value]
    return loader.construct_object(node, deep=True)


def _entry_words(name: str, value, action: argparse.Action) -> list[str]:
    """An entry of a recipe as command-line words. Raises ValueError."""
    if value is None and action.default is not None:
        raise ValueError(f"{name}: has no value; give one or remove the line")
    if isinstance(value, list):
        if action.nargs != "+":
            raise ValueError(f"{name}: must be one value, not a list")
        if not value or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name}: must be a list of one or more values")
    return _to_words({name: value})


def _recipe_path(path: str):
    """The file; if there is none, the packaged recipe named, for example, demo, demo.yaml or configs/demo.yaml."""
    file = Path(path)
    packaged = resources.files("pix2seq") / "configs" / f"{file.stem}.yaml"
    is_recipe_name = file.parent in (Path("."), Path("configs")) and file.suffix in ("", ".yaml")
    return packaged if is_recipe_name and not file.exists() and packaged.is_file() else file


def _to_words(arguments: dict) -> list[str]:
    words = []
    for name, value in arguments.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(_to_word, value)]
        elif value is not None:
            words.append(f"--{name}={_to_word(value)}")
    return words


def _to_word(value) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict | bool) else str(value)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Returns " (did you mean NAME?)" for the most similar name, or "" if none is similar."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def to_yaml(arguments) -> str:
    """The arguments as a recipe that parses back to the same values."""
    values = {k: v for k, v in dataclasses.asdict(arguments).items() if v is not None and k != "config"}
    values["report_to"] = values.get("report_to") or ["none"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def changed_arguments(before: dict, arguments, ignored: set[str]) -> str:
    """Compares the arguments of an earlier run with the current ones.

    Args:
        before: arguments of the earlier run; missing ones had the value of their default.
        arguments: dataclass of the current arguments.
        ignored: names that may differ.

    Returns:
        A list such as "--lr 0.5 (was 0.1)", or "" if nothing differs.
    """
    now = yaml.safe_load(to_yaml(arguments))
    fields = dataclasses.fields(arguments)
    before = {f.name: f.default for f in fields if f.name in now and f.name not in ignored} | before
    names = [name for name in before | now if name not in ignored and before.get(name) != now.get(name)]
    return ", ".join(f"--{name} {now.get(name)} (was {before.get(name)})" for name in names)


def write_training_arguments(arguments, folder: Path) -> None:
    """Writes the arguments a model was trained with beside its weights."""
    (folder / TRAINING_FILE).write_text(to_yaml(arguments))


def read_training_arguments(name: str | Path, flag: str) -> dict:
    """Reads the arguments that a model was trained with.

    Args:
        name: folder or hub name of the model, or "starter".
        flag: flag that names the model, for error messages.

    Returns:
        The arguments, {} if the model has no training.yaml. Those that older versions did not have are included if
        their default changes what a model computes.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        path = cached_file(str(resolve_model_name(name)), TRAINING_FILE, _raise_exceptions_for_missing_entries=False)
    except OSError:  # neither a folder nor a hub name
        path = None
    if path is None:
        return {}
    try:
        arguments = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{flag} {name}: {TRAINING_FILE} cannot be read ({error})") from None
    if not isinstance(arguments, dict):
        raise UserError(f"{flag} {name}: {TRAINING_FILE} does not contain arguments")
    return ARGUMENTS_OF_OLDER_RUNS | arguments
