"""predict.py and the Pix2Seq class: any picture there is, the same boxes by every route, and nothing lost."""

import contextlib
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import pipeline

import pix2seq
from pix2seq import Pix2Seq, evaluate, predict
from pix2seq.argument_parser import parse
from pix2seq.data import EvalDataset, eval_loader
from pix2seq.data.image_files import BadImageError
from pix2seq.data.shapes import CATEGORY_IDS, SHAPES
from pix2seq.errors import UserError
from pix2seq.evaluate import EvaluateArguments
from pix2seq.evaluation.coco_metrics import coco_metrics
from pix2seq.inference import DetectionResult, predictor
from pix2seq.inference.inputs import find_inputs, name_inputs
from pix2seq.inference.result_files import ResultFolder
from pix2seq.inference.video import Video, opencv


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PICTURES = {
    "large.jpg": lambda path: photo(300, 170).save(path),  # so large that a loader could decode half of it
    "plain.png": lambda path: photo(70, 50, 1).save(path),
    "grey.jpg": lambda path: photo(64, 90, 2).convert("L").save(path),
    "cmyk.jpg": lambda path: photo(80, 60, 3).convert("CMYK").save(path),
    "turned.jpg": lambda path: photo(90, 40, 4).save(path, exif=turned()),
    "dot.png": lambda path: Image.new("RGB", (1, 1), "red").save(path),
    "wide.png": lambda path: photo(20000, 10, 5).save(path),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, save in PICTURES.items():
        save(folder / name)
    return folder


def run(folder, *words) -> int:
    words = ["--checkpoint", str(folder), "--num_workers", "0", "--device", "cpu", *map(str, words)]
    return predict.run(parse(predict.PredictArguments, words, "predict.py"))


def read(path) -> list[dict]:
    return json.loads(path.read_text())


# -- one answer by all routes ----------------------------------------------------------------------


def test_every_route_gives_the_same_boxes(folder, detector, pictures, tmp_path):
    assert run(folder, pictures, "--threshold", "0", "--output_dir", tmp_path / "out", "--no_pictures") == 0
    rows, images = (read(tmp_path / "out" / f"{name}.json") for name in ("predictions", "images"))
    assert [image["file_name"] for image in images] == [str(pictures / name) for name in sorted(PICTURES)]

    truth = {
        "images": [image | {"file_name": image["file_name"].rpartition("/")[2]} for image in images],
        "categories": [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, SHAPES, strict=True)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    words = ["--val_images", str(pictures), "--val_json", str(tmp_path / "truth.json"), "--num_workers", "0"]
    words += ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "scored"), "--num_images", "0"]
    metrics = evaluate.run_evaluation(parse(EvaluateArguments, words))
    assert coco_metrics(truth, rows)["AP"] == metrics["AP"]  # a COCO results file
    expected = [row for row in read(tmp_path / "scored" / "predictions.json") if row["score"] > 0]

    classes = dict(zip(CATEGORY_IDS, SHAPES, strict=True))
    detect = pipeline("object-detection", model=str(folder), device="cpu")
    for image in images:
        path = image["file_name"]
        wanted = [row for row in expected if row["image_id"] == image["id"]]
        assert wanted
        mine = [row for row in rows if row["file_name"] == path]
        assert [(row["image_id"], row["bbox"]) for row in mine] == [(row["image_id"], row["bbox"]) for row in wanted]
        assert [row["score"] for row in mine] == pytest.approx([row["score"] for row in wanted], abs=1e-5)
        assert [row["category_id"] for row in mine] == [row["category_id"] for row in wanted]
        assert [row["category_name"] for row in mine] == [classes[row["category_id"]] for row in mine]

        boxes = np.array([row["bbox"] for row in wanted])
        boxes[:, 2:] += boxes[:, :2]
        opened = Image.open(path)
        upright = opened.transpose(Image.Transpose.ROTATE_270) if opened.getexif() else opened.convert("RGB")
        for source in (path, opened, np.asarray(upright)):
            found = detector(source, threshold=0)
            np.testing.assert_allclose(found.boxes, boxes, atol=1e-9)
            assert found.names == [row["category_name"] for row in mine]
            assert found.scores.tolist() == pytest.approx([row["score"] for row in wanted], abs=1e-5)
            assert found.size == (image["height"], image["width"])
        answers = detect(path, threshold=0)
        assert [[*answer["box"].values()] for answer in answers] == boxes.astype(int).tolist()
        assert [answer["label"] for answer in answers] == found.names


