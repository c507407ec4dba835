"""predict.py and the class Pix2Seq: every route gives the same boxes, and unusual files are handled."""

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
from transformers import pipeline

from pix2seq import Pix2Seq, evaluate, predict
from pix2seq.argument_parser import parse
from pix2seq.data.image_files import BadImageError
from pix2seq.data.shapes import CATEGORY_IDS, SHAPES
from pix2seq.errors import UserError
from pix2seq.evaluate import EvaluateArguments
from pix2seq.evaluation.coco_metrics import coco_metrics
from pix2seq.inference import DetectionResult
from pix2seq.inference.inputs import find_inputs
from pix2seq.inference.video import VideoReader, import_opencv


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


IMAGES = {
    "large.jpg": lambda path: random_image(300, 170).save(path),  # large enough for decoding at half the size
    "plain.png": lambda path: random_image(70, 50, 1).save(path),
    "grey.jpg": lambda path: random_image(64, 90, 2).convert("L").save(path),
    "cmyk.jpg": lambda path: random_image(80, 60, 3).convert("CMYK").save(path),
    "rotated.jpg": lambda path: random_image(90, 40, 4).save(path, exif=rotated_exif()),
    "dot.png": lambda path: Image.new("RGB", (1, 1), "red").save(path),
    "wide.png": lambda path: random_image(20000, 10, 5).save(path),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, save in IMAGES.items():
        save(folder / name)
    return folder


def run(folder, *words) -> int:
    return predict.main(["--checkpoint", str(folder), "--num_workers", "0", "--device", "cpu", *map(str, words)])


def read(path) -> list[dict]:
    return json.loads(path.read_text())


# -- the same boxes by every route -----------------------------------------------------------------


def test_every_route_gives_the_same_boxes(folder, detector, images, tmp_path):
    assert run(folder, images, "--threshold", "0", "--output_dir", tmp_path / "out", "--no_save_images") == 0
    predictions, entries = (read(tmp_path / "out" / f"{name}.json") for name in ("predictions", "images"))
    assert [entry["file_name"] for entry in entries] == [str(images / name) for name in sorted(IMAGES)]

    ground_truth = {
        "images": [entry | {"file_name": entry["file_name"].rpartition("/")[2]} for entry in entries],
        "categories": [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, SHAPES, strict=True)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(ground_truth))
    words = ["--val_images", str(images), "--val_json", str(tmp_path / "gt.json"), "--num_workers", "0"]
    words += ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "eval"), "--num_images", "0"]
    metrics = evaluate.run_evaluation(parse(EvaluateArguments, words))
    assert coco_metrics(ground_truth, predictions)["AP"] == metrics["AP"]
    evaluated = [row for row in read(tmp_path / "eval" / "predictions.json") if row["score"] > 0]

    classes = dict(zip(CATEGORY_IDS, SHAPES, strict=True))
    detect = pipeline("object-detection", model=str(folder), device="cpu")
    for entry in entries:
        path = entry["file_name"]
        expected = [row for row in evaluated if row["image_id"] == entry["id"]]
        assert expected
        rows = [row for row in predictions if row["file_name"] == path]
        assert [(row["image_id"], row["bbox"]) for row in rows] == [(row["image_id"], row["bbox"]) for row in expected]
        assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in expected], abs=1e-5)
        assert [row["category_id"] for row in rows] == [row["category_id"] for row in expected]
        assert [row["category_name"] for row in rows] == [classes[row["category_id"]] for row in rows]

        boxes = np.array([row["bbox"] for row in expected])
        boxes[:, 2:] += boxes[:, :2]
        image = Image.open(path)
        upright = image.transpose(Image.Transpose.ROTATE_270) if image.getexif() else image.convert("RGB")
        for source in (path, image, np.asarray(upright)):
            result = detector(source, threshold=0)
            np.testing.assert_allclose(result.boxes, boxes, atol=1e-9)
            assert result.names == [row["category_name"] for row in rows]
            assert result.scores.tolist() == pytest.approx([row["score"] for row in expected], abs=1e-5)
            assert result.size == (entry["height"], entry["width"])
        outputs = detect(path, threshold=0)
        assert [[*output["box"].values()] for output in outputs] == boxes.astype(int).tolist()
        assert [output["label"] for output in outputs] == result.names


