"""How fast sentences are written, beside other ways to write the same ones, in one run.

python -m benchmarks.decode --output docs/results/decode_cpu.json                          (2 cores, 20 minutes)
python -m benchmarks.decode --output docs/results/decode_gpu.json --mixed_precision bf16 \
    --batch_sizes 1 32 128                                                                         (a GPU, 6 minutes)

The decoder of the R50 recipe (6 layers, 256 wide, 400 visual tokens), random weights, greedy, 100 objects:

pix2seq      decoding.generate
generate     transformers' generate of the same LlamaForCausalLM: its dynamic cache, our grammar as a LogitsProcessor
loop         LlamaForCausalLM called token by token with a dynamic cache
no cache     the whole sentence read again for every token; timed at some of the tokens, see `without_cache`
All write the same tokens: `equal_sentences` counts. The classic decoder is timed beside a loop with
transformers' cache alone. Times are those of the decoder. The picture's encoder, the same
for all, is timed by itself, and DETR's R50 as the yardstick of a detector that writes nothing.
"""

import argparse
import copy
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DetrConfig, DetrForObjectDetection, LlamaForCausalLM, LogitsProcessor, ResNetConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from benchmarks.record import environment
from pix2seq.generation import DecodingOptions, generate
from pix2seq.models import build_model
from pix2seq.models.llama_decoder import CACHE
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer

OURS = "pix2seq"


class GrammarProcessor(LogitsProcessor):
    """The grammar as transformers' generate takes it."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device | str = "cpu"):
        self.ids = torch.arange(tokenizer.vocab_size, device=device)
        bins = self.ids >= tokenizer.first_bin_id
        classes = ~bins & (self.ids >= tokenizer.noise_id)
        self.kinds = [bins] * 4 + [classes]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        slot = (input_ids.shape[1] - 1) % TOKENS_PER_OBJECT  # BOS is the first
        allowed = self.kinds[slot]
        if slot in (2, 3):
            allowed = allowed & (self.ids >= input_ids[:, -2:-1])
        return scores.masked_fill(~allowed, -torch.inf)


class PrefixedLlama(LlamaForCausalLM):
    """transformers' Llama, told in `generate` where our tokens stand: the picture at 0, the sentence from 1 on."""

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict:
        cache = {name: kwargs[name] for name in ("cache", "past_key_values") if name in kwargs}
        positions = torch.full((1, 1), input_ids.shape[1], device=input_ids.device)
        return cache | {"input_ids": input_ids[:, -1:], "position_ids": positions, "use_cache": True}

    @classmethod
    def of(cls, decoder) -> "PrefixedLlama":
        """With the weights of our decoder."""
        plain = cls(copy.deepcopy(decoder.config)).to(decoder.device).eval()
        plain.load_state_dict(decoder.state_dict())
        plain.set_attn_implementation("sdpa")
        return plain


def prefix_cache(decoder, visual: torch.Tensor) -> DynamicCache:
    """The keys and values of the picture, as transformers keeps them."""
    seen, cache = decoder.prefill(visual, 1).kv_cache, DynamicCache(config=decoder.config)
    for index, layer in enumerate(seen.layers):
        keys, values = layer[:, :, :, : visual.shape[1]]
        cache.update(keys.clone(), values.clone(), index)
    return cache


def by_generate(model, plain: PrefixedLlama, visual: torch.Tensor, tokenizer: Tokenizer, length: int) -> torch.Tensor:
    """Tokens (B, L) by transformers' generate, greedy."""
    bos = torch.full((len(visual), 1), tokenizer.bos_id, device=visual.device)
    written = plain.generate(
        input_ids=bos,
        **{CACHE: prefix_cache(model.decoder, visual)},
        logits_processor=[GrammarProcessor(tokenizer, visual.device)],
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
    )
    return written[:, 1:]


def by_loop(model, plain: PrefixedLlama, visual: torch.Tensor, tokenizer: Tokenizer, length: int) -> torch.Tensor:
    """Tokens (B, L) by calling LlamaForCausalLM with a dynamic cache."""
    cache, grammar = prefix_cache(model.decoder, visual), GrammarProcessor(tokenizer, visual.device)
    tokens = torch.full((len(visual), 1), tokenizer.bos_id, device=visual.device)
    for position in range(length):
        positions = torch.full((1, 1), position + 1, device=visual.device)
        output = plain(input_ids=tokens[:, -1:], position_ids=positions, use_cache=True, **{CACHE: cache})
        tokens = torch.cat([tokens, grammar(tokens, output.logits[:, -1]).argmax(-1)[:, None]], dim=1)
    return tokens[:, 1:]


