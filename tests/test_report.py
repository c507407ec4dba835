"""The report's numbers are pycocotools' and what can be counted by hand, and its page needs nothing but itself."""

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
from pix2seq.evaluation.coco_metrics import METRICS, coco_metrics, load_ground_truth, remap_ids
from pix2seq.evaluation.output_folder import Skipped
from pix2seq.evaluation.report import figures, html, matching
from pix2seq.evaluation.report.analysis import analyse, best_of_each
from pix2seq.evaluation.report.examples import TRUTH, WRONG, draw_error
from pix2seq.evaluation.report.figures import FIGURES, threshold
from pix2seq.evaluation.report.matching import KINDS, match
from pix2seq.evaluation.report.write import write_report
from pix2seq.visualization import CELL
from tests.test_scoring import CATEGORIES, plain_pycocotools, random_dataset


def dataset(objects: list[tuple], found: list[tuple], num_images: int = 1) -> tuple[dict, list[dict]]:
    """(image, category, xywh, crowd) of each object and (image, category, xywh, score) of each prediction."""
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": crowd,
        }
        for number, (image, category, box, crowd) in enumerate(objects, start=1)
    ]
    images = [{"id": image, "file_name": f"{image}.png"} for image in range(1, num_images + 1)]
    predictions = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in found
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, predictions


def many_objects(seed: int) -> tuple[dict, list[dict]]:
    """Several random datasets in one, of which each image has objects of three classes, some of them crowds."""
    truth, predictions = {"images": [], "annotations": [], "categories": CATEGORIES}, []
    for part in range(8):
        images, found = random_dataset(100 * seed + part)
        for entry in (*images["annotations"], *found):
            entry["image_id"] += 10_000 * part
        truth["images"] += [image | {"id": image["id"] + 10_000 * part} for image in images["images"]]
        truth["annotations"] += images["annotations"]
        predictions += found
    for number, entry in enumerate(truth["annotations"], start=1):
        entry["id"] = number
    return truth, predictions


@pytest.mark.parametrize("seed", range(3))
def test_overall_and_per_class_numbers_are_pycocotools(tmp_path, seed):
    truth, predictions = many_objects(seed)
    assert any(entry["iscrowd"] for entry in truth["annotations"])
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    stats, evaluation = plain_pycocotools(tmp_path / "truth.json", tmp_path / "predictions.json")
    numbers = analyse(truth, predictions).numbers
    assert [numbers["metrics"][name] for name in METRICS] == pytest.approx(stats.tolist(), abs=1e-9)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    assert len(numbers["classes"]) == 3
    for label, row in enumerate(numbers["classes"]):
        values = precision[:, :, label]
        expected = [values.mean(), values[0].mean(), values[5].mean()]
        assert [row["AP"], row["AP50"], row["AP75"]] == pytest.approx(expected, abs=1e-9)
        category = CATEGORIES[label]["id"]
        own = [entry for entry in truth["annotations"] if entry["category_id"] == category and not entry["iscrowd"]]
        assert row["objects"] == len(own)
        assert row["predictions"] == sum(entry["category_id"] == category for entry in predictions)
    curves = numbers["precision_recall"]
    np.testing.assert_allclose(curves["mean"]["0.75"], precision[5].mean(axis=1), atol=1e-9)
    np.testing.assert_allclose(curves["classes"]["eel"]["0.50"], precision[0, :, 2], atol=1e-9)
    sizes = [row["AP"] for row in numbers["by_size"]]
    assert sizes == pytest.approx(stats[3:6].tolist(), abs=1e-9)


