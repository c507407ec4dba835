"""A dataset of COCO's size: its index is small and opens quickly, workers do not grow, and scoring takes seconds."""

import gc
import json
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import psutil
import pytest

from pix2seq.data import Split, StepSampler, TrainDataset, load_annotations, train_loader
from pix2seq.data.shapes import draw_image
from pix2seq.evaluation.coco_metrics import coco_metrics
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import TrainTransform

pytestmark = pytest.mark.slow

IMAGES, OBJECTS, CLASSES = 118_287, 860_001, 80  # COCO 2017's training set


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """Entries as in COCO's file, outlines included. Its images are a few files under many names."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "images").mkdir()
    image, _ = draw_image(np.random.default_rng(0), 64, 3)
    rng = np.random.default_rng(0)
    boxes = (rng.random((OBJECTS, 4)) * [40, 40, 20, 20] + [0, 0, 1, 1]).round(2)
    owners, classes = rng.integers(1, IMAGES + 1, OBJECTS).tolist(), rng.integers(1, CLASSES + 1, OBJECTS).tolist()
    with (folder / "large.json").open("w") as file:
        file.write('{"images": [')
        for number in range(1, IMAGES + 1):
            if number % 10_000 == 1:  # a file can have so many names only
                image.save(base := folder / f"{number}.jpg")
            os.link(base, folder / "images" / f"{number:012d}.jpg")
            entry = {"id": number, "file_name": f"{number:012d}.jpg", "height": 64, "width": 64, "license": 3}
            file.write(", " * (number > 1) + json.dumps(entry))
        file.write('], "annotations": [')
        for number, (box, owner, kind) in enumerate(zip(boxes.tolist(), owners, classes, strict=True), start=1):
            x, y, w, h = box
            outline = [[x, y, x + w, y, x + w, y + h, x + w / 2, y + h, x, y + h, x, y + h / 2]]
            entry = {"segmentation": outline, "area": w * h, "iscrowd": 0, "image_id": owner, "bbox": box}
            file.write(", " * (number > 1) + json.dumps(entry | {"category_id": kind, "id": number}))
        categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return Split(folder / "images", folder / "large.json")


def apart(measurement: Callable[..., dict], *arguments) -> dict:
    """In a process of its own, which has not grown by other tests; a forked one would wait for threads it lacks."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measurement, *arguments).result()


def own_mb(process: psutil.Process | None = None) -> float:
    """Memory that is this process's alone."""
    gc.collect()
    return (process or psutil.Process()).memory_full_info().uss / 1e6


def measure(split: Split) -> dict:
    before, began = own_mb(), time.perf_counter()
    annotations = load_annotations(split)
    seconds, after = time.perf_counter() - began, own_mb()
    assert len(annotations) == IMAGES
    assert len(annotations.boxes) == OBJECTS
    assert annotations.issues == []
    data = TrainDataset(annotations, TrainTransform(32), SequenceBuilder(Tokenizer(CLASSES, 100), 20), seed=0)
    workers, steps = [], 500
    # Epochs of 8,000 images, which is quicker than three of all; what grows does so by the example.
    batches = iter(train_loader(data, StepSampler(8_000, 16, seed=0), 4, pin_memory=False))
    for step in range(3 * steps):
        next(batches)
        if (step + 1) % steps == 0:
            workers.append([own_mb(child) for child in psutil.Process().children()])
    return {"seconds": seconds, "index_mb": after - before, "workers_mb": workers, "main_mb": own_mb() - after}


def test_an_index_of_cocos_size_is_small_and_workers_do_not_grow(split, record_property):
    found = apart(measure, split)
    record_property("seconds to open the index", found["seconds"])
    record_property("MB of the index", found["index_mb"])
    first, *_, last = (max(mb) for mb in found["workers_mb"])
    record_property("MB by which a worker grows over 2 epochs", last - first)
    assert len(found["workers_mb"][0]) == 4
    assert found["seconds"] < 20
    assert found["index_mb"] < 150
    assert last - first < 20


def test_the_predictions_of_cocos_validation_set_are_scored_in_seconds(record_property):
    """5,000 images, 500,000 boxes."""
    found = apart(score_many)
    record_property("seconds to score 500,000 boxes", found["seconds"])
    record_property("MB it took", found["mb"])
    assert found["seconds"] < 10
    assert found["mb"] < 1000


def score_many() -> dict:
    rng = np.random.default_rng(0)
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(5000)]
    annotations = [
        {"id": n, "image_id": int(i), "category_id": int(c), "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
        for n, (i, c, b) in enumerate(
            zip(rng.integers(0, 5000, 36_000), rng.integers(1, 81, 36_000), some_boxes(rng, 36_000), strict=True), 1
        )
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 81)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    predictions = [
        {"image_id": n // 100, "category_id": int(c), "bbox": box, "score": float(score)}
        for n, (c, box, score) in enumerate(
            zip(rng.integers(1, 81, 500_000), some_boxes(rng, 500_000), rng.random(500_000), strict=True)
        )
    ]
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    metrics = coco_metrics(truth, predictions)
    seconds = time.perf_counter() - began
    assert 0 < metrics["AP50"] < 1
    return {"seconds": seconds, "mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6}


def some_boxes(rng: np.random.Generator, count: int) -> list[list[float]]:
    return np.concatenate([rng.uniform(0, 400, (count, 2)), rng.uniform(10, 240, (count, 2))], axis=1).tolist()
