"""Every flag of every command with its default, as a page: what `--help` says, to be searched and linked to.

python -m benchmarks.flags --output docs/flags.md
"""

import argparse
from dataclasses import fields
from pathlib import Path

from transformers import HfArgumentParser

from export import ExportArguments
from pix2seq.config import (
    Arguments,
    DataArguments,
    DecodingArguments,
    EvaluateArguments,
    ModelArguments,
    TrainArguments,
)
from pix2seq.data.commands import ShardArguments, ShowArguments, convert_parser
from pix2seq.demo.__main__ import DemoArguments
from pix2seq.evaluation.commands import compare_parser, tokens_parser
from plan import PlanArguments
from predict import PredictArguments

OPENING = """\
# Every flag

What `--help` says, on a page. What is off is switched on by `--flag`, what is on off by `--no_flag`; a hyphen may
stand for each underscore. A recipe (`--config FILE.yaml` of `train.py`) is these flags without the dashes, and the
command line wins over it. An empty default is explained in the last column, or means that there is none. Written by
`python -m benchmarks.flags --output docs/flags.md`.
"""
TRAINING = (("Model", ModelArguments), ("Data", DataArguments), ("Training", TrainArguments))
WRITING = ("How sentences are written", DecodingArguments)
OF_TRAINING = "All [flags of train.py](#trainpy), and"
# Of a command: what its flags are called, and in which part of them they are declared.
COMMANDS = {
    "train.py": (Arguments, TRAINING),
    "evaluate.py": (EvaluateArguments, (("What is evaluated", EvaluateArguments), WRITING)),
    "predict.py": (PredictArguments, (("Pictures in, boxes out", PredictArguments), WRITING)),
    "python -m pix2seq.demo": (DemoArguments, (("A page in the browser", DemoArguments), WRITING)),
    "export.py": (ExportArguments, (("", ExportArguments),)),
    "plan.py": (PlanArguments, ((OF_TRAINING, PlanArguments),)),
    "python -m pix2seq.data check": (Arguments, (("All [flags of train.py](#trainpy).", None),)),
    "python -m pix2seq.data show": (ShowArguments, ((OF_TRAINING, ShowArguments),)),
    "python -m pix2seq.data convert": (convert_parser, (("", None),)),
    "python -m pix2seq.data shard": (ShardArguments, ((OF_TRAINING, ShardArguments),)),
    "python -m pix2seq.evaluation compare": (compare_parser, (("", None),)),
    "python -m pix2seq.evaluation tokens": (tokens_parser, (("", None),)),
}


def page() -> str:
    """All commands as Markdown."""
    parts = [OPENING]
    for name, (kind, groups) in COMMANDS.items():
        parts.append(f"## {name}\n")
        is_parser = not isinstance(kind, type)
        actions = (kind() if is_parser else HfArgumentParser(kind))._actions[1:]  # the first is --help
        for title, declared in groups:
            if title:
                parts.append(f"{title}\n" if declared is None or title == OF_TRAINING else f"### {title}\n")
            names = own_fields(declared) if declared else {action.dest for action in actions if is_parser}
            shown = [row(action) for action in actions if action.dest in names and not negates(action)]
            if shown:
                parts.append("\n".join(["| flag | default | |", "|---|---|---|", *shown]) + "\n")
    return "\n".join(parts)


def own_fields(kind: type) -> set[str]:
    """The names a dataclass adds to those of its bases."""
    inherited = {name for base in kind.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
    return {field.name for field in fields(kind)} - inherited


def negates(action: argparse.Action) -> bool:
    return any(name.startswith("--no_") for name in action.option_strings)


def row(action: argparse.Action) -> str:
    name = action.option_strings[0] if action.option_strings else action.dest
    if isinstance(action.default, bool):
        default = "on" if action.default else "off"
    elif isinstance(action.default, list):
        default = " ".join(action.default)
    else:
        default = "" if action.default is None else str(action.default)
    default = "required" if action.required else f"`{default}`" if default else ""
    choices = f" ({', '.join(f'`{choice}`' for choice in action.choices)})" if action.choices else ""
    text = (action.help + choices).replace("|", "\\|")
    return f"| `{name}` | {default} | {text} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write down every flag.")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.parse_args().output.write_text(page())


if __name__ == "__main__":
    main()