def test_parts_of_the_data_have_their_own_ap():
    truth, predictions = many_objects(1)
    numbers = analyse(truth, predictions).numbers
    for kept in numbers["kept"]:
        metrics = coco_metrics(truth, best_of_each(predictions, kept["kept"]))
        assert kept["AP"] == pytest.approx(metrics["AP"], abs=1e-9)
    assert numbers["kept"][-1]["AP"] == pytest.approx(numbers["metrics"]["AP"], abs=1e-9)
    counts = Counter(entry["image_id"] for entry in truth["annotations"] if not entry["iscrowd"])
    images = {image["id"] for image in truth["images"] if 2 <= counts[image["id"]] <= 3}
    part = truth | {
        "images": [image for image in truth["images"] if image["id"] in images],
        "annotations": [entry for entry in truth["annotations"] if entry["image_id"] in images],
    }
    metrics = coco_metrics(part, [row for row in predictions if row["image_id"] in images])
    row = next(row for row in numbers["by_count"] if row["objects"] == "2 to 3")
    assert (row["images"], row["AP"]) == (len(images), pytest.approx(metrics["AP"], abs=1e-9))
    assert sum(row["images"] for row in numbers["by_count"]) == numbers["images"]
    assert sum(row["objects"] for row in numbers["by_quarter"]) >= numbers["objects"]


def test_the_best_of_each_image_are_kept():
    _, rows = dataset([], [(1, 3, [0, 0, 1, 1], s) for s in (0.1, 0.9, 0.9)] + [(2, 3, [0, 0, 1, 1], 0.2)])
    assert best_of_each(rows, 1) == [rows[1], rows[3]]
    assert best_of_each(rows, 2) == [rows[1], rows[2], rows[3]]
    assert best_of_each([], 5) == []


# -- errors ----------------------------------------------------------------------------------------

A, B, C, D, E, F = ([100 * place, 0, 40, 40] for place in range(6))


def one_of_each() -> tuple[dict, list[dict]]:
    """A right prediction and an error of each kind, all of cats (3) or dogs (11); a crowd of dogs with two on it."""
    objects = [(1, 3, A, 0), (1, 11, B, 0), (1, 3, C, 0), (1, 11, D, 0), (1, 3, E, 0), (1, 11, F, 1)]
    found = [
        (1, 3, A, 0.9),  # right
        (1, 3, [1, 0, 40, 40], 0.8),  # duplicate
        (1, 3, B, 0.7),  # classification: it is a dog
        (1, 3, [220, 0, 40, 40], 0.6),  # localisation: IoU 1 / 3
        (1, 3, [320, 0, 40, 40], 0.5),  # both: a third of a dog
        (1, 3, [0, 200, 40, 40], 0.4),  # background
        (1, 11, F, 0.95),  # on the crowd, as the next
        (1, 11, [510, 10, 10, 10], 0.85),
    ]
    return dataset(objects, found)


def test_each_kind_of_error_is_told():
    """D and E are missed: of D there is only a badly placed cat."""
    analysis = analyse(*one_of_each())
    kinds = {error.prediction: error.kind for error in analysis.errors if error.prediction >= 0}
    assert kinds == {1: "duplicate", 2: "classification", 3: "localisation", 4: "both", 5: "background"}
    objects = {error.prediction: error.object for error in analysis.errors if error.prediction >= 0}
    assert objects == {1: 0, 2: 1, 3: 2, 4: 3, 5: -1}
    assert [error.object for error in analysis.errors if error.kind == "missed"] == [3, 4]
    rows = {row["kind"]: row for row in analysis.numbers["errors"]["kinds"]}
    assert [rows[kind]["count"] for kind in KINDS] == [1, 1, 1, 1, 1, 2]


def test_the_gain_of_each_kind_by_hand():
    """AP50 is the mean of cats (one of three found, by the best score) and dogs (none of two)."""
    found = analyse(*one_of_each()).numbers["errors"]
    first = 34 / 101  # recalls 0 to 0.33 of the 101, at which precision is 1
    assert found["AP50"] == pytest.approx(first / 2)
    gains = {row["kind"]: row["dAP"] for row in found["kinds"]}
    # The dog that was called a cat is found: recall of dogs is 1/2. Cats: still one hit before all errors.
    assert gains["classification"] == pytest.approx(51 / 101 / 2)
    # The second cat is found as the fourth: precision 2/4 from recall 0.34 to 0.66.
    assert gains["localisation"] == pytest.approx(33 / 101 * 2 / 4 / 2)
    # Errors that are only taken away come after the hit or matter to nothing.
    assert [gains[kind] for kind in ("both", "duplicate", "background")] == [0, 0, 0]
    # One missing cat and one missing dog less: recall of cats is 1/2, of dogs still 0.
    assert gains["missed"] == pytest.approx((51 - 34) / 101 / 2)


