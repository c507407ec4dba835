"""Measures the speed of decoding, next to other implementations of the same computation.

python -m benchmarks.decode --output docs/results/decode_cpu.json                          (2 cores, 20 minutes)
python -m benchmarks.decode --output docs/results/decode_gpu.json --mixed_precision bf16 \
    --batch_sizes 1 32 128                                                                     (a GPU, 6 minutes)

The decoders have the size of the R50 recipe (6 layers of width 256, 400 visual tokens) and random weights. Decoding is
greedy, 100 objects per image:

pix2seq      pix2seq.generation.generate_tokens, with the fused decoder
modules      the same with the modules of the decoder and a static cache, as with adapters or quantized weights
generate     `generate` of transformers with the same weights, a dynamic cache and the grammar as a LogitsProcessor;
             for the Llama decoder only
loop         transformers' model in a loop, with a dynamic cache
baseline     with `--baseline FOLDER`, the implementation "pix2seq" of the checkout of another commit in that folder,
             in a process of its own that runs in turn with the others

`equal_sequences` is the fraction of images with equal tokens. The times are those of the decoder. `images_per_s` are
those of the complete model, of its encoder alone, and of DETR-R50.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    BlenderbotForCausalLM,
    DetrConfig,
    DetrForObjectDetection,
    LlamaForCausalLM,
    LogitsProcessor,
    ResNetConfig,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from benchmarks.record import environment
from pix2seq.generation import DecodingOptions, generate_tokens
from pix2seq.models import Pix2SeqForObjectDetection, build_model
from pix2seq.models.incremental_decoder import IncrementalDecoder
from pix2seq.models.llama_decoder import CACHE, LlamaDecoder
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer


class GrammarProcessor(LogitsProcessor):
    """The grammar as a logits processor of transformers."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device | str = "cpu"):
        self.ids = torch.arange(tokenizer.vocab_size, device=device)
        bins = self.ids >= tokenizer.first_bin_id
        classes = ~bins & (self.ids >= tokenizer.noise_id)
        self.allowed_by_slot = [bins] * 4 + [classes]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        slot = (input_ids.shape[1] - 1) % TOKENS_PER_OBJECT  # the first token is BOS
        allowed = self.allowed_by_slot[slot]
        if slot in (2, 3):
            allowed = allowed & (self.ids >= input_ids[:, -2:-1])
        return scores.masked_fill(~allowed, -torch.inf)


class PrefixedLlama(LlamaForCausalLM):
    """Llama whose `generate` continues a prefix at position 0 with a sequence that starts at position 1."""

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict:
        cache = {name: kwargs[name] for name in ("cache", "past_key_values") if name in kwargs}
        positions = torch.full((1, 1), input_ids.shape[1], device=input_ids.device)
        return cache | {"input_ids": input_ids[:, -1:], "position_ids": positions, "use_cache": True}

    @classmethod
    def from_decoder(cls, decoder: LlamaDecoder) -> "PrefixedLlama":
        """Creates a Llama with the weights of a decoder."""
        plain = cls(copy.deepcopy(decoder.config)).to(decoder.device).eval()
        plain.load_state_dict(decoder.state_dict())
        plain.set_attn_implementation("sdpa")
        return plain


