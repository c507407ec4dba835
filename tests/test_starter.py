"""The packaged starter detector: its files, and training that starts from it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from pix2seq import train
from pix2seq.argument_parser import parse, read_training_arguments
from pix2seq.arguments import TrainArguments
from pix2seq.data.shapes import draw_dataset
from pix2seq.models import load_model
from pix2seq.starter import FOLDER, resolve_model_name
from pix2seq.starter.__main__ import write
from tests.runs import evaluate_checkpoint, read_json

pytest.importorskip("timm")


def small_arguments(root, output, *words: str) -> TrainArguments:
    """Arguments of two steps of the small recipe."""
    words = ("--max_steps", "2", "--batch_size", "2", "--num_workers", "0", "--eval_every", "0", *words)
    return parse(
        TrainArguments, ["--config", "configs/small.yaml", "--root", str(root), "--output_dir", str(output), *words]
    )


def test_the_starter_is_a_small_file_of_half_precision():
    files = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {v.dtype for v in load_file(FOLDER / "model.safetensors").values()} == {torch.float16, torch.int64}
    assert {p.dtype for p in load_model("starter", "--checkpoint").parameters()} == {torch.float32}
    # No paths of the machine that trained it.
    assert "root" not in read_training_arguments("starter", "--checkpoint")


def test_the_small_recipe_starts_from_the_starter(shapes_root, tmp_path):
    args = small_arguments(shapes_root, tmp_path / "out", "--lr", "1e-12", "--lr_backbone", "1e-12")
    assert train.run_training(args) == 0
    assert "--init_from starter: classes kept: " in (tmp_path / "out" / "train.log").read_text()
    starter, trained = load_model("starter", ""), load_model(tmp_path / "out" / "final", "")
    for name, value in starter.backbone.state_dict().items():
        torch.testing.assert_close(trained.backbone.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_init_from_none_builds_a_new_model(shapes_root, tmp_path):
    words = ("--init_from", "none", "--hidden_size", "64", "--mlp_size", "64", "--decoder_layers", "1")
    args = small_arguments(shapes_root, tmp_path / "out", *words)
    assert args.init_from is None
    assert train.run_training(args) == 0
    assert read_json(tmp_path, "out", "final", "config.json")["hidden_size"] == 64


def test_another_architecture_is_an_error_that_names_init_from_none(shapes_root, tmp_path, capsys):
    assert train.run_training(small_arguments(shapes_root, tmp_path / "out", "--hidden_size", "64")) == 2
    assert "--hidden_size 64: the model of --init_from has 128; omit this flag, or " in capsys.readouterr().err


def test_a_local_folder_named_starter_has_precedence(tmp_path, monkeypatch):
    assert resolve_model_name("starter") == FOLDER
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").mkdir()
    assert resolve_model_name("starter") == "starter"


def test_writing_a_starter_keeps_the_weights_and_the_model_arguments(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "source")
    (tmp_path / "copy").mkdir()
    write(str(tmp_path / "source"), tmp_path / "copy")
    source, copy = (load_file(folder / "model.safetensors") for folder in (FOLDER, tmp_path / "copy"))
    assert source.keys() == copy.keys()
    assert all(torch.equal(source[name], copy[name]) for name in source)
    assert read_training_arguments(tmp_path / "copy", "") == read_training_arguments(FOLDER, "")


@pytest.mark.slow
def test_the_starter_finds_drawn_objects(tmp_path):
    root = draw_dataset(tmp_path, num_train=1, num_val=40, style="rich", seed=7)
    metrics = evaluate_checkpoint(FOLDER, root, "--output_dir", str(tmp_path / "out"))
    assert metrics["AP50"] > 0.5