# -- result files ----------------------------------------------------------------------------------


def test_all_formats_contain_the_same_objects(folder, detector, images, tmp_path):
    names = ["plain.png", "grey.jpg"]
    words = [images / name for name in names]
    words += ["--threshold", "0", "--format", "coco", "yolo", "csv", "--output_dir", tmp_path]
    assert run(folder, *words) == 0
    rows = read(tmp_path / "predictions.json")
    assert [entry["name"] for entry in read(tmp_path / "images.json")] == ["plain", "grey"]
    table = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(table) == len(rows) == 8
    classes = (tmp_path / "classes.txt").read_text().splitlines()
    assert classes == list(SHAPES)
    entries = iter(zip(rows, table, strict=True))
    for name in names:
        result = detector(images / name, threshold=0)
        drawn = Image.open(tmp_path / f"{name[:-4]}.jpg")
        assert drawn.size == result.draw().size
        assert np.abs(np.asarray(drawn, float) - np.asarray(result.draw(), float)).mean() < 8
        lines = (tmp_path / "labels" / f"{name[:-4]}.txt").read_text().splitlines()
        for line, box, score in zip(lines, result.boxes, result.scores, strict=True):
            label, x, y, width, height, confidence = map(float, line.split())
            corners = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
            np.testing.assert_allclose(corners * np.tile(result.size[::-1], 2), box, atol=0.01)
            row, cells = next(entries)
            assert cells["file_name"] == row["file_name"] == str(images / name)
            assert cells["class"] == row["category_name"] == classes[int(label)]
            assert float(cells["score"]) == row["score"] == pytest.approx(score, abs=1e-6)
            assert confidence == pytest.approx(score, abs=1e-6)
            np.testing.assert_allclose([float(cells[side]) for side in ("x1", "y1", "x2", "y2")], box, atol=1e-9)
    assert next(entries, None) is None


def test_an_image_without_objects_has_empty_files(folder, images, tmp_path):
    words = [images / "dot.png", "--threshold", "1", "--format", "coco", "yolo", "csv", "--output_dir", tmp_path]
    assert run(folder, *words) == 0
    assert read(tmp_path / "predictions.json") == []
    assert (tmp_path / "labels" / "dot.txt").read_text() == ""
    assert Image.open(tmp_path / "dot.jpg").size == (320, 320)


def test_threshold_and_classes_filter_objects(detector, images):
    every = detector(images / "plain.png", threshold=0)
    assert len(every) == 4
    assert len(detector(images / "plain.png", threshold=float(every.scores[1]))) == 1  # strictly higher
    for name in SHAPES:
        some = detector(images / "plain.png", threshold=0, classes=[name])
        assert some.names == [other for other in every.names if other == name]
        assert detector(images / "plain.png", threshold=0, classes=name).names == some.names


