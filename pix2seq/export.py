"""A trained detector as two ONNX graphs, which write the same boxes.

    python export.py --checkpoint OUT/best --output_dir E

    encoder.onnx   pixel_values -> picture: the picture as keys and values that the decoder looks at
    step.onnx      token, position, picture, said -> logits, said_after: reads one more token in each row

What lies between the two, grammar and sampling, stays what it is: `OnnxDetector` is driven by the same `generate` as
the detector. Before the folder is left behind, both write about the same pictures (see docs/export.md).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils import logging as transformers_logging

from pix2seq import manifest
from pix2seq.argument_parser import parse, run_command
from pix2seq.arguments import argument
from pix2seq.data.shapes import draw_image
from pix2seq.errors import UserError
from pix2seq.generation import DecodingOptions, Detections, NonFiniteLogits, generate
from pix2seq.models import Pix2SeqConfig, Pix2SeqForObjectDetection, load_model
from pix2seq.models.image_processing_pix2seq import Pix2SeqImageProcessor
from pix2seq.models.llama_decoder import CACHE, prefix_positions
from pix2seq.progress import progress
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer
from pix2seq.transforms import PAD_VALUE

OPSETS = range(18, 26)  # what torch's exporter writes and onnxruntime reads
NUM_PICTURES, TOGETHER = 20, 5  # that are written about before a folder is left, and how many of them at a time
MOST_DIFFERENT = 1e-3  # logits, as a part of the largest one
SAME_BOX = 1e-4  # of the canvas: far less than a bin

README = """\
An object detector, exported by export.py of pix2seq.

{graphs}

Pixels are uint8: the picture in the top left corner of the canvas, {padding} right of it and below. `config.json` has
the classes (id2label) and num_bins. From a clone of pix2seq:

    from export import OnnxDetector
    found = OnnxDetector("this folder").detect(pixel_values)

Its docs/export.md has the same in NumPy alone. {parity}
"""


@dataclass
class ExportArguments:
    checkpoint: str | None = argument(None, "folder of a trained detector: OUT/best or OUT/final")
    output_dir: str | None = argument(None, "where the graphs go: a new folder")
    opset: int = argument(20, f"version of ONNX's operators: {OPSETS[0]} to {OPSETS[-1]}")

    def __post_init__(self):
        for name in ("checkpoint", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name}: missing")
        if self.opset not in OPSETS:
            raise ValueError(f"--opset {self.opset}: must lie in {OPSETS[0]} ... {OPSETS[-1]}")


def encode_llama(detector: Pix2SeqForObjectDetection, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pixels uint8 (B, 3, S, S) -> keys and values of N visual tokens in L layers, (B, L, 2 H, N, d): keys first."""
    visual, cache = detector.encode(pixel_values), DynamicCache(config=detector.decoder.config)
    detector.decoder.model(
        inputs_embeds=visual,
        position_ids=prefix_positions(visual.shape[1], 0, visual.device),
        num_visual=detector.decoder.num_bidirectional(visual),
        use_cache=True,
        **{CACHE: cache},
    )
    return torch.stack([torch.cat([layer.keys, layer.values], dim=1) for layer in cache.layers], dim=1)


def encode_transformer(detector: Pix2SeqForObjectDetection, pixel_values: torch.Tensor) -> torch.Tensor:
    """As `encode_llama`; the keys and values are those of cross-attention."""
    visual, layers = detector.encode(pixel_values), []
    for layer in detector.decoder.model.decoder.layers:
        cross = layer.encoder_attn
        heads = [linear(visual).unflatten(2, (-1, cross.head_dim)) for linear in (cross.k_proj, cross.v_proj)]
        layers.append(torch.cat(heads, dim=2).transpose(1, 2))
    return torch.stack(layers, dim=1)


