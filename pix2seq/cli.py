"""The command `pix2seq`, also `python -m pix2seq`: one subcommand for each task."""

import sys
from importlib import import_module

from pix2seq.argument_parser import did_you_mean

# Subcommand -> (function `f(argv, program) -> exit code`, help). Modules are imported when they are called.
COMMANDS = {
    "train": ("pix2seq.train:main", "train a model"),
    "evaluate": ("pix2seq.evaluate:main", "compute COCO metrics of a model or of a results file"),
    "predict": ("pix2seq.predict:main", "detect objects in images and videos"),
    "export": ("pix2seq.export:main", "export a model to ONNX"),
    "demo": ("pix2seq.demo.serve:main", "serve the demo page"),
    "plan": ("pix2seq.plan:main", "estimate steps, FLOPs, memory and hours of a recipe"),
    "check": ("pix2seq.data.commands:check_main", "report the contents and the issues of a dataset"),
    "show": ("pix2seq.data.commands:show_main", "draw training examples as the model receives them"),
    "convert": ("pix2seq.data.commands:convert_main", "convert YOLO or Pascal VOC to COCO annotation files"),
    "shard": ("pix2seq.data.commands:shard_main", "pack training images into WebDataset shards"),
    "shapes": ("pix2seq.data.shapes:main", "draw the dataset of shapes that `make demo` trains on"),
    "compare": ("pix2seq.evaluation.commands:compare_main", "compare two models on the same images"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv: subcommand and its arguments. Default: `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        module, _, function = COMMANDS[argv[0]][0].partition(":")
        return getattr(import_module(module), function)(argv[1:], program=f"pix2seq {argv[0]}")
    asked_for_help = argv[:1] in (["-h"], ["--help"])
    if argv and not asked_for_help:
        known = f"the commands are {', '.join(COMMANDS)}"
        print(f"pix2seq: error: {argv[0]}: no such command{did_you_mean(argv[0], COMMANDS)}; {known}", file=sys.stderr)
        return 2
    lines = [f"  {name:10}{text}" for name, (_, text) in COMMANDS.items()]
    usage = "\n".join(["usage: pix2seq COMMAND ...", "", *lines, "", "pix2seq COMMAND --help lists its arguments."])
    print(usage, file=sys.stdout if asked_for_help else sys.stderr)
    return 0 if asked_for_help else 2
