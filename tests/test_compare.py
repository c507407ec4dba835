"""`pix2seq compare`: the AP of a resample equals COCO's, and only real differences are significant."""

import json
import re
import shutil

import hotcoco
import numpy as np
import pytest

from pix2seq import evaluate
from pix2seq.argument_parser import parse
from pix2seq.cli import main
from pix2seq.data import find_split
from pix2seq.evaluate import EvaluateArguments
from pix2seq.evaluation.coco_metrics import coco_metrics, evaluate_with_hotcoco, remap_ids
from pix2seq.evaluation.compare import BootstrapAP, Comparison, compare, comparison_table, summary_line
from pix2seq.evaluation.report.matching import match
from tests.test_coco_metrics import make_ground_truth, perfect_predictions
from tests.test_report import many_objects


@pytest.mark.parametrize("seed", range(4))
def test_ap_of_all_images_equals_coco_metrics(seed):
    ground_truth, predictions = many_objects(seed)
    ap = BootstrapAP(match(*remap_ids(ground_truth, predictions)))(np.ones(len(ground_truth["images"]), int))
    metrics = coco_metrics(ground_truth, predictions)
    assert [ap.mean(), ap[0].mean(), ap[5].mean()] == pytest.approx(
        [metrics["AP"], metrics["AP50"], metrics["AP75"]], abs=1e-9
    )
    assert ap.mean(axis=0) == pytest.approx([metrics[f"per_class/{name}"] for name in ("cat", "dog", "eel")], abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_ap_of_a_resample_equals_coco_metrics(seed):
    """The oracle is a dataset with copies of the images that are drawn several times."""
    ground_truth, predictions = many_objects(seed)
    rng = np.random.default_rng(seed)
    for prediction in predictions:  # with equal scores, the order of the copies matters
        prediction["score"] = float(rng.random())
    ground_truth, predictions = remap_ids(ground_truth, predictions)
    num_images = len(ground_truth["images"])
    counts = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
    drawn = {"images": [], "annotations": [], "categories": ground_truth["categories"]}
    drawn_predictions = []
    for image_id in np.repeat(np.arange(len(counts)), counts) + 1:
        copy = len(drawn["images"]) + 1
        drawn["images"].append({"id": copy})
        for entry in ground_truth["annotations"]:
            if entry["image_id"] == image_id:
                drawn["annotations"].append(entry | {"image_id": copy, "id": len(drawn["annotations"]) + 1})
        drawn_predictions += [entry | {"image_id": copy} for entry in predictions if entry["image_id"] == image_id]
    ap = BootstrapAP(match(ground_truth, predictions))(counts)
    metrics = coco_metrics(drawn, drawn_predictions)
    assert [np.nanmean(ap), np.nanmean(ap[0])] == pytest.approx([metrics["AP"], metrics["AP50"]], abs=1e-9)


def test_hotcoco_intervals_are_too_narrow():
    """A finds all of 100 objects, B half of them. The standard error of the recall of B is sqrt(0.5 * 0.5 / 100)."""
    ground_truth = make_ground_truth({image_id: [[0, 0, 10, 10]] for image_id in range(1, 101)})
    a = perfect_predictions(ground_truth)
    b = a[:50]
    evaluations = [evaluate_with_hotcoco(ground_truth, predictions) for predictions in (a, b)]
    interval = hotcoco.compare(*evaluations, n_bootstrap=2000, seed=0)["ci"]["AR100"]
    assert interval["std_err"] == pytest.approx(0.05 * np.sqrt(1 / (1 - np.exp(-1)) - 1), rel=0.05)  # 0.038
    ours = compare(ground_truth, a, b, resamples=2000)[0]
    assert (ours.high - ours.low) / (2 * 1.96) == pytest.approx(0.05, rel=0.05)


def test_class_without_objects_has_no_ap():
    ground_truth, predictions = many_objects(0)
    ground_truth["annotations"] = [entry for entry in ground_truth["annotations"] if entry["category_id"] != 11]
    comparisons = compare(ground_truth, predictions, predictions, resamples=5)
    assert comparisons[0].a == pytest.approx(coco_metrics(ground_truth, predictions)["AP"], abs=1e-9)
    dog = next(comparison for comparison in comparisons if comparison.name == "dog")
    assert np.isnan([dog.a, dog.b, dog.low, dog.high]).all()


def degrade(predictions: list[dict], share: float) -> list[dict]:
    """Moves a share of the boxes away."""
    rng = np.random.default_rng(0)
    moved = [entry | {"bbox": [entry["bbox"][0] + 500, *entry["bbox"][1:]]} for entry in predictions]
    return [b if rng.random() < share else a for a, b in zip(predictions, moved, strict=True)]


def test_real_difference_is_significant_in_its_direction():
    ground_truth, _ = many_objects(0)
    good = perfect_predictions(ground_truth)
    bad = degrade(good, 0.3)
    better, worse = (compare(ground_truth, *models, resamples=200)[0] for models in ((bad, good), (good, bad)))
    assert 0.05 < better.low < better.difference < better.high
    assert better.difference == pytest.approx(better.b - better.a)
    assert worse.low == pytest.approx(-better.high)  # both use the same resamples
    assert summary_line(better, 40).startswith("B is better")
    assert summary_line(worse, 40).startswith("A is better")


def test_equal_models_do_not_differ():
    ground_truth, predictions = many_objects(2)
    comparison = compare(ground_truth, predictions, predictions, resamples=50)[0]
    assert (comparison.difference, comparison.low, comparison.high) == (0, 0, 0)
    assert summary_line(comparison, 40).startswith("no significant difference")


def test_seed_determines_the_resamples():
    ground_truth, predictions = many_objects(0)
    first, same, other = (
        compare(ground_truth, predictions, degrade(predictions, 0.1), 20, seed) for seed in (0, 0, 1)
    )
    assert first[0] == same[0] != other[0]


def test_table_has_one_line_per_class():
    names = ("AP", "AP50", "AP75", "a\nb", "größe")
    lines = comparison_table([Comparison(name, 0, 0, 0, 0) for name in names]).splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["a\\nb", "größe"]
    assert len({len(line) for line in lines[-2:]}) == 1


# -- command line ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(shapes_root, tmp_path_factory):
    """Output folders of evaluate.py for a good and a bad oracle."""
    root = tmp_path_factory.mktemp("compare")
    for name, bins in (("fine", "200"), ("coarse", "7")):
        words = ["--oracle", "--root", str(shapes_root), "--num_bins", bins, "--output_dir", str(root / name)]
        evaluate.run_evaluation(parse(EvaluateArguments, words))
    return root


def test_compare_two_folders(folders, tmp_path, capsys):
    words = ["compare", str(folders / "coarse"), str(folders / "fine"), "--resamples", "100"]
    assert main([*words, "--output", str(tmp_path / "compare.json")]) == 0
    content = json.loads((tmp_path / "compare.json").read_text())
    assert "too few images" in content["summary"]
    out = capsys.readouterr().out
    assert content["summary"] in out
    assert "95 %" not in out
    assert {(row["low"], row["high"]) for row in content["metrics"]} == {(None, None)}
    assert [row["name"] for row in content["metrics"][:4]] == ["AP", "AP50", "AP75", "ellipse"]
    metrics = json.loads((folders / "fine" / "metrics.json").read_text())
    assert content["metrics"][0]["b"] == pytest.approx(metrics["AP"], abs=1e-9)


def test_comparing_two_files_requires_gt(folders, shapes_root, capsys):
    file = str(folders / "fine" / "predictions.json")
    assert main(["compare", file, file]) == 2
    assert "--gt: missing" in capsys.readouterr().err
    gt = str(find_split("val", shapes_root).json)
    assert main(["compare", file, file, "--gt", gt, "--resamples", "100"]) == 0
    assert main(["compare", file, str(folders / "fine"), "--resamples", "100"]) == 0


def evaluate_nothing(document: dict, folder) -> str:
    """Evaluates an empty results file; returns the output folder."""
    folder.mkdir()
    (folder / "gt.json").write_text(json.dumps(document))
    (folder / "p.json").write_text("[]")
    words = ["--predictions", str(folder / "p.json"), "--gt", str(folder / "gt.json")]
    evaluate.run_evaluation(parse(EvaluateArguments, [*words, "--output_dir", str(folder / "out")]))
    return str(folder / "out")


def test_order_of_the_annotations_and_further_classes_do_not_matter(folders, shapes_root, tmp_path, capsys):
    document = json.loads(find_split("val", shapes_root).json.read_text())
    document["images"].reverse()
    document["annotations"].reverse()
    document["categories"].append({"id": 500, "name": "another"})
    other = evaluate_nothing(document, tmp_path / "other")
    (tmp_path / "other" / "gt.json").unlink()
    for pair in ([other, str(folders / "fine")], [str(folders / "fine"), other]):
        assert main(["compare", *pair, "--resamples", "100"]) == 0
        out = capsys.readouterr().out
        assert re.search("another +no objects", out)
        assert "nan" not in out


@pytest.mark.parametrize("part", ["images", "annotations", "classes"])
def test_folders_of_different_data_are_rejected(folders, shapes_root, tmp_path, capsys, part):
    document = json.loads(find_split("val", shapes_root).json.read_text())
    if part == "images":
        document["images"].append({"id": 77, "file_name": "more.png"})
    elif part == "annotations":
        document["annotations"][0]["bbox"][0] += 1
    else:
        document["categories"][0]["name"] = "oval"
    other = evaluate_nothing(document, tmp_path / "other")
    assert main(["compare", other, str(folders / "fine")]) == 2
    assert f"different {part}" in capsys.readouterr().err
    words = ["--gt", str(find_split("val", shapes_root).json), "--resamples", "100"]
    assert main(["compare", other, str(folders / "fine"), *words]) == 0


def test_dataset_without_objects_is_rejected(shapes_root, tmp_path, capsys):
    document = json.loads(find_split("val", shapes_root).json.read_text())
    out = evaluate_nothing(document | {"annotations": []}, tmp_path / "empty")
    assert main(["compare", out, out]) == 2
    assert "no objects" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["predictions.json", "ground_truth.json", "link.json"])