# -- what is written -------------------------------------------------------------------------------


def test_every_format_says_the_same(folder, detector, pictures, tmp_path):
    names = ["plain.png", "grey.jpg"]
    words = [pictures / name for name in names]
    words += ["--threshold", "0", "--format", "coco", "yolo", "csv", "--output_dir", tmp_path]
    assert run(folder, *words) == 0
    rows, number = read(tmp_path / "predictions.json"), 0
    assert [line["name"] for line in read(tmp_path / "images.json")] == ["plain", "grey"]
    table = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(table) == len(rows) == 8
    classes = (tmp_path / "classes.txt").read_text().splitlines()
    assert classes == list(SHAPES)
    for name in names:
        found = detector(pictures / name, threshold=0)
        drawn = Image.open(tmp_path / f"{name[:-4]}.jpg")
        assert drawn.size == found.draw().size
        assert np.abs(np.asarray(drawn, float) - np.asarray(found.draw(), float)).mean() < 8
        lines = (tmp_path / "labels" / f"{name[:-4]}.txt").read_text().splitlines()
        assert len(lines) == len(found)
        for line, box, score in zip(lines, found.boxes, found.scores, strict=True):
            label, x, y, width, height, confidence = map(float, line.split())
            size = np.array([found.size[1], found.size[0]])
            corners = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2]) * np.tile(size, 2)
            np.testing.assert_allclose(corners, box, atol=0.01)
            row, entry = rows[number], table[number]
            assert entry["file_name"] == row["file_name"] == str(pictures / name)
            assert entry["class"] == row["category_name"] == classes[int(label)]
            assert float(entry["score"]) == row["score"] == pytest.approx(score, abs=1e-6)
            assert confidence == pytest.approx(score, abs=1e-6)
            np.testing.assert_allclose([float(entry[side]) for side in ("x1", "y1", "x2", "y2")], box, atol=1e-9)
            number += 1
    assert number == len(rows)


def test_a_picture_with_nothing_in_it_has_empty_files(folder, pictures, tmp_path):
    words = [pictures / "dot.png", "--threshold", "1", "--format", "coco", "yolo", "csv", "--output_dir", tmp_path]
    assert run(folder, *words) == 0
    assert read(tmp_path / "predictions.json") == []
    assert (tmp_path / "labels" / "dot.txt").read_text() == ""
    assert Image.open(tmp_path / "dot.jpg").size == (320, 320)


def test_threshold_and_classes_choose(detector, pictures):
    everything = detector(pictures / "plain.png", threshold=0)
    assert len(everything) == 4
    cut = float(everything.scores[1])
    assert len(detector(pictures / "plain.png", threshold=cut)) == 1  # above, as in transformers' pipeline
    for name in SHAPES:
        some = detector(pictures / "plain.png", threshold=0, classes=[name])
        assert some.names == [other for other in everything.names if other == name]
        assert detector(pictures / "plain.png", threshold=0, classes=name).names == some.names
    with pytest.raises(UserError, match=r"classes ellipsis: .*did you mean ellipse"):
        detector(pictures / "plain.png", classes=["ellipsis"])


