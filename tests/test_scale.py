"""A dataset of COCO's size: loading time, memory of the annotations and the workers, and evaluation time."""

import gc
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

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

NUM_IMAGES, NUM_OBJECTS, NUM_CLASSES = 118_287, 860_001, 80  # of COCO train2017
CATEGORIES = [{"id": number, "name": f"class {number}"} for number in range(1, NUM_CLASSES + 1)]
MAX_HARD_LINKS = 10_000  # of a file; the limit of ext4 is 65,000


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """Entries as in COCO, including segmentations. The images are hard links to a few files."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    image, _ = draw_image(rng, 64, 3)
    boxes = (rng.random((NUM_OBJECTS, 4)) * [40, 40, 20, 20] + [0, 0, 1, 1]).round(2).tolist()
    image_ids = rng.integers(1, NUM_IMAGES + 1, NUM_OBJECTS).tolist()
    category_ids = rng.integers(1, NUM_CLASSES + 1, NUM_OBJECTS).tolist()
    images = []
    for number in range(1, NUM_IMAGES + 1):
        if number % MAX_HARD_LINKS == 1:
            image.save(original := folder / f"{number}.jpg")
        os.link(original, folder / "images" / f"{number:012d}.jpg")
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": 64, "width": 64, "license": 3})
    header = json.dumps({"images": images, "categories": CATEGORIES})
    with (folder / "large.json").open("w") as file:  # entry by entry, because all of them take gigabytes
        file.write(header.removesuffix("}") + ', "annotations": [')
        for number, (box, image_id, category_id) in enumerate(zip(boxes, image_ids, category_ids, strict=True)):
            x, y, w, h = box
            polygon = [[x, y, x + w, y, x + w, y + h, x + w / 2, y + h, x, y + h, x, y + h / 2]]
            entry = {"segmentation": polygon, "area": w * h, "iscrowd": 0, "image_id": image_id, "bbox": box}
            file.write(", " * (number > 0) + json.dumps(entry | {"category_id": category_id, "id": number + 1}))
        file.write("]}")
    return Split(folder / "images", folder / "large.json")


def run_in_new_process(function: Callable[..., dict], *args) -> dict:
    """Runs a function in a process whose memory other tests did not increase."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def unique_mb(process: psutil.Process | None = None) -> float:
    """Memory that a process does not share, in MB."""
    gc.collect()
    return (process or psutil.Process()).memory_full_info().uss / 1e6


def measure_training_data(split: Split) -> dict:
    mb_before, started = unique_mb(), time.process_time()  # CPU time, because other processes may use the cores
    annotations = load_annotations(split)
    seconds, mb = time.process_time() - started, unique_mb() - mb_before
    assert len(annotations) == NUM_IMAGES
    assert len(annotations.boxes) == NUM_OBJECTS
    assert annotations.issues == []
    builder = SequenceBuilder(Tokenizer(NUM_CLASSES, 100), max_objects=20)
    dataset = TrainDataset(annotations, TrainTransform(32), builder, seed=0)
    sampler, worker_mb, steps = StepSampler(num_images=8_000, batch_size=16), [], 500  # 8,000 images per epoch
    batches = iter(train_loader(dataset, sampler, num_workers=4, pin_memory=False))
    for step in range(3 * steps):
        next(batches)
        if (step + 1) % steps == 0:
            worker_mb.append([unique_mb(child) for child in psutil.Process().children()])
    return {"seconds": seconds, "mb": mb, "worker_mb": worker_mb}


def test_annotations_are_small_and_workers_do_not_grow(split, record_property):
    result = run_in_new_process(measure_training_data, split)
    first, *_, last = (max(mb) for mb in result["worker_mb"])
    record_property("cpu_seconds_to_load", result["seconds"])
    record_property("mb_of_annotations", result["mb"])
    record_property("mb_a_worker_grows_in_2_epochs", last - first)
    assert len(result["worker_mb"][0]) == 4
    assert result["seconds"] < 20
    assert result["mb"] < 150
    assert last - first < 20


def random_boxes(rng: np.random.Generator, count: int) -> list[list[float]]:
    return np.concatenate([rng.uniform(0, 400, (count, 2)), rng.uniform(10, 240, (count, 2))], axis=1).tolist()


def measure_evaluation() -> dict:
    rng, num_images, num_objects, num_predictions = np.random.default_rng(0), 5_000, 36_000, 500_000
    image_ids = rng.integers(0, num_images, num_objects).tolist()
    category_ids = rng.integers(1, 81, num_objects).tolist()
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (i, c, box) in enumerate(zip(image_ids, category_ids, random_boxes(rng, num_objects), strict=True), 1)
    ]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(num_images)]
    truth = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    category_ids, scores = rng.integers(1, 81, num_predictions).tolist(), rng.random(num_predictions).tolist()
    predictions = [
        {"image_id": n // 100, "category_id": c, "bbox": box, "score": score}
        for n, (c, box, score) in enumerate(zip(category_ids, random_boxes(rng, num_predictions), scores, strict=True))
    ]
    mb_before, started = psutil.Process().memory_info().rss / 1e6, time.perf_counter()
    metrics = coco_metrics(truth, predictions)
    seconds = time.perf_counter() - started
    assert 0 < metrics["AP50"] < 1
    # getrusage would also count the memory of the parent process before `exec`.
    peak_kb = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    return {"seconds": seconds, "mb": peak_kb * 1024 / 1e6 - mb_before}


def test_evaluation_of_half_a_million_boxes_takes_seconds(record_property):
    result = run_in_new_process(measure_evaluation)
    record_property("seconds", result["seconds"])
    record_property("mb", result["mb"])
    assert result["seconds"] < 10
    assert result["mb"] < 1000
