"""The commands `pix2seq check | show | convert | shard`: their output, and one-line errors."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pix2seq.cli import main


@pytest.fixture
def voc(tmp_path):
    """A training and a validation image, each with an XML file beside it."""
    root = tmp_path / "my data"
    for folder in ("train", "valid"):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(root / folder / "a.png")
        box = "<xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax>"
        xml = f"<annotation><object><name>cat</name><bndbox>{box}</bndbox></object></annotation>"
        (root / folder / "a.xml").write_text(xml)
    return root


def raise_os_error(*args, **kwargs):
    raise OSError("links are not supported")


@pytest.mark.parametrize(("links", "flag"), [(True, "--root"), (False, "--train_images")])
def test_convert_prints_flags_that_other_commands_accept(voc, tmp_path, capsys, monkeypatch, links, flag):
    if not links:
        monkeypatch.setattr(Path, "symlink_to", raise_os_error)
    for _ in range(2):  # the second call replaces the first conversion
        assert main(["convert", str(voc), str(tmp_path / "out")]) == 0
    flags = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("train with "))
    assert flags[0] == flag
    assert main(["check", *flags, "--output_dir", str(tmp_path / "run")]) == 0
    assert "train: 1 images (0 without objects), 1 objects of 1 classes" in capsys.readouterr().out


def test_convert_reports_the_issues_of_boxes(tmp_path, capsys):
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: train\n")
    (tmp_path / "train").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "train/a.png")
    (tmp_path / "train/a.txt").write_text("0 0.5 0.5 2 2\n0 0.5 0.5 0 0.1\n0 0.5 0.5 0.5 0.5\n")
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 0
    note = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    assert "1 zero-size, 1 beyond-edge" in note
    assert "annotation 2: bbox [10.0, 4.5, 0.0, 1.0]" in note


def test_convert_does_not_write_into_its_source(voc, capsys):
    assert main(["convert", str(voc), f"{voc}/train/.."]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert not (voc / "annotations").exists()


def test_an_unconverted_dataset_points_to_convert(voc, capsys):
    assert main(["show", "--root", str(voc)]) == 2
    assert "pix2seq convert" in capsys.readouterr().err


def test_show_draws_a_row_for_each_image(shapes_root, tmp_path):
    flags = ["--root", str(shapes_root), "--image_size", "64", "--num_bins", "64", "--max_objects", "12"]
    images = []
    for options in (
        ["--num_images", "1"],
        ["--num_images", "2"],
        ["--num_images", "2", "--epoch", "1"],
        ["--num_images", "2", "--color_jitter", "0.5"],
        ["--first", "11", "--num_images", "5", "--no_noise_objects"],
    ):
        assert main(["show", *flags, *options, "--output", str(tmp_path / "show.png")]) == 0
        with Image.open(tmp_path / "show.png") as image:
            images.append(np.asarray(image))
    one, two, next_epoch, color, last = images
    assert two.shape[0] > 1.7 * one.shape[0]
    assert last.shape[0] == one.shape[0]
    assert not np.array_equal(two, next_epoch)
    assert not np.array_equal(two, color)


@pytest.mark.parametrize("name", ["images/val2017/000000.png", "annotations/instances_train2017.json"])
def test_show_overwrites_no_input(shapes_root, capsys, name):
    before = (shapes_root / name).read_bytes()
    assert main(["show", "--root", str(shapes_root), "--output", str(shapes_root / name)]) == 2
    assert f"{name}: would overwrite the input" in capsys.readouterr().err
    assert (shapes_root / name).read_bytes() == before


def test_check_tests_its_folder_before_the_work(shapes_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pix2seq.data.commands.check_dataset", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "data").mkdir()
    train = str(shutil.copy(shapes_root / "annotations/instances_train2017.json", tmp_path / "data/check.json"))
    words = ["--train_images", str(shapes_root / "images/train2017"), "--train_json", train]
    words += ["--val_images", str(shapes_root / "images/val2017"), "--val_json", train]
    for folder, part in (("file", "cannot be written to"), (".", "check.json; name another")):
        assert main(["check", *words, "--output_dir", str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert f"--output_dir {tmp_path / folder}: " in error
        assert part in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "--first", "12"], "--first 12"),
        (["show", "--epoch", "-1"], "--epoch -1"),
        (["show", "--output", "/nowhere/x.png"], "--output /nowhere/x.png"),
        (["show", "--mix_rate", "0.5", "--no_noise_objects"], "--mix_rate 0.5"),
        (["shard"], "--output: missing"),
        (["shard", "--output", "x", "--shard_mb", "0"], "--shard_mb 0.0"),
        (["check", "--root", "/nowhere"], "--root /nowhere"),
        (["check", "--chek"], "--chek"),
        (["convert"], "source, output"),
        (["convert", "/nowhere", "out"], "/nowhere"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(shapes_root, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    root = [] if command == "convert" or "--root" in rest else ["--root", str(shapes_root)]
    try:
        code = main([command, *root, *rest])
    except SystemExit as error:
        code = error.code
    assert code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"pix2seq {command}: error: ")
    assert expected in message
    assert message.count("\n") == 1
