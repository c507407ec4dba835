"""The report: numbers equal to pycocotools, TIDE and counts by hand, and a self-contained page."""

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageColor

from pix2seq import evaluate
from pix2seq.argument_parser import parse
from pix2seq.data import find_split, load_annotations
from pix2seq.evaluate import EvaluateArguments
from pix2seq.evaluation.coco_metrics import METRICS, coco_metrics, load_ground_truth
from pix2seq.evaluation.report import figures
from pix2seq.evaluation.report.analysis import analyze
from pix2seq.evaluation.report.examples import draw_error
from pix2seq.evaluation.report.figures import FIGURES, threshold_text
from pix2seq.evaluation.report.matching import ERROR_TYPES
from pix2seq.evaluation.report.write import write_report
from pix2seq.visualization import CELL, CORRECT, WRONG
from tests.test_coco_metrics import CATEGORIES, evaluate_with_pycocotools, random_dataset


def make_dataset(objects: list[tuple], predictions: list[tuple], num_images: int = 1) -> tuple[dict, list[dict]]:
    """A dataset from (image, category, xywh, crowd) of each object and (image, category, xywh, score)."""
    annotations = [
        {"id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": crowd}
        for number, (image_id, category_id, box, crowd) in enumerate(objects, start=1)
    ]
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(1, num_images + 1)]
    keys = ("image_id", "category_id", "bbox", "score")
    return (
        {"images": images, "annotations": annotations, "categories": CATEGORIES},
        [dict(zip(keys, prediction, strict=True)) for prediction in predictions],
    )


def many_objects(seed: int) -> tuple[dict, list[dict]]:
    """Eight random datasets in one, with crowds."""
    ground_truth, predictions = {"images": [], "annotations": [], "categories": CATEGORIES}, []
    for part in range(8):
        dataset, found = random_dataset(100 * seed + part)
        for entry in (*dataset["annotations"], *found):
            entry["image_id"] += 10_000 * part
        ground_truth["images"] += [image | {"id": image["id"] + 10_000 * part} for image in dataset["images"]]
        ground_truth["annotations"] += dataset["annotations"]
        predictions += found
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        annotation["id"] = number
    return ground_truth, predictions


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_numbers_equal_pycocotools(seed):
    ground_truth, predictions = many_objects(seed)
    assert any(annotation["iscrowd"] for annotation in ground_truth["annotations"])
    expected, evaluation = evaluate_with_pycocotools(ground_truth, predictions)
    numbers = analyze(ground_truth, predictions).numbers
    assert numbers["metrics"] == pytest.approx({name: expected[name] for name in METRICS}, abs=1e-9)
    sizes = [expected[f"AP_{row['size']}"] for row in numbers["sizes"]]
    assert [row["AP"] for row in numbers["sizes"]] == pytest.approx(sizes, abs=1e-9)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    for label, (row, category) in enumerate(zip(numbers["classes"], CATEGORIES, strict=True)):
        values = precision[:, :, label]
        expected = [values.mean(), values[0].mean(), values[5].mean()]
        assert [row["AP"], row["AP50"], row["AP75"]] == pytest.approx(expected, abs=1e-9)
        objects = [entry for entry in ground_truth["annotations"] if entry["category_id"] == category["id"]]
        assert row["objects"] == sum(not entry["iscrowd"] for entry in objects)
        assert row["predictions"] == sum(entry["category_id"] == category["id"] for entry in predictions)


def test_ap_by_number_of_objects_is_the_ap_of_these_images():
    ground_truth, predictions = many_objects(1)
    numbers = analyze(ground_truth, predictions).numbers
    counts = Counter(entry["image_id"] for entry in ground_truth["annotations"] if not entry["iscrowd"])
    image_ids = {image["id"] for image in ground_truth["images"] if 2 <= counts[image["id"]] <= 3}
    part = ground_truth | {
        "images": [image for image in ground_truth["images"] if image["id"] in image_ids],
        "annotations": [entry for entry in ground_truth["annotations"] if entry["image_id"] in image_ids],
    }
    metrics = coco_metrics(part, [entry for entry in predictions if entry["image_id"] in image_ids])
    row = next(row for row in numbers["object_counts"] if row["objects"] == "2 to 3")
    assert (row["images"], row["AP"]) == (len(image_ids), pytest.approx(metrics["AP"], abs=1e-9))


