"""`python -m pix2seq compare`: AP of resamples is COCO's, and a difference is told only where one is."""

import json
import re
import runpy
import sys

import numpy as np
import pytest

from pix2seq import evaluate
from pix2seq.argument_parser import parse
from pix2seq.cli import main
from pix2seq.data import find_split
from pix2seq.evaluate import EvaluateArguments
from pix2seq.evaluation.coco_metrics import METRICS, coco_metrics, metrics_table, remap_ids
from pix2seq.evaluation.compare import BootstrapAP, Row, compare, summary_line, table
from pix2seq.evaluation.report.matching import match
from tests.test_report import many_objects

NOTHING = "there is no object to find in these images, so no AP to compare"


@pytest.mark.parametrize("seed", range(4))
def test_every_image_once_gives_coco_metrics(seed):
    truth, predictions = many_objects(seed)
    ap = BootstrapAP(match(*remap_ids(truth, predictions)))(np.ones(len(truth["images"]), int))
    metrics = coco_metrics(truth, predictions)
    assert ap.mean() == pytest.approx(metrics["AP"], abs=1e-9)
    assert [ap[0].mean(), ap[5].mean()] == pytest.approx([metrics["AP50"], metrics["AP75"]], abs=1e-9)
    assert ap.mean(axis=0) == pytest.approx([metrics[f"per_class/{name}"] for name in ("cat", "dog", "eel")], abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_resample_gives_coco_metrics_of_the_drawn_images(seed):
    """Written out as a dataset, with copies of the images that are drawn more than once, next to each other."""
    truth, predictions = many_objects(seed)
    rng = np.random.default_rng(seed)
    for row in predictions:  # in a tie, copies of an image may come in an order that weights do not know
        row["score"] = float(rng.random())
    truth, predictions = remap_ids(truth, predictions)
    counts = np.bincount(rng.integers(len(truth["images"]), size=len(truth["images"])), minlength=len(truth["images"]))
    drawn = {"images": [], "annotations": [], "categories": truth["categories"]}
    found = []
    for image in np.repeat(np.arange(len(counts)), counts) + 1:
        copy = len(drawn["images"]) + 1
        drawn["images"].append({"id": copy})
        for entry in truth["annotations"]:
            if entry["image_id"] == image:
                drawn["annotations"].append(entry | {"image_id": copy, "id": len(drawn["annotations"]) + 1})
        found += [row | {"image_id": copy} for row in predictions if row["image_id"] == image]
    ap = BootstrapAP(match(truth, predictions))(counts)
    metrics = coco_metrics(drawn, found)
    assert np.nanmean(ap) == pytest.approx(metrics["AP"], abs=1e-9)
    assert np.nanmean(ap[0]) == pytest.approx(metrics["AP50"], abs=1e-9)


def test_a_class_without_objects_counts_for_nothing():
    truth, predictions = many_objects(0)
    truth["annotations"] = [entry for entry in truth["annotations"] if entry["category_id"] != 11]
    rows = compare(truth, predictions, predictions, resamples=5)
    assert rows[0].a == pytest.approx(coco_metrics(truth, predictions)["AP"], abs=1e-9)
    dog = next(row for row in rows if row.name == "dog")
    assert np.isnan([dog.a, dog.b, dog.low, dog.high]).all()


def worse(predictions: list[dict], share: float) -> list[dict]:
    """Some of the boxes are moved away."""
    rng = np.random.default_rng(0)
    moved = [row | {"bbox": [row["bbox"][0] + 500, *row["bbox"][1:]]} for row in predictions]
    return [b if rng.random() < share else a for a, b in zip(predictions, moved, strict=True)]


def perfect(truth: dict) -> list[dict]:
    return [
        {"image_id": e["image_id"], "category_id": e["category_id"], "bbox": e["bbox"], "score": 0.9}
        for e in truth["annotations"]
        if not e["iscrowd"]
    ]


def test_a_planted_difference_is_found_and_its_direction():
    truth, _ = many_objects(0)
    good, bad = perfect(truth), worse(perfect(truth), 0.3)
    rows = compare(truth, bad, good, resamples=200)
    assert rows[0].difference == pytest.approx(rows[0].b - rows[0].a)
    assert rows[0].low > 0.05
    assert rows[0].low < rows[0].difference < rows[0].high
    assert summary_line(rows[0], 40).startswith(
        f"B is better by {rows[0].difference:.3f} AP (95 % interval {rows[0].low:.3f} to"
    )
    turned = compare(truth, good, bad, resamples=200)
    assert turned[0].low == pytest.approx(-rows[0].high)  # the same images were drawn
    assert summary_line(turned[0], 40) == summary_line(rows[0], 40).replace("B is", "A is")


def test_a_detector_is_not_better_than_itself():
    truth, predictions = many_objects(2)
    row = compare(truth, predictions, predictions, resamples=50)[0]
    assert (row.difference, row.low, row.high) == (0, 0, 0)
    assert summary_line(row, 40).startswith("no difference can be told: B - A is 0.000 AP")


def test_the_seed_decides_the_resamples():
    truth, predictions = many_objects(0)
    one, same, other = (compare(truth, predictions, worse(predictions, 0.1), 20, seed) for seed in (0, 0, 1))
    assert one[0] == same[0] != other[0]


def test_a_class_is_one_line_whatever_its_name():
    names = ("AP", "AP50", "AP75", "a\nb", "größe")
    lines = table([Row(name, 0, 0, 0, 0) for name in names]).splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["a\\nb", "größe"]
    assert len({len(line) for line in lines[-2:]}) == 1
    metrics = dict.fromkeys(METRICS, 0.0) | {f"per_class/{name}": 0.0 for name in names[3:]}
    assert [line.split()[0] for line in metrics_table(metrics).splitlines()[-2:]] == ["a\\nb", "größe"]


# -- from the command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(shapes_root, tmp_path_factory):
    """What evaluate.py leaves of a good and of a bad oracle."""
    root = tmp_path_factory.mktemp("compare")
    for name, bins in (("fine", "200"), ("coarse", "7")):
        words = ["--oracle", "--root", str(shapes_root), "--num_bins", bins, "--output_dir", str(root / name)]
        evaluate.run_evaluation(parse(EvaluateArguments, words))
    return root


def test_compare_of_two_folders(folders, tmp_path, capsys):
    words = ["compare", str(folders / "coarse"), str(folders / "fine"), "--resamples", "100"]
    assert main([*words, "--output", str(tmp_path / "compare.json")]) == 0
    out = capsys.readouterr().out
    assert "AP by class" in out
    assert "no difference can be told by 5 images, at least 20 are needed: B - A is 0." in out
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["verdict"] in out
    assert [row["name"] for row in content["rows"][:4]] == ["AP", "AP50", "AP75", "ellipse"]
    metrics = json.loads((folders / "fine" / "metrics.json").read_text())
    assert content["rows"][0]["b"] == pytest.approx(metrics["AP"], abs=1e-9)


def test_compare_of_files_needs_the_ground_truth(folders, shapes_root, capsys):
    files = [str(folders / name / "predictions.json") for name in ("fine", "fine")]
    assert main(["compare", *files]) == 2
    assert "pix2seq.evaluation compare: error: --gt: missing" in capsys.readouterr().err
    gt = str(find_split("val", shapes_root).json)
    assert main(["compare", *files, "--gt", gt, "--resamples", "100"]) == 0
    assert "no difference can be told" in capsys.readouterr().out
    assert main(["compare", files[0], str(folders / "fine"), "--resamples", "100"]) == 0  # one folder knows it


def scored(truth: dict, folder) -> str:
    """A folder of evaluate.py of no predictions, scored against a file."""
    folder.mkdir()
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "p.json").write_text("[]")
    words = ["--predictions", str(folder / "p.json"), "--gt", str(folder / "gt.json")]
    evaluate.run_evaluation(parse(EvaluateArguments, [*words, "--output_dir", str(folder / "out")]))
    return str(folder / "out")


