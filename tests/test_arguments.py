"""Arguments, recipes and presets: an error is one line and exit code 2, and a recipe consists of arguments."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from pix2seq.argument_parser import parse, to_yaml
from pix2seq.arguments import PRESETS, TrainArguments
from pix2seq.cli import COMMANDS, main
from pix2seq.evaluate import EvaluateArguments

CONFIGS = sorted(Path("configs").glob("*.yaml"))


def error_of(capsys, argv: list[str], kind: type = TrainArguments) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(kind, argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    arguments = parse(TrainArguments, ["--config", str(path), "--root", "somewhere"])
    for name, value in yaml.safe_load(path.read_text()).items():
        parsed = getattr(arguments, name)
        assert (yaml.safe_load(parsed) if isinstance(value, dict) else parsed) == (
            float(value) if isinstance(parsed, float) else value
        )


def test_expected_recipes_exist():
    assert {"demo", "overfit", "coco_r50", "coco_r50_1333", "coco_vit_b"} <= {path.stem for path in CONFIGS}


def test_scientific_notation_in_a_recipe_is_a_number(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lr: 1e-3\nroot: x\n")  # PyYAML reads 1e-3 as a string
    assert parse(TrainArguments, ["--config", str(recipe)]).lr == pytest.approx(1e-3)


def test_texts_in_a_recipe_are_not_converted_by_yaml(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("root: 1.10\nproject_name: on\nmixed_precision: no\nbatch_size: 010\nlr_backbone: null\n")
    arguments = parse(TrainArguments, ["--config", str(recipe)])
    assert (arguments.root, arguments.project_name, arguments.mixed_precision) == ("1.10", "on", "no")
    assert (arguments.batch_size, arguments.lr_backbone) == (10, None)


def test_command_line_overrides_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lr: 1e-3\nbatch_size: 4\nroot: x\nnoise_objects: false\n")
    arguments = parse(TrainArguments, [f"--config={recipe}", "--batch_size", "8"])
    assert (arguments.batch_size, arguments.lr, arguments.noise_objects) == (8, 1e-3, False)


def test_boolean_flags_can_be_turned_off():
    assert parse(TrainArguments, ["--root", "x"]).noise_objects
    assert not parse(TrainArguments, ["--root", "x", "--no_noise_objects"]).noise_objects
    assert not parse(TrainArguments, ["--root", "x", "--noise_objects", "false"]).noise_objects


def test_written_arguments_parse_to_the_same_values(tmp_path):
    argv = ["--root", "x", "--lr", "3e-5", "--no_noise_objects", "--backbone", "{model_type: resnet, depths: [1, 1]}"]
    first = parse(TrainArguments, [*argv, "--report_to", "wandb", "tensorboard"])
    dump = tmp_path / "config.yaml"
    dump.write_text(to_yaml(first))
    second = parse(TrainArguments, ["--config", str(dump)])
    assert dataclasses.asdict(second) | {"config": None} == dataclasses.asdict(first)


def test_default_output_dir_follows_the_project_name():
    assert parse(TrainArguments, ["--root", "x", "--project_name", "p"]).output_dir == str(Path("runs") / "p")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--num_bin", "10"], ["--num_bin", "did you mean --num_bins?"]),
        (["--batchsize=3"], ["--batchsize", "did you mean --batch_size?"]),
        (["--num_bins", "1"], ["--num_bins 1", "at least 2"]),
        (["--batch_size", "0"], ["--batch_size 0", "at least 1"]),
        (["--batch_size", "four"], ["--batch_size", "four"]),
        (["--lr_scheduler", "cos"], ["--lr_scheduler", "cosine"]),
        (["--mixed_precision", "fp8"], ["--mixed_precision", "bf16"]),
        (["--repeat_threshold", "2"], ["--repeat_threshold 2.0", "0 to 1"]),
        (["--early_stopping_patience", "3", "--eval_every", "0"], ["--early_stopping_patience 3", "--eval_every 0"]),
        (["--keep_last", "1"], ["--keep_last 1", "at least 2"]),
        (["--hidden_size", "100"], ["--hidden_size 100", "multiple of 16"]),
        (["--scale_min", "3"], ["--scale_min 3.0", "--scale_max"]),
        (["--top_p", "1.5"], ["--top_p 1.5", "0 to 1"]),
        (["--val_json", "x.json"], ["--root", "--val_json"]),
        (["stray"], ["stray"]),
        *(([f"--{name}", ""], [f"--{name}: is empty"]) for name in ("output_dir", "root", "config", "report_to")),
        *((["--project_name", name], ["--project_name", "without '..'"]) for name in ("a/../../b", "/b", "a/..")),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml"]),
    ],
)
def test_errors_name_the_flag_and_the_allowed_values(capsys, argv, parts):
    message = error_of(capsys, ["--root", "x", *argv])
    assert all(part in message for part in parts), message


def test_missing_dataset_arguments_are_named(capsys):
    assert "--root" in error_of(capsys, [])
    assert "--train_json" in error_of(capsys, ["--train_images", "x", "--val_images", "y", "--val_json", "z"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("num_bin: 5\n", ["'num_bin'", "did you mean num_bins?"]),
        ("lr_scheduler: cos\n", ["--lr_scheduler"]),
        ("- a\n- b\n", ["flag: value"]),
        ("a: [1\n", ["is not YAML"]),
        ("lr: 1\nseed: 2\nlr: 3\n", ["r.yaml: ", "'lr' appears twice, in lines 1 and 3"]),
        ("backbone: {depths: [1], depths: [2]}\n", ["r.yaml: ", "'depths' appears twice, in lines 1 and 1"]),
        ("lr: [1]\n", ["r.yaml: lr: must be one value"]),
        ("report_to: []\n", ["r.yaml: report_to: must be a list of one or more"]),
        ("report_to: [[wandb]]\n", ["r.yaml: report_to: must be a list of one or more"]),
        ("batch_size: null\n", ["r.yaml: batch_size: has no value"]),
        ("batch_size:\n", ["r.yaml: batch_size: has no value"]),
        ("batch_size: 1:30\n", ["r.yaml: ", "--batch_size", "1:30"]),
        ("output_dir: ''\n", ["r.yaml: --output_dir: is empty"]),
        ("lr: .nan\n", ["r.yaml: ", "--lr", ".nan"]),
        ("", ["flag: value"]),
    ],
)
def test_errors_in_a_recipe(capsys, tmp_path, text, parts):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    message = error_of(capsys, ["--root", "x", "--config", str(recipe)])
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--checkpoint", "a", "--oracle"],
        ["--predictions", "p.json"],
        ["--gt", "g.json", "--checkpoint", "a"],
        ["--oracle"],
        ["--checkpoint", "a", "--val_images", "b"],
        ["--checkpoint", "a", "--max_objects", "0"],
    ],
)
def test_evaluate_needs_exactly_one_mode(capsys, argv):
    error_of(capsys, argv, EvaluateArguments)


def test_help_lists_every_argument_with_a_text(capsys):
    for kind in (TrainArguments, EvaluateArguments):
        with pytest.raises(SystemExit):
            parse(kind, ["--help"])
        text = capsys.readouterr().out
        for field in dataclasses.fields(kind):
            assert f"--{field.name}" in text
            assert field.metadata["help"]


def test_preset_on_the_command_line_overrides_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("hidden_size: 64\nnum_heads: 4\nroot: x\n")
    argv = ["--config", str(recipe), "--preset", "r50-c4"]
    assert parse(TrainArguments, argv).hidden_size == 512
    assert parse(TrainArguments, [*argv, "--hidden_size", "256"]).hidden_size == 256
    recipe.write_text("preset: r50-c4\nhidden_size: 64\nnum_heads: 4\nroot: x\n")
    arguments = parse(TrainArguments, ["--config", str(recipe)])
    assert (arguments.hidden_size, arguments.decoder_layers, arguments.backbone_stage) == (64, 8, "c4")


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_written_with_its_arguments(preset, tmp_path):
    arguments = parse(TrainArguments, ["--root", "x", "--preset", preset])
    for name, value in PRESETS[preset].items():
        assert getattr(arguments, name) == value
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(arguments))
    assert parse(TrainArguments, ["--config", str(written)]) == dataclasses.replace(arguments, config=str(written))


def test_packaged_recipes_are_found_by_name(tmp_path, monkeypatch):
    packaged = tmp_path / "package" / "configs"
    packaged.mkdir(parents=True)
    (packaged / "demo.yaml").write_text("lr: 0.5\nroot: x\n")
    monkeypatch.setattr("pix2seq.argument_parser.resources.files", lambda package: tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo.yaml", "configs/demo.yaml"):
        assert parse(TrainArguments, ["--config", name]).lr == 0.5
    (tmp_path / "demo.yaml").write_text("lr: 0.25\nroot: x\n")
    assert parse(TrainArguments, ["--config", "demo.yaml"]).lr == 0.25


def test_other_missing_recipes_are_not_replaced_by_packaged_ones(capsys):
    assert "elsewhere/demo.yaml" in error_of(capsys, ["--root", "x", "--config", "elsewhere/demo.yaml"])


def test_date_in_an_inline_config_is_text(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("root: x\nbackbone: {model_type: resnet, when: 2020-01-01}\n")
    assert "2020-01-01" in parse(TrainArguments, ["--config", str(recipe)]).backbone


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"pix2seq {command}" in capsys.readouterr().out


def test_unknown_subcommands_list_the_known_ones(capsys):
    assert main(["chek"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("pix2seq: error: chek: no such command (did you mean check?)")
    assert message.count("\n") == 1
    assert all(command in message for command in COMMANDS)