A, B, C, D, E, F = ([100 * column, 0, 40, 40] for column in range(6))


def one_of_each() -> tuple[dict, list[dict]]:
    """A correct prediction and an error of each type, and a crowd of dogs with two predictions on it."""
    objects = [(1, 3, A, 0), (1, 11, B, 0), (1, 3, C, 0), (1, 11, D, 0), (1, 3, E, 0), (1, 11, F, 1)]
    predictions = [
        (1, 3, A, 0.9),  # correct
        (1, 3, [1, 0, 40, 40], 0.8),  # duplicate
        (1, 3, B, 0.7),  # classification: a dog
        (1, 3, [220, 0, 40, 40], 0.6),  # localization: IoU 1 / 3
        (1, 3, [320, 0, 40, 40], 0.5),  # both: IoU 1 / 3 with a dog
        (1, 3, [0, 200, 40, 40], 0.4),  # background
        (1, 11, F, 0.95),  # on the crowd
        (1, 11, [510, 10, 10, 10], 0.85),  # on the crowd
    ]
    return make_dataset(objects, predictions)


def test_error_types_by_hand():
    analysis = analyze(*one_of_each())
    wrong = {error.prediction: (error.type, error.object) for error in analysis.errors if error.type != "missed"}
    assert wrong == {
        1: ("duplicate", 0),
        2: ("classification", 1),
        3: ("localization", 2),
        4: ("both", 3),
        5: ("background", None),
    }
    assert [error.object for error in analysis.errors if error.type == "missed"] == [3, 4]
    counts = {row["type"]: row["count"] for row in analysis.numbers["errors"]}
    assert counts == dict.fromkeys(ERROR_TYPES, 1) | {"missed": 2}


def test_gains_equal_tidecv():
    """The values are those of tidecv 1.0.1, the authors' code, without the crowd."""
    ground_truth, predictions = one_of_each()
    ground_truth["annotations"].pop()
    rows = analyze(ground_truth, predictions[:-2]).numbers["errors"]
    gains = {"classification": 25.247524752475247, "localization": 8.168316831683168, "missed": 8.415841584158414}
    assert {row["type"]: 100 * row["AP50_gain"] for row in rows if row["AP50_gain"]} == pytest.approx(gains)
    with_crowd = analyze(*one_of_each()).numbers["errors"]
    assert [row["AP50_gain"] for row in with_crowd] == pytest.approx([row["AP50_gain"] for row in rows])


@pytest.mark.parametrize("seed", range(3))
def test_found_errors_equal_the_counts_of_hotcoco(seed):
    analysis = analyze(*many_objects(seed))
    counts = {row["type"]: row["count"] for row in analysis.numbers["errors"]}
    found = Counter(error.type for error in analysis.errors)
    assert {error_type: found[error_type] for error_type in ERROR_TYPES} == counts
    assert sum(counts.values()) > 100