def step_llama(
    detector: Pix2SeqForObjectDetection,
    token: torch.Tensor,
    position: torch.Tensor,
    picture: torch.Tensor,
    said: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One more token in each row: its id (B,), its position (B,) in the sentence (BOS is at 0), the picture
    (B, L, 2 H, N, d), and the keys and values of what was said before, with room for T tokens (B, L, 2 H, T, d).

    Returns what may follow, logits (B, V), and what is said now. Weights are not laid out here, as in
    pix2seq/models/kv_cache.py: that is what who runs the graph does.
    """
    model, new = detector.decoder.model, []
    before = torch.arange(said.shape[3], device=said.device) < position[:, None]
    hidden = model.embed_tokens(token)
    cos, sin = (part[:, 0] for part in model.rotary_emb(hidden, 1 + position[:, None]))  # the picture is at 0
    for index, layer in enumerate(model.layers):
        own, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = (
            linear(normed).unflatten(1, (-1, own.head_dim)) for linear in (own.q_proj, own.k_proj, own.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        new.append(torch.cat([key, value], dim=1)[:, :, None])
        found = look(query, (picture[:, index], None), (said[:, index], before), (new[-1], None))
        hidden = hidden + own.o_proj(found)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return detector.decoder.lm_head(model.norm(hidden)), remember(said, new, position)


def step_transformer(
    detector: Pix2SeqForObjectDetection,
    token: torch.Tensor,
    position: torch.Tensor,
    picture: torch.Tensor,
    said: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `step_llama`."""
    decoder, new = detector.decoder.model.decoder, []
    before = torch.arange(said.shape[3], device=said.device) < position[:, None]
    hidden = decoder.embed_tokens(token) + decoder.embed_positions.weight[position]
    for index, layer in enumerate(decoder.layers):
        own, cross, normed = layer.self_attn, layer.encoder_attn, layer.self_attn_layer_norm(hidden)
        query, key, value = (
            linear(normed).unflatten(1, (-1, own.head_dim)) for linear in (own.q_proj, own.k_proj, own.v_proj)
        )
        new.append(torch.cat([key, value], dim=1)[:, :, None])
        hidden = hidden + own.out_proj(look(query, (said[:, index], before), (new[-1], None)))
        query = cross.q_proj(layer.encoder_attn_layer_norm(hidden)).unflatten(1, (-1, cross.head_dim))
        hidden = hidden + cross.out_proj(look(query, (picture[:, index], None)))
        hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))
    return detector.decoder.lm_head(decoder.layer_norm(hidden)), remember(said, new, position)