def test_names_that_collide_are_numbered(folder, tmp_path):
    for name in ("a/x.jpg", "b/X.png", "b/x_2.png", "c/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo(20, 20).save(tmp_path / name)
    words = [tmp_path / "a", tmp_path / "b", tmp_path / "c" / "*.jpg", tmp_path / "a" / "x.jpg"]
    assert run(folder, *words, "--format", "yolo", "coco", "--output_dir", tmp_path / "out") == 0
    names = [image["name"] for image in read(tmp_path / "out" / "images.json")]
    assert names == ["x", "X_2", "x_2_2", "x_3"]
    for suffix in ("*.jpg", "labels/*.txt"):
        assert {path.stem for path in (tmp_path / "out").glob(suffix)} == set(names)


def test_nothing_that_is_there_is_lost(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo(20, 20).save("x.jpg")
    photo(30, 30).save("y.png")
    before = (tmp_path / "x.jpg").read_bytes()
    for words in ([], ["--overwrite"]):
        assert run(folder, "x.jpg", "--output_dir", ".", *words) == 2
        assert "x.jpg would take the place of an input" in capsys.readouterr().err
    assert (tmp_path / "x.jpg").read_bytes() == before
    assert run(folder, ".") == 0
    assert run(folder, ".") == 2  # its own pictures are no input
    assert "predictions: predictions.json and 3 more is there already" in capsys.readouterr().err
    assert run(folder, ".", "--overwrite") == 0
    assert sorted(path.name for path in (tmp_path / "predictions").glob("*.jpg")) == ["x.jpg", "y.jpg"]


@pytest.fixture
def earlier(folder, pictures, tmp_path):
    """What a run of other pictures and formats left, among files of somebody else's."""
    words = [pictures / "plain.png", pictures / "grey.jpg", "--format", "yolo", "csv", "--output_dir", tmp_path]
    assert run(folder, *words) == 0
    for name in FOREIGN:
        (tmp_path / name).write_text("somebody else's")
    return tmp_path


def files_in(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


FOREIGN = {"notes.txt", "dot.jpeg", "labels/dot.txt", "images.json.bak"}
AS_CSV = {"dot.jpg", "predictions.csv", "written.ndjson"}


def test_only_what_an_earlier_run_wrote_is_removed(folder, pictures, earlier):
    (earlier / "grey.jpg").write_text("changed")
    (earlier / "labels" / "plain.txt").rename(earlier / "moved.txt")
    (earlier / "labels" / "plain.txt").symlink_to(earlier / "moved.txt")
    assert run(folder, pictures / "dot.png", "--output_dir", earlier, "--overwrite") == 0
    new = {"dot.jpg", "predictions.json", "images.json", "written.ndjson"}
    assert files_in(earlier) == FOREIGN | new | {"grey.jpg", "labels/plain.txt", "moved.txt"}
    assert run(folder, pictures / "dot.png", "--output_dir", earlier, "--overwrite", "--format", "csv") == 0
    assert files_in(earlier) == FOREIGN | AS_CSV | {"grey.jpg", "labels/plain.txt", "moved.txt"}
    assert {(earlier / name).read_text() for name in FOREIGN} == {"somebody else's"}


def test_runs_that_do_not_collide_are_removed_together(folder, pictures, earlier):
    assert run(folder, pictures / "wide.png", "--output_dir", earlier) == 0
    assert {"plain.jpg", "predictions.csv", "wide.jpg", "images.json"} < files_in(earlier)
    assert run(folder, pictures / "large.jpg", "--output_dir", earlier, "--overwrite", "--no_pictures") == 0
    assert files_in(earlier) == FOREIGN | {"predictions.json", "images.json", "written.ndjson"}


def test_what_a_killed_run_left_is_removed(folder, pictures, earlier, monkeypatch):
    left, save = [], Image.Image.save

    def killed(image, path, **how):
        left.append((earlier / "written.ndjson").read_text() + '["half a li')
        save(image, path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        assert run(folder, pictures / "turned.jpg", "--output_dir", earlier) == 0
    (earlier / "written.ndjson").write_text(left[0])
    (earlier / "turned.jpg").write_text("half of it")
    for name in ("predictions.json", "images.json"):
        (earlier / name).unlink()
    assert run(folder, pictures / "dot.png", "--output_dir", earlier, "--overwrite", "--format", "csv") == 0
    assert files_in(earlier) == FOREIGN | AS_CSV


def test_a_torn_line_costs_no_other(folder, pictures, earlier, capsys):
    """And what could not be written is not taken for ours when somebody else puts it there."""
    with (earlier / "written.ndjson").open("a") as file:
        file.write('["half a li')
    files = ResultFolder(earlier, ["own.jpg"], [], overwrite=False)
    with pytest.raises(OSError, match="full"), files.writing("own.jpg"):
        raise OSError("full")
    assert run(folder, pictures / "wide.png", "--output_dir", earlier) == 2  # that of another, which is at work
    assert "written.ndjson is being written by another predict.py" in capsys.readouterr().err
    del files
    (earlier / "own.jpg").write_text("somebody else's")
    assert run(folder, pictures / "wide.png", "--output_dir", earlier) == 0
    assert run(folder, pictures / "dot.png", "--output_dir", earlier, "--overwrite", "--format", "csv") == 0
    assert files_in(earlier) == FOREIGN | AS_CSV | {"own.jpg"}


def test_mistakes_about_earlier_files_remove_nothing(folder, pictures, earlier, capsys):
    dot, own = pictures / "dot.png", (earlier / "written.ndjson").read_text()
    for words, written, said in (
        ([dot, "--format", "yolo"], own, "labels/dot.txt is there already, and not as predictions left it"),
        ([earlier / "grey.jpg", "--no_pictures"], own, "grey.jpg would take the place of an input"),
        ([dot], "not JSON\n", "written.ndjson is not what predict.py writes"),
        ([dot], '["a", "b", "c"]\n', "written.ndjson is not what predict.py writes"),
        ([dot], '["../notes.txt", null]\n', "written.ndjson names '../notes.txt', which lies elsewhere"),
        ([dot], '["labels/../notes.txt", null]\n', "which lies elsewhere"),
        ([dot], f'["{earlier}/notes.txt", null]\n', "which lies elsewhere"),
    ):
        (earlier / "written.ndjson").write_text(written)
        before = {name: (earlier / name).read_bytes() for name in files_in(earlier)}
        assert run(folder, *words, "--output_dir", earlier, "--overwrite") == 2
        assert said in capsys.readouterr().err
        assert {name: (earlier / name).read_bytes() for name in files_in(earlier)} == before


# -- what cannot be read ---------------------------------------------------------------------------


def test_what_cannot_be_read_is_told_and_the_rest_is_done(folder, tmp_path, capsys):
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "broken.jpg").write_bytes(b"no picture")
    (data / "empty.png").touch()
    photo(64, 64).save(data / "cut.jpg")
    (data / "cut.jpg").write_bytes((data / "cut.jpg").read_bytes()[:500])
    (data / "notes.txt").write_text("hello")
    (data / "table.csv").write_text("hello")
    (data / ".hidden.jpg").write_text("hello")
    photo(40, 40).save(data / "deep" / "good.png")
    (data / "deep" / "same").symlink_to(data)
    words = [data, data / "notes.txt", "--output_dir", tmp_path / "out", "--format", "coco", "csv"]
    assert run(folder, *words, "--batch_size", "2", "--num_workers", "1") == 2
    said = capsys.readouterr().err
    for name, why in (
        ("broken.jpg", "not an image"),
        ("empty.png", "it is empty"),
        ("cut.jpg", ""),
        ("notes.txt", "not"),
    ):
        assert f"cannot be read: {data / name}: {why}" in said
    assert f"left out, no pictures by their names: 2 files: {data}/.hidden.jpg, {data}/table.csv" in said
    assert "4 of 5 could not be read" in said
    assert [image["name"] for image in read(tmp_path / "out" / "images.json") if "unreadable" not in image] == ["good"]
    assert (tmp_path / "out" / "good.jpg").exists()


def test_only_regular_files_are_opened(folder, tmp_path, capsys):
    """Nobody writes to these pipes, so who reads them waits for ever."""
    for name in ("in/x.jpg", "named", "clip.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    photo(40, 40).save(tmp_path / "in" / "y.png")
    words = [tmp_path / "in", tmp_path / "named", tmp_path / "clip.mp4", "--output_dir", tmp_path / "out"]
    assert run(folder, *words) == 2
    said = capsys.readouterr().err
    for name in ("in/x.jpg", "named", "clip.mp4"):
        assert f"cannot be read: {tmp_path / name}: not a regular file" in said
    assert "3 of 4 could not be read" in said
    assert (tmp_path / "out" / "y.jpg").exists()


NAMES = ("new\nline.jpg", "100%d %s.jpg", "[x].jpg", "-dash.jpg", "é 日本.jpg", "\udcff.jpg", "5")


def test_any_name_is_a_name(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for name in NAMES:
        photo(20, 20).save(tmp_path / "in" / name, "JPEG")
    (tmp_path / "in" / "bro\nken.jpg").touch()
    monkeypatch.chdir(tmp_path / "in")
    words = [*NAMES, "bro\nken.jpg", "--format", "coco", "yolo", "csv", "--output_dir", tmp_path / "out\n%s"]
    for more in ([], ["--overwrite"]):
        assert run(folder, *words, *more) == 2
        said, told = capsys.readouterr()
        assert (len(said.splitlines()), len(told.splitlines())) == (2, 2)
    images = read(tmp_path / "out\n%s" / "images.json")
    assert [image["file_name"] for image in images if "unreadable" not in image] == list(NAMES)
    assert all((tmp_path / "out\n%s" / f"{image['name']}.jpg").exists() for image in images[:-1])


def test_only_we_speak_of_many_pixels(folder, tmp_path, capsys):
    (tmp_path / "x.ppm").write_bytes(b"P5 11000 11000 255\n")
    with warnings.catch_warnings(record=True) as others:
        assert run(folder, tmp_path / "x.ppm", "--output_dir", tmp_path / "out") == 2
    assert "x.ppm: 11000 x 11000 pixels, more than the 100 million allowed" in capsys.readouterr().err
    assert not [other for other in others if other.category is Image.DecompressionBombWarning]


def test_mistakes_are_told_in_one_line_before_any_work(folder, pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    picture, output = pictures / "dot.png", ["--output_dir", tmp_path / "out"]
    for words, said in (
        ([], "no pictures: name files"),
        ([""], "no pictures: name files"),
        ([tmp_path / "empty"], f"{tmp_path}/empty: holds no pictures"),
        ([pictures / "*.bmp"], "*.bmp: matches nothing"),
        ([tmp_path / "gone.jpg"], "gone.jpg: no such file or folder"),
        ([picture, "--checkpoint", tmp_path / "nowhere"], f"--checkpoint {tmp_path}/nowhere: no such folder"),
        ([picture, "--classes", "cat"], "--classes cat: the detector knows no such class"),
        ([picture, "--device", "cuda:77"], "--device cuda:77: cannot be used"),
        ([picture, "--device", "toaster"], "--device toaster: cannot be used"),
        ([picture, "--device", "meta"], "--device meta: cannot be used"),
        ([picture, "--dtype", "float16"], "--dtype float16: needs a GPU"),
        ([picture, "--output_dir", tmp_path / "file"], f"--output_dir {tmp_path}/file: is a file; name a folder"),
        ([picture, "--output_dir", tmp_path / "file" / "x"], f"{tmp_path}/file/x: cannot be written to"),
    ):
        assert run(folder, *output, *words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith(f"predict.py: error: {'' if words else said}")
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "2"], "--threshold 2.0: must be 0 to 1"),
        (["--threshold", "nan"], "--threshold nan: must be 0 to 1"),
        (["--format", "voc"], "--format voc: must be coco, yolo, csv"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--top_p", "2"], "--top_p 2.0: must be 0 (greedy) to 1"),
        (["--treshold", "0.5"], "--treshold: no such flag (did you mean --threshold?)"),
    ],
)
def test_flags_that_are_wrong(folder, words, said, capsys):
    with pytest.raises(SystemExit) as end:
        run(folder, "x.jpg", *words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        parse(predict.PredictArguments, ["x.jpg"], "predict.py")
    assert capsys.readouterr().err == "predict.py: error: --checkpoint: missing (the folder of a trained detector)\n"


def test_a_full_disk_is_told(folder, pictures, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert run(folder, pictures / "dot.png", "--output_dir", tmp_path) == 2
    assert capsys.readouterr().err.endswith(
        f"--output_dir {tmp_path}: cannot be written to (No space left on device)\n"
    )


@pytest.fixture
def _sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def ctrl_c() -> None:
    raise KeyboardInterrupt


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("_sigterm")
@pytest.mark.parametrize(("interrupt", "code"), [(ctrl_c, 130), (sigterm, 143)])
def test_what_was_found_before_an_interruption_is_kept(folder, pictures, tmp_path, monkeypatch, interrupt, code):
    whole, seen, write = DetectionResult.draw, [], Path.write_text

    def interrupted(found):
        seen.append(found)
        if len(seen) == 3:
            interrupt()
        return whole(found)

    def told_again(path, *args):
        if interrupt is sigterm and path.name == "predictions.json":  # as `timeout` does
            sigterm()
        return write(path, *args)

    monkeypatch.setattr(DetectionResult, "draw", interrupted)
    monkeypatch.setattr(Path, "write_text", told_again)
    assert run(folder, pictures, "--output_dir", tmp_path, "--threshold", "0") == code
    assert len({row["image_id"] for row in read(tmp_path / "predictions.json")}) == 3
    assert len(read(tmp_path / "images.json")) == 3


# -- in Python -------------------------------------------------------------------------------------


def test_a_list_gives_a_list(detector, pictures):
    paths = [pictures / "plain.png", str(pictures / "turned.jpg")]
    together = detector(paths, threshold=0, batch_size=1)
    assert [len(found) for found in together] == [4, 4]
    assert together[1].size == (90, 40)
    assert detector([]) == []
    assert isinstance(detector(paths[:1]), list)
    drawn = together[1].draw()
    assert drawn.size == (142, 320)  # enlarged, and upright
    plain = predictor.enlarge(_upright(Image.open(paths[1])), together[1].boxes, 320)[0]
    assert (np.asarray(drawn) != np.asarray(plain)).any()


def _upright(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.ROTATE_270)


def test_decoding_and_precision_can_be_chosen(folder, pictures):
    path, names = pictures / "plain.png", ("max_objects", "seed", "top_p")
    assert len(Pix2Seq.from_pretrained(folder, "cpu", max_objects=2)(path, threshold=0)) == 2
    seeds = [Pix2Seq.from_pretrained(folder, "cpu", seed=seed, top_p=1)(path, 0).boxes.tolist() for seed in (1, 2)]
    assert seeds[0] != seeds[1]
    half = Pix2Seq.from_pretrained(folder, "cpu", dtype="bfloat16")
    assert half.model.dtype == torch.float32
    precise, coarse = Pix2Seq.from_pretrained(folder, "cpu")(path, 0).scores, half(path, 0).scores
    assert (precise != coarse).any()
    args = parse(predict.PredictArguments, ["--checkpoint", "x", "--max_objects", "2", "--seed", "3", "--top_p", "0"])
    assert args.decoding() == dict(zip(names, (2, 3, 0), strict=True))
    for wrong in ({"max_object": 2}, {"top_p": 3}, {"device": "toaster"}, {"dtype": "int8"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Pix2Seq.from_pretrained(folder, **({"device": "cpu"} | wrong))


def test_what_is_no_picture_is_refused(detector, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    with pytest.raises(BadImageError, match=r"broken.jpg: not an image"):
        detector(tmp_path / "broken.jpg")
    (found,) = detector.stream([tmp_path / "broken.jpg"], threshold=0)
    assert "not an image" in found.unreadable
    assert len(found) == 0
    photo(64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-300])
    with pytest.raises(BadImageError, match="truncated"):
        detector(Image.open(tmp_path / "cut.jpg"))
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), 7, None):
        with pytest.raises(ValueError, match="must be"):
            detector(bad)
    with pytest.raises(ValueError, match="a picture of 0 x 5 pixels: must have some"):
        detector(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size 0, num_workers 0: must be at least 1, and 0"),
        ({"batch_size": 2.5}, "batch_size 2.5: must be a whole number"),
        ({"threshold": None}, "threshold None: must be a number"),
        ({"threshold": "a"}, "threshold 'a': must be a number"),
        ({"threshold": float("nan")}, "threshold nan: must be a number"),
        ({"classes": "crux"}, "classes crux: the detector knows no such class"),
        ({"classes": [3]}, "classes 3: the detector knows no such class"),
    ],
)
def test_options_that_are_wrong_are_named(detector, pictures, options, said):
    with pytest.raises(UserError) as error:
        detector(pictures / "dot.png", **options)
    assert str(error.value).startswith(said)


def test_decoding_options_that_are_no_numbers_are_named(detector):
    for options, kind in (
        ({"top_p": "a"}, "number"),
        ({"max_objects": None}, "whole number"),
        ({"seed": 0.5}, "whole"),
    ):
        ((name, value),) = options.items()
        with pytest.raises(UserError, match=f"^{name} {value!r}: must be a {kind}"):
            Pix2Seq(detector.model, "cpu", **options)
    assert Pix2Seq(detector.model, "cpu", top_p=1, seed=np.int64(3), box_score_power=np.float32(0.5)).options.seed == 3


def test_an_array_three_pixels_high_is_rows_first(detector):
    pixels = np.asarray(photo(9, 3))
    found, flipped = detector(pixels, 0), detector(pixels[..., ::-1][..., ::-1], 0)  # a view with other strides
    assert found.size == flipped.size == (3, 9)


def test_16_bits_are_the_same_from_a_file_and_from_memory(detector, tmp_path):
    levels = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    from_file, opened = (detector(x, 0) for x in (tmp_path / "deep.png", Image.open(tmp_path / "deep.png")))
    assert from_file.boxes.tolist() == opened.boxes.tolist()


def test_logits_that_are_not_finite_name_their_pictures(folder, pictures):
    detector = Pix2Seq.from_pretrained(folder, "cpu")
    whole = detector.model.encode
    detector.model.encode = lambda pixels: whole(pixels).index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(RuntimeError, match=r"grey.jpg: the detector's logits are NaN"):
        detector([pictures / "dot.png", pictures / "grey.jpg"])


@pytest.mark.slow  # for a second Python that imports everything
def test_importing_the_package_does_not_load_it():
    code = "import sys, pix2seq; assert not {'pix2seq.inference', 'pix2seq.data', 'cv2'} & set(sys.modules); "
    code += "from pix2seq import Pix2Seq; assert not {'matplotlib', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="has no attribute 'Pix2Sequence'"):
        pix2seq.Pix2Sequence  # noqa: B018


# -- videos ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    cv2 = opencv("clip.avi")
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (96, 64))
    for seed in range(7):
        writer.write(np.asarray(photo(96, 64, seed))[..., ::-1].copy())
    writer.release()
    return path


def frames(path) -> list[np.ndarray]:
    return list(Video(str(path)))


def test_a_video(folder, detector, clip, tmp_path):
    assert run(folder, clip, "--output_dir", tmp_path, "--threshold", "0", "--batch_size", "3") == 0
    lines = [json.loads(line) for line in (tmp_path / "clip.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(7))
    assert lines[6]["time"] == pytest.approx(1.2)
    drawn = frames(tmp_path / "clip.mp4")
    assert len(drawn) == 7
    for line, frame, shown in zip(lines, frames(clip), drawn, strict=True):
        assert np.abs(frame.astype(float) - np.asarray(photo(96, 64, line["frame"]), float)).mean() < 12  # RGB
        found = detector(frame, threshold=0)
        assert [row["category_name"] for row in line["objects"]] == found.names
        np.testing.assert_allclose(
            [row["bbox"][:2] for row in line["objects"]], found.boxes[:, :2].reshape(-1, 2), atol=1e-9
        )
        expected = np.asarray(found.draw(), float)[: shown.shape[0], : shown.shape[1]]
        assert np.abs(expected - shown).mean() < 12


def test_videos_that_cannot_be_read_are_told(folder, clip, pictures, tmp_path, capfd):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 50)
    data = clip.read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    words = [tmp_path / "broken.mp4", tmp_path / "cut.avi", pictures / "dot.png", "--output_dir", tmp_path / "out"]
    assert run(folder, *words, "--no_pictures") == 2
    said = capfd.readouterr().err
    assert f"{tmp_path}/broken.mp4: no frame of a video in it" in said
    assert f"{tmp_path}/cut.avi: only " in said
    assert "2 of 3 could not be read" in said
    assert len(said.splitlines()) == 3
    assert len(read(tmp_path / "out" / "images.json")) == 1
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_a_video_that_cannot_be_written_whole_is_told(folder, clip, tmp_path, capfd):
    """OpenCV says nothing of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert run(folder, clip, "--output_dir", tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr().err == f"predict.py: error: {tmp_path}/out/clip.mp4: OpenCV could not write all of it\n"


def test_videos_need_a_package_that_is_named(folder, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert run(folder, clip, "--output_dir", tmp_path) == 2
    assert "videos need OpenCV: pip install opencv-python-headless" in capsys.readouterr().err


@pytest.mark.usefixtures("_sigterm")
@pytest.mark.parametrize(("interrupt", "code"), [(None, 0), (ctrl_c, 0), (sigterm, 143)])
def test_a_webcam(folder, tmp_path, monkeypatch, interrupt, code):
    """A stand-in for one, which is pulled out or left with Ctrl-C or SIGTERM after four frames."""
    import cv2

    class Camera:
        def __new__(cls, source):  # what was written is a file
            return super().__new__(cls) if source == 0 else whole(source)

        def __init__(self, number):
            self.frames, self.released = [np.asarray(photo(48, 32, seed)) for seed in range(4)], False
            cameras.append(self)

        def get(self, what):
            return 0.0

        def read(self):
            if not self.frames and interrupt:
                interrupt()
            return (True, self.frames.pop()) if self.frames else (False, None)

        def release(self):
            self.released = True

    cameras, whole = [], cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    assert run(folder, "0", "--output_dir", tmp_path) == code
    assert cameras[0].released
    assert len((tmp_path / "webcam_0.jsonl").read_text().splitlines()) == 4
    monkeypatch.undo()
    assert len(frames(tmp_path / "webcam_0.mp4")) == 4


def test_a_folder_may_lie_in_the_output_folder(pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    expected = find_inputs([str(folder)], tmp_path / "elsewhere")
    assert find_inputs([str(folder)], tmp_path) == find_inputs([str(folder)], folder) == expected
    shutil.copytree(pictures, folder / "out")
    assert find_inputs([str(folder)], folder / "out") == expected
    assert len(find_inputs([str(folder)], tmp_path / "elsewhere")[0]) == 2 * len(expected[0])


def test_many_pictures_of_one_name(monkeypatch):
    paths = [f"{number}/rgb.png" for number in range(50_000)]
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    names = name_inputs([*paths, "x/RGB_7.png", "y/rgb.jpg"])
    assert len({name.casefold() for name in names.values()}) == 50_002
    assert (names["0/rgb.png"], names["1/rgb.png"], names["x/RGB_7.png"]) == ("rgb", "rgb_2", "RGB_7_2")


def test_a_signal_that_is_dropped_is_heeded_at_the_next_picture(folder, pictures, tmp_path, monkeypatch):
    """As by a callback of Python's own, in which what a handler raises is ignored."""
    whole, seen = DetectionResult.draw, []

    def terminated(found):
        seen.append(found)
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        return whole(found)

    monkeypatch.setattr(DetectionResult, "draw", terminated)
    assert run(folder, pictures, "--output_dir", tmp_path / "out", "--batch_size", 1) == 143
    assert len(seen) == 1
    assert len(json.loads((tmp_path / "out" / "images.json").read_text())) == 1


def test_no_more_processes_than_batches(detector, pictures, monkeypatch):
    monkeypatch.setattr(DataLoader, "__iter__", lambda loader: iter([loader.num_workers]))
    loader = eval_loader(EvalDataset(range(5), None), 2, 0, 1, num_workers=10_000)
    assert list(loader) == [3]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"temprature": 2}, r"temprature: no such option \(did you mean temperature\?\)"),
        ({"device": "nonsense"}, r"device nonsense: cannot be used here: cpu, cuda, or cuda:1 and so on \("),
    ],
)
def test_mistakes_in_python_are_told(folder, words, says):
    with pytest.raises(UserError, match=says):
        Pix2Seq.from_pretrained(folder, **words)


def test_mistakes_in_a_call_are_told(detector, pictures):
    with pytest.raises(UserError, match="threshold 2: must be 0 to 1"):
        detector(pictures / "dot.png", threshold=2)
    with pytest.raises(UserError, match="classes zebra: the detector knows no such class; it knows ellipse"):
        detector(pictures / "dot.png", classes="zebra")
    assert len(detector(pictures / "dot.png", 0, classes=None)) == len(detector(pictures / "dot.png", 0))


def test_the_message_about_bombs_names_our_limit(detector, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="400000000 pixels, more than the 100 million allowed"):
        detector(tmp_path / "bomb.png")
