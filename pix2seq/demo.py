"""A page on which a detector shows what it writes, while it writes it.

    python -m pix2seq.demo --checkpoint runs/demo/best

Needs gradio, and no network. The server remembers nothing of its visitors: for another threshold, the page hides boxes
by itself.
"""

import base64
import html
import io
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from transformers.utils import logging as transformers_logging

from pix2seq.command_line import parse, read_flags
from pix2seq.config import DecodingArguments, flag
from pix2seq.data import find_split, load_annotations
from pix2seq.decoding import NonFiniteLogits, write
from pix2seq.decoding.sentences import Sentences
from pix2seq.errors import UserError
from pix2seq.model import load_detector
from pix2seq.predictor import Pix2Seq, open_picture
from pix2seq.shapes import draw_picture
from pix2seq.tokenizer import SLOTS, TOKENS_PER_OBJECT
from pix2seq.transforms import EvalTransform, fitted_size, to_original_pixels
from pix2seq.visualize import GREY, color_of

PROGRAM = "python -m pix2seq.demo"
SHOWN = 640  # pixels of the longer side of a picture on the page
LEAST_SIDE = 8
EXAMPLES, EXAMPLE_SIDE, EXAMPLE_SHAPES = 5, 320, 4
KEPT = 600  # seconds that files of visitors are kept


@dataclass
class DemoArguments(DecodingArguments):
    checkpoint: str | None = flag(None, "folder of a trained detector: OUT/best, OUT/final or a checkpoint")
    host: str = flag("127.0.0.1", "address to serve at: this machine alone can reach the default; 0.0.0.0 is all")
    port: int = flag(7860, "port to serve at")
    threshold: float = flag(0.5, "only objects of a higher score are drawn at first")
    device: str | None = flag(None, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    pace: int = flag(100, "tokens a second at most, so that one can watch (0: as fast as they come)")
    max_side: int = flag(8192, "pixels a side of a picture may have")
    max_mb: int = flag(20, "megabytes a file may have")
    max_queue: int = flag(32, "visitors that may wait; further ones are told to come back")

    def __post_init__(self):
        if self.checkpoint is None:
            raise ValueError("--checkpoint: missing (the folder of a trained detector)")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold}: must be 0 to 1")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: must be 1 to 65535")
        if self.max_side < LEAST_SIDE:
            raise ValueError(f"--max_side {self.max_side}: must be at least {LEAST_SIDE}")
        if self.pace < 0 or self.max_mb < 1 or self.max_queue < 1:
            raise ValueError(
                f"--pace {self.pace}, --max_mb {self.max_mb}, --max_queue {self.max_queue}: at least 0, 1 and 1"
            )
        super().__post_init__()


@dataclass(frozen=True)
class Line:
    """An object of a sentence, or as much as is written of it.

    words   of its tokens, five if it is finished     color   as its box, grey for noise; none before it is finished
    then also: the detector's `name` for it, `score`, and `box` (4,), xyxy in pixels of the picture
    """

    words: list[str]
    color: str = ""
    name: str = ""
    score: float = 1.0
    box: np.ndarray | None = None

    @property
    def is_noise(self) -> bool:
        return self.color == GREY


def lines_of(detector: Pix2Seq, writing: Sentences, size: tuple[int, int]) -> list[Line]:
    """The sentence of one picture of this (height, width), as far as it is written. Raises NonFiniteLogits."""
    tokenizer, side = detector.model.tokenizer, detector.model.config.image_size
    found = writing.detections(tokenizer, detector.options.sharpness)[0]
    boxes = to_original_pixels(found.boxes, side, fitted_size(size, side), size)
    tokens = writing.tokens[0].tolist()
    words = [tokenizer.word(token, detector.names) for token in tokens[: tokens.index(tokenizer.eos_id)]]
    lines = []
    for number, start in enumerate(range(0, len(words), TOKENS_PER_OBJECT)):
        line = Line(words[start : start + TOKENS_PER_OBJECT])
        if len(line.words) == TOKENS_PER_OBJECT:
            label, noise = found.labels[number], tokens[start + TOKENS_PER_OBJECT - 1] == tokenizer.noise_id
            color = GREY if noise else color_of(label)
            line = Line(line.words, color, detector.names[label], float(found.scores[number]), boxes[number])
        lines.append(line)
    return lines