def test_colliding_names_are_numbered(folder, tmp_path):
    for name in ("a/x.jpg", "b/X.png", "b/x_2.png", "c/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        random_image(20, 20).save(tmp_path / name)
    words = [tmp_path / "a", tmp_path / "b", tmp_path / "c" / "*.jpg", tmp_path / "a" / "x.jpg"]
    assert run(folder, *words, "--format", "yolo", "coco", "--output_dir", tmp_path / "out") == 0
    names = [entry["name"] for entry in read(tmp_path / "out" / "images.json")]
    assert names == ["x", "X_2", "x_2_2", "x_3"]
    for pattern in ("*.jpg", "labels/*.txt"):
        assert {path.stem for path in (tmp_path / "out").glob(pattern)} == set(names)


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_an_input_is_never_overwritten(folder, tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    random_image(20, 20).save("x.jpg")
    before = (tmp_path / "x.jpg").read_bytes()
    assert run(folder, "x.jpg", "--output_dir", ".", *options) == 2
    assert "x.jpg is an input" in capsys.readouterr().err
    assert (tmp_path / "x.jpg").read_bytes() == before


def test_existing_files_are_replaced_only_with_overwrite(folder, images, tmp_path, capsys):
    (tmp_path / "dot.jpg").write_text("an earlier result")
    (tmp_path / "linked.json").write_text("another file")
    (tmp_path / "images.json").symlink_to(tmp_path / "linked.json")
    assert run(folder, images / "dot.png", "--output_dir", tmp_path) == 2
    assert "images.json and 1 more exists" in capsys.readouterr().err
    assert (tmp_path / "dot.jpg").read_text() == "an earlier result"
    assert run(folder, images / "dot.png", "--output_dir", tmp_path, "--overwrite") == 0
    assert Image.open(tmp_path / "dot.jpg").size == (320, 320)
    assert len(read(tmp_path / "images.json")) == 1
    assert (tmp_path / "linked.json").read_text() == "another file"


def test_the_output_folder_is_not_searched_for_images(folder, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_image(20, 20).save("x.jpg")
    for options in ([], ["--overwrite"]):
        assert run(folder, ".", *options) == 0
        assert [path.name for path in (tmp_path / "predictions").glob("*.jpg")] == ["x.jpg"]
    nested = tmp_path / "images"
    shutil.copytree(images, nested)
    expected = find_inputs([str(nested)], tmp_path / "elsewhere")
    assert find_inputs([str(nested)], tmp_path) == find_inputs([str(nested)], nested) == expected


def test_every_name_of_a_file_is_an_input_and_has_an_output(folder, images, tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/a.png"):
        (tmp_path / "in" / name).symlink_to(images / "dot.png")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    words = [tmp_path / "in", tmp_path / "in/../in/a.png", f"{tmp_path}/in/**/*.png"]
    assert run(folder, *words, "--output_dir", tmp_path / "out") == 0
    assert [entry["name"] for entry in read(tmp_path / "out/images.json")] == ["a", "b", "a_2"]
    assert {path.name for path in (tmp_path / "out").glob("*.jpg")} == {"a.jpg", "b.jpg", "a_2.jpg"}


# -- unreadable inputs and invalid arguments -------------------------------------------------------


def test_unreadable_inputs_are_reported_and_the_others_are_processed(folder, tmp_path, capsys):
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "broken.jpg").write_bytes(b"not an image")
    (data / "empty.png").touch()
    random_image(64, 64).save(data / "cut.jpg")
    (data / "cut.jpg").write_bytes((data / "cut.jpg").read_bytes()[:500])
    (data / "bomb.ppm").write_bytes(b"P5 11000 11000 255\n")
    (data / "notes.txt").write_text("hello")
    (data / "table.csv").write_text("hello")
    (data / ".hidden.jpg").write_text("hello")
    random_image(40, 40).save(data / "deep" / "good.png")
    (data / "deep" / "loop").symlink_to(data)
    for name in ("pipe.jpg", "clip.mp4"):  # without a writer: reading it would block
        os.mkfifo(data / name)
    words = [data, data / "notes.txt", data / "clip.mp4", "--output_dir", tmp_path / "out"]
    with warnings.catch_warnings(record=True) as caught:
        assert run(folder, *words, "--format", "coco", "csv", "--batch_size", "2", "--num_workers", "1") == 2
    error = capsys.readouterr().err
    for name, reason in (
        ("broken.jpg", "not an image"),
        ("empty.png", ""),
        ("cut.jpg", ""),
        ("bomb.ppm", "11000 x 11000 pixels"),
        ("notes.txt", ""),
        ("pipe.jpg", "not a regular file"),
        ("clip.mp4", "not a regular file"),
    ):
        assert f"cannot be read: {data / name}: {reason}" in error
    assert f"2 files that are not images by their suffix: {data}/.hidden.jpg, {data}/table.csv" in error
    assert "7 of 8 inputs cannot be read" in error
    assert [entry["name"] for entry in read(tmp_path / "out" / "images.json") if "error" not in entry] == ["good"]
    assert (tmp_path / "out" / "good.jpg").exists()
    assert not [warning for warning in caught if warning.category is Image.DecompressionBombWarning]


UNUSUAL_NAMES = ("new\nline.jpg", "100%d %s.jpg", "[x].jpg", "-dash.jpg", "é 日本.jpg", "\udcff.jpg", "5")


def test_file_names_may_be_unusual(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    for name in UNUSUAL_NAMES:
        random_image(20, 20).save(tmp_path / "in" / name, "JPEG")
    (tmp_path / "in" / "bro\nken.jpg").touch()
    monkeypatch.chdir(tmp_path / "in")
    output = tmp_path / "out\n%s"
    assert run(folder, *UNUSUAL_NAMES, "bro\nken.jpg", "--format", "coco", "yolo", "csv", "--output_dir", output) == 2
    captured = capsys.readouterr()
    assert (len(captured.out.splitlines()), len(captured.err.splitlines())) == (2, 2)
    entries = read(output / "images.json")
    assert [entry["file_name"] for entry in entries if "error" not in entry] == list(UNUSUAL_NAMES)
    assert all((output / f"{entry['name']}.jpg").exists() for entry in entries[:-1])


def test_mistakes_get_one_line_before_any_work(folder, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    image, output = images / "dot.png", ["--output_dir", tmp_path / "out"]
    for words, message in (
        ([], "no inputs"),
        ([""], "no inputs"),
        ([tmp_path / "empty"], f"{tmp_path}/empty: contains no images"),
        ([images / "*.bmp"], "*.bmp: matches no file"),
        ([tmp_path / "gone.jpg"], "gone.jpg: no such file"),
        ([image, "--checkpoint", tmp_path / "nowhere"], f"--checkpoint {tmp_path}/nowhere: no such folder"),
        ([image, "--classes", "cat"], "--classes cat: "),
        ([image, "--device", "cuda:77"], "--device cuda:77: cannot be used"),
        ([image, "--device", "toaster"], "--device toaster: cannot be used"),
        ([image, "--dtype", "float16"], "--dtype float16: needs a GPU"),
        ([image, "--output_dir", tmp_path / "file"], f"--output_dir {tmp_path}/file: is a file; name a folder"),
        ([image, "--output_dir", tmp_path / "file" / "x"], f"{tmp_path}/file/x: cannot be written to"),
    ):
        assert run(folder, *output, *words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("predict.py: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threshold", "2"], "--threshold 2.0: must be 0 to 1"),
        (["--threshold", "nan"], "--threshold nan: "),
        (["--format", "voc"], "--format voc: must be coco, yolo, csv"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--top_p", "2"], "--top_p 2.0: must be 0 to 1"),
        (["--treshold", "0.5"], "--treshold: no such flag (did you mean --threshold?)"),
        (["--checkpoint"], "--checkpoint: "),
    ],
)
def test_invalid_flags_are_named(folder, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(folder, "x.jpg", *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_gets_one_line(folder, images, tmp_path, monkeypatch, capsys):
    def raise_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", raise_full)
    assert run(folder, images / "dot.png", "--output_dir", tmp_path) == 2
    error = f"--output_dir {tmp_path}: cannot be written to (No space left on device)\n"
    assert capsys.readouterr().err.endswith(error)


def ctrl_c() -> None:
    raise KeyboardInterrupt


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("interrupt", "code"), [(ctrl_c, 130), (sigterm, 143)])
def test_results_before_an_interruption_are_written(folder, images, tmp_path, monkeypatch, interrupt, code):
    draw, write_text, drawn = DetectionResult.draw, Path.write_text, []

    def interrupted_draw(result):
        drawn.append(result)
        if len(drawn) == 3:
            interrupt()
        return draw(result)

    def write_and_terminate(path, *args):
        if interrupt is sigterm and path.name == "predictions.json":  # `timeout` sends a second signal
            sigterm()
        return write_text(path, *args)

    monkeypatch.setattr(DetectionResult, "draw", interrupted_draw)
    monkeypatch.setattr(Path, "write_text", write_and_terminate)
    assert run(folder, images, "--output_dir", tmp_path, "--threshold", "0") == code
    assert len({row["image_id"] for row in read(tmp_path / "predictions.json")}) == 3
    assert len(read(tmp_path / "images.json")) == 3


def test_a_dropped_signal_exception_takes_effect_at_the_next_image(folder, images, tmp_path, monkeypatch):
    """Python ignores an exception of a signal handler that runs inside a callback of its own."""
    draw = DetectionResult.draw

    def draw_and_drop(result):
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        return draw(result)

    monkeypatch.setattr(DetectionResult, "draw", draw_and_drop)
    assert run(folder, images, "--output_dir", tmp_path, "--batch_size", 1) == 143
    assert len(read(tmp_path / "images.json")) == 1


# -- the Python class ------------------------------------------------------------------------------


def test_a_list_gives_a_list(detector, images):
    paths = [images / "plain.png", str(images / "rotated.jpg")]
    results = detector(paths, threshold=0, batch_size=1)
    assert [len(result) for result in results] == [4, 4]
    assert results[1].size == (90, 40)
    assert results[1].draw().size == (142, 320)  # enlarged and upright
    assert detector([]) == []
    assert isinstance(detector(paths[:1]), list)


def test_decoding_options_and_precision(folder, images):
    path = images / "plain.png"
    assert len(Pix2Seq.from_pretrained(folder, "cpu", max_objects=2)(path, threshold=0)) == 2
    seeds = [Pix2Seq.from_pretrained(folder, "cpu", seed=seed, top_p=1)(path, 0).boxes.tolist() for seed in (1, 2)]
    assert seeds[0] != seeds[1]
    bfloat16 = Pix2Seq.from_pretrained(folder, "cpu", dtype="bfloat16")
    assert bfloat16.model.dtype == torch.float32
    assert (Pix2Seq.from_pretrained(folder, "cpu")(path, 0).scores != bfloat16(path, 0).scores).any()
    words = ["--checkpoint", "x", "--max_objects", "2", "--seed", "3", "--top_p", "0"]
    assert parse(predict.PredictArguments, words).decoding() == {"max_objects": 2, "seed": 3, "top_p": 0}


def test_unreadable_images_raise_or_have_an_error(detector, tmp_path):
    (tmp_path / "broken.jpg").write_text("not an image")
    with pytest.raises(BadImageError, match=r"broken.jpg: not an image"):
        detector(tmp_path / "broken.jpg")
    (result,) = detector.stream([tmp_path / "broken.jpg"], threshold=0)
    assert "not an image" in result.error
    assert len(result) == 0
    random_image(64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-300])
    with pytest.raises(BadImageError, match="truncated"):
        detector(Image.open(tmp_path / "cut.jpg"))
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(BadImageError, match="400000000 pixels"):
        detector(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("RGB", (0, 5)),
        7,
        None,
    ],
)
def test_sources_that_are_not_images_are_rejected(detector, source):
    with pytest.raises(ValueError, match="must "):
        detector(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"threshold": 2}, "threshold 2: must be 0 to 1"),
        ({"threshold": float("nan")}, "threshold nan: must be 0 to 1"),
        ({"classes": "ellipsis"}, r"classes ellipsis: .*did you mean ellipse"),
        ({"classes": "zebra"}, "classes zebra: .*ellipse"),
        ({"classes": [3]}, "classes 3: "),
    ],
)
def test_invalid_arguments_of_a_call_are_named(detector, images, options, message):
    with pytest.raises(UserError, match=message):
        detector(images / "dot.png", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 2}, r"temprature: no such decoding option \(did you mean temperature\?\)"),
        ({"top_p": 3}, "top_p"),
        ({"device": "meta"}, "device meta: cannot be used"),
        ({"dtype": "int8"}, "dtype int8: must be one of float32"),
    ],
)
def test_invalid_arguments_of_the_class_are_named(folder, options, message):
    with pytest.raises(UserError, match=message):
        Pix2Seq.from_pretrained(folder, **({"device": "cpu"} | options))