def look(query: torch.Tensor, *seen: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    """What queries (B, H', d) find in parts, each of keys and values (B, 2 H, n, d) and which of them there are,
    (B, n), or all: (B, H' d). In parts, because joining them would copy the whole picture for every token."""
    heads = seen[0][0].shape[1] // 2
    query = query.unflatten(1, (heads, -1)) / math.sqrt(query.shape[-1])  # heads that share keys lie side by side
    scores = []
    for kept, there in seen:
        score = query @ kept[:, :heads].transpose(2, 3)
        scores.append(score if there is None else score.masked_fill(~there[:, None, None], -torch.inf))
    shares = torch.cat(scores, dim=-1).softmax(-1).split([kept.shape[2] for kept, _ in seen], dim=-1)
    return sum(share @ kept[:, heads:] for share, (kept, _) in zip(shares, seen, strict=True)).flatten(1)


def remember(said: torch.Tensor, new: list[torch.Tensor], position: torch.Tensor) -> torch.Tensor:
    """What was said (B, L, 2 H, T, d), with the new token of each layer, (B, 2 H, 1, d), at its position (B,)."""
    here = torch.arange(said.shape[3], device=said.device) == position[:, None]
    return torch.where(here[:, None, None, :, None], torch.stack(new, dim=1), said)


# By the decoder config's model_type.
FUNCTIONS = {"llama": (encode_llama, step_llama), "blenderbot": (encode_transformer, step_transformer)}


class Graph(nn.Module):
    """A function of a detector, for the exporter."""

    def __init__(self, detector: Pix2SeqForObjectDetection, function: Callable):
        super().__init__()
        self.detector, self.function = detector, function

    def forward(self, *inputs: torch.Tensor):
        return self.function(self.detector, *inputs)


def write_graphs(detector: Pix2SeqForObjectDetection, folder: Path, opset: int) -> None:
    """encoder.onnx and step.onnx, for any number of pictures. Raises UserError if the exporter does not know a part
    of the detector."""
    encode, step = FUNCTIONS[detector.config.decoder_config.model_type]
    side, batch, room = detector.config.image_size, torch.export.Dim("batch"), torch.export.Dim("room")
    pixel_values = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with torch.inference_mode():
        picture = torch.zeros_like(encode(detector, pixel_values))
    said = torch.zeros(*picture.shape[:3], TOKENS_PER_OBJECT * detector.config.max_objects, picture.shape[4])
    token, first = torch.full((2,), detector.tokenizer.bos_id), {0: batch}
    for name, function, inputs, outputs in (
        ("encoder", encode, {"pixel_values": (pixel_values, first)}, ["picture"]),
        (
            *("step", step),
            {
                "token": (token, first),
                "position": (torch.zeros_like(token), first),
                "picture": (picture, first),
                "said": (said, {0: batch, 3: room}),
            },
            ["logits", "said_after"],
        ),
    ):
        examples, shapes = zip(*inputs.values(), strict=True)
        try:
            with warnings.catch_warnings(action="ignore"):  # of the libraries, about each other
                torch.onnx.export(
                    *(Graph(detector, function).eval(), examples),
                    input_names=list(inputs),
                    output_names=outputs,
                    dynamic_shapes=(shapes,),
                    opset_version=opset,
                    dynamo=True,
                    verbose=False,
                ).save(folder / f"{name}.onnx")
        except torch.onnx.OnnxExporterError as error:
            raise UserError(f"--checkpoint: torch.onnx cannot write its {name} ({str(error)[:300]})") from None


class OnnxDetector:
    """An exported folder, as `generate` asks for a model. `providers`: see onnxruntime's InferenceSession."""

    def __init__(self, folder: str | Path, providers: tuple[str, ...] = ("CPUExecutionProvider",)):
        import onnxruntime  # an extra: only those who export need it

        self.config = Pix2SeqConfig.from_pretrained(folder)
        self.tokenizer = Tokenizer(len(self.config.category_ids), self.config.num_bins)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.encoder, self.reader = (
            onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx", options, list(providers))
            for name in ("encoder", "step")
        )

    def detect(self, pixel_values: torch.Tensor, options: DecodingOptions | None = None) -> list[Detections]:
        """Pixels uint8 (B, 3, S, S) -> the objects of each picture, as the detector's own `detect`."""
        options = options or DecodingOptions(**{"max_objects": self.config.max_objects} | self.config.decoding)
        return generate(self, pixel_values, self.tokenizer, options)

    def prefill(self, pixel_values: torch.Tensor, length: int) -> "OnnxSteps":
        (picture,) = self.encoder.run(None, {"pixel_values": pixel_values.numpy()})
        return OnnxSteps(picture, np.zeros((*picture.shape[:3], length, picture.shape[4]), picture.dtype))

    def decode_step(
        self, ids: torch.Tensor, position: int, steps: "OnnxSteps", rows: slice = slice(None)
    ) -> torch.Tensor:
        inputs = {"token": ids.numpy(), "position": np.full(len(ids), position), **vars(steps)}
        logits, steps.said = self.reader.run(None, inputs)
        return torch.from_numpy(logits)[:, rows]


@dataclass
class OnnxSteps:
    """What was read so far: see `step_llama`."""

    picture: np.ndarray
    said: np.ndarray

    def select_batch(self, rows: torch.Tensor) -> None:
        """Goes on with these rows of the batch only."""
        self.picture, self.said = self.picture[rows.numpy()], self.said[rows.numpy()]


class SideBySide:
    """Both read what the detector writes; remembers the largest difference between their logits."""

    def __init__(self, detector: Pix2SeqForObjectDetection, exported: OnnxDetector):
        self.detector, self.exported, self.config = detector, exported, detector.config
        self.difference = 0.0

    def prefill(self, pixel_values: torch.Tensor, length: int) -> "SideBySide":
        self.steps = self.detector.prefill(pixel_values, length), self.exported.prefill(pixel_values, length)
        return self

    def decode_step(self, ids: torch.Tensor, position: int, steps: "SideBySide", rows: slice) -> torch.Tensor:
        ours, theirs = (
            model.decode_step(ids, position, steps, rows)
            for model, steps in zip((self.detector, self.exported), self.steps, strict=True)
        )
        difference = ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)).item()
        self.difference = max(self.difference, difference if math.isfinite(difference) else math.inf)
        return ours

    def select_batch(self, rows: torch.Tensor) -> None:
        for steps in self.steps:
            steps.select_batch(rows)


