"""Runs a model over a dataset and returns COCO results."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from pix2seq.data import Annotations, EvalDataset, eval_loader
from pix2seq.data.image_files import BadImageError
from pix2seq.errors import Stopped
from pix2seq.generation import DecodingOptions, Interrupted, NonFiniteLogits
from pix2seq.models.detections import Detections
from pix2seq.progress import progress
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import to_original_pixels

NUM_LISTED = 3  # unreadable images that a warning names


def predict(
    model,
    dataset: EvalDataset[Annotations],
    options: DecodingOptions,
    batch_size: int,
    accelerator,
    num_workers: int = 0,
    stop: Callable[[], bool] = lambda: False,
    warn: Callable[[list[str]], None] | None = None,
    description: str = "evaluating",
) -> list[dict]:
    """Predicts the objects of every image, each image once over all ranks.

    Every rank calls this function. The model runs in eval mode and is set back to its mode afterwards.

    Args:
        model: A Pix2SeqForObjectDetection.
        dataset: The images.
        options: Decoding options.
        batch_size: Images per process.
        accelerator: Accelerate's Accelerator.
        num_workers: Data loading workers per process.
        stop: Returns True if this process should stop.
        warn: Called on the main process with one line for each image that cannot be read. Such images have no
            predictions. Default: `warn_unreadable`.
        description: Name of the work, for the progress bar.

    Returns:
        COCO results of all images on every rank, in the order of the dataset, with unrounded boxes in pixels of the
        original images.

    Raises:
        Stopped: `stop` returned True on any rank. All ranks raise it.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = iter(eval_loader(dataset, batch_size, rank, world_size, num_workers))
    if world_size > 1:
        # In training, the batch norm statistics of the ranks differ by the last batch. Checkpoints hold those of the
        # main process, so all ranks evaluate with them.
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)

    def any_rank(condition: bool) -> bool:
        total = accelerator.reduce(torch.tensor(float(condition), device=accelerator.device), "sum")
        return total.item() > 0

    was_training = model.training
    model.eval()
    results, stopped = [], False
    rounds = range(math.ceil(len(dataset) / (batch_size * world_size)))
    for _ in progress(rounds, description) if accelerator.is_main_process else rounds:
        if stopped := any_rank(stopped or stop()):
            break
        if (batch := next(batches, None)) is None:  # this rank may have no batch in the last round
            continue
        with accelerator.autocast():
            try:
                detections = model.detect(batch["pixel_values"].to(accelerator.device), options, stop)
            except Interrupted:
                stopped = True  # the other ranks learn it in the next round
                continue
            except NonFiniteLogits as error:
                image_ids = batch["image_id"][error.rows].tolist()
                raise RuntimeError(f"image ids {image_ids}: the model's logits are NaN or infinite") from None
        results += _batch_results(batch, detections, dataset.transform.image_size, model.config.category_ids)
    model.train(was_training)
    if any_rank(stopped):
        raise Stopped

    # The loader gives each image to one rank. Keys by image id make sure that none counts twice.
    gathered = accelerator.gather_for_metrics(results, use_gather_object=True)
    by_image = {image_id: entries for image_id, entries, _ in reversed(gathered)}
    if accelerator.is_main_process:
        (warn or warn_unreadable)([reason for *_, reason in gathered if reason])
    return [entry for image_id in dataset.annotations.image_ids.tolist() for entry in by_image[image_id]]


def _batch_results(
    batch: dict, detections: list[Detections], image_size: int, category_ids: Sequence[int]
) -> list[tuple[int, list[dict], str]]:
    """Returns the id, the COCO results and the reason why it is unreadable ("" if it is not) of each image."""
    results = []
    for row, detected in enumerate(detections):
        image_id, unreadable = int(batch["image_id"][row]), batch["unreadable"][row]
        detected.boxes = to_original_pixels(
            detected.boxes, image_size, batch["size"][row].tolist(), batch["original_size"][row].tolist()
        )
        results.append((image_id, [] if unreadable else coco_results(image_id, detected, category_ids), unreadable))
    return results


def warn_unreadable(lines: list[str], write: Callable[[str], None] = tqdm.write) -> None:
    """Writes one line about the images that cannot be read, if there are any."""
    if lines:
        more = f" (and {len(lines) - NUM_LISTED} more)" if len(lines) > NUM_LISTED else ""
        listed = "; ".join(lines[:NUM_LISTED])
        write(f"{len(lines)} images cannot be read; their objects count as not found: {listed}{more}")


def coco_results(image_id: int, detections: Detections, category_ids: Sequence[int]) -> list[dict]:
    """Converts detections to entries of a COCO results file.

    Args:
        image_id: Id of the image.
        detections: Detections with boxes (N, 4) xyxy in pixels of the original image.
        category_ids: Category id of each label.

    Returns:
        N entries, highest score first. Entries of equal score keep their order.
    """
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[detections.labels[index]],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(detections.scores[index]),
        }
        for index in np.argsort(-detections.scores, kind="stable")
        for x1, y1, x2, y2 in [detections.boxes[index].tolist()]
    ]


def oracle_predictions(
    dataset: EvalDataset[Annotations], tokenizer: Tokenizer, warn: Callable[[list[str]], None] | None = None
) -> list[dict]:
    """Encodes and decodes the ground truth with the tokenizer: the predictions of a perfect model.

    Args:
        dataset: The images.
        tokenizer: The tokenizer.
        warn: See `predict`.

    Returns:
        COCO results with a score of 1.
    """
    annotations, transform = dataset.annotations, dataset.transform
    results, unreadable = [], []
    for index in progress(range(len(dataset)), "oracle"):
        boxes, labels = annotations.objects(index)
        try:
            image = annotations.image_file(index)
            padded = transform(image, boxes)
            height, width = image.shape[-2:]
        except BadImageError as error:
            unreadable.append(f"{annotations.name(index)}: {error}")
            continue
        boxes, labels = tokenizer.decode(tokenizer.encode(padded.boxes, labels[padded.kept]))
        boxes = to_original_pixels(boxes, transform.image_size, padded.valid_size, (height, width))
        detections = Detections(boxes, labels, np.ones(len(boxes)))
        results += coco_results(int(annotations.image_ids[index]), detections, annotations.categories.ids)
    (warn or warn_unreadable)(unreadable)
    return results
