"""Compares the detections of quantized models with those of the model.

python -m benchmarks.quantization --checkpoint runs/demo/best --images data/shapes/images/val2017 \
    --output docs/results/quantization.json

Needs the packages of requirements-hf.txt. For the objects of the model with a score above 0.5, `matched` is the share
with an object of the same class, IoU and score above 0.5, of the quantized model. `mean_iou` is that
of the matched objects.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from PIL import Image
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchvision.ops import box_iou
from transformers import AutoImageProcessor, BitsAndBytesConfig

from benchmarks.record import environment
from pix2seq import Pix2SeqForObjectDetection

MIN_SCORE, MIN_IOU = 0.5, 0.5


def quantized_models(checkpoint: str, model: Pix2SeqForObjectDetection) -> dict[str, Pix2SeqForObjectDetection]:
    models = {}
    for name, config in (
        ("torchao int8 weights", Int8WeightOnlyConfig()),
        ("torchao int8 weights and inputs", Int8DynamicActivationInt8WeightConfig()),
    ):
        models[name] = copy.deepcopy(model)
        quantize_(models[name], config)
    for bits in (8, 4):
        config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
        models[f"bitsandbytes {bits} bits"] = Pix2SeqForObjectDetection.from_pretrained(
            checkpoint, quantization_config=config, dtype=torch.float32, device_map=str(model.device)
        ).eval()
    models["quantize_dynamic"] = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})
    return models


def compare(expected: list[dict], actual: list[dict]) -> dict[str, float]:
    """Compares the results of `post_process_object_detection`."""
    num_objects, ious = 0, []
    for ours, theirs in zip(expected, actual, strict=True):
        num_objects += len(ours["labels"])
        if len(ours["labels"]) and len(theirs["labels"]):
            iou = box_iou(ours["boxes"], theirs["boxes"]) * (ours["labels"][:, None] == theirs["labels"])
            ious += [value for value in iou.max(1).values.tolist() if value > MIN_IOU]
    return {"objects": num_objects, "matched": len(ious) / num_objects, "mean_iou": sum(ious) / len(ious)}


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict:
    model = Pix2SeqForObjectDetection.from_pretrained(args.checkpoint).eval()
    processor = AutoImageProcessor.from_pretrained(args.checkpoint)
    images = [Image.open(path).convert("RGB") for path in sorted(args.images.iterdir())[: args.num_images]]
    inputs, sizes = processor(images), [(image.height, image.width) for image in images]

    def detect(detector: Pix2SeqForObjectDetection) -> list[dict]:
        return processor.post_process_object_detection(detector(**inputs), MIN_SCORE, sizes)

    expected = detect(model)
    return {
        "environment": environment(model.device),
        "num_images": len(images),
        "agreement": {
            name: compare(expected, detect(quantized))
            for name, quantized in quantized_models(args.checkpoint, model).items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare quantized models with a model.", allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="folder of a trained model")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    results = measure(args)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    for name, result in results["agreement"].items():
        print(f"{name}: {result['matched']:.1%} of {result['objects']} objects, mean IoU {result['mean_iou']:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
