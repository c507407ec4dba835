"""The loader's benchmark runs, and gives all makers the same pictures in the same order."""

import json

import numpy as np
import pytest

from benchmarks import data
from pix2seq.data.image_files import Folder

PEERS = {"torchvision", "torchvision_raw", "torchvision_pil", "detr-style"}


def test_the_record_has_all_figures(shapes_root, tmp_path):
    words = ["--root", str(shapes_root), "--image_size", "64", "--output", str(tmp_path / "data.json")]
    words += ["--rounds", "1", "--num_workers", "2", "--large_images", "2", "--large_side", "300"]
    assert data.main(words) == 0
    found = json.loads((tmp_path / "data.json").read_text())
    parts = {"as_batches", "as_examples", "ms_per_image", "memory_mb", "data_wait"}
    assert found.keys() == {"environment", "flags", "images", "large_images"} | parts
    assert found["images"]["count"] == 12
    assert found["large_images"]["count"] == 2
    for race in (found["as_batches"], found["as_examples"], found["large_images"]["as_batches"]):
        rates = {name: rate["median"] for name, rate in race["images_per_s"].items()}
        assert rates.keys() == {"pix2seq"} | PEERS
        assert min(rates.values()) > 0
        assert race["times_as_fast"].keys() == PEERS | {"faster peer"}
        assert rates[race["times_as_fast"]["faster peer"]["name"]] == max(rates[peer] for peer in PEERS)
    rates = {name: rate["median"] for name, rate in found["as_batches"]["images_per_s"].items()}
    for name in PEERS:
        assert found["as_batches"]["times_as_fast"][name]["median"] == pytest.approx(rates["pix2seq"] / rates[name])
    times = found["ms_per_image"]
    assert times.pop("all") == pytest.approx(sum(times.values()))
    assert min(times.values()) > 0
    assert {"bare_worker", "worker_after_1", "worker_after_3", "main_after_3"} <= found["memory_mb"].keys()
    assert found["data_wait"]["status"].startswith("computed, not measured")
    assert found["data_wait"]["images_per_s_eaten"] > 0


def test_all_makers_see_the_same_pictures_in_the_same_order(shapes_root, monkeypatch):
    dataset = data.training_set(str(shapes_root), 64, 8)
    places, read, made = [], Folder.read, {}
    monkeypatch.setattr(Folder, "read", lambda store, place: places.append(str(place)) or read(store, place))

    def noted(name, make):
        def make_and_note(index, number):
            places.clear()
            example = make(index, number)
            made.setdefault(name, []).append((example["image_id"], *places))
            assert example["pixel_values"].shape == (3, 64, 64)
            assert len(example["labels"]) == (500 if name == "pix2seq" else len(example["boxes"]))
            return example

        return make_and_note

    data.race({name: noted(name, make) for name, make in data.makers_of(dataset).items()}, 8, 2, "drawn")
    assert made.keys() == {"pix2seq"} | PEERS
    assert all(made[peer] == made["pix2seq"] for peer in PEERS)
    rounds = np.array([image for image, _ in made["pix2seq"]])[8:].reshape(2, 8)
    assert {frozenset(round) for round in rounds.tolist()} == {frozenset(dataset.annotations.image_ids.tolist())}


def test_a_gpus_wait_is_what_the_cores_cannot_make():
    found = data.data_wait({"images_per_s_eaten": 1000.0}, 50.0)
    assert found["cores_for_less_than_5%_wait"] == 20
    assert found["wait_share_with_16_workers"] == pytest.approx(0.2)


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--step_ms", "3"], ["--wrong", "1"], ["--root", "/nowhere"]])
def test_bad_flags_are_one_line(shapes_root, tmp_path, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        data.main(["--root", str(shapes_root), "--output", str(tmp_path / "data.json"), *words])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