def without_cache(model, visual: torch.Tensor, tokens: torch.Tensor, samples: int) -> float:
    """Seconds that a loop without a cache takes for these tokens (B, L): the sum over all of them, of which `samples`
    evenly spaced ones are timed and the others taken to lie between them."""
    length = tokens.shape[1]
    places = [round(i * (length - 1) / (samples - 1)) for i in range(samples)]
    bos = torch.full((len(tokens), 1), model.tokenizer.bos_id, device=tokens.device)
    read, seconds = torch.cat([bos, tokens], dim=1), []
    for place in places:
        started = time.perf_counter()
        model.decoder.lm_head(model.decoder(visual, read[:, : place + 1])[:, -1])
        seconds.append(time.perf_counter() - started)
    between = zip(places, places[1:], seconds, seconds[1:], strict=False)
    return seconds[0] + sum((b - a) * (sa + sb) / 2 for a, b, sa, sb in between)


def encoded(model):
    """The same detector, its pictures visual tokens already: what is timed is the decoder."""
    model = copy.copy(model)
    model.encode = lambda visual: visual
    return model


def ours(model, visual: torch.Tensor, tokenizer: Tokenizer, objects: int) -> torch.Tensor:
    """Boxes (B, N, 4), greedy."""
    found = generate(encoded(model), visual, tokenizer, DecodingOptions(objects, top_p=0))
    return torch.stack([torch.from_numpy(one.boxes) for one in found])


def equal_sentences(boxes: torch.Tensor, tokens: torch.Tensor, tokenizer: Tokenizer) -> float:
    """The share of pictures whose boxes are those of the tokens (B, L): all, but for two tokens whose logits differ by
    less than rounding, which random weights give now and then."""
    corners = tokens.reshape(len(tokens), -1, TOKENS_PER_OBJECT)[..., [1, 0, 3, 2]].cpu().numpy()
    return float((torch.from_numpy(tokenizer.dequantize(corners)) == boxes).flatten(1).all(1).float().mean())


def race(model, batch: int, objects: int, rounds: int, samples: int) -> dict:
    """Seconds of each, in turn, and ours against each other one, for `batch` pictures."""
    tokenizer, device = model.tokenizer, model.device
    plain, length = PrefixedLlama.of(model.decoder), TOKENS_PER_OBJECT * objects
    width = model.config.decoder_config.hidden_size
    side = model.encode(torch.zeros(1, 3, model.config.image_size, model.config.image_size, device=device)).shape[1]
    equal: dict[str, list[float]] = {"generate": [], "loop": []}
    seconds: dict[str, list[float]] = {OURS: [], **{name: [] for name in equal}, "no cache": []}
    for number in tqdm(range(rounds + 1), desc=f"batch {batch}", disable=None):
        torch.manual_seed(number)
        visual = torch.randn(batch, side, width, device=device)
        written = {}
        for name, write in (
            (OURS, lambda v=visual: ours(model, v, tokenizer, objects)),
            ("generate", lambda v=visual: by_generate(model, plain, v, tokenizer, length)),
            ("loop", lambda v=visual: by_loop(model, plain, v, tokenizer, length)),
        ):
            seconds[name].append(timed(device, write, written, name))
        tokens = written["generate"]
        for name in ("generate", "loop"):
            equal[name].append(equal_sentences(written[OURS], written[name], tokenizer))
        if number or device.type == "cuda":  # on a CPU there is nothing to warm up that is worth the minutes
            seconds["no cache"].append(without_cache(model, visual, tokens, samples))
    seconds = {name: values[-rounds:] for name, values in seconds.items()}  # the first round warms up
    ratios = {
        name: spread([b / a for a, b in zip(seconds[OURS], values, strict=True)])
        for name, values in seconds.items()
        if name != OURS
    }
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast": ratios,
        "tokens_per_s": batch * length / statistics.median(seconds[OURS]),
        "equal_sentences": {name: statistics.mean(shares) for name, shares in equal.items()},
    }


def race_of_the_classic_decoder(model, batch: int, objects: int, rounds: int) -> dict:
    """As `race`, against the loop alone."""
    tokenizer, device = model.tokenizer, model.device
    width, length = model.config.decoder_config.hidden_size, TOKENS_PER_OBJECT * objects
    side = model.encode(torch.zeros(1, 3, model.config.image_size, model.config.image_size, device=device)).shape[1]
    seconds: dict[str, list[float]] = {OURS: [], "loop": []}
    equal = []
    for number in tqdm(range(rounds + 1), desc=f"classic decoder, batch {batch}", disable=None):
        torch.manual_seed(number)
        visual, written = torch.randn(batch, side, width, device=device), {}
        for name, write in (
            (OURS, lambda v=visual: ours(model, v, tokenizer, objects)),
            ("loop", lambda v=visual: by_classic_loop(model, v, tokenizer, length)),
        ):
            seconds[name].append(timed(device, write, written, name))
        equal.append(equal_sentences(written[OURS], written["loop"], tokenizer))
    seconds = {name: values[-rounds:] for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast": {"loop": spread(ratios)},
        "tokens_per_s": batch * length / statistics.median(seconds[OURS]),
        "equal_sentences": {"loop": statistics.mean(equal)},
    }


