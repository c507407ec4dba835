"""Times a training step beside two peers in the same run: DETR, and a plain Llama.

python -m benchmarks.train_step --output docs/results/train_step_cpu.json                       (2 cores, 15 minutes)
python -m benchmarks.train_step --output docs/results/train_step_gpu.json --preset vit-b --batch_size 32 \
    --mixed_precision bf16 --compile --steps 20 --num_workers 12                                (a GPU)

pix2seq   `train_step` of train.py, on batches of its own loader
detr      DetrForObjectDetection (ResNet-50) of transformers on images of the same number and size, with the same parts
          frozen and without auxiliary losses
decoder   our decoder alone: loss and gradients for the same visual tokens and sequences
llama     the same weights in a plain LlamaForCausalLM(labels=...), with a mask for bidirectional visual tokens

All of them compute the gradient norm and an AdamW step, alternately; ratios are of times of the same round. The model
FLOPs utilisation refers to the data sheet of a GPU, and to a product of large matrices on a CPU.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import DetrConfig, DetrForObjectDetection, LlamaForCausalLM, ResNetConfig

from benchmarks.record import environment
from pix2seq import train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.data import train_loader
from pix2seq.data.shapes import draw_dataset
from pix2seq.models.llama_decoder import prefix_positions
from pix2seq.training.cost import flop_counter, model_step_cost, peak_flops, step_cost
from pix2seq.training.preemption import StopRequest

OBJECTS = 7  # per image, in DETR's targets: the mean of COCO


def build_context(args: argparse.Namespace, folder: Path):
    """The TrainContext of train.py, on drawn images unless --root is given."""
    root = args.root or draw_dataset(folder / "shapes", num_train=64, num_val=1, size=640, max_shapes=2 * OBJECTS - 1)
    argv = ["--root", root, "--output_dir", folder / "run", "--preset", args.preset, "--decoder", args.decoder]
    argv += ["--image_size", args.image_size, "--batch_size", args.batch_size, "--num_workers", args.num_workers]
    argv += ["--mixed_precision", args.mixed_precision, *(["--compile"] if args.compile else [])]
    if args.freeze:
        argv += ["--batch_norm", "frozen", "--frozen_stages", 1 if args.preset.startswith("r50") else 0]
    return train.setup(parse(TrainArguments, list(map(str, argv))), StopRequest())


def detr(args: argparse.Namespace, device: torch.device):
    """DETR and its inputs."""
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(out_features=["stage4"]),
        num_labels=80,
    )
    model = DetrForObjectDetection(config).to(device).train()
    for name, parameter in model.model.backbone.named_parameters():
        frozen = args.freeze and not any(f"stages.{stage}" in name for stage in (1, 2, 3))
        parameter.requires_grad_(not frozen)
    pixels = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    centres = torch.rand(args.batch_size, OBJECTS, 2, device=device) * 0.6 + 0.2
    boxes = torch.cat([centres, torch.rand(args.batch_size, OBJECTS, 2, device=device) * 0.3 + 0.05], dim=2)
    labels = [
        {"class_labels": torch.randint(0, 80, (OBJECTS,), device=device), "boxes": image_boxes}
        for image_boxes in boxes
    ]
    return model, {"pixel_values": pixels, "labels": labels}


class Decoder(torch.nn.Module):
    """Our decoder, from visual tokens and token ids to the loss."""

    def __init__(self, model):
        super().__init__()
        self.decoder = model.decoder

    def forward(self, visual, input_ids, labels, loss_positions):
        hidden = self.decoder(visual, input_ids).flatten(0, 1)[loss_positions]
        return torch.nn.functional.cross_entropy(
            self.decoder.lm_head(hidden).float(), labels.flatten()[loss_positions]
        )


class PlainLlama(torch.nn.Module):
    """The same weights and loss in transformers' LlamaForCausalLM."""

    def __init__(self, model):
        super().__init__()
        config = copy.deepcopy(model.decoder.config)
        self.llama = LlamaForCausalLM(config)
        self.llama.set_attn_implementation("sdpa")
        self.llama.load_state_dict(model.decoder.state_dict())

    def forward(self, visual, input_ids, labels, token_weights):
        num_visual, total = visual.shape[1], visual.shape[1] + input_ids.shape[1]
        visible = torch.ones(total, total, dtype=torch.bool, device=visual.device).tril()
        visible[:num_visual, :num_visual] = True
        labels = labels.masked_fill(token_weights == 0, -100)
        # transformers shifts labels by one; ours are already shifted.
        labels = torch.cat([labels.new_full((len(labels), num_visual + 1), -100), labels[:, :-1]], dim=1)
        embeddings = self.llama.get_input_embeddings()(input_ids)
        return self.llama(
            inputs_embeds=torch.cat([visual, embeddings], dim=1),
            attention_mask=visible[None, None],
            position_ids=prefix_positions(num_visual, input_ids.shape[1], visual.device),
            labels=labels,
        ).loss


def plain_step(model, loss_of, args: argparse.Namespace, device: torch.device):
    """A plain optimizer step with the same precision and compiler settings."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    half = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]

    def step():
        with torch.autocast(device.type, half, enabled=args.mixed_precision != "no"):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a product of two float32 matrices, an estimate of the peak of this processor."""
    a = torch.rand(2048, 2048, device=device)
    seconds = min(timed(lambda: a @ a, device) for _ in range(5))
    return 2 * 2048**3 / seconds