def test_the_same_data_may_come_from_another_file(folders, shapes_root, tmp_path, capsys):
    """A detector's folder and one of a results file: in another order, and one knows a class more."""
    truth = json.loads(find_split("val", shapes_root).json.read_text())
    truth["images"].reverse()
    truth["annotations"].reverse()
    truth["categories"].append({"id": 500, "name": "another"})
    other = scored(truth, tmp_path / "other")
    (tmp_path / "other" / "gt.json").unlink()  # the folder knows what it was scored against
    for words in ([other, str(folders / "fine")], [str(folders / "fine"), other]):
        assert main(["compare", *words, "--resamples", "100"]) == 0
        out = capsys.readouterr().out
        assert re.search("another +no objects", out)
        assert "nan" not in out


@pytest.mark.parametrize("what", ["images", "annotations", "classes"])
def test_folders_of_different_data_are_not_compared(folders, shapes_root, tmp_path, capsys, what):
    truth = json.loads(find_split("val", shapes_root).json.read_text())
    if what == "images":
        truth["images"].append({"id": 77, "file_name": "more.png"})
    elif what == "annotations":
        truth["annotations"][0]["bbox"][0] += 1
    else:
        truth["categories"][0]["name"] = "oval"
    other = scored(truth, tmp_path / "other")
    assert main(["compare", other, str(folders / "fine")]) == 2
    assert f"were scored against different {what}; name what is common" in capsys.readouterr().err
    words = ["--gt", str(find_split("val", shapes_root).json), "--resamples", "100"]
    assert main(["compare", other, str(folders / "fine"), *words]) == 0