def test_the_counts_are_those_of_tide():
    """What tidecv 1.0.1, the authors' code, says of `one_of_each` without its crowd."""
    truth, predictions = one_of_each()
    truth["annotations"].pop()
    rows = analyse(truth, predictions[:-2]).numbers["errors"]["kinds"]
    expected = {"classification": 1, "localisation": 1, "both": 1, "duplicate": 1, "background": 1, "missed": 2}
    assert {row["kind"]: row["count"] for row in rows} == expected
    gains = {"classification": 25.247524752475247, "localisation": 8.168316831683168, "missed": 8.415841584158414}
    assert {row["kind"]: 100 * row["dAP"] for row in rows if row["dAP"]} == pytest.approx(gains)


@pytest.mark.parametrize("seed", range(3))
def test_every_error_that_is_counted_is_named(seed):
    """The kinds are told by us, one by one, and counted by hotcoco: two roads to the same numbers, crowds included."""
    analysis = analyse(*many_objects(seed))
    counted = {row["kind"]: row["count"] for row in analysis.numbers["errors"]["kinds"]}
    named = Counter(error.kind for error in analysis.errors)
    assert {kind: named[kind] for kind in KINDS} == counted
    assert sum(counted.values()) > 100


def test_confusion_by_hand():
    """At the threshold of the best F1, 0.9: one hit, nothing wrong; its matrix has what is above it only."""
    truth, predictions = one_of_each()
    numbers = analyse(truth, predictions).numbers
    assert numbers["operating_point"] == {"score": 0.9, "precision": 1.0, "recall": 0.2, "F1": 2 / 6}
    assert numbers["confusion"]["matrix"] == [[1, 0, 0, 2], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    # Three more hits of the least score lower the threshold to it: everything counts. The two on the crowd do not.
    predictions += [dict(predictions[0], category_id=c, bbox=box, score=0.3) for c, box in ((3, C), (11, D), (3, E))]
    numbers = analyse(truth, predictions).numbers
    assert numbers["operating_point"]["score"] == 0.3
    cats, dogs, eels, background = numbers["confusion"]["matrix"]
    assert cats == [3, 0, 0, 0]
    assert dogs == [1, 1, 0, 0]  # the dog that was called a cat
    assert eels == [0, 0, 0, 0]
    assert background == [4, 0, 0, 0]  # all wrong cats but the one on a dog


def test_calibration_by_hand():
    """Of scores 0.95 and 0.85 (bin 9 and 8) one is right each time; of the two of 0.25, one."""
    objects = [(1, 3, A, 0), (1, 3, B, 0), (1, 3, C, 0), (1, 11, F, 1)]
    found = [(1, 3, A, 0.95), (1, 3, D, 0.95), (1, 3, B, 0.85), (1, 3, C, 0.25), (1, 3, E, 0.25), (1, 11, F, 0.5)]
    calibration = analyse(*dataset(objects, found)).numbers["calibration"]
    told = [(part["predictions"], part["score"], part["right"]) for part in calibration["bins"] if part["predictions"]]
    assert told == [(2, 0.25, 0.5), (1, 0.85, 1.0), (2, 0.95, 0.5)]
    assert calibration["ECE"] == pytest.approx((2 * 0.25 + 1 * 0.15 + 2 * 0.45) / 5)
    no_probabilities = [row | {"score": 100 * row["score"]} for row in dataset(objects, found)[1]]
    assert analyse(dataset(objects, found)[0], no_probabilities).numbers["calibration"] == {"ECE": None, "bins": []}


def test_duplicates_by_hand():
    """A cat found three times, before another is found: without the repetitions precision is 1 throughout."""
    objects = [(1, 3, A, 0), (1, 3, B, 0)]
    found = [(1, 3, A, 0.9), (1, 3, A, 0.8), (1, 3, [1, 0, 40, 40], 0.7), (1, 3, B, 0.6)]
    duplicates = analyse(*dataset(objects, found)).numbers["duplicates"]
    assert duplicates["count"] == 2
    assert duplicates["with"]["AP50"] == pytest.approx((51 * 1 + 50 * 2 / 4) / 101)
    assert duplicates["without"] == {"AP": pytest.approx(1), "AP50": pytest.approx(1)}


def test_where_nothing_is_right_no_threshold_is_named(tmp_path):
    truth, predictions = one_of_each()
    predictions = predictions[2:6]
    numbers = analyse(truth, predictions).numbers
    assert numbers["operating_point"] is None
    assert numbers["confusion"]["matrix"][3] == [3, 0, 0, 0]  # all boxes: a cat on a dog is in another row
    assert {row["count_at_operating_point"] for row in numbers["errors"]["kinds"]} == {None}
    write_report(tmp_path, truth, predictions, None, "predictions", "wrong", Skipped())
    text = check_page(tmp_path, 0)
    assert "No box is right, whatever its score" in text
    assert "there is no threshold to go by" in text
    assert "(F1 " not in text


def test_a_threshold_is_rounded_down(tmp_path, monkeypatch, blank_charts):
    """Up, it would leave out the boxes that were counted."""
    assert [threshold(score) for score in (0.64526, 0.64999, 0.29, 0.9, 1.0, 0.001)] == [
        *("0.64", "0.64", "0.29", "0.90", "1.00", "0.00")
    ]
    truth, predictions = one_of_each()
    write_report(tmp_path, truth, [predictions[0] | {"score": 0.64578}], None, "predictions", "one", Skipped())
    text = (tmp_path / "report.html").read_text()
    assert "With boxes of score 0.64 and above" in text
    assert "a score of at least 0.645," in text
    monkeypatch.setattr(figures, "to_image", lambda figure: figure)
    chart = figures.errors(json.loads((tmp_path / "report.json").read_text()))
    assert [text.get_text() for text in chart.legends[0].get_texts()][1] == "of score 0.64 or more"


def test_matching_takes_a_part_of_the_images_at_a_time(monkeypatch):
    """The same matches whatever the part, and no more is asked of hotcoco at once."""
    truth, predictions = remap_ids(*many_objects(1))
    whole, asked = match(truth, predictions), []
    score = matching.evaluate_fast
    monkeypatch.setattr(matching, "AT_ONCE", 7)
    monkeypatch.setattr(matching, "evaluate_fast", lambda *args: asked.append(len(args[0]["images"])) or score(*args))
    parts = match(truth, predictions)
    for name in ("row", "found", "ignored", "label", "score", "image"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert len(parts.row) > 100
    assert max(asked) == 7


def test_classes_without_a_name_make_no_noise(capfd):
    truth, predictions = one_of_each()
    truth["categories"] = [entry | {"name": ""} for entry in CATEGORIES]
    analyse(truth, predictions)
    assert capfd.readouterr() == ("", "")


# -- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page would load, and its captions."""

    def __init__(self, text: str):
        super().__init__()
        self.sources, self.tags, self.links = [], Counter(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        attributes = dict(attributes)
        self.sources += [attributes["src"]] if "src" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        if tag == "img":
            assert attributes["alt"]


def check_page(folder, examples: int) -> str:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.tags["img"] == page.tags["figure"] == page.tags["figcaption"] == len(FIGURES) + examples
    assert all(source.startswith("data:image/") for source in page.sources)
    assert all(link.startswith(("#", "data:,")) for link in page.links)
    assert all(f'id="{link[1:]}"' in text for link in page.links if link.startswith("#"))
    assert not page.tags["script"]
    assert not re.search(r"https?://|url\(|@import", text)
    files = {path.name for path in (folder / "report").iterdir()}
    assert {f"{key}.png" for key in FIGURES} <= files
    assert len(files) == len(FIGURES) + examples
    for name in files:
        with Image.open(folder / "report" / name) as image:
            image.verify()
    numbers = json.loads((folder / "report.json").read_text())
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    return text


@pytest.fixture
def blank_charts(monkeypatch):
    """Charts take most of a report's time; where a test looks at something else they are not drawn."""
    blank = {key: lambda numbers: Image.new("RGB", (8, 8)) for key in FIGURES}
    monkeypatch.setattr("pix2seq.evaluation.report.write.FIGURES", blank)


@pytest.fixture
def predictions_of_shapes(shapes_root):
    """Of the validation images: the first object shifted, the second of another class, a repetition, an invention."""
    truth = load_ground_truth(find_split("val", shapes_root).json)
    rows, seen = [], Counter()
    for entry in truth["annotations"]:
        x, y, w, h = entry["bbox"]
        place = seen[entry["image_id"]]
        seen[entry["image_id"]] += 1
        box = [x + w / 2, y, w, h] if place == 0 else [x, y, w, h]
        category = entry["category_id"] if place != 1 else {1: 3, 3: 1, 7: 1, 11: 1}[entry["category_id"]]
        rows.append({"image_id": entry["image_id"], "category_id": category, "bbox": box, "score": 0.9})
        if place == 2:
            rows.append(rows[-1] | {"score": 0.8})
    return truth, [*rows, {"image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 3], "score": 0.4}]


def test_the_page_shows_pictures_of_errors(shapes_root, tmp_path, predictions_of_shapes):
    truth, predictions = predictions_of_shapes
    annotations = load_annotations(find_split("val", shapes_root))
    write_report(tmp_path, truth, predictions, annotations, "predictions", "a < b & c", Skipped())
    kinds = {path.stem.removeprefix("example_") for path in (tmp_path / "report").glob("example_*")}
    assert {"localisation", "classification", "background"} <= kinds
    text = check_page(tmp_path, len(kinds))
    assert "Evaluation of a &lt; b &amp; c" in text
    assert "The truth" not in text
    assert "No box is right" not in text
    for kind in set(KINDS) - kinds:
        assert kind in text.split("Not shown: ")[1]


def test_small_errors_are_shown_from_near():
    """Of a large image, the part around both boxes: the object is blue where the wrong box is not orange."""
    truth, predictions = dataset([(1, 3, [600, 440, 20, 20], 0)], [(1, 3, [610, 440, 20, 20], 0.9)])
    analysis = analyse(truth, predictions)
    assert analysis.errors[0].kind == "localisation"
    picture = draw_error(Image.new("RGB", (640, 480)), analysis.errors[0], analysis)
    assert max(picture.size) == CELL
    scale = CELL / 75  # 2.5 times the 30 pixels both boxes take together; the image ends at 640 and 480
    x, y = (600 - (640 - 75)) * scale, (450 - (480 - 75)) * scale
    assert picture.getpixel((round(x) + 2, round(y))) == ImageColor.getrgb(TRUTH)
    assert picture.getpixel((round(x + 30 * scale) - 1, round(y))) == ImageColor.getrgb(WRONG)


def test_images_that_cannot_be_read_are_passed_over(shapes_root, tmp_path, predictions_of_shapes, blank_charts):
    truth, predictions = predictions_of_shapes
    root = tmp_path / "shapes"
    shutil.copytree(shapes_root, root)
    for path in (root / "images" / "val2017").iterdir():
        path.write_bytes(b"no picture")
    annotations = load_annotations(find_split("val", root))
    (tmp_path / "out").mkdir()
    write_report(tmp_path / "out", truth, predictions, annotations, "predictions", "broken", Skipped())
    assert "their images cannot be read" in check_page(tmp_path / "out", 0)


@pytest.mark.parametrize("empty", ["predictions", "both"])
def test_nothing_found_and_nothing_to_find(tmp_path, monkeypatch, empty):
    truth, predictions = one_of_each()
    truth = truth | {"annotations": []} if empty != "predictions" else truth
    write_report(tmp_path, truth, [], None, "predictions", empty, Skipped())
    text = check_page(tmp_path, 0)
    assert ("There is nothing to find" in text) == (empty != "predictions")
    numbers = json.loads((tmp_path / "report.json").read_text())
    nothing = 0 if empty == "predictions" else None
    assert numbers["metrics"]["AP"] == numbers["errors"]["AP50"] == numbers["kept"][0]["AP"] == nothing
    assert {row["dAP"] is None for row in numbers["errors"]["kinds"]} == {nothing is None}
    numbers = analyse(truth | {"annotations": []}, predictions).numbers
    assert numbers["metrics"]["AP"] is numbers["errors"]["AP50"] is numbers["calibration"]["ECE"] is None
    monkeypatch.setattr(figures, "to_image", lambda figure: figure)
    assert "AP50 is none" in figures.errors(numbers).axes[0].get_title()
    assert not figures.kept(numbers).axes[0].texts


def test_many_classes_and_names_of_all_kinds(tmp_path):
    """$ and _ mean something to charts, < and & to pages; ids may be negative and names the same."""
    rng = np.random.default_rng(0)
    truth, predictions = dataset([], [], num_images=3)
    names = ["a$b_{c", "<b>&amp;", "same", "same", "x" * 80, *(f"class {n}" for n in range(35))]
    truth["categories"] = [{"id": n - 5, "name": name} for n, name in enumerate(names)]
    for number, category in enumerate(truth["categories"] * 2, start=1):
        box = [float(v) for v in rng.uniform(10, 90, 4)]
        entry = {"image_id": number % 3 + 1, "category_id": category["id"], "bbox": box}
        truth["annotations"].append(entry | {"id": number, "area": box[2] * box[3], "iscrowd": 0})
        said = truth["categories"][int(rng.integers(40))]["id"]
        predictions += [entry | {"score": float(rng.random())}, entry | {"category_id": said, "score": 0.5}]
    write_report(tmp_path, truth, predictions, None, "predictions", "names", Skipped())
    text = check_page(tmp_path, 0)
    assert "<b>&amp;" not in text
    assert "same (-3)" in text
    assert "same (-2)" in text
    assert re.findall(r"([^{}\n]*){[^}]*overflow-wrap: anywhere", html.STYLE) == [".facts ", " td.text "]  # no numbers


def test_a_class_may_begin_with_an_underscore(monkeypatch):
    """matplotlib takes such a label for one to be left out."""
    truth, predictions = one_of_each()
    truth["categories"] = [entry | {"name": f"_{entry['name']}"} for entry in CATEGORIES]
    monkeypatch.setattr(figures, "to_image", lambda figure: figure)
    chart = figures.precision_recall(analyse(truth, predictions).numbers)
    assert [text.get_text() for text in chart.axes[1].get_legend().get_texts()] == ["0.000 _dog", "0.337 _cat"]


# -- evaluate.py --report --------------------------------------------------------------------------


def run(*words) -> int:
    return evaluate.evaluate(parse(EvaluateArguments, list(map(str, words))))


def test_report_of_a_checkpoint(shapes_root, tmp_path, make_model, blank_charts):
    make_model(decoder_layers=1).save_pretrained(tmp_path / "best")
    words = ("--checkpoint", tmp_path / "best", "--root", shapes_root, "--num_workers", 0, "--eval_batch_size", 5)
    assert run(*words, "--output_dir", tmp_path / "out", "--report") == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "the truth" in text  # examples of errors, of which an untrained detector makes some
    check_page(tmp_path / "out", len(list((tmp_path / "out" / "report").glob("example_*"))))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]
    assert {name: -1 if value is None else value for name, value in numbers.items()} == {
        k: metrics[k] for k in METRICS
    }


def test_report_of_a_results_file(shapes_root, tmp_path, predictions_of_shapes, capsys, blank_charts):
    (tmp_path / "p.json").write_text(json.dumps(predictions_of_shapes[1]))
    gt = find_split("val", shapes_root).json
    words = ("--predictions", tmp_path / "p.json", "--gt", gt, "--output_dir", tmp_path / "out")
    assert run(*words) == 0
    assert not (tmp_path / "out" / "report.html").exists()
    assert run(*words, "--report") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("metrics.json, predictions.json, report.html")
    assert "There are no pictures here" in check_page(tmp_path / "out", 0)


def test_report_of_the_oracle(shapes_root, tmp_path, blank_charts):
    words = ("--oracle", "--root", shapes_root, "--num_bins", 10, "--output_dir", tmp_path / "out", "--report")
    assert run(*words) == 0
    check_page(tmp_path / "out", len(list((tmp_path / "out" / "report").glob("example_*"))))


def test_report_without_a_folder_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(EvaluateArguments, ["--oracle", "--root", "x", "--report"])
    assert stopped.value.code == 2
    assert "--report: needs --output_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        parse(EvaluateArguments, ["--oracle", "--root", "x", "--report", "--output_dir", ""])
    assert stopped.value.code == 2
    assert "--output_dir: is empty" in capsys.readouterr().err


def contents(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_report_is_not_taken_for_a_later_one(shapes_root, tmp_path, blank_charts):
    """Its files go with its metrics, and nothing else does."""
    out = tmp_path / "out"
    words = ("--oracle", "--root", shapes_root, "--num_bins", 5, "--output_dir", out)
    assert run(*words, "--report") == 0
    assert any(name.startswith("report/example_") for name in contents(out))
    for name in ("report/mine.png", "notes.txt"):
        (out / name).write_text("mine")
    assert run(*words, "--num_images", 0) == 0
    numbers = {"metrics.json", "predictions.json", "scored_against.json", "evaluation.json"}
    assert contents(out) == numbers | {"report/mine.png", "notes.txt"}
    (out / "report/mine.png").unlink()
    assert run(*words) == 0
    assert not (out / "report").exists()


def test_what_is_skipped_is_counted_and_named(shapes_root, tmp_path, capsys, blank_charts):
    """By the terminal, and by page and evaluation.json, which are sent to others: neither names a folder of this
    machine."""
    root, out = tmp_path / "shapes", tmp_path / "out"
    shutil.copytree(shapes_root, root)
    split = find_split("val", root)
    truth = json.loads(split.json.read_text())
    for image in truth["images"][:4]:
        (split.images / image["file_name"]).write_bytes(b"")
    (split.images / truth["images"][0]["file_name"]).unlink()
    truth["annotations"][0]["category_id"] = 99
    truth["annotations"][1]["bbox"][2] = 0
    split.json.write_text(json.dumps(truth))
    assert run("--oracle", "--root", root, "--output_dir", out, "--report") == 0
    names = [image["file_name"] for image in truth["images"]]
    about = json.loads((out / "evaluation.json").read_text())
    assert about["ground_truth"] == split.json.name
    reasons = [f"{names[0]}: no such file in the folder of images"]
    reasons += [f"{name}: it is empty (0 bytes)" for name in names[1:3]]
    assert about["unreadable_images"] == {"count": 4, "first": reasons}
    assert about["annotation_faults"]["kinds"] == {"unknown-category": 1, "zero-size": 1}
    assert f"faults in {split.json}: 1 unknown-category, 1 zero-size\n" in capsys.readouterr().out
    fault, _ = about["annotation_faults"]["first"]
    assert fault.startswith(f"annotation {truth['annotations'][0]['id']}: ")
    text = (out / "report.html").read_text()
    assert f"Not read: 4 images, whose objects count as not found. {'; '.join(reasons)} (and 1 more)" in text
    assert "Faults in the annotation file: 1 unknown-category, 1 zero-size" in text
    assert str(tmp_path) not in text + (out / "evaluation.json").read_text()


def test_files_to_be_sent_name_no_folder_of_this_machine(shapes_root, tmp_path, make_model, blank_charts):
    model, out = tmp_path / "run" / "best", tmp_path / "out"
    make_model(decoder_layers=1, max_objects=1).save_pretrained(model)
    words = ("--root", shapes_root, "--num_workers", 0, "--eval_batch_size", 5, "--output_dir", out, "--report")
    assert run("--checkpoint", model, *words) == 0
    text = (out / "report.html").read_text()
    assert "Evaluation of run/best" in text
    assert "Not read" not in text
    told = text + (out / "evaluation.json").read_text() + (out / "scored_against.json").read_text()
    assert str(tmp_path) not in told
    assert str(shapes_root) not in told


def test_a_folder_that_cannot_be_written_is_named(shapes_root, tmp_path, capsys, monkeypatch):
    """Before the detector runs where it can be known, and in one line whenever."""
    monkeypatch.setattr(evaluate, "oracle_predictions", None)  # it is not reached

    def complaint(folder) -> str:
        assert run("--oracle", "--root", shapes_root, "--output_dir", folder, "--num_images", 0, "--report") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"evaluate.py: error: --output_dir {folder}: cannot be written to (")
        assert error.count("\n") == 1
        return error

    (tmp_path / "a" / "metrics.json").mkdir(parents=True)
    assert "metrics.json is a folder there" in complaint(tmp_path / "a")
    (tmp_path / "b" / "report" / "kept.png").mkdir(parents=True)
    assert "kept.png is a folder there" in complaint(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "report").write_text("a file of this name")
    assert "report is a file there" in complaint(tmp_path / "c")
    complaint(tmp_path / "c" / "report")
    complaint("/proc/self")  # where nobody can write

    def full(*_, **__):
        (tmp_path / "d" / "report.html").mkdir()
        return []

    monkeypatch.setattr(evaluate, "oracle_predictions", full)
    complaint(tmp_path / "d")


@pytest.mark.slow
def test_a_browser_opens_the_page(tmp_path, shapes_root, predictions_of_shapes):
    """All pictures are shown, nothing is asked of the network, and the console stays empty."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    truth, predictions = predictions_of_shapes
    write_report(
        tmp_path,
        truth,
        predictions,
        load_annotations(find_split("val", shapes_root)),
        "predictions",
        "shapes",
        Skipped(),
    )
    page = tmp_path / "report.html"
    # A second page says of the first what only a browser knows.
    probe = (
        "<script>onload = () => { const broken = [...document.images].filter(i => !i.naturalWidth).length;"
        "const wide = document.documentElement.scrollWidth > innerWidth;"
        "const asked = performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length;"
        "document.title = `${document.images.length} pictures, ${broken} broken, wide ${wide}, ${asked} asked`; }"
        "</script></body>"
    )
    (tmp_path / "probe.html").write_text(page.read_text().replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,4000", "--enable-logging=stderr"]
    flags.append(f"--user-data-dir={tmp_path / 'browser'}")

    def opened(*words) -> subprocess.CompletedProcess:
        return subprocess.run([browser, *flags, *words], capture_output=True, text=True, timeout=120)

    shown = opened(f"--screenshot={tmp_path / 'page.png'}", page.as_uri())
    assert "CONSOLE" not in shown.stderr
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (1280, 4000)
        assert len(set(np.asarray(image.convert("L")).reshape(-1).tolist())) > 50
    title = re.search(r"<title>(.*?)</title>", opened("--dump-dom", (tmp_path / "probe.html").as_uri()).stdout)[1]
    count = len(list((tmp_path / "report").iterdir()))
    assert title == f"{count} pictures, 0 broken, wide false, 0 asked"
