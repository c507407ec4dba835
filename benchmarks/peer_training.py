"""Training and prediction of the detectors of `benchmarks.peers`, on the batches of the project's loaders."""

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from benchmarks.peer_models import MEAN, STD, Peer
from pix2seq.color_augmentation import apply_color_ops
from pix2seq.errors import UserError
from pix2seq.evaluation import coco_results
from pix2seq.models.detections import Detections
from pix2seq.transforms import to_original_pixels

WARMUP, LR_END = 0.05, 0.01  # shares of the time and of the peak learning rate
NUM_LINES = 20  # of each peer's progress


@dataclass(frozen=True)
class BoxTargets:
    """Replaces the SequenceBuilder of a `TrainDataset`: boxes and labels, padded with -1 to `max_boxes`."""

    max_boxes: int

    def __call__(self, boxes: np.ndarray, labels: np.ndarray, *_) -> dict[str, np.ndarray]:
        padding = (0, self.max_boxes - len(labels))
        return {
            "boxes": np.pad(boxes.astype(np.float32), (padding, (0, 0)), constant_values=-1),
            "labels": np.pad(labels, padding, constant_values=-1),
        }


def model_inputs(batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized pixels (B, 3, S, S), and a mask (B, S, S) that is 0 in the padding."""
    pixels = batch["pixel_values"].to(device)
    if "color_ops" in batch:
        pixels = apply_color_ops(pixels, batch["size"], batch["color_ops"])
    mask = torch.zeros(len(pixels), *pixels.shape[-2:], dtype=torch.int64)
    for image_mask, (height, width) in zip(mask, batch["size"].tolist(), strict=True):
        image_mask[:height, :width] = 1
    return (pixels.float() / 255 - MEAN) / STD, mask.to(device)


def learning_rate_factor(progress: float) -> float:
    """Linear warm-up and linear decay, at a share of the training."""
    return max(LR_END, min(progress / WARMUP, (1 - progress) / (1 - WARMUP)))


def optimizer_of(peer: Peer, args: argparse.Namespace, lr: float) -> torch.optim.Optimizer:
    in_backbone = {id(parameter) for parameter in peer.backbone.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in peer.model.parameters():
        if parameter.requires_grad:
            factor = args.backbone_lr_factor if id(parameter) in in_backbone else 1.0
            decay = args.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((lr * factor, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    )


def train_peer(name: str, peer: Peer, optimizer, batches: Iterable[dict], device, steps: int, seconds: float) -> dict:
    """Trains for a number of steps, or a time if it is 0. Returns the steps, the speed and the losses by step."""
    peer.model.train()
    started, step, num_images, losses, loss_by_step = time.perf_counter(), 0, 0, [], {}
    for batch in batches:
        progress = step / steps if steps else (time.perf_counter() - started) / seconds
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(progress)
        kept = batch["labels"] >= 0
        boxes, labels = (
            [v[k].to(device) for v, k in zip(batch[key], kept, strict=True)] for key in ("boxes", "labels")
        )
        loss = peer.loss(*model_inputs(batch, device), boxes, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(peer.model.parameters(), peer.max_grad_norm)
        optimizer.step()
        step, num_images = step + 1, num_images + len(labels)
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise UserError(f"--lr: the loss of {name} is not finite at step {step}; use a smaller one")
        if progress >= len(loss_by_step) / NUM_LINES:
            loss_by_step[step], losses = float(np.mean(losses)), []
            speed = num_images / (time.perf_counter() - started)
            print(
                f"{name} step {step} ({progress:.0%}): loss {loss_by_step[step]:.3f}, {speed:.1f} images/s", flush=True
            )
    speed = num_images / (time.perf_counter() - started)
    return {"steps": step, "images_per_s": speed, "loss_by_step": loss_by_step}


@torch.no_grad()
def predict(peer: Peer, batches: Iterable[dict], side: int, category_ids: tuple[int, ...], device) -> list[dict]:
    """COCO results, with boxes in pixels of the original images. Boxes in the padding are dropped."""
    peer.model.eval()
    results = []
    for batch in batches:
        for row, detected in enumerate(peer.detect(*model_inputs(batch, device))):
            boxes, labels, scores = (detected[key].cpu().numpy() for key in ("boxes", "labels", "scores"))
            sizes = batch["size"][row].tolist(), batch["original_size"][row].tolist()
            boxes = to_original_pixels(boxes.astype(np.float64), side, *sizes)
            kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (not batch["unreadable"][row])
            detections = Detections(boxes[kept], labels[kept], scores[kept])
            results += coco_results(int(batch["image_id"][row]), detections, category_ids)
    return results
