"""What the page shows, how fast, and what programs are answered.

For another threshold, the page hides boxes by itself: nothing is detected again.
"""

import asyncio
import base64
import html
import io
import os
import time
from collections.abc import AsyncIterator, Callable
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image

from pix2seq.demo.worker import FULL, InferenceWorker, Line, Sentence, beginning
from pix2seq.errors import UserError
from pix2seq.tokenizer import SLOTS

FRAMES = 30  # a second at most are sent to a page
SIGN_OF_LIFE = 0.5  # seconds: who has left is noticed only when there is a word for him
AT_ONCE = 200  # visitors who are shown something; and pages of which gradio keeps what they showed last
KEPT = 600  # seconds that files of visitors are kept

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
@media (max-width: 600px) {
  .sentence table { border-spacing: 2px; }
  .sentence td, .sentence th { padding: 4px; font-size: 13px; }
}
.status { color: var(--body-text-color-subdued); font-size: 14px; margin: 0 0 6px 12px; }
.fault { border-left: 4px solid #D55E00; background: #D55E0018; padding: 12px 16px; border-radius: 4px; }
"""


def picture_html(image: Image.Image) -> str:
    """The picture, in an element that is left open for its boxes: so these are all that is sent while they grow."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    code = base64.b64encode(data.getvalue()).decode()
    return f'<div class="picture"><img alt="the picture" src="data:image/jpeg;base64,{code}">'


def boxes_html(lines: list[Line], size: tuple[int, int]) -> str:
    """Of the objects that are finished, on a picture of this (height, width)."""
    parts = []
    for line in lines:
        if line.box is None:
            continue
        x1, y1, x2, y2 = (100 * line.box / np.array([size[1], size[0]] * 2)).tolist()
        kinds = f"box{' noise' * line.is_noise}{' high' * (y1 < 6)}{' right' * (x1 > 50)}"
        place = f"left:{x1:.2f}%;top:{y1:.2f}%;width:{x2 - x1:.2f}%;height:{y2 - y1:.2f}%"
        tag = "noise" if line.is_noise else f"{html.escape(line.name)} {line.score:.2f}"
        style = f"{place};--color:{line.color};--score:{line.score:.4f}"
        parts.append(f'<div class="{kinds}" style="{style}"><b>{tag}</b></div>')
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


def waiting_html(ahead: int) -> str:
    words = f"{ahead} picture{'s come' if ahead > 1 else ' comes'} before yours" if ahead else "being read"
    return f'<p class="status">{words}</p>'


def fault_html(why: str) -> str:
    return f'<p class="fault">{html.escape(why)}</p>'


async def watch(desk: InferenceWorker, sentence: Sentence, pace: int) -> AsyncIterator[tuple[str, str]]:
    """Picture and sentence as a page shows them, again and again while these grow, or why they cannot be shown.

    pace   tokens a second at most (0: any number)
    """
    picture, begun, frame, told = "", 0.0, None, time.monotonic()
    while not sentence.left.is_set():
        # In this order: what is done is whole.
        done, lines, now, last = sentence.work.done(), sentence.lines, time.monotonic(), frame
        count = whole = sum(len(line.words) for line in lines)
        if sentence.fault:
            yield "", fault_html(sentence.fault)
            return
        if sentence.preview is None:
            frame = "", waiting_html(desk.ahead(sentence))
        else:
            picture, begun = picture or picture_html(sentence.preview), begun or (now if lines else 0.0)
            if pace:
                count = min(whole, 1 + int(pace * (now - begun)))
            part = beginning(lines, count)
            frame = picture + boxes_html(part, sentence.size), sentence_html(part)
        if (picture and frame != last) or now - told > SIGN_OF_LIFE:
            yield frame
            told = now
        if done and count == whole:
            return
        await asyncio.sleep(1 / FRAMES)


def build_page(desk: InferenceWorker, examples: list[str], threshold: float, pace: int):
    """The page, with these files as examples, and `/detect` for programs. Raises UserError."""
    gradio = _gradio()
    of_examples: dict[int, Sentence] = {}
    newest: dict[str, object] = {}  # of each visitor who is shown something: what was asked for last
    programs, turn = [], asyncio.Lock()

    def ask_example(index: int) -> Sentence:
        if index not in range(len(examples)):  # a program asks
            raise gradio.Error("there is no such example", print_exception=False)
        if index not in of_examples or of_examples[index].fault:
            of_examples[index] = desk.ask(examples[index])
        return of_examples[index]

    def showing(ask: Callable[[Any], Sentence], for_all: bool) -> Callable:
        """`for_all`: the sentence is not ended by who leaves."""

        async def show(what, visitor: gradio.Request) -> AsyncIterator[tuple[str, str]]:
            sentence, mine = ask(what), object()
            newest[visitor.session_hash] = mine
            try:
                async for frame in watch(desk, sentence, pace):
                    if newest.get(visitor.session_hash) is not mine:
                        return
                    yield frame
            finally:
                if newest.get(visitor.session_hash) is mine:
                    del newest[visitor.session_hash]
                if not for_all:
                    sentence.leave()

        return show

    async def detect(picture: str, threshold: float) -> list[dict]:
        """Objects of a picture, best first: class, score, and box as x1, y1, x2, y2 in its pixels."""
        if picture is None:
            raise gradio.Error("picture: none was sent", print_exception=False)
        if isinstance(threshold, bool) or not (isinstance(threshold, Real) and 0 <= threshold <= 1):
            raise gradio.Error("threshold: must be a number from 0 to 1", print_exception=False)
        if len(programs) > desk.max_queue:
            raise gradio.Error(FULL, print_exception=False)
        programs.append(picture)
        try:
            async with turn:  # one of them at a time stands in the visitors' line
                sentence = desk.ask(picture)
                await asyncio.wrap_future(sentence.work)
        finally:
            programs.remove(picture)
        if sentence.fault:
            raise gradio.Error(sentence.fault, print_exception=False)
        lines = [line for line in sentence.lines if line.score > threshold]
        lines.sort(key=lambda line: -line.score)
        return [{"class": line.name, "score": line.score, "box": line.box.tolist()} for line in lines]

    with gradio.Blocks(title="pix2seq", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.HTML(HEAD.format(last=desk.detector.model.config.num_bins - 1), elem_classes="head")
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
                slider = gradio.Slider(0, 1, threshold, step=0.01, label="Boxes of a score above")
                sentence = gradio.HTML(elem_id="sentence")
        # Who is shown something holds nobody up: pictures wait at the desk.
        how = {"outputs": [picture, sentence], "show_progress": "hidden", "concurrency_limit": None}
        how |= {"trigger_mode": "multiple", "api_visibility": "private"}
        show_example = showing(ask_example, for_all=True)
        page.load(show_example, gradio.State(0), **how)
        upload.upload(showing(desk.ask, for_all=False), upload, **how)
        samples.click(show_example, samples, **how)
        slider.change(None, slider, js=HIDE, api_visibility="private")
        # Not gradio.api, which lets its callers name any file of the server's; and no slider, which has errors of its
        # own.
        anything, answer = (gradio.JSON(text, visible=False) for text in (str(threshold), None))
        gradio.on([], detect, [upload, anything], answer, api_name="detect", concurrency_limit=None)
    return page.queue()  # gradio's line is one for all who want anything; ours are of the desk, and of programs


def launch(page, host: str, port: int, max_mb: int, threshold: float) -> None:
    """Raises OSError for an address that cannot be had."""
    themes = _gradio().themes
    page.launch(
        server_name=host,
        server_port=port,
        max_file_size=max_mb * 2**20,
        max_threads=AT_ONCE,
        state_session_capacity=AT_ONCE,
        theme=themes.Base(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=FONT_MONO),
        css=f":root {{ --threshold: {threshold}; }}{STYLE}",
        footer_links=["api"],
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )


def _gradio():
    """The package that makes the page. Raises UserError."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError:
        raise UserError("the page needs gradio: pip install -e '.[demo]', or gradio") from None
    return gradio