def watch(detector: Pix2Seq, pixels: torch.Tensor, pace: int = 0) -> Iterator[list[Line]]:
    """What is written about a picture uint8 (3, H, W), again and again while it grows, and at last all of it.

    pace   tokens a second at most (0: any number). Who looks away misses some. Who leaves ends the writing

    Raises NonFiniteLogits.
    """
    model, size = detector.model, tuple(pixels.shape[-2:])
    canvas = EvalTransform(model.config.image_size)(pixels).image[None].to(detector.device)
    writing = Sentences.new(canvas, model.tokenizer, detector.options)
    news, left, told = SimpleQueue(), threading.Event(), 0

    def look_on() -> bool:
        nonlocal told
        count, before = int((writing.tokens[0] != model.tokenizer.eos_id).sum()), told
        told = count
        if news.empty():
            news.put(lines_of(detector, writing, size))
        return left.wait((count - before) / pace if pace else 0)

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(write, model, canvas, model.tokenizer, detector.options, look_on, writing)
        work.add_done_callback(lambda _: news.put(None))
        try:
            yield from iter(news.get, None)
            yield lines_of(detector, work.result(), size)
        finally:
            left.set()


def open_upload(path: str, max_side: int) -> torch.Tensor:
    """The pixels of a stranger's file, uint8 (3, H, W). Raises ValueError."""
    picture = open_picture(path)
    _, height, width = picture.shape
    if min(height, width) < LEAST_SIDE or max(height, width) > max_side:
        raise ValueError(f"{width} x {height} pixels: each side must have {LEAST_SIDE} to {max_side}")
    return picture.pixels()


def draw_examples(folder: Path) -> list[str]:
    """Files of drawn shapes, at least two in each."""
    drawn = (draw_picture(np.random.default_rng(seed), EXAMPLE_SIDE, EXAMPLE_SHAPES) for seed in range(10**6))
    crowded = (image for image, objects in drawn if len(objects) > 1)
    return [_saved(image, folder, number) for number, image in zip(range(EXAMPLES), crowded, strict=False)]


def find_examples(checkpoint: str, folder: Path) -> list[str]:
    """Files of pictures the detector was evaluated on, if its dataset is there, else of drawn shapes."""
    flags = read_flags(checkpoint, "--checkpoint")
    try:
        where = (flags.get(name) for name in ("root", "val_images", "val_json"))
        annotations = load_annotations(find_split("val", *where))
        indices = np.linspace(0, len(annotations) - 1, EXAMPLES, dtype=int)
        pictures = [annotations.picture(index).pixels() for index in dict.fromkeys(indices.tolist())]
    except (ValueError, TypeError):  # no such folder, or no flags at all
        return draw_examples(folder)
    return [_saved(to_pil_image(pixels), folder, number) for number, pixels in enumerate(pictures)]


def _saved(image: Image.Image, folder: Path, number: int) -> str:
    path = folder / f"{number}.png"
    image.save(path)
    return str(path)


# -- what the page shows ---------------------------------------------------------------------------