def timed(step, device: torch.device, count: int = 1) -> float:
    """Seconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def measure(args: argparse.Namespace, folder: Path) -> dict:
    context = build_context(args, folder)
    device, model = context.accelerator.device, context.unwrapped_model
    batches = iter(train_loader(context.train_set, context.sampler, args.num_workers, device.type == "cuda"))
    batch = next(batches)
    num_loss_positions = int((batch["token_weights"] != 0).sum())
    length = context.train_set.sequence_builder.length
    cost = model_step_cost(model, args.batch_size, length, args.mixed_precision, num_loss_positions // args.batch_size)
    steps = {"pix2seq": lambda: train.train_step(context, [batch])}
    flops = {"pix2seq": cost.step_flops}

    peer, arguments = detr(args, device)
    run = torch.compile(peer) if args.compile else peer
    steps["detr"] = plain_step(peer, lambda: run(**arguments).loss, args, device)
    with flop_counter() as counter:  # a real step: the forward pass depends on values
        peer(**arguments).loss.backward()
    flops["detr"] = counter.get_total_flops()

    if args.decoder == "llama":
        on_device = {name: batch[name].to(device) for name in ("input_ids", "labels", "token_weights")}
        with torch.no_grad():
            visual = model.encode(batch["pixel_values"].to(device)).float().requires_grad_()
        loss_positions = on_device["token_weights"].flatten().nonzero()[:, 0]
        ours, plain = Decoder(copy.deepcopy(model)).train(), PlainLlama(model).to(device).train()
        inputs = {
            "decoder": (
                ours,
                {**{k: on_device[k] for k in ("input_ids", "labels")}, "loss_positions": loss_positions},
            ),
            "llama": (plain, on_device),
        }
        with torch.no_grad():
            losses = [part.eval()(visual, **kwargs).item() for part, kwargs in inputs.values()]
            assert abs(losses[0] - losses[1]) < 1e-2 * losses[1]
        for name, (part, kwargs) in inputs.items():
            run_part = torch.compile(part.train()) if args.compile else part.train()
            steps[name] = plain_step(
                part, lambda run_part=run_part, kwargs=kwargs: run_part(visual, **kwargs), args, device
            )
            shapes = {"visual": visual, **kwargs}
            flops[name] = step_cost(part, shapes, lambda loss: loss, args.mixed_precision).step_flops

    memory = {}
    for name, step in steps.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(args.warmup):
            step()
        memory[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    peak = peak_flops(torch.cuda.get_device_name(device), args.mixed_precision) if device.type == "cuda" else None
    peaks, seconds = [peak or matmul_flops(device)], {name: [] for name in steps}
    for number in range(args.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, device, args.steps))
        if peak is None:
            peaks.append(matmul_flops(device))
        print(f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.3f} s" for name, values in seconds.items()))

    waited, started = 0.0, time.perf_counter()
    for _ in range(max(args.rounds, args.steps)):
        requested = time.perf_counter()
        new_batch = next(batches)
        waited += time.perf_counter() - requested
        train.train_step(context, [new_batch])
    if device.type == "cuda":
        torch.cuda.synchronize()
    wait_share = waited / (time.perf_counter() - started)

    def ratio(a: str, b: str) -> dict | None:
        """Speed of a relative to b."""
        if a not in seconds or b not in seconds:
            return None
        values = sorted(y / x for x, y in zip(seconds[a], seconds[b], strict=True))
        return {"median": statistics.median(values), "min": values[0], "max": values[-1]}

    rows = {}
    for name, values in seconds.items():
        second = statistics.median(values)
        rows[name] = {
            "seconds": second,
            "images_per_s": args.batch_size / second,
            "tokens_per_s": args.batch_size * length / second if name != "detr" else None,
            "gflops_per_image": flops[name] / args.batch_size / 1e9,
            "mfu": flops[name] / second / statistics.median(peaks),
            "peak_memory_gib": memory[name],
            "all_seconds": values,
        }
    return {
        "environment": environment(device),
        "settings": {name: value for name, value in vars(args).items() if name not in ("output", "root")},
        "loss_positions_per_image": num_loss_positions / args.batch_size,
        "peak_flops": statistics.median(peaks),
        "peak_is": "data sheet" if peak else "measured: product of float32 matrices",
        "rows": rows,
        "data_wait_share": wait_share,
        "times_as_fast": {
            "pix2seq as detr": ratio("pix2seq", "detr"),
            "decoder as llama": ratio("decoder", "llama"),
            "flops: decoder as llama": flops["llama"] / flops["decoder"] if "llama" in flops else None,
            "flops: pix2seq as detr": flops["detr"] / flops["pix2seq"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step beside DETR's and a plain Llama's.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--root", help="COCO layout (default: drawn shapes)")
    parser.add_argument("--preset", default="r50", help="as in train.py")
    parser.add_argument("--decoder", default="llama", choices=["llama", "transformer"])
    parser.add_argument("--image_size", type=int, default=640)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--compile", action="store_true", help="compile our model and the peers")
    parser.add_argument("--freeze", action=argparse.BooleanOptionalAction, default=True, help="stem, stage 1, norms")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before the first round")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=1, help="steps timed together in a round")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    for name, row in results["rows"].items():
        print(f"{name:8} {row['images_per_s']:8.2f} images/s  {row['mfu']:.0%} of the peak")
    for name, value in results["times_as_fast"].items():
        if value is not None:
            print(f"{name}: {value['median'] if isinstance(value, dict) else value:.2f}")
    print(f"waiting for data: {results['data_wait_share']:.1%} of the time")


if __name__ == "__main__":
    main()