def by_classic_loop(model, visual: torch.Tensor, tokenizer: Tokenizer, length: int) -> torch.Tensor:
    """Tokens (B, L) by calling transformers' decoder with its cache."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    grammar = GrammarProcessor(tokenizer, visual.device)
    tokens = torch.full((len(visual), 1), tokenizer.bos_id, device=visual.device)
    for _ in range(length):
        output = model.decoder(
            input_ids=tokens[:, -1:], encoder_hidden_states=visual, use_cache=True, **{CACHE: cache}
        )
        tokens = torch.cat([tokens, grammar(tokens, output.logits[:, -1]).argmax(-1)[:, None]], dim=1)
    return tokens[:, 1:]


def timed(device: torch.device, write: Callable, written: dict, name: str) -> float:
    synchronise(device)
    started = time.perf_counter()
    written[name] = write()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def full_pipeline(model, batch: int, image_size: int, objects: int, rounds: int) -> dict:
    """Images/s of the whole detector from pixels to boxes, of its encoder alone, and of DETR."""
    device = model.device
    config = DetrConfig(use_timm_backbone=False, backbone_config=ResNetConfig(out_features=["stage4"]), backbone=None)
    detr = DetrForObjectDetection(config).to(device).eval()
    pixels = torch.randint(0, 256, (batch, 3, image_size, image_size), dtype=torch.uint8, device=device)
    floats = pixels / 255
    ways = {
        OURS: lambda: model.detect(pixels, DecodingOptions(objects, top_p=0)),
        "encoder": lambda: model.encode(pixels),
        "detr": lambda: detr(floats),
    }
    seconds = {name: [timed(device, way, {}, name) for _ in range(rounds + 1)][1:] for name, way in ways.items()}
    return {name: spread([batch / value for value in values]) for name, values in seconds.items()}


def detector(args: argparse.Namespace, decoder: str):
    torch.manual_seed(0)
    model = build_model(
        backbone="{model_type: resnet}",
        image_size=args.image_size,
        max_objects=args.num_objects,
        decoder=decoder,
        category_ids=tuple(range(80)),
        class_names=tuple(map(str, range(80))),
    ).eval()
    with torch.no_grad():  # of random weights, all tokens would be nearly equally likely
        for parameter in model.decoder.parameters():
            parameter.mul_(3.0)
    return model


def measure(args: argparse.Namespace) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model, classic = (detector(args, decoder).to(device) for decoder in ("llama", "transformer"))
    half = torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16")
    found = {"environment": environment(device), "flags": {k: v for k, v in vars(args).items() if k != "output"}}
    with torch.inference_mode(), half:
        found["batches"] = {
            str(batch): race(model, batch, args.num_objects, args.rounds, args.samples) for batch in args.batch_sizes
        }
        found["classic"] = {
            str(batch): race_of_the_classic_decoder(classic, batch, args.num_objects, args.rounds)
            for batch in args.batch_sizes
        }
        found["images_per_s"] = {
            str(batch): full_pipeline(model, batch, args.image_size, args.num_objects, 1) for batch in args.batch_sizes
        }
    if device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    else:
        found["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found


def report(found: dict) -> str:
    lines = []
    for batch, part in found["batches"].items():
        equal = ", ".join(f"{share:.0%} as {name}" for name, share in part["equal_sentences"].items())
        lines.append(f"batch {batch}: {part['tokens_per_s']:.0f} tokens/s; equal sentences: {equal}")
        for name, times in part["times_as_fast"].items():
            lines.append(f"  {{median:.2f}} times as fast as {name} ({{min:.2f}} to {{max:.2f}})".format(**times))
        classic = found["classic"][batch]["times_as_fast"]["loop"]["median"]
        lines.append(f"  classic decoder: {classic:.2f} times as fast as a loop")
        rates = found["images_per_s"][batch]
        lines.append("  images/s: " + ", ".join(f"{name} {rate['median']:.2f}" for name, rate in rates.items()))
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the writing of sentences.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--num_objects", type=int, default=100)
    parser.add_argument("--image_size", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=6, help="tokens at which the loop without a cache is timed")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--num_threads", type=int, default=0, help="of the CPU (default: torch's own choice)")
    args = parser.parse_args(words)
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: its folder does not exist")
    found = measure(args)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(report(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