def generate_with_pix2seq(model: Pix2SeqForObjectDetection, visual_tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Generates tokens (B, L) with this package."""
    decoder_only = copy.copy(model)
    decoder_only.encode = lambda pixel_values: pixel_values
    options = DecodingOptions(length // TOKENS_PER_OBJECT, top_p=0)
    return generate_tokens(decoder_only, visual_tokens, model.tokenizer, options).tokens


def generate_with_modules(model: Pix2SeqForObjectDetection, visual_tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Generates tokens (B, L) with this package, with the modules of the decoder."""
    by_modules = copy.copy(model)
    by_modules.prefill = lambda visual_tokens, length: IncrementalDecoder(model.decoder, visual_tokens, length)
    options = DecodingOptions(length // TOKENS_PER_OBJECT, top_p=0)
    return generate_tokens(by_modules, visual_tokens, model.tokenizer, options).tokens


class Baseline:
    """Runs `generate_with_pix2seq` of another checkout, in a process that waits between the measurements.

    Args:
        folder: The checkout.
        arguments: Arguments of `random_model`, as a JSON object.
        decoder: The decoder.
    """

    PROGRAM = """
import argparse, json, sys, time, torch
from benchmarks.decode import generate_with_pix2seq, random_model
arguments, decoder = argparse.Namespace(**json.loads(sys.argv[1])), sys.argv[2]
torch.set_num_threads(arguments.num_threads or torch.get_num_threads())
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = random_model(arguments, decoder).to(device)
with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=arguments.mixed_precision == "bf16"):
    for line in sys.stdin:
        batch_size, num_visual, length = map(int, line.split())
        visual_tokens = torch.randn(batch_size, num_visual, model.config.decoder_config.hidden_size, device=device)
        start = time.perf_counter()
        generate_with_pix2seq(model, visual_tokens, length).cpu()
        print(time.perf_counter() - start, flush=True)
"""

    def __init__(self, folder: Path, arguments: dict, decoder: str):
        command = [sys.executable, "-c", self.PROGRAM, json.dumps(arguments), decoder]
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def measure(self, batch_size: int, num_visual: int, length: int) -> float:
        """Returns the seconds that the decoding of a batch takes."""
        print(batch_size, num_visual, length, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def generate_with_transformers(
    model: Pix2SeqForObjectDetection, plain: PrefixedLlama, visual_tokens: torch.Tensor, length: int
) -> torch.Tensor:
    """Generates tokens (B, L) with `generate` of transformers."""
    bos = torch.full((len(visual_tokens), 1), model.tokenizer.bos_id, device=visual_tokens.device)
    tokens = plain.generate(
        input_ids=bos,
        **{CACHE: model.decoder.encode_prefix(visual_tokens)},
        logits_processor=[GrammarProcessor(model.tokenizer, visual_tokens.device)],
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
    )
    return tokens[:, 1:]


def generate_in_a_loop(
    next_logits: Callable[[torch.Tensor, int], torch.Tensor], tokenizer: Tokenizer, like: torch.Tensor, length: int
) -> torch.Tensor:
    """Generates tokens (B, L) from a function of the last tokens (B, 1) and their position to logits (B, V)."""
    grammar = GrammarProcessor(tokenizer, like.device)
    tokens = torch.full((len(like), 1), tokenizer.bos_id, device=like.device)
    for position in range(length):
        logits = next_logits(tokens[:, -1:], position)
        tokens = torch.cat([tokens, grammar(tokens, logits).argmax(-1)[:, None]], dim=1)
    return tokens[:, 1:]


def loop_over_llama(
    model: Pix2SeqForObjectDetection, plain: PrefixedLlama, visual_tokens: torch.Tensor, length: int
) -> torch.Tensor:
    cache = model.decoder.encode_prefix(visual_tokens)

    def next_logits(token: torch.Tensor, position: int) -> torch.Tensor:
        positions = torch.full((1, 1), position + 1, device=token.device)
        return plain(input_ids=token, position_ids=positions, use_cache=True, **{CACHE: cache}).logits[:, -1]

    return generate_in_a_loop(next_logits, model.tokenizer, visual_tokens, length)


def loop_over_blenderbot(model: Pix2SeqForObjectDetection, visual_tokens: torch.Tensor, length: int) -> torch.Tensor:
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def next_logits(token: torch.Tensor, position: int) -> torch.Tensor:
        # TransformerDecoder overrides `forward`.
        output = BlenderbotForCausalLM.forward(
            model.decoder,
            input_ids=token,
            encoder_hidden_states=visual_tokens,
            use_cache=True,
            **{CACHE: cache},
        )
        return output.logits[:, -1]

    return generate_in_a_loop(next_logits, model.tokenizer, visual_tokens, length)


def implementations(model: Pix2SeqForObjectDetection, length: int) -> dict[str, Callable]:
    """Functions from visual tokens (B, N, D) to tokens (B, L), by name."""
    functions = {
        "pix2seq": lambda visual_tokens: generate_with_pix2seq(model, visual_tokens, length),
        "modules": lambda visual_tokens: generate_with_modules(model, visual_tokens, length),
    }
    if not isinstance(model.decoder, LlamaDecoder):
        return functions | {"loop": lambda visual_tokens: loop_over_blenderbot(model, visual_tokens, length)}
    plain = PrefixedLlama.from_decoder(model.decoder)
    return functions | {
        "generate": lambda visual_tokens: generate_with_transformers(model, plain, visual_tokens, length),
        "loop": lambda visual_tokens: loop_over_llama(model, plain, visual_tokens, length),
    }


def compare_implementations(
    model: Pix2SeqForObjectDetection, batch_size: int, num_objects: int, rounds: int, baseline: Baseline | None
) -> dict:
    """Measures the implementations in turn, after a warm-up round."""
    length, side, device = TOKENS_PER_OBJECT * num_objects, model.config.image_size, model.device
    num_visual, width = model.encode(torch.zeros(1, 3, side, side, device=device)).shape[1:]
    functions = implementations(model, length)
    seconds = {name: [] for name in (*functions, *(["baseline"] if baseline else []))}
    equal = {name: [] for name in functions if name != "pix2seq"}
    name = type(model.decoder).__name__
    for seed in tqdm(range(rounds + 1), desc=f"{name}, batch size {batch_size}", disable=None):
        torch.manual_seed(seed)
        visual_tokens = torch.randn(batch_size, num_visual, width, device=device)
        tokens = {}
        for name, function in functions.items():
            tokens[name], duration = measure_time(device, lambda f=function, v=visual_tokens: f(v))
            seconds[name].append(duration)
        if baseline is not None:
            seconds["baseline"].append(baseline.measure(batch_size, num_visual, length))
        for name, fractions in equal.items():
            fractions.append((tokens[name] == tokens["pix2seq"]).all(1).float().mean().item())
    seconds = {name: values[1:] for name, values in seconds.items()}
    return {
        "seconds": {name: statistics_of(values) for name, values in seconds.items()},
        "times_as_fast": {
            name: statistics_of([b / a for a, b in zip(seconds["pix2seq"], seconds[name], strict=True)])
            for name in seconds
            if name != "pix2seq"
        },
        "tokens_per_s": batch_size * length / statistics.median(seconds["pix2seq"]),
        "equal_sequences": {name: statistics.mean(fractions) for name, fractions in equal.items()},
    }


def images_per_second(
    model: Pix2SeqForObjectDetection, batch_size: int, num_objects: int, rounds: int
) -> dict[str, dict]:
    """Measures the complete model from pixels to boxes, its encoder alone, and DETR, after a warm-up round."""
    device, side = model.device, model.config.image_size
    config = DetrConfig(use_timm_backbone=False, backbone_config=ResNetConfig(out_features=["stage4"]), backbone=None)
    detr = DetrForObjectDetection(config).to(device).eval()
    pixel_values = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8, device=device)
    float_pixels = pixel_values / 255
    functions = {
        "pix2seq": lambda: model.detect(pixel_values, DecodingOptions(num_objects, top_p=0)),
        "encoder": lambda: model.encode(pixel_values),
        "detr": lambda: detr(float_pixels),
    }
    return {
        name: statistics_of([batch_size / measure_time(device, function)[1] for _ in range(rounds + 1)][1:])
        for name, function in functions.items()
    }


def measure_time(device: torch.device, function: Callable) -> tuple[object, float]:
    """Returns the result of a function and its duration in seconds."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return result, time.perf_counter() - start


def statistics_of(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def random_model(args: argparse.Namespace, decoder: str) -> Pix2SeqForObjectDetection:
    torch.manual_seed(0)
    model = build_model(
        backbone="{model_type: resnet}",
        image_size=args.image_size,
        max_objects=args.num_objects,
        decoder=decoder,
        spatial_modulation=False,  # `generate` of transformers knows none
        category_ids=tuple(range(80)),
        class_names=tuple(map(str, range(80))),
    ).eval()
    with torch.no_grad():  # with the weights of a new model, all tokens are almost equally probable
        for parameter in model.decoder.parameters():
            parameter.mul_(3.0)
    return model


def measure(args: argparse.Namespace) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    arguments = {name: value for name, value in vars(args).items() if name not in ("output", "baseline")}
    results = {"environment": environment(device), "arguments": arguments}
    if args.baseline is not None:
        command = ["git", "-C", str(args.baseline), "rev-parse", "HEAD"]
        results["baseline_commit"] = subprocess.check_output(command, text=True).strip()
    models = {decoder: random_model(args, decoder).to(device) for decoder in ("llama", "transformer")}
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        for decoder, model in models.items():
            baseline = None if args.baseline is None else Baseline(args.baseline, arguments, decoder)
            results[decoder] = {
                str(batch_size): compare_implementations(model, batch_size, args.num_objects, args.rounds, baseline)
                for batch_size in args.batch_sizes
            }
            if baseline is not None:
                baseline.close()
        results["images_per_s"] = {
            str(batch_size): images_per_second(models["llama"], batch_size, args.num_objects, 1)
            for batch_size in args.batch_sizes
        }
    if device.type == "cuda":
        results["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    else:
        results["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return results


def summary(results: dict) -> str:
    lines = []
    for decoder in ("llama", "transformer"):
        for batch_size, result in results[decoder].items():
            lines.append(f"{decoder}, batch size {batch_size}: {result['tokens_per_s']:.0f} tokens/s")
            for name, ratio in result["times_as_fast"].items():
                line = f"  {ratio['median']:.2f} times as fast as {name} ({ratio['min']:.2f} to {ratio['max']:.2f})"
                if name in result["equal_sequences"]:
                    line += f", {result['equal_sequences'][name]:.0%} equal sequences"
                lines.append(line)
    for batch_size, rates in results["images_per_s"].items():
        values = ", ".join(f"{name} {rate['median']:.2f}" for name, rate in rates.items())
        lines.append(f"images/s with batch size {batch_size}: {values}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the speed of decoding.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num_objects", type=int, default=100, help="objects per image")
    parser.add_argument("--image_size", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3, help="measurements after the warm-up round")
    parser.add_argument("--baseline", type=Path, help="checkout of another commit to compare with")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--num_threads", type=int, default=0, help="threads of the CPU (default: chosen by PyTorch)")
    args = parser.parse_args(argv)
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: its folder does not exist")
    results = measure(args)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