def test_where_there_is_nothing_to_find_there_is_nothing_to_compare(shapes_root, tmp_path, capsys):
    truth = json.loads(find_split("val", shapes_root).json.read_text())
    out = scored(truth | {"annotations": []}, tmp_path / "empty")
    capsys.readouterr()
    assert main(["compare", out, out]) == 2
    said = capsys.readouterr()
    assert said.err == f"pix2seq.evaluation compare: error: {out} and {out}: {NOTHING}\n"
    assert said.out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{fine}", "/nowhere"], "B /nowhere: cannot be read"),
        (["{fine}", "{fine}", "--gt", "/nowhere.json"], "/nowhere.json: cannot be read"),
        (["{fine}", "{fine}", "--resamples", "0"], "--resamples 0: must be at least 100"),
        (["{fine}", "{fine}", "--seed", "-1"], "--seed -1: must be at least 0"),
        (["{fine}", "{fine}", "--resamples", "x"], "--resamples: invalid int value"),
        (
            ["{fine}", "/nowhere", "--resamples", "100", "--output", "/nowhere/x.json"],  # told before any reading
            "--output /nowhere/x.json: cannot be",
        ),
        (["{fine}", "{bad}/b.json", "--output", "{bad}/b.json"], "b.json: would take the place of an input"),
        (["{fine}", "{fine}/metrics.json"], "a COCO results file is a list"),
        (["{fine}"], "required: b"),
        (["{fine}", "{fine}", "--gtt", "x"], "unrecognized arguments: --gtt"),
        (["{fine}", "{bad}"], "scored_against.json: has no list 'images'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(folders, tmp_path, capsys, words, says):
    for name in ("scored_against.json", "b.json"):
        (tmp_path / name).write_text("[]")
    words = [word.format(fine=folders / "fine", bad=tmp_path) for word in words]
    try:
        code = main(["compare", *words])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("pix2seq.evaluation compare: error: ")
    assert error.count("\n") == 1


def test_without_a_command_it_says_which_there_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pix2seq.evaluation"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("pix2seq.evaluation", run_name="__main__")
    assert stopped.value.code == 2
    assert "compare A B" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "compare A B" in capsys.readouterr().out
