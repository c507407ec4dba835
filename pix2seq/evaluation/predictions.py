"""From a model and a dataset to predictions: every image once, on all ranks, in original pixels, unrounded."""

import math
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from pix2seq.data import EvalDataset, eval_loader
from pix2seq.data.image_files import BadImageError
from pix2seq.errors import Stopped
from pix2seq.generation import DecodingOptions, Detections, Interrupted, NonFiniteLogits
from pix2seq.progress import progress
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import to_original_pixels


def predict(
    model,
    dataset: EvalDataset,
    options: DecodingOptions,
    batch_size: int,
    accelerator,
    num_workers: int = 0,
    stop: Callable[[], bool] = lambda: False,
    warn: Callable[[list[str]], None] | None = None,
) -> list[dict]:
    """COCO results of every image of the dataset, gathered from all ranks in the dataset's order.

    The model is put in eval mode and back. Every rank calls this, and every rank gets the whole list. `stop` says
    whether this process has been told to stop: if any has, all of them raise Stopped, in the middle of a batch too.
    Nothing is found on images that cannot be read; on the main process `warn` is given a line for each.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = iter(eval_loader(dataset, batch_size, rank, world_size, num_workers))
    if world_size > 1:
        # While training, each rank's batch norms have counted a batch of their own since the last forward pass.
        # Checkpoints hold the main process's, and so must every rank that evaluates.
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)

    def any_rank(answer: bool) -> bool:
        answers = torch.tensor(float(answer), device=accelerator.device)
        return accelerator.reduce(answers, "sum").item() > 0

    was_training = model.training
    model.eval()
    results, broken_off = [], False
    rounds = range(math.ceil(len(dataset) / (batch_size * world_size)))
    for _ in progress(rounds, "evaluating") if accelerator.is_main_process else rounds:
        if broken_off := any_rank(broken_off or stop()):
            break
        if (batch := next(batches, None)) is None:  # the last round may have no batch for this rank
            continue
        image_ids = batch["image_id"].tolist()
        with accelerator.autocast():
            try:
                found = model.detect(batch["pixel_values"].to(accelerator.device), options, stop)
            except Interrupted:
                broken_off = True  # the other ranks hear of it in the next round
                continue
            except NonFiniteLogits as error:
                named = [image_ids[row] for row in error.rows]
                raise RuntimeError(f"image ids {named}: the detector's logits are NaN or infinite") from None
        for row, detections in enumerate(found):
            size, original_size = batch["size"][row].tolist(), batch["original_size"][row].tolist()
            side = dataset.transform.image_size
            detections.boxes = to_original_pixels(detections.boxes, side, size, original_size)
            unreadable = batch["unreadable"][row]
            rows = [] if unreadable else coco_results(image_ids[row], detections, model.config.category_ids)
            results.append((image_ids[row], rows, unreadable))
    model.train(was_training)
    if any_rank(broken_off):
        raise Stopped

    # Batches are dealt out so that no image is read twice; keying by image id is the second guard.
    gathered = accelerator.gather_for_metrics(results, use_gather_object=True)
    by_image = {image_id: rows for image_id, rows, _ in reversed(gathered)}
    if accelerator.is_main_process:
        (warn or warn_unreadable)([line for *_, line in gathered if line])
    return [row for image_id in dataset.annotations.image_ids.tolist() for row in by_image[image_id]]


def warn_unreadable(lines: list[str], write: Callable[[str], None] = tqdm.write) -> None:
    """One line of all there are, if there are any."""
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        write(f"{len(lines)} images cannot be read; their objects count as not found: {'; '.join(lines[:3])}{more}")


def coco_results(image_id: int, detections: Detections, category_ids: list[int]) -> list[dict]:
    """Detections in original pixels -> entries of a COCO results file, best score first."""
    rows = []
    for index in np.argsort(-detections.scores, kind="stable"):
        x1, y1, x2, y2 = detections.boxes[index].tolist()
        rows.append(
            {
                "image_id": image_id,
                "category_id": category_ids[detections.labels[index]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(detections.scores[index]),
            }
        )
    return rows


def oracle_predictions(
    dataset: EvalDataset, tokenizer: Tokenizer, warn: Callable[[list[str]], None] | None = None
) -> list[dict]:
    """The ground truth through the tokenizer and back, as COCO results: what a perfect model would score. `warn`: see
    `predict`."""
    annotations, transform = dataset.annotations, dataset.transform
    results, unreadable = [], []
    for index in progress(range(len(dataset)), "oracle"):
        image_id = int(annotations.image_ids[index])
        boxes, labels = annotations.objects(index)
        try:
            picture = annotations.image_file(index)
            canvas = transform(picture, boxes)
        except BadImageError as bad:
            unreadable.append(f"{annotations.name(index)}: {bad}")
            continue
        boxes, labels = tokenizer.decode(tokenizer.encode(canvas.boxes, labels[canvas.kept]))
        boxes = to_original_pixels(boxes, transform.image_size, canvas.valid_size, tuple(picture.shape[-2:]))
        detections = Detections(boxes, labels, np.ones(len(boxes)))
        results += coco_results(image_id, detections, annotations.categories.ids)
    (warn or warn_unreadable)(unreadable)
    return results