def test_no_file_of_an_input_folder_is_overwritten(folders, tmp_path, capsys, name):
    folder = shutil.copytree(folders / "fine", tmp_path / "fine")
    (folder / "link.json").symlink_to(folder / "predictions.json")
    before = (folder / name).read_bytes()
    assert main(["compare", str(folder), str(folders / "coarse"), "--output", str(folder / name)]) == 2
    assert f"{name}: would overwrite the input" in capsys.readouterr().err
    assert (folder / name).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{fine}", "/nowhere"], "B /nowhere"),
        (["{fine}", "{fine}", "--gt", "/nowhere.json"], "/nowhere.json"),
        (["{fine}", "{fine}", "--resamples", "0"], "--resamples 0"),
        (["{fine}", "{fine}", "--seed", "-1"], "--seed -1"),
        (["{fine}", "{fine}", "--resamples", "x"], "--resamples"),
        (["{fine}", "/nowhere", "--output", "/nowhere/x.json"], "--output /nowhere/x.json"),  # before reading
        (["{fine}", "{bad}/b.json", "--output", "{bad}/b.json"], "b.json: would overwrite the input"),
        (["{fine}", "{fine}/metrics.json"], "metrics.json"),
        (["{fine}"], "required: b"),
        (["{fine}", "{fine}", "--gtt", "x"], "--gtt"),
        (["{fine}", "{bad}"], "ground_truth.json"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(folders, tmp_path, capsys, words, message):
    for name in ("ground_truth.json", "b.json"):
        (tmp_path / name).write_text("[]")
    try:
        code = main(["compare", *(word.format(fine=folders / "fine", bad=tmp_path) for word in words)])
    except SystemExit as stopped:
        code = stopped.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert message in line