def test_16_bit_images_are_the_same_from_a_file_and_from_memory(detector, tmp_path):
    levels = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    from_file, opened = (detector(source, 0) for source in (tmp_path / "deep.png", Image.open(tmp_path / "deep.png")))
    assert from_file.boxes.tolist() == opened.boxes.tolist()


def test_non_finite_logits_name_the_image(folder, images):
    detector = Pix2Seq.from_pretrained(folder, "cpu")
    encode = detector.model.encode
    detector.model.encode = lambda pixels: encode(pixels).index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(RuntimeError, match=r"grey.jpg: the model's logits are NaN"):
        detector([images / "dot.png", images / "grey.jpg"])


@pytest.mark.slow  # starts a second Python
def test_importing_the_package_does_not_import_inference():
    code = "import sys, pix2seq; assert not {'pix2seq.inference', 'pix2seq.data', 'cv2'} & set(sys.modules); "
    code += "from pix2seq import Pix2Seq; assert not {'matplotlib', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- videos ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    cv2 = import_opencv("clip.avi")
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (96, 64))
    for seed in range(7):
        writer.write(np.asarray(random_image(96, 64, seed))[..., ::-1].copy())
    writer.release()
    return path


def frames(path) -> list[np.ndarray]:
    return list(VideoReader(str(path)))