def test_threshold_and_confusion_by_hand():
    ground_truth, predictions = one_of_each()
    numbers = analyze(ground_truth, predictions).numbers
    assert numbers["best_threshold"] == {"score": 0.9, "precision": 1.0, "recall": 0.2, "F1": 2 / 6}
    assert numbers["confusion"]["matrix"] == [[1, 0, 0, 2], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    # Three more correct predictions of the lowest score lower the threshold. Those on the crowd still do not count.
    predictions += [
        predictions[0] | {"category_id": c, "bbox": box, "score": 0.3} for c, box in ((3, C), (11, D), (3, E))
    ]
    numbers = analyze(ground_truth, predictions).numbers
    assert numbers["best_threshold"]["score"] == 0.3
    assert numbers["confusion"]["matrix"] == [[3, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]]


def test_calibration_by_hand():
    objects = [(1, 3, A, 0), (1, 3, B, 0), (1, 3, C, 0), (1, 11, F, 1)]
    predictions = [
        (1, 3, A, 0.95),
        (1, 3, D, 0.95),
        (1, 3, B, 0.85),
        (1, 3, C, 0.25),
        (1, 3, E, 0.25),
        (1, 11, F, 0.5),
    ]
    ground_truth, predictions = make_dataset(objects, predictions)
    calibration = analyze(ground_truth, predictions).numbers["calibration"]
    bins = [(part["predictions"], part["score"], part["correct"]) for part in calibration["bins"]]
    assert bins == [(2, 0.25, 0.5), (1, 0.85, 1.0), (2, 0.95, 0.5)]
    assert calibration["ECE"] == pytest.approx((2 * 0.25 + 1 * 0.15 + 2 * 0.45) / 5)
    no_probabilities = [prediction | {"score": 100 * prediction["score"]} for prediction in predictions]
    assert analyze(ground_truth, no_probabilities).numbers["calibration"] is None


def test_no_threshold_without_correct_predictions(tmp_path):
    ground_truth, predictions = one_of_each()
    write_report(tmp_path, ground_truth, predictions[2:6])
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["best_threshold"] is None
    assert numbers["confusion"]["matrix"][3] == [3, 0, 0, 0]
    assert {row["count_above_threshold"] for row in numbers["errors"]} == {None}
    check_page(tmp_path)


def test_thresholds_are_rounded_down():
    scores = (0.64526, 0.64999, 0.29, 0.9, 1.0, 0.001)
    assert [threshold_text(score) for score in scores] == ["0.64", "0.64", "0.29", "0.90", "1.00", "0.00"]


# -- page ------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects the tags, the sources and the links of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.sources, self.tags, self.links, self.ids = [], Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        attributes = dict(attrs)
        self.sources += [attributes["src"]] if "src" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "img":
            assert attributes["alt"]


def check_page(folder, figures: int = len(FIGURES), examples: int = 0) -> str:
    """Checks that a page is self-contained and has all its images; returns its text."""
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.tags["script"] == page.tags["link"] - 1 == 0  # the link is an empty icon
    assert page.tags["img"] == page.tags["figcaption"] == figures + examples
    assert all(source.startswith("data:image/") for source in page.sources)
    assert [link for link in page.links if link != "data:,"] == [f"#{key}" for key in page.ids]
    assert len(list((folder / "report").glob("*.png"))) == figures + examples
    return text


def count_examples(folder) -> int:
    return len(list((folder / "report").glob("example_*")))


@pytest.fixture
def blank_figures(monkeypatch):
    """Replaces the figures, which take seconds."""
    image = Image.new("RGB", (8, 8))
    monkeypatch.setattr(figures, "FIGURES", dict.fromkeys(FIGURES, lambda analysis: image))


@pytest.fixture(scope="module")
def shapes(shapes_root) -> tuple[dict, list[dict]]:
    """The shapes, and predictions with errors of several types."""
    ground_truth = load_ground_truth(find_split("val", shapes_root).json)
    predictions = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 3], "score": 0.4}]
    for number, entry in enumerate(ground_truth["annotations"]):
        x, y, width, height = entry["bbox"]
        predictions.append({key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9})
        if number % 4 == 0:
            predictions[-1]["bbox"] = [x + width / 2, y, width, height]
        elif number % 4 == 1:
            predictions[-1]["category_id"] = {1: 3, 3: 1, 7: 1, 11: 1}[entry["category_id"]]
        elif number % 4 == 2:
            predictions.append(predictions[-1] | {"score": 0.8})
    return ground_truth, predictions