def check(detector: Pix2SeqForObjectDetection, folder: Path) -> str:
    """Lets the detector and its graphs write about the same pictures, and says how far they agree.

    Raises UserError if they do not. One picture in ten may differ: where two tokens are as good as equally likely,
    rounding decides, and sentences part.
    """
    exported = OnnxDetector(folder)
    options = detector.decoding_options
    drawn = [draw_image(np.random.default_rng(seed), 64, 6)[0] for seed in range(NUM_PICTURES)]
    pictures = Pix2SeqImageProcessor.for_detector(detector.config)(drawn)["pixel_values"]
    pair, same = SideBySide(detector, exported), {1: 0, TOGETHER: 0}
    for part in progress(pictures.split(TOGETHER), "comparing"):
        expected = generate(pair, part, detector.tokenizer, options)
        for size in same:
            found = [each for some in part.split(size) for each in exported.detect(some, options)]
            same[size] += sum(map(are_same, expected, found))
    told = (
        f"Logits differ by {pair.difference:.1e} of the largest at most; the boxes of {same[1]} of {NUM_PICTURES} "
        f"pictures are the same one at a time, of {same[TOGETHER]} in batches of {TOGETHER}."
    )
    if pair.difference > MOST_DIFFERENT or min(same.values()) < 0.9 * NUM_PICTURES:
        raise UserError(f"the graphs do not say what the detector says, and were not kept. {told}")
    return told


def are_same(ours: Detections, theirs: Detections) -> bool:
    return (
        np.array_equal(ours.labels, theirs.labels)
        and np.allclose(ours.boxes, theirs.boxes, rtol=0, atol=SAME_BOX)
        and np.allclose(ours.scores, theirs.scores, rtol=0, atol=MOST_DIFFERENT)
    )


def described(graph: Path) -> str:
    """What goes in and what comes out."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph)
    inputs, outputs = (
        ", ".join(f"{each.name} {each.type.removeprefix('tensor')} {tuple(each.shape)}" for each in some)
        for some in (session.get_inputs(), session.get_outputs())
    )
    return f"- {graph.name}: {inputs} -> {outputs}"


def run_export(args: ExportArguments) -> int:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"export.py needs {', '.join(missing)}, which is not installed: pip install -e '.[export]'")
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output_dir {output}: is there already; name a new folder")
    transformers_logging.disable_progress_bar()
    detector = load_model(args.checkpoint, "--checkpoint").float().eval().requires_grad_(False)

    def write(folder: Path) -> None:
        config = detector.config
        config.save_pretrained(folder)
        Pix2SeqImageProcessor.for_detector(config).save_pretrained(folder)
        write_graphs(detector, folder, args.opset)
        parity = check(detector, folder)
        print(parity)
        graphs = "\n".join(described(folder / name) for name in ("encoder.onnx", "step.onnx"))
        (folder / "README.md").write_text(README.format(graphs=graphs, padding=PAD_VALUE, parity=parity))

    try:
        manifest.write_folder_atomically(output, write)
    except OSError as error:
        raise UserError(f"--output_dir {output}: could not be written ({error.strerror or error})") from None
    except NonFiniteLogits as error:
        raise UserError(f"--checkpoint {args.checkpoint}: {error}") from None
    print(f"written to {output}")
    return 0


def main(argv: list[str] | None = None, program: str = "export.py") -> int:
    """Parses the command line and exports; returns the exit code."""
    return run_command(run_export, parse(ExportArguments, argv, program), program=program)
