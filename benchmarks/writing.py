"""What each way of writing boxes does to AP, to the number of decoder passes and to the time, for a trained detector.

python -m benchmarks.writing --checkpoint runs/demo/drafted --root data/shapes --output docs/results/writing_demo.json

Greedy, token by token, is what the others are held against. `equal` is the share of images whose boxes are the same
to the bit, and their labels; `passes` how often the decoder ran for an image (a batch runs as often as its slowest
image), and `passes_few` the same for those images with at most --few objects. Times are of whole detectors, in one
run; `times_as_fast` is the median over --rounds.

Beam search keeps several beginnings of a sentence. A temperature is fitted to the scores of every other image; its
gain is on the rest, against greedy there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import batched_nms, box_iou
from tqdm import tqdm

from benchmarks.record import environment
from benchmarks.search import are_right, beam_search, fitted_temperature, scored_anew
from pix2seq.data import Categories, EvalDataset, eval_loader, find_split, load_annotations
from pix2seq.decoding import DecodingOptions, Detections
from pix2seq.evaluation import coco_results
from pix2seq.model import load_detector
from pix2seq.scoring import coco_metrics, load_ground_truth
from pix2seq.tokenizer import TOKENS_PER_OBJECT
from pix2seq.transforms import EvalTransform, to_original_pixels

GREEDY = "greedy"
MERGE_IOU = 0.7


def ways(has_drafter: bool) -> dict[str, dict]:
    """Options of each way."""
    plain = {"top_p": 0.0}
    found = {GREEDY: plain, "top_p 0.4": {"top_p": 0.4}, "top_p 0.8": {"top_p": 0.8}}
    for reach in (1, 2, 4, 8):
        found[f"expected_bins {reach}"] = plain | {"expected_bins": reach}
    for power in (0.25, 0.5, 1.0):
        found[f"expected_bins 2, sharpness {power}"] = plain | {"expected_bins": 2, "sharpness": power}
    for count, score in ((1, 0.5), (1, 0.1), (2, 0.5), (2, 0.1), (3, 0.1)):
        found[f"stop_after_noise {count}, noise_score {score}"] = plain | {
            "stop_after_noise": count,
            "noise_score": score,
        }
    if has_drafter:
        found["draft exact"] = plain | {"draft": "exact"}
        for reach in (0, 1, 2, 4):
            found[f"draft tolerant, draft_bins {reach}"] = plain | {"draft": "tolerant", "draft_bins": reach}
        found["draft unverified"] = plain | {"draft": "unverified"}
        best = {"expected_bins": 2, "sharpness": 0.25, "stop_after_noise": 2, "noise_score": 0.1}
        found["draft tolerant, expected_bins 2, sharpness 0.25, stop_after_noise 2, noise_score 0.1"] = (
            plain | {"draft": "tolerant"} | best
        )
    return found


def merged(samples: list[Detections]) -> Detections:
    """Several sentences about one picture: of boxes of a class that overlap, the best stays, moved to the average of
    all that overlap with it, weighted by scores, and its score is their sum divided by the number of sentences."""
    boxes, labels, scores = (np.concatenate([getattr(one, name) for one in samples]) for name in VALUES)
    tensors = torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels)
    kept = batched_nms(*tensors, MERGE_IOU).numpy()
    same = (box_iou(tensors[0][kept], tensors[0]).numpy() >= MERGE_IOU) & (labels[kept][:, None] == labels)
    weights = same * scores
    boxes = (weights @ boxes) / np.maximum(weights.sum(1, keepdims=True), 1e-12)
    return Detections(boxes, labels[kept], weights.sum(1) / len(samples), sum(one.passes for one in samples))


VALUES = ("boxes", "labels", "scores")


class Bench:
    def __init__(self, checkpoint: str, root: str, batch_size: int, few: int):
        self.model = load_detector(checkpoint, "--checkpoint").eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        config = self.model.config
        categories = Categories(tuple(config.category_ids), config.class_names)
        annotations = load_annotations(find_split("val", root, None, None, None), categories, False)
        self.truth = load_ground_truth(annotations.split.json, annotations.image_ids, categories)
        self.batches = list(
            eval_loader(EvalDataset(annotations, EvalTransform(config.image_size)), batch_size, 0, 1, 0)
        )
        counts = [len(annotations.objects(index)[1]) for index in range(len(annotations))]
        self.few = np.array(counts) <= few
        self.objects = [annotations.objects(index) for index in range(len(annotations))]
        self.most = config.max_objects

    def detect(self, options: DecodingOptions) -> tuple[list[Detections], float]:
        found, began = [], time.perf_counter()
        for batch in self.batches:
            found += self.model.detect(batch["pixel_values"].to(self.model.device), options)
        return found, time.perf_counter() - began

    def ap(self, found: list[Detections], places: slice = slice(None)) -> float:
        """Of the detections of all pictures, those at these places."""
        rows = list(zip(self.image_ids(), self.in_pixels(found), strict=True))[places]
        wanted = {image_id for image_id, _ in rows}
        truth = self.truth | {
            "images": [image for image in self.truth["images"] if image["id"] in wanted],
            "annotations": [entry for entry in self.truth["annotations"] if entry["image_id"] in wanted],
        }
        ids = self.model.config.category_ids
        return coco_metrics(truth, [row for image_id, one in rows for row in coco_results(image_id, one, ids)])["AP"]

    def in_pixels(self, found: list[Detections]) -> Iterator[Detections]:
        side, sizes = self.model.config.image_size, []
        for batch in self.batches:
            sizes += zip(batch["size"].tolist(), batch["original_size"].tolist(), strict=True)
        for one, (size, original) in zip(found, sizes, strict=True):
            yield replace(one, boxes=to_original_pixels(one.boxes, side, size, original))

    def image_ids(self) -> list[int]:
        return [image_id for batch in self.batches for image_id in batch["image_id"].tolist()]

    def beams(self, width: int, heard: list[torch.Tensor] | None = None) -> list[Detections]:
        """Of all pictures; see beam_search. The logits (N, V) of each go to `heard`."""
        found, options = [], DecodingOptions(self.most, top_p=0.0)
        for batch in self.batches:
            pixels, logits = batch["pixel_values"].to(self.model.device), None
            if heard is not None:
                shape = len(pixels), self.most, self.model.tokenizer.vocab_size
                logits = torch.zeros(shape, device=pixels.device)
                heard.extend(logits)
            found += beam_search(self.model, pixels, width, options, logits)
        return found

    def temperature(self) -> dict:
        """Of the scores: fitted to every other picture, and what it does on the rest."""
        heard = []
        found = self.beams(1, heard)
        first = self.model.tokenizer.first_class_id
        right = [are_right(one, *objects) for one, objects in zip(self.in_pixels(found), self.objects, strict=True)]
        fitted = fitted_temperature(found[::2], heard[::2], right[::2], first)
        anew = [scored_anew(one, logits, first, fitted) for one, logits in zip(found, heard, strict=True)]
        before, after = (self.ap(scored, slice(1, None, 2)) for scored in (found, anew))
        passes = float(np.mean([one.passes for one in found]))
        return {"temperature": fitted, "ap": after, "ap_gain": after - before, "passes": passes}

    def measure(self, options: dict, baseline: list[Detections] | None) -> tuple[dict, list[Detections]]:
        found, _ = self.detect(DecodingOptions(self.most, **options))  # and warms up
        passes = np.array([one.passes for one in found], dtype=float)
        written = np.array([len(one.scores) for one in found], dtype=float)
        result = {"options": options, "ap": self.ap(found), "passes": passes.mean(), "objects": written.mean()}
        result |= {"passes_few": passes[self.few].mean() if self.few.any() else None, "seconds": []}
        result["passes_per_object"] = passes.sum() / written.sum()
        result["tokens_per_pass"] = TOKENS_PER_OBJECT * written.sum() / passes.sum()
        if baseline is not None:
            same = [
                np.array_equal(a.boxes, b.boxes) and np.array_equal(a.labels, b.labels)
                for a, b in zip(found, baseline, strict=True)
            ]
            result["equal"] = float(np.mean(same))
        return result, found


def measure(args: argparse.Namespace) -> dict:
    bench = Bench(args.checkpoint, args.root, args.batch_size, args.few)
    plans = ways(bench.model.drafter is not None)
    found, baseline = {}, None
    for name, options in tqdm(plans.items(), desc="ways", disable=None):
        found[name], boxes = bench.measure(options, baseline)
        baseline = boxes if baseline is None else baseline
    for number in range(args.rounds):
        names = list(plans)
        for name in names[number:] + names[:number]:  # none always comes first
            found[name]["seconds"].append(bench.detect(DecodingOptions(bench.most, **plans[name]))[1])
    for count in args.samples:
        for top_p in (0.4, 0.8):
            runs = [bench.detect(DecodingOptions(bench.most, top_p=top_p, seed=seed))[0] for seed in range(count)]
            boxes = [merged(list(samples)) for samples in zip(*runs, strict=True)]
            passes = float(np.mean([one.passes for one in boxes]))
            found[f"{count} samples of top_p {top_p} merged"] = {"ap": bench.ap(boxes), "passes": passes}
    if bench.model.config.noise_objects:
        for width in args.beams:
            boxes = bench.beams(width)
            passes = float(np.mean([one.passes for one in boxes]))
            found[f"{width} beams"] = {"ap": bench.ap(boxes), "passes": passes}
        fitted = bench.temperature()
        found[f"scores at a temperature of {fitted['temperature']:g}, fitted"] = fitted
    for result in found.values():
        result.setdefault("ap_gain", result["ap"] - found[GREEDY]["ap"])
        result["times_fewer_passes"] = found[GREEDY]["passes"] / result["passes"]
        if result.get("passes_few"):
            result["times_fewer_passes_few"] = found[GREEDY]["passes_few"] / result["passes_few"]
        if "seconds" in result:
            pairs = zip(found[GREEDY]["seconds"], result["seconds"], strict=True)
            result["times_as_fast"] = statistics.median(a / b for a, b in pairs)
    device = bench.model.device
    return {
        "environment": environment(device),
        "flags": {k: v for k, v in vars(args).items() if k not in ("output", "checkpoint", "root")},
        "images": len(bench.few),
        "images_with_few_objects": int(bench.few.sum()),
        "objects_asked_for": bench.most,
        "ways": found,
    }


def markdown(found: dict) -> str:
    """A table of a record, for docs."""
    head = ("way", "AP", "gain", "passes an image", "times fewer", "with few objects", "tokens a pass", "same boxes")
    lines = [head, ("---",) * len(head)]
    for name, way in found["ways"].items():
        few, tokens, equal = (way.get(key) for key in ("times_fewer_passes_few", "tokens_per_pass", "equal"))
        lines.append(
            (
                f"`{name}`",
                f"{way['ap']:.4f}",
                f"{way['ap_gain']:+.4f}",
                f"{way['passes']:.1f}",
                f"{way['times_fewer_passes']:.2f}",
                "" if few is None else f"{few:.2f}",
                "" if tokens is None else f"{tokens:.2f}",
                "" if equal is None else f"{equal:.1%}",
            )
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure ways of writing boxes.", allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="folder of a trained detector, with a drafter or without")
    parser.add_argument("--root", required=True, help="COCO layout, of which the val split is read")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--few", type=int, default=2, help="objects an image has at most to count as one with few")
    parser.add_argument("--samples", type=int, nargs="*", default=[3, 5], help="sentences that are merged")
    parser.add_argument("--beams", type=int, nargs="*", default=[2, 4, 8], help="beginnings a beam search keeps")
    args = parser.parse_args(words)
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: its folder does not exist")
    found = measure(args)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