def test_page_has_figures_and_examples(shapes_root, tmp_path, shapes):
    write_report(
        tmp_path, *shapes, load_annotations(find_split("val", shapes_root)), title="a < b & c", notes=["note"]
    )
    types = {path.stem.removeprefix("example_") for path in (tmp_path / "report").glob("example_*")}
    assert {"localization", "classification", "background"} <= types
    text = check_page(tmp_path, examples=len(types))
    assert "Evaluation of a &lt; b &amp; c" in text
    assert "<li>note</li>" in text
    for error_type in set(ERROR_TYPES) - types:
        assert error_type in text.split("Not shown: ")[1]


def test_examples_show_the_part_around_the_boxes():
    objects, predictions = [(1, 3, [600, 440, 20, 20], 0)], [(1, 3, [610, 440, 20, 20], 0.9)]
    analysis = analyze(*make_dataset(objects, predictions))
    image = draw_error(Image.new("RGB", (640, 480)), analysis.errors[0], analysis)
    assert analysis.errors[0].type == "localization"
    assert max(image.size) == CELL
    scale = CELL / 75  # 2.5 times the 30 pixels of both boxes, at the corner of the image
    x, y = (600 - (640 - 75)) * scale, (450 - (480 - 75)) * scale
    assert image.getpixel((round(x) + 2, round(y))) == ImageColor.getrgb(CORRECT)
    assert image.getpixel((round(x + 30 * scale) - 1, round(y))) == ImageColor.getrgb(WRONG)


def test_unreadable_images_are_no_examples(shapes_root, tmp_path, shapes, blank_figures):
    root = tmp_path / "shapes"
    shutil.copytree(shapes_root, root)
    for path in (root / "images" / "val2017").iterdir():
        path.write_bytes(b"not an image")
    (tmp_path / "out").mkdir()
    write_report(tmp_path / "out", *shapes, load_annotations(find_split("val", root)))
    check_page(tmp_path / "out")


def test_no_predictions(tmp_path):
    write_report(tmp_path, one_of_each()[0], [])
    check_page(tmp_path, figures=len(FIGURES) - 1)  # no calibration
    assert json.loads((tmp_path / "report.json").read_text())["metrics"]["AP"] == 0


@pytest.mark.parametrize("with_predictions", [True, False])
def test_no_objects(tmp_path, with_predictions):
    ground_truth, predictions = one_of_each()
    write_report(tmp_path, ground_truth | {"annotations": []}, predictions if with_predictions else [])
    check_page(tmp_path, figures=0)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["metrics"]["AP"] is numbers["errors"][0]["AP50_gain"] is numbers["calibration"] is None


def test_class_names_of_all_kinds(tmp_path, capfd):
    """$ and _ have a meaning in charts, < and & on pages; ids may be negative, and names equal, long or empty."""
    rng = np.random.default_rng(0)
    ground_truth, predictions = make_dataset([], [], num_images=3)
    names = ["a$\\frac$", "US$ and A$", "_b", "", "<b>&amp;", "same", "same", "x" * 80]
    names += [f"class {number}" for number in range(32)]
    ground_truth["categories"] = [{"id": number - 5, "name": name} for number, name in enumerate(names)]
    for number, category in enumerate(ground_truth["categories"] * 2, start=1):
        box = [float(value) for value in rng.uniform(10, 90, 4)]
        entry = {"image_id": number % 3 + 1, "category_id": category["id"], "bbox": box}
        ground_truth["annotations"].append(entry | {"id": number, "area": box[2] * box[3], "iscrowd": 0})
        other = ground_truth["categories"][int(rng.integers(40))]["id"]
        predictions += [entry | {"score": float(rng.random())}, entry | {"category_id": other, "score": 0.5}]
    write_report(tmp_path, ground_truth, predictions)
    text = check_page(tmp_path)
    assert "<b>&amp;" not in text
    assert "same (0)" in text
    assert "same (1)" in text
    assert not re.search("Warning|findfont", capfd.readouterr().err)


# -- evaluate.py -----------------------------------------------------------------------------------


def run(*words) -> int:
    return evaluate.evaluate(parse(EvaluateArguments, list(map(str, words))))


