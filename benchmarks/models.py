"""Parameters, tokens and FLOPs of the named sizes, counted on meta tensors: no weights, no network, a few seconds.

python -m benchmarks.models --output docs/results/models.json    (also writes docs/models.md)
"""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from pix2seq.arguments import PRESETS
from pix2seq.models import build_model
from pix2seq.tokenizer import TOKENS_PER_OBJECT

# The authors' figures for the classic decoder, in millions, with a vocabulary of 3000 tokens.
PAPER = {"r50": 36.6, "r50-c4": 84.7, "vit-b": 115.2, "vit-l": 341.2}
NUM_CLASSES, IMAGE_SIZE, MAX_OBJECTS = 80, 640, 100


def measure(size: str, decoder: str) -> dict:
    """One forward pass of one image and one training sentence."""
    with torch.device("meta"):
        model = build_model(
            category_ids=tuple(range(NUM_CLASSES)),
            class_names=tuple(f"class {label}" for label in range(NUM_CLASSES)),
            decoder=decoder,
            image_size=IMAGE_SIZE,
            max_objects=MAX_OBJECTS,
            **PRESETS[size],
        ).eval()
        pixels = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        ids = torch.zeros(1, TOKENS_PER_OBJECT * MAX_OBJECTS, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as encoder:
            visual = model.encode(pixels)
        with torch.no_grad(), FlopCounterMode(display=False) as whole:
            model(pixels, ids)
    return {
        "size": size,
        "decoder": decoder,
        "parameters_m": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "paper_m": PAPER[size] if decoder == "transformer" else None,
        "visual_tokens": visual.shape[1],
        "sentence_tokens": ids.shape[1],
        "encoder_gflops": encoder.get_total_flops() / 1e9,
        "forward_gflops": whole.get_total_flops() / 1e9,
    }


def page(rows: list[dict]) -> str:
    lines = [
        "# Sizes",
        "",
        f"One image of {IMAGE_SIZE} px, {NUM_CLASSES} classes, 1000 bins, sentences of {MAX_OBJECTS} objects. FLOPs "
        "are of one forward pass (a multiplication and an addition count two); a training step takes about three.",
        "",
        "| `--preset` | `--decoder` | parameters (M) | paper (M) | visual tokens | sentence tokens | encoder GFLOPs "
        "| whole GFLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paper = f"{row['paper_m']:.1f}" if row["paper_m"] else ""
        lines.append(
            f"| {row['size']} | {row['decoder']} | {row['parameters_m']:.1f} | {paper} | {row['visual_tokens']} "
            f"| {row['sentence_tokens']} | {row['encoder_gflops']:.1f} | {row['forward_gflops']:.1f} |"
        )
    lines += [
        "",
        "The paper's models have a vocabulary of 3000 tokens, ours as many as classes and bins need. The `vit` sizes "
        "also have Hugging Face ViT's class token and learned positions.",
        "",
        "Made by `python -m benchmarks.models --output docs/results/models.json`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count parameters, tokens and FLOPs of the named sizes.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    rows = [measure(size, decoder) for size in PRESETS for decoder in ("transformer", "llama")]
    args.output.write_text(json.dumps({"torch": torch.__version__, "sizes": rows}, indent=1) + "\n")
    text = page(rows)
    (args.output.parent.parent / "models.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