HEAD = (
    "<h1>pix2seq</h1><p>A picture goes in, and a decoder writes what is in it as a sentence, five tokens an object: "
    "<b>y1 x1 y2 x2 class</b>. Numbers are bins of a ruler: 0 is the top or left edge of the canvas, {last} the "
    "bottom or right. Grey is noise, by which the model says that nothing more is there.</p>"
)
HIDE = "value => { document.documentElement.style.setProperty('--threshold', value); return []; }"
FONT, FONT_MONO = ("system-ui", "sans-serif"), ("ui-monospace", "Menlo", "Consolas", "monospace")
STYLE = """
.gradio-container { max-width: 1240px !important; margin: auto; }
.html-container { padding: 0 !important; }
.head h1 { font-size: 30px; font-weight: 700; margin: 6px 0 2px; }
.head p { color: var(--body-text-color-subdued); margin: 0 0 8px; font-size: 15px; }
.picture { position: relative; width: 100%; border-radius: 8px; overflow: hidden; background: #EEE; }
.picture img { display: block; width: 100%; }
.picture .box { position: absolute; border: 3px solid var(--color); box-sizing: border-box; transition: opacity .15s;
  box-shadow: 0 0 0 1px #0005, inset 0 0 0 1px #0005; opacity: calc((var(--score) - var(--threshold)) * 1e6); }
.picture .box.noise { border-style: dashed; border-width: 2px; }
.picture .box b { position: absolute; left: -3px; bottom: 100%; background: var(--color); color: #000;
  font: 600 13px/20px system-ui, sans-serif; padding: 0 6px; white-space: nowrap; border-radius: 3px 3px 0 0;
  z-index: 1; }
.picture .box.high b { bottom: auto; top: 0; border-radius: 0 0 3px 0; }
.picture .box.right b { left: auto; right: -3px; }
.sentence { max-height: 480px; overflow-y: auto; }
.sentence table { width: 100%; margin: 0; border: 0; border-collapse: separate; border-spacing: 4px;
  table-layout: fixed; }
.sentence th { color: var(--body-text-color-subdued); font-weight: 500; font-size: 13px; text-align: left;
  padding: 0 8px; border: 0; position: sticky; top: 0; background: var(--body-background-fill); }
.sentence th:nth-child(5) { width: 30%; }
.sentence tr { border: 0; opacity: clamp(.4, calc((var(--score) - var(--threshold)) * 1e6), 1); }
.sentence td { background: color-mix(in srgb, var(--color) 35%, white); color: #111; border: 0; border-radius: 5px;
  padding: 4px 8px; font: 15px/22px ui-monospace, Menlo, Consolas, monospace; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.sentence td:nth-child(5) { background: var(--color); font-weight: 700; }
.sentence td.score { background: none; color: var(--body-text-color-subdued); }
.sentence tr.noise td, .sentence tr.unfinished td { background: #EDEDED; color: #888; font-weight: 400; }
.sentence tr.unfinished td { background: #E3E7EE; color: #111; }
.sentence tr.noise td.score { background: none; }
.status { color: var(--body-text-color-subdued); font-size: 14px; margin: 0 0 6px 12px; }
.fault { border-left: 4px solid #D55E00; background: #D55E0018; padding: 12px 16px; border-radius: 4px; }
"""


def picture_html(pixels: torch.Tensor) -> str:
    """The picture, in an element that is left open for its boxes: so these are all that is sent while they grow."""
    image, data = to_pil_image(pixels), io.BytesIO()
    image.thumbnail((SHOWN, SHOWN))
    image.save(data, "WEBP", quality=90)
    code = base64.b64encode(data.getvalue()).decode()
    return f'<div class="picture"><img alt="the picture" src="data:image/webp;base64,{code}">'


def boxes_html(lines: list[Line], size: tuple[int, int]) -> str:
    """Of the objects that are finished, on a picture of this (height, width)."""
    parts = []
    for line in lines:
        if line.box is None:
            continue
        x1, y1, x2, y2 = (100 * line.box / np.array([size[1], size[0]] * 2)).tolist()
        kinds = f"box{' noise' * line.is_noise}{' high' * (y1 < 6)}{' right' * (x1 > 75)}"
        place = f"left:{x1:.2f}%;top:{y1:.2f}%;width:{x2 - x1:.2f}%;height:{y2 - y1:.2f}%"
        parts.append(
            f'<div class="{kinds}" style="{place};--color:{line.color};--score:{line.score:.4f}">'
            f"<b>{html.escape(line.name)} {line.score:.2f}</b></div>"
        )
    return "".join(parts)