def test_report_of_a_checkpoint(shapes_root, tmp_path, make_model, blank_figures):
    model, out = tmp_path / "run" / "best", tmp_path / "out"
    make_model(decoder_layers=1).save_pretrained(model)
    words = ("--checkpoint", model, "--root", shapes_root, "--num_workers", 0, "--eval_batch_size", 5)
    assert run(*words, "--output_dir", out, "--report") == 0
    text = check_page(out, examples=count_examples(out))
    metrics = json.loads((out / "metrics.json").read_text())
    numbers = json.loads((out / "report.json").read_text())["metrics"]
    assert {name: -1 if value is None else value for name, value in numbers.items()} == {
        k: metrics[k] for k in METRICS
    }
    assert "Evaluation of run/best" in text
    for file in ("report.html", "evaluation.json", "ground_truth.json"):  # can be sent to others
        assert str(tmp_path) not in (out / file).read_text()
        assert str(shapes_root) not in (out / file).read_text()


def test_report_of_a_results_file(shapes_root, tmp_path, shapes, capsys, blank_figures):
    (tmp_path / "p.json").write_text(json.dumps(shapes[1]))
    words = ("--predictions", tmp_path / "p.json", "--gt", find_split("val", shapes_root).json)
    assert run(*words, "--output_dir", tmp_path / "out") == 0
    assert "no prediction" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "report.html").exists()
    assert run(*words, "--output_dir", tmp_path / "out", "--report") == 0
    check_page(tmp_path / "out")


def test_images_that_a_results_file_omits_are_counted(shapes_root, tmp_path, shapes, capsys, blank_figures):
    (tmp_path / "p.json").write_text(json.dumps([entry for entry in shapes[1] if entry["image_id"] > 2]))
    words = ("--predictions", tmp_path / "p.json", "--gt", find_split("val", shapes_root).json)
    assert run(*words, "--output_dir", tmp_path / "out", "--report") == 0
    count = 5 - len({entry["image_id"] for entry in shapes[1]} - {1, 2})
    assert f"{count} of 5 images have no prediction" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["images_without_predictions"] == count
    assert f"{count} images without predictions" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize("words", [["--report"], ["--report", "--output_dir", ""]])
