"""The gradio page of the demo, and its endpoint `/detect` for programs."""

import asyncio
import os
import time
from collections.abc import AsyncIterator

from pix2seq.demo.html import (
    CSS,
    INTRODUCTION,
    SET_THRESHOLD,
    boxes_html,
    error_html,
    image_html,
    sequence_html,
    waiting_html,
)
from pix2seq.demo.worker import InferenceWorker, Request, first_tokens
from pix2seq.errors import UserError

FRAMES_PER_SECOND = 30
KEEPALIVE = 0.5  # seconds: gradio notices only when it sends something that a visitor has left
MAX_SESSIONS = 200
FILE_LIFETIME = 600  # seconds that uploaded files are kept


async def stream_frames(
    worker: InferenceWorker, request: Request, tokens_per_second: int
) -> AsyncIterator[tuple[str, str]]:
    """Yields the HTML of image and sequence while the tokens are generated, or of an error.

    Args:
        worker: The worker of the request.
        request: The request.
        tokens_per_second: Speed limit of the display (0: no limit). It does not slow down the worker.
    """
    image, started, frame, last_sent = "", 0.0, None, time.monotonic()
    while not request.cancelled.is_set():
        # `done` is read first: the objects of a finished request are complete.
        done, objects, now, previous = request.future.done(), request.objects, time.monotonic(), frame
        if request.error:
            yield "", error_html(request.error)
            return
        num_tokens = num_displayed = sum(len(item.tokens) for item in objects)
        if request.preview is None:
            frame = "", waiting_html(worker.queue_position(request))
        else:
            image = image or image_html(request.preview)
            started = started or (now if objects else 0.0)
            if tokens_per_second:
                num_displayed = min(num_tokens, 1 + int(tokens_per_second * (now - started)))
            displayed = first_tokens(objects, num_displayed)
            frame = image + boxes_html(displayed, request.size), sequence_html(displayed)
        if (image and frame != previous) or now - last_sent > KEEPALIVE:
            yield frame
            last_sent = now
        if done and num_displayed == num_tokens:
            return
        await asyncio.sleep(1 / FRAMES_PER_SECOND)


def build_page(worker: InferenceWorker, examples: list[str], threshold: float, tokens_per_second: int):
    """Builds the page.

    Args:
        worker: Runs the model.
        examples: Image files.
        threshold: Initial position of the score slider.
        tokens_per_second: See `stream_frames`.

    Returns:
        A `gradio.Blocks`.

    Raises:
        UserError: gradio is not installed.
    """
    gradio = import_gradio()
    current: dict[str, Request] = {}  # the last request of each session

    # gradio passes the session because of this annotation. mypy rejects it because `gradio` is a local variable.
    async def show(path: str, session: gradio.Request) -> AsyncIterator[tuple[str, str]]:  # type: ignore[name-defined]
        request = worker.submit(path)
        if previous := current.get(session.session_hash):
            previous.cancel()
        current[session.session_hash] = request
        try:
            async for frame in stream_frames(worker, request, tokens_per_second):
                yield frame
        finally:  # also when the visitor leaves
            request.cancel()
            if current.get(session.session_hash) is request:
                del current[session.session_hash]

    async def show_example(index: int, session: gradio.Request) -> AsyncIterator[tuple[str, str]]:  # type: ignore[name-defined]
        async for frame in show(examples[index], session):
            yield frame

    async def detect(image: str, threshold: float) -> list[dict]:
        """Objects of an image, in descending order of scores: class, score, and box as x1, y1, x2, y2 in pixels."""
        if image is None:
            raise gradio.Error("image: missing", print_exception=False)
        if not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
            raise gradio.Error("threshold: must be a number from 0 to 1", print_exception=False)
        request = worker.submit(image)
        await asyncio.wrap_future(request.future)
        if request.error:
            raise gradio.Error(request.error, print_exception=False)
        objects = sorted((item for item in request.objects if item.score > threshold), key=lambda item: -item.score)
        return [
            {"class": item.name, "score": item.score, "box": item.box.tolist()}
            for item in objects
            if item.box is not None
        ]

    with gradio.Blocks(title="pix2seq", analytics_enabled=False, delete_cache=(FILE_LIFETIME, FILE_LIFETIME)) as page:
        last_bin = worker.detector.model.config.num_bins - 1
        gradio.HTML(INTRODUCTION.format(last_bin=last_bin), elem_classes="introduction")
        with gradio.Row():
            with gradio.Column(scale=6):
                image = gradio.HTML(elem_id="image")
            with gradio.Column(scale=5):
                upload = gradio.UploadButton("Upload an image", file_types=["image"], variant="primary", size="md")
                # gradio checks the suffix here and logs a traceback; the worker checks the content and reports it.
                upload.preprocess = lambda file: file and file.path
                gallery = gradio.Dataset(
                    label="Examples",
                    components=[gradio.Image(render=False)],
                    samples=[[path] for path in examples],
                    type="index",
                )
                slider = gradio.Slider(0, 1, threshold, step=0.01, label="Score threshold")
                sequence = gradio.HTML(elem_id="sequence")
        # No concurrency limit: requests wait in the worker's queue.
        options = {"outputs": [image, sequence], "show_progress": "hidden", "concurrency_limit": None}
        options |= {"trigger_mode": "multiple", "api_visibility": "private"}
        page.load(show_example, gradio.State(0), **options)
        upload.upload(show, upload, **options)
        gallery.click(show_example, gallery, **options)
        slider.change(None, slider, js=SET_THRESHOLD, api_visibility="private")
        # An upload component accepts only uploaded files; gradio.api would let callers name any file of the server.
        threshold_input, answer = gradio.JSON(str(threshold), visible=False), gradio.JSON(visible=False)
        gradio.on([], detect, [upload, threshold_input], answer, api_name="detect", concurrency_limit=None)
    return page.queue()


def launch(page, *, host: str, port: int, max_mb: int, threshold: float) -> None:
    """Starts the server. Raises OSError if the address cannot be used."""
    gradio = import_gradio()
    theme = gradio.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),  # local fonts: the page requests nothing from other hosts
        font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    )
    page.launch(
        server_name=host,
        server_port=port,
        max_file_size=max_mb * 2**20,
        max_threads=MAX_SESSIONS,
        state_session_capacity=MAX_SESSIONS,
        theme=theme,
        css=f":root {{ --threshold: {threshold}; }}{CSS}",
        footer_links=["api"],
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )


def import_gradio():
    """Imports gradio without its telemetry. Raises UserError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise UserError("the demo needs gradio: pip install 'gradio>=6.31'") from None
    return gradio