def test_every_frame_of_a_video_is_written(folder, detector, clip, tmp_path):
    assert run(folder, clip, "--output_dir", tmp_path, "--threshold", "0", "--batch_size", "3") == 0
    lines = [json.loads(line) for line in (tmp_path / "clip.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(7))
    assert lines[6]["time"] == pytest.approx(1.2)
    for line, frame, drawn in zip(lines, frames(clip), frames(tmp_path / "clip.mp4"), strict=True):
        assert np.abs(frame.astype(float) - np.asarray(random_image(96, 64, line["frame"]), float)).mean() < 12  # RGB
        result = detector(frame, threshold=0)
        assert [row["category_name"] for row in line["objects"]] == result.names
        corners = np.array([row["bbox"][:2] for row in line["objects"]]).reshape(-1, 2)
        np.testing.assert_allclose(corners, result.boxes[:, :2], atol=1e-9)
        expected = np.asarray(result.draw(), float)[: drawn.shape[0], : drawn.shape[1]]
        assert np.abs(expected - drawn).mean() < 12


def test_unreadable_videos_are_reported(folder, clip, images, tmp_path, capfd):
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 50)
    data = clip.read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    words = [tmp_path / "broken.mp4", tmp_path / "cut.avi", images / "dot.png", "--output_dir", tmp_path / "out"]
    assert run(folder, *words, "--no_save_images") == 2
    error = capfd.readouterr().err
    assert f"{tmp_path}/broken.mp4: contains no video frame" in error
    assert f"{tmp_path}/cut.avi: only " in error
    assert "2 of 3 inputs cannot be read" in error
    assert len(error.splitlines()) == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.json", "images.json", "cut.jsonl"}


def test_an_incompletely_written_video_is_an_error(folder, clip, tmp_path, capfd):
    """OpenCV reports no error when the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert run(folder, clip, "--output_dir", tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capfd.readouterr().err
    assert error.startswith(f"predict.py: error: {tmp_path}/out/clip.mp4: OpenCV could not write all frames")
    assert error.count("\n") == 1


def test_videos_without_opencv_are_an_error(folder, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert run(folder, clip, "--output_dir", tmp_path) == 2
    assert "videos need OpenCV: pip install opencv-python-headless" in capsys.readouterr().err


@pytest.mark.parametrize(("interrupt", "code"), [(None, 0), (ctrl_c, 0), (sigterm, 143)])
def test_a_webcam_is_read_until_it_ends_or_a_signal_arrives(folder, tmp_path, monkeypatch, interrupt, code):
    import cv2

    class Webcam:
        def __new__(cls, source):  # the written video is read back
            return super().__new__(cls) if source == 0 else video_capture(source)

        def __init__(self, number):
            self.frames, self.released = [np.asarray(random_image(48, 32, seed)) for seed in range(4)], False
            webcams.append(self)

        def get(self, property_id):
            return 0.0

        def read(self):
            if not self.frames and interrupt:
                interrupt()
            return (True, self.frames.pop()) if self.frames else (False, None)

        def release(self):
            self.released = True

    webcams, video_capture = [], cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Webcam)
    assert run(folder, "0", "--output_dir", tmp_path) == code
    assert webcams[0].released
    assert len((tmp_path / "webcam_0.jsonl").read_text().splitlines()) == 4
    monkeypatch.undo()
    assert len(frames(tmp_path / "webcam_0.mp4")) == 4