def sentence_html(lines: list[Line]) -> str:
    """A row for each object: its tokens, and its score."""
    rows = []
    for line in lines:
        kind = "unfinished" if line.box is None else "noise" if line.is_noise else "object"
        cells = "".join(f"<td>{html.escape(word)}</td>" for word in line.words)
        score = "" if line.box is None else f'<td class="score">{line.score:.2f}</td>'
        rows.append(f'<tr class="{kind}" style="--color:{line.color};--score:{line.score:.4f}">{cells}{score}</tr>')
    head = "".join(f"<th>{name}</th>" for name in (*SLOTS, "score"))
    count = sum(len(line.words) for line in lines)
    return (
        f'<p class="status">{count} tokens</p><div class="sentence"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def fault_html(why: object) -> str:
    return f'<p class="fault">This picture cannot be used: {html.escape(str(why))}</p>'


def frames(detector: Pix2Seq, path: str, args: DemoArguments) -> Iterator[tuple[str, str]]:
    """Picture and sentence as the page shows them, while the sentence is written; or why it cannot be."""
    try:
        pixels = open_upload(path, args.max_side)
        shown = picture_html(pixels)
        for lines in watch(detector, pixels, args.pace):
            yield shown + boxes_html(lines, tuple(pixels.shape[-2:])), sentence_html(lines)
    except (ValueError, NonFiniteLogits) as error:
        yield "", fault_html(error)


def build_page(detector: Pix2Seq, args: DemoArguments, examples: list[str]):
    """The page, and `/detect` for programs. One picture at a time is worked on, whoever asks."""
    gradio = _gradio()

    def show(path: str) -> Iterator[tuple[str, str]]:
        yield from frames(detector, path, args)

    def show_example(index: int) -> Iterator[tuple[str, str]]:
        yield from frames(detector, examples[index], args)

    def detect(picture: str, threshold: float) -> list[dict]:
        """Objects of a picture, best first: class, score, and box as x1, y1, x2, y2 in its pixels."""
        try:
            open_upload(picture, args.max_side)
            found = detector(picture, threshold)
        except (ValueError, RuntimeError) as error:
            raise gradio.Error(str(error), print_exception=False) from None
        rows = zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
        return [dict(zip(("class", "score", "box"), row, strict=True)) for row in rows]

    with gradio.Blocks(title="pix2seq", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.HTML(HEAD.format(last=detector.model.config.num_bins - 1), elem_classes="head")
        with gradio.Row():
            with gradio.Column(scale=6):
                picture = gradio.HTML(elem_id="picture")
            with gradio.Column(scale=5):
                upload = gradio.UploadButton("Open a picture", file_types=["image"], variant="primary", size="md")
                samples = gradio.Dataset(
                    label="or one of these",
                    components=[gradio.Image(render=False)],
                    samples=[[path] for path in examples],
                    type="index",
                )
                threshold = gradio.Slider(0, 1, args.threshold, step=0.01, label="Boxes of a score above")
                sentence = gradio.HTML(elem_id="sentence")
        how = {"outputs": [picture, sentence], "show_progress": "hidden", "concurrency_id": "detector"}
        how |= {"concurrency_limit": 1, "trigger_mode": "always_last", "api_visibility": "private"}
        page.load(lambda: (yield from show_example(0)), **how)
        upload.upload(show, upload, **how)
        samples.click(show_example, samples, **how)
        threshold.change(None, threshold, js=HIDE, api_visibility="private")
        # Not gradio.api, which lets its callers name any file of the server's.
        gradio.on(
            *([], detect, [upload, threshold], gradio.JSON(visible=False)),
            **{"api_name": "detect", "concurrency_id": "detector", "concurrency_limit": 1},
        )
    return page.queue(max_size=args.max_queue)


def _gradio():
    """The package that makes the page. Raises UserError."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError:
        raise UserError("the page needs gradio: pip install -e '.[demo]', or gradio") from None
    return gradio


def serve(args: DemoArguments) -> None:
    """Serves the page until it is interrupted. Raises UserError."""
    transformers_logging.disable_progress_bar()
    # A draft's guesses stand in the sentence before they are checked: nothing to show.
    decoding = args.decoding() | {"draft": "off"}
    model = load_detector(args.checkpoint, "--checkpoint")
    try:
        detector = Pix2Seq(model, args.device, **decoding)
    except UserError as error:
        raise UserError(f"--{error}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the folder goes
    with tempfile.TemporaryDirectory(prefix="pix2seq-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported
        gradio, examples = _gradio(), Path(folder) / "examples"
        examples.mkdir()
        # The dataset may be nobody else's business.
        local = args.host in ("127.0.0.1", "localhost", "::1")
        page = build_page(
            detector, args, find_examples(args.checkpoint, examples) if local else draw_examples(examples)
        )
        try:
            page.launch(
                server_name=args.host,
                server_port=args.port,
                max_file_size=args.max_mb * 2**20,
                theme=gradio.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=FONT_MONO),
                css=f":root {{ --threshold: {args.threshold}; }}{STYLE}",
                footer_links=["api"],
                share=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"--host {args.host} --port {args.port}: cannot be served at ({error})") from None
        print(f"http://{args.host}:{args.port} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def main() -> int:
    try:
        serve(parse(DemoArguments, program=PROGRAM))
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