def test_report_requires_an_output_folder(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        parse(EvaluateArguments, ["--oracle", "--root", "x", *words])
    assert stopped.value.code == 2
    assert "--output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["predictions.json", "ground_truth.json", "predictions.png"])
def test_no_input_is_overwritten(shapes_root, tmp_path, capsys, name):
    split = find_split("val", shapes_root)
    shutil.copytree(split.images, tmp_path / "data")
    document = json.loads(split.json.read_text())
    if name.endswith(".png"):
        (tmp_path / "data" / document["images"][0]["file_name"]).rename(tmp_path / "data" / name)
        document["images"][0]["file_name"] = name
    (tmp_path / "data" / "ground_truth.json").write_text(json.dumps(document))
    (tmp_path / "data" / "predictions.json").write_text("[]")
    before = {file: (tmp_path / "data" / file).read_bytes() for file in file_names(tmp_path / "data")}
    truth = str(tmp_path / "data" / "ground_truth.json")
    elsewhere = str(shutil.copy(truth, tmp_path / "elsewhere.json"))
    words = {
        "predictions.json": ["--predictions", str(tmp_path / "data" / name), "--gt", elsewhere],
        "ground_truth.json": ["--oracle", "--val_images", str(split.images), "--val_json", truth],
        "predictions.png": ["--oracle", "--val_images", str(tmp_path / "data"), "--val_json", elsewhere],
    }[name]
    assert evaluate.main([*words, "--output_dir", str(tmp_path / "data")]) == 2
    assert f"{name}; name another" in capsys.readouterr().err
    assert {file: (tmp_path / "data" / file).read_bytes() for file in file_names(tmp_path / "data")} == before


def file_names(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_files_of_an_earlier_evaluation_are_removed(shapes_root, tmp_path, blank_figures):
    out = tmp_path / "out"
    words = ("--oracle", "--root", shapes_root, "--num_bins", 5, "--output_dir", out)
    assert run(*words, "--report") == 0
    assert count_examples(out) > 0
    for name in ("report/other.png", "notes.txt"):
        (out / name).write_text("not ours")
    assert run(*words, "--num_images", 0) == 0
    expected = {"metrics.json", "predictions.json", "ground_truth.json", "evaluation.json"}
    assert file_names(out) == expected | {"report/other.png", "notes.txt"}
    (out / "report/other.png").unlink()
    assert run(*words) == 0
    assert not (out / "report").exists()


def test_skipped_data_is_counted_and_named(shapes_root, tmp_path, capsys, blank_figures):
    root, out = tmp_path / "shapes", tmp_path / "out"
    shutil.copytree(shapes_root, root)
    split = find_split("val", root)
    document = json.loads(split.json.read_text())
    names = [image["file_name"] for image in document["images"]]
    (split.images / names[0]).unlink()
    for name in names[1:4]:
        (split.images / name).write_bytes(b"")
    document["annotations"][0]["category_id"] = 99
    document["annotations"][1]["bbox"][2] = 0
    split.json.write_text(json.dumps(document))
    assert run("--oracle", "--root", root, "--output_dir", out, "--report") == 0
    about = json.loads((out / "evaluation.json").read_text())
    assert about["annotation_file"] == split.json.name
    assert about["unreadable_images"]["count"] == 4
    assert [line.split(":")[0] for line in about["unreadable_images"]["first"]] == names[:3]
    assert about["annotation_issues"]["by_kind"] == {"unknown-category": 1, "zero-size": 1}
    assert about["annotation_issues"]["first"][0].startswith(f"annotation {document['annotations'][0]['id']}: ")
    assert "1 unknown-category, 1 zero-size" in capsys.readouterr().out
    text = (out / "report.html").read_text()
    assert "4 unreadable images" in text
    assert "1 unknown-category, 1 zero-size" in text
    assert str(tmp_path) not in text + (out / "evaluation.json").read_text()


def test_output_folder_that_cannot_be_written_is_named(shapes_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "oracle_predictions", None)  # the error comes before the predictions

    def error(folder) -> str:
        words = ["--oracle", "--root", str(shapes_root), "--output_dir", str(folder), "--num_images", "0", "--report"]
        assert evaluate.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--output_dir {folder}: cannot be written to" in line
        return line

    (tmp_path / "file").write_text("a file")
    error(tmp_path / "file")
    error("/proc/self")
    monkeypatch.setattr(evaluate, "oracle_predictions", lambda *_, **__: [])
    for name in ("metrics.json", "report.html"):
        (tmp_path / name).mkdir()
        assert name in error(tmp_path)
        (tmp_path / name).rmdir()


@pytest.mark.slow
def test_browser_shows_the_page(tmp_path, shapes_root, shapes):
    """All images are shown, nothing is requested from the network, and the console stays empty."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("Chromium is not installed")
    write_report(tmp_path, *shapes, load_annotations(find_split("val", shapes_root)))
    probe = (
        "<script>onload = () => { const broken = [...document.images].filter(i => !i.naturalWidth).length;"
        "const wide = document.documentElement.scrollWidth > innerWidth;"
        "const requests = performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length;"
        "document.title = `${document.images.length} images, ${broken} broken, wide ${wide}, ${requests} requests`; }"
        "</script></body>"
    )
    text = (tmp_path / "report.html").read_text()
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,4000", "--enable-logging=stderr"]
    words += [f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", (tmp_path / "probe.html").as_uri()]
    result = subprocess.run([browser, *words], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr
    title = re.search(r"<title>(.*?)</title>", result.stdout)[1]
    count = len(list((tmp_path / "report").iterdir()))
    assert title == f"{count} images, 0 broken, wide false, 0 requests"
