"""The benchmark of the data pipeline runs, and all pipelines process the same images in the same order."""

import json

import numpy as np
import pytest

from benchmarks import data
from pix2seq.data.image_stores import FolderStore

PEERS = {"torchvision", "torchvision_raw", "torchvision_pil", "detr-style"}


def test_benchmark_writes_a_record(shapes_root, tmp_path):
    flags = "--image_size 64 --rounds 1 --large_images 2 --large_rounds 1 --large_side 300"
    argv = f"--root {shapes_root} --output {tmp_path / 'data.json'} {flags}".split()
    data.main(argv)
    record = json.loads((tmp_path / "data.json").read_text())
    assert record["images"]["count"] == 12
    assert record["large_images"]["count"] == 2
    for comparison in (record["as_batches"], record["as_examples"], record["large_images"]["as_batches"]):
        rates = {name: rate["median"] for name, rate in comparison["images_per_s"].items()}
        assert rates.keys() == {"pix2seq"} | PEERS
        assert min(rates.values()) > 0
        for name in PEERS:
            assert comparison["times_as_fast"][name]["median"] == pytest.approx(rates["pix2seq"] / rates[name])
    times = record["ms_per_image"]
    assert times.pop("all") == pytest.approx(sum(times.values()))
    assert min(times.values()) > 0


def test_all_pipelines_process_the_same_images_in_the_same_order(shapes_root, monkeypatch):
    dataset = data.load_train_set(str(shapes_root), 64, 8)
    locations, read, processed = [], FolderStore.read, {}
    monkeypatch.setattr(
        FolderStore, "read", lambda store, location: locations.append(str(location)) or read(store, location)
    )

    def record_calls(name, pipeline):
        def make_example(index, round_number):
            locations.clear()
            example = pipeline(index, round_number)
            processed.setdefault(name, []).append((example["image_id"], *locations))
            assert example["pixel_values"].shape == (3, 64, 64)
            assert len(example["labels"]) == (500 if name == "pix2seq" else len(example["boxes"]))
            return example

        return make_example

    pipelines = {name: record_calls(name, pipeline) for name, pipeline in data.make_pipelines(dataset).items()}
    data.compare(pipelines, num_images=8, rounds=2, title="shapes")
    assert processed.keys() == {"pix2seq"} | PEERS
    assert all(processed[name] == processed["pix2seq"] for name in PEERS)
    rounds = np.array([image_id for image_id, _ in processed["pix2seq"]])[8:].reshape(2, 8)
    assert {frozenset(image_ids) for image_ids in rounds.tolist()} == {
        frozenset(dataset.annotations.image_ids.tolist())
    }
