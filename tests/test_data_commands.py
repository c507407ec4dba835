"""`python -m pix2seq.data`: what its commands write, and mistakes in one line."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pix2seq.cli import main


@pytest.fixture
def voc(tmp_path):
    """A picture with an XML file beside it, for training, and one for validation."""
    for folder in ("train", "valid"):
        (tmp_path / "my data" / folder).mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(tmp_path / "my data" / folder / "a.png")
        box = "<xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax>"
        text = f"<annotation><object><name>cat</name><bndbox>{box}</bndbox></object></annotation>"
        (tmp_path / "my data" / folder / "a.xml").write_text(text)
    return tmp_path / "my data"


def no_links(*args, **kwargs):
    raise OSError("no links on this disk")


@pytest.mark.parametrize(("links", "flag"), [(True, "--root"), (False, "--train_images")])
def test_what_convert_prints_is_what_the_other_commands_take(voc, tmp_path, capsys, monkeypatch, links, flag):
    """Also where a folder has a space in its name, and a second time."""
    if not links:
        monkeypatch.setattr(Path, "symlink_to", no_links)
    assert main(["convert", str(voc), str(tmp_path / "out")]) == 0
    assert main(["convert", str(voc), str(tmp_path / "out")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"train.py reads them with {flag} ")
    words = shlex.split(line.removeprefix("train.py reads them with "))
    assert main(["check", *words, "--output_dir", str(tmp_path / "run")]) == 0
    assert "train: 1 images (0 without objects), 1 objects of 1 classes" in capsys.readouterr().out
    assert main(["show", "--root", str(voc), "--output", str(tmp_path / "x.png")]) == 2
    assert "python -m pix2seq convert" in capsys.readouterr().err


def test_show_draws_a_row_for_each_image(shapes_root, tmp_path, capsys):
    flags = ["--root", str(shapes_root), "--image_size", "64", "--num_bins", "64", "--max_objects", "12"]
    pictures = []
    for words in (
        ["--num_images", "1"],
        ["--num_images", "2"],
        ["--num_images", "2", "--epoch", "1"],
        ["--num_images", "2", "--color_jitter", "0.5"],
        ["--first", "11", "--num_images", "5", "--no_noise_objects"],
    ):
        assert main(["show", *flags, *words, "--output", str(tmp_path / "show.png")]) == 0
        with Image.open(tmp_path / "show.png") as image:
            pictures.append(np.asarray(image))
    one, two, later, coloured, last = pictures
    assert two.shape[0] > 1.7 * one.shape[0]
    assert last.shape[0] == one.shape[0]
    assert not np.array_equal(two, later)
    assert not np.array_equal(two, coloured)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "--first", "12"], "--first 12: there are 12 images"),
        (["show", "--epoch", "-1"], "--epoch -1: must be at least 0"),
        (["show", "--output", "/nowhere/x.png"], "--output /nowhere/x.png: cannot be written"),
        (["show", "--mix_rate", "0.5", "--no_noise_objects"], "--mix_rate 0.5: must be 0 with --no_noise_objects"),
        (["shard"], "--output: missing"),
        (["shard", "--output", "x", "--shard_mb", "0"], "--shard_mb 0.0: must be above 0"),
        (["check", "--root", "/nowhere"], "--root /nowhere: no such folder"),
        (["check", "--chek"], "--chek: no such flag"),
        (["convert"], "source, output"),
        (["convert", "/nowhere", "out"], "/nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(shapes_root, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    command, *rest = words
    root = [] if command == "convert" or "--root" in rest else ["--root", str(shapes_root)]
    try:
        code = main([command, *root, *rest])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith(f"pix2seq.data {command}: error: ")
    assert error.count("\n") == 1


def test_without_a_command_it_says_which_there_are():
    done = subprocess.run([sys.executable, "-m", "pix2seq.data"], capture_output=True, text=True)
    assert done.returncode == 2
    assert all(name in done.stderr for name in ("check", "show", "convert", "shard"))
