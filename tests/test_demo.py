"""The demo page: tokens during generation, files of visitors, and the page in a browser without a network."""

import asyncio
import io
import itertools
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import gradio
import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from benchmarks import demo_load
from pix2seq import Pix2Seq
from pix2seq.argument_parser import parse, write_training_arguments
from pix2seq.data.image_files import ImageFile
from pix2seq.data.shapes import SHAPES
from pix2seq.demo import serve, worker
from pix2seq.demo.html import boxes_html, sequence_html
from pix2seq.demo.page import build_page, stream_frames
from pix2seq.demo.worker import FAILED, QUEUE_FULL, InferenceWorker, ObjectTokens, first_tokens
from pix2seq.errors import UserError
from pix2seq.tokenizer import TOKENS_PER_OBJECT
from pix2seq.visualization import GREY
from tests.runs import arguments

NUM_TOKENS = 20  # of the fixture's model, for each image


@pytest.fixture
def inference(detector):
    with closing(InferenceWorker(detector, max_queue=2)) as inference:
        yield inference


def random_image(width: int = 90, height: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def image(tmp_path):
    path = str(tmp_path / "image.png")
    random_image(80, 48).save(path)
    return path


def frames(inference: InferenceWorker, path: str, tokens_per_second: int = 0) -> list[tuple[str, str]]:
    """All HTML that is sent to a page."""

    async def run():
        return [frame async for frame in stream_frames(inference, inference.submit(path), tokens_per_second)]

    return asyncio.run(run())


def slow_down(monkeypatch, detector, seconds: float = 0.02) -> list:
    """Makes each decoding step take this long; the list grows by one with each."""
    calls, decode_step = [], detector.model.decode_step

    def slow_step(*args):
        calls.append(time.sleep(seconds))
        return decode_step(*args)

    monkeypatch.setattr(detector.model, "decode_step", slow_step)
    return calls


def count(objects: list[ObjectTokens]) -> int:
    return sum(len(item.tokens) for item in objects)


# -- the token sequence ----------------------------------------------------------------------------


def test_the_sequence_grows_by_a_token_and_ends_with_the_detections(inference, detector, image, monkeypatch):
    parts, to_objects = [], worker.to_objects
    monkeypatch.setattr(worker, "to_objects", lambda *args: parts.append(to_objects(*args)) or parts[-1])
    request = inference.submit(image)
    request.future.result()
    objects = request.objects
    assert [count(part) for part in parts] == list(range(NUM_TOKENS + 1))
    for part in parts:
        assert [item.tokens for item in part] == [item.tokens for item in first_tokens(objects, count(part))]
        assert [item.box is not None for item in part] == [len(item.tokens) == TOKENS_PER_OBJECT for item in part]
    expected = detector(image, threshold=0)
    order = np.argsort([-item.score for item in objects], kind="stable")
    np.testing.assert_allclose([objects[index].box for index in order], expected.boxes)
    assert [objects[index].name for index in order] == expected.names
    assert {token for item in objects for token in item.tokens[4:]} <= {*SHAPES, "NOISE"}


def test_the_display_speed_is_limited(inference, image):
    started = time.monotonic()
    counts = [sequence.count("<td>") for _, sequence in frames(inference, image, tokens_per_second=60)]
    assert time.monotonic() - started > 0.9 * (NUM_TOKENS - 1) / 60
    assert counts == sorted(counts)
    assert counts[-1] == NUM_TOKENS
    assert len(set(counts)) > TOKENS_PER_OBJECT


def test_a_slow_display_does_not_delay_other_requests(inference, image):
    async def run():
        display = stream_frames(inference, inference.submit(image), tokens_per_second=1)
        while "<td>" not in (await anext(display))[1]:
            pass
        other = inference.submit(image)
        await asyncio.wait_for(asyncio.wrap_future(other.future), 10)
        return count(other.objects), (await anext(display))[1].count("<td>")

    num_tokens, num_displayed = asyncio.run(run())
    assert num_tokens == NUM_TOKENS
    assert num_displayed < 5


def test_the_queue_position_is_displayed(inference, image, monkeypatch):
    slow_down(monkeypatch, inference.detector, 0.05)
    inference.submit(image)
    sequences = [sequence for _, sequence in frames(inference, image)]
    assert "images before yours: 1" in sequences[0]
    assert sequences[-1].count("<td>") == NUM_TOKENS


def test_cancelled_requests_end_or_do_not_start(inference, image, monkeypatch):
    calls = slow_down(monkeypatch, inference.detector)
    first, waiting, last = (inference.submit(image) for _ in range(3))
    while not first.objects:
        time.sleep(0.001)
    first.cancel()
    waiting.cancel()
    last.future.result()
    assert count(last.objects) == NUM_TOKENS
    assert waiting.preview is None
    assert len(calls) < NUM_TOKENS + 5


def test_a_full_queue_rejects_requests(inference, image, monkeypatch):
    slow_down(monkeypatch, inference.detector)
    requests = [inference.submit(image) for _ in range(3)]
    assert frames(inference, image) == [("", f'<p class="error">{QUEUE_FULL}</p>')]
    requests[2].cancel()
    for _ in range(4):
        request = inference.submit(image)
        request.future.result()
        assert (request.error, count(request.objects)) == ("", NUM_TOKENS)


def test_close_does_not_wait_for_sequences(detector, image, monkeypatch):
    calls = slow_down(monkeypatch, detector)
    with closing(InferenceWorker(detector, max_queue=2)) as inference:
        requests = [inference.submit(image) for _ in range(2)]
        while not requests[0].objects:
            time.sleep(0.001)
    assert len(calls) < 10


def test_after_an_error_the_next_image_is_processed(inference, image, monkeypatch, caplog):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError(f"CUDA out of memory: {image}")

    with monkeypatch.context() as patch:
        patch.setattr(inference.detector.model, "decode_step", out_of_memory)
        assert frames(inference, image)[-1] == ("", f'<p class="error">{FAILED}</p>')
    assert "CUDA out of memory" in caplog.text
    assert frames(inference, image)[-1][1].count("<td>") == NUM_TOKENS


def test_non_finite_logits_are_an_error(folder, image):
    broken = Pix2Seq.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        broken.model.decoder.lm_head.weight.fill_(torch.nan)
    with closing(InferenceWorker(broken, max_queue=2)) as inference:
        assert frames(inference, image)[-1] == ("", f'<p class="error">{FAILED}</p>')


# -- files of visitors -----------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    data = io.BytesIO()
    Image.new("RGB", (1, 1)).save(data, "PNG")
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    old = data.getvalue()
    return old[:12] + header + zlib.crc32(header).to_bytes(4, "big") + old[33:]


def zip_file() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.txt", "text")
    return data.getvalue()


def encode(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, image_format, **options)
    return data.getvalue()


# Name, content, part of the message.
BAD_FILES = [
    ("bomb.png", png_header(60000, 60000), "pixels"),
    ("renamed.jpg", zip_file(), "not an image"),
    ("empty.jpg", b"", "empty"),
    ("cut.jpg", encode(random_image(), "JPEG")[:400], "Truncated File Read"),
]
GOOD_FILES = [
    ("cmyk.jpg", encode(random_image().convert("CMYK"), "JPEG")),
    ("grey.png", encode(random_image().convert("L"))),
    ("palette.gif", encode(random_image().convert("P"), "GIF")),
    ("dot.png", encode(Image.new("RGB", (1, 1)))),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_bad_files_are_reported_without_their_path(inference, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    ((image, sequence),) = frames(inference, str(tmp_path / name))
    assert image == ""
    assert message in sequence
    assert "/" not in sequence.replace("</p>", "")


def test_a_decompression_bomb_is_not_decoded(inference, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "pixels", lambda *args: pytest.fail("decoded"))
    (tmp_path / "bomb.png").write_bytes(png_header(10_000, 10_001))
    ((_, sequence),) = frames(inference, str(tmp_path / "bomb.png"))
    assert "10000 x 10001 pixels" in sequence


@pytest.mark.parametrize(("name", "content"), GOOD_FILES, ids=[name for name, _ in GOOD_FILES])
def test_all_kinds_of_images_are_processed(inference, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    *_, (image, sequence) = frames(inference, str(tmp_path / name))
    assert image.count('class="box') == sequence.count("<tr class=") == 4
    assert sequence.count("<td>") == NUM_TOKENS


def test_the_exif_orientation_is_applied(inference, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "rotated.jpg").write_bytes(encode(random_image(90, 40), "JPEG", exif=exif))
    request = inference.submit(str(tmp_path / "rotated.jpg"))
    request.future.result()
    assert request.size == (90, 40)
    assert request.preview.size == (40, 90)


def test_html_only_grows(inference, image):
    """gradio sends only what is appended, so the image is sent once."""
    images = [html for html, _ in frames(inference, image, tokens_per_second=200)]
    assert all(after.startswith(before) for before, after in itertools.pairwise(images))


def test_class_names_are_escaped():
    item = ObjectTokens(["<b>"] * TOKENS_PER_OBJECT, "#E69F00", "<script>", 0.5, np.array([0.0, 1, 2, 3]))
    assert "<b>&lt;script&gt; 0.50</b>" in boxes_html([item], (10, 10))
    assert sequence_html([item]).count("<td>&lt;b&gt;</td>") == TOKENS_PER_OBJECT


def test_noise_objects_have_no_class_name():
    item = ObjectTokens(["1", "2", "3", "4", "NOISE"], GREY, "ellipse", 0.2, np.array([0.0, 1, 2, 3]))
    box = boxes_html([item], (10, 10))
    assert '<div class="box noise' in box
    assert "ellipse" not in box + sequence_html([item])


# -- the functions of the page ---------------------------------------------------------------------


def page_functions(inference: InferenceWorker, examples: list[str]) -> dict:
    page = build_page(inference, examples, 0.5, 0)
    functions = [function.fn for function in page.fns.values() if function.fn]
    return dict(zip(("load", "upload", "example", "detect"), functions, strict=True))


def session(name: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


async def last_frame(display) -> tuple[str, str] | None:
    displayed = [frame async for frame in display]
    return displayed[-1] if displayed else None


def test_examples_and_uploads_give_the_same_frames(inference, image):
    page = page_functions(inference, [image])

    async def run():
        displays = page["load"](0, session("a")), page["example"](0, session("b")), page["upload"](image, session("c"))
        return await asyncio.gather(*map(last_frame, displays))

    first, second, third = asyncio.run(run())
    assert first == second == third
    assert first[1].count("<td>") == NUM_TOKENS


@pytest.mark.parametrize("closes", [True, False])
def test_a_closed_page_or_another_image_cancels_the_request(inference, image, monkeypatch, closes):
    calls, page = slow_down(monkeypatch, inference.detector), page_functions(inference, [])

    async def run():
        first = page["upload"](image, session("a"))
        await anext(first)
        if closes:
            await first.aclose()
        second = asyncio.create_task(last_frame(page["upload"](image, session("a"))))
        await asyncio.sleep(0)
        assert await last_frame(first) is None
        return (await second)[1]

    assert asyncio.run(run()).count("<td>") == NUM_TOKENS
    assert len(calls) < NUM_TOKENS + 15


def test_the_endpoint_decodes_once_and_sorts_by_score(inference, detector, image, monkeypatch):
    decoded, pixels = [], ImageFile.pixels
    monkeypatch.setattr(ImageFile, "pixels", lambda self, *args: decoded.append(self) or pixels(self, *args))
    detect = page_functions(inference, [])["detect"]
    objects = asyncio.run(detect(image, 0))
    assert len(decoded) == 1
    expected = detector(image, threshold=0)
    assert [item["class"] for item in objects] == expected.names
    np.testing.assert_allclose([item["score"] for item in objects], expected.scores)
    middle = float(np.median(expected.scores))
    assert asyncio.run(detect(image, middle)) == objects[: int((expected.scores > middle).sum())]


@pytest.mark.parametrize("threshold", [None, "0.5", float("nan"), 1.1, -1, [0.5]])
def test_the_endpoint_rejects_invalid_thresholds(inference, image, threshold):
    with pytest.raises(gradio.Error, match="threshold: must be a number from 0 to 1"):
        asyncio.run(page_functions(inference, [])["detect"](image, threshold))


def test_the_endpoint_reveals_no_path(inference, tmp_path):
    detect = page_functions(inference, [])["detect"]
    for path, reason in ((None, "missing"), (tmp_path / "gone.png", "No such file"), (tmp_path, "regular file")):
        with pytest.raises(gradio.Error, match=reason) as error:
            asyncio.run(detect(path and str(path), 0.5))
        assert str(tmp_path) not in error.value.message


# -- examples and arguments ------------------------------------------------------------------------


def test_examples_are_validation_images_on_this_machine_only(tmp_path, shapes_root):
    write_training_arguments(arguments(shapes_root, tmp_path / "out"), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    paths = serve.save_examples(str(tmp_path), tmp_path, "127.0.0.1")
    for path, original in zip(paths, sorted((shapes_root / "images" / "val2017").iterdir()), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(original).convert("RGB")))
    assert {Image.open(path).size for path in serve.save_examples(str(tmp_path), tmp_path, "0.0.0.0")} == {(320, 320)}


@pytest.mark.parametrize("training_yaml", ["root: /no/such/folder\n", None])
def test_examples_are_drawn_without_the_dataset(tmp_path, training_yaml):
    if training_yaml:
        (tmp_path / "training.yaml").write_text(training_yaml)
    paths = serve.save_examples(str(tmp_path), tmp_path, "localhost")
    assert [Image.open(path).size for path in paths] == [(320, 320)] * 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--checkpoint: missing"),
        (["--checkpoint", "x", "--threshold", "2"], "--threshold 2.0: must be 0 to 1"),
        (["--checkpoint", "x", "--port", "0"], "--port 0: must be 1 to 65535"),
        (["--checkpoint", "x", "--max_queue", "0"], "--max_queue 0: must be at least 1"),
        (["--checkpoint", "x", "--max_objects", "0"], "--max_objects 0"),
    ],
)
def test_invalid_flags_are_named(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        serve.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def run_demo(folder, *words) -> int:
    return serve.run_demo(parse(serve.DemoArguments, ["--checkpoint", str(folder), *map(str, words)]))


def test_other_mistakes_are_named(folder, monkeypatch):
    with pytest.raises(UserError, match="--checkpoint /no/such: no such folder"):
        run_demo("/no/such")
    with pytest.raises(UserError, match="--device nonsense"):
        run_demo(folder, "--device", "nonsense")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="needs gradio: pip install"):
        run_demo(folder)


@pytest.mark.parametrize(("host", "reason"), [("nope.invalid", "not known|resolution"), ("127.0.0.1", "in use")])
def test_an_unusable_address_is_named(folder, host, reason):
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        with pytest.raises(UserError, match=rf"^--host {host} --port {port}: cannot be used \(.*({reason})"):
            run_demo(folder, "--host", host, "--port", port)


# -- the server ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The address of a server in a process of its own, and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--checkpoint", folder, "--port", port, "--threshold", 0, "--max_mb", 1, "--max_queue", 4]
    command = [sys.executable, "-m", "pix2seq", "demo", *map(str, words), "--tokens_per_second", "30"]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        for _ in range(600):
            if "Ctrl-C ends it" in log.read_text():
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", log
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A page with its first example. It makes no request to other hosts and logs nothing to the console."""
    url, _ = server
    page, requests, messages = browser.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(url)
    wait_for_the_last_object(page)
    yield page
    page.close()
    assert {address for address in requests if not address.startswith((url, "data:", "blob:"))} == set()
    assert [message for message in messages if "413" not in message] == []  # the status of files that are too large


def wait_for_the_last_object(page) -> None:
    page.locator("#sequence td.score").nth(3).wait_for()


def opacities(page) -> list[float]:
    page.wait_for_timeout(400)  # the transition
    return page.eval_on_selector_all(".image .box", "boxes => boxes.map(box => +getComputedStyle(box).opacity)")


def upload(page, name: str, content: bytes) -> None:
    page.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": "", "buffer": content})


@pytest.mark.slow
def test_the_page_shows_an_example_token_by_token(page):
    before = page.locator(".image img").get_attribute("src")
    page.evaluate(
        "() => { window.counts = new Set(); const count = query => document.querySelectorAll(query).length;"
        "const sample = () => { counts.add(`${count('#sequence td:not(.score)')} ${count('.image .box')}`);"
        "requestAnimationFrame(sample); }; sample(); }"
    )
    page.locator("button.gallery-item").nth(2).click()
    page.wait_for_function("before => document.querySelector('.image img').src != before", arg=before)
    wait_for_the_last_object(page)
    page.wait_for_timeout(500)
    counts = [tuple(map(int, pair.split())) for pair in page.evaluate("() => [...counts]")]
    assert max(counts) == (NUM_TOKENS, 4)
    assert len({tokens for tokens, _ in counts}) > 10
    assert all(boxes == tokens // TOKENS_PER_OBJECT for tokens, boxes in counts if tokens)


@pytest.mark.slow
def test_the_slider_hides_boxes_without_a_request(page):
    requests, slider = [], page.locator("input[type=number]")
    scores = [float(text) for text in page.locator("#sequence td.score").all_inner_texts()]
    assert opacities(page) == [1.0] * 4
    page.on("request", lambda request: requests.append(request.url))
    middle = round((max(scores) + min(scores)) / 2, 2)
    for threshold in (middle, 1, 0):
        slider.fill(str(threshold))
        slider.press("Enter")
        assert opacities(page) == [float(score > threshold) for score in scores]
    assert requests == []


@pytest.mark.slow
def test_the_page_reports_bad_uploads_and_accepts_the_next_one(page, server):
    for name, content, message in [*BAD_FILES, ("text.txt", b"text", "Invalid file type")]:
        upload(page, name, content)
        page.get_by_text(message).first.wait_for()
    upload(page, "large.png", encode(random_image(700, 700)))
    page.get_by_text("exceed the maximum allowed size of 1").first.wait_for()
    upload(page, "image.jpg", encode(random_image(), "JPEG"))
    wait_for_the_last_object(page)
    assert page.locator(".error").count() == 0
    assert page.locator(".image .box").count() == 4
    assert "Traceback" not in server[1].read_text()


@pytest.mark.slow
def test_a_program_gets_the_detections_and_no_other_file(server, detector, tmp_path):
    random_image().save(tmp_path / "image.png")
    client = Client(server[0], verbose=False)
    objects = client.predict(handle_file(tmp_path / "image.png"), 0, api_name="/detect")
    expected = detector(tmp_path / "image.png", threshold=0)
    assert [item["class"] for item in objects] == expected.names
    np.testing.assert_allclose([item["box"] for item in objects], expected.boxes)
    (tmp_path / "broken.png").write_bytes(zip_file())
    (tmp_path / "text.txt").write_text("text")
    for name in ("broken.png", "text.txt"):
        with pytest.raises(AppError, match="not an image"):
            client.predict(handle_file(tmp_path / name), 0, api_name="/detect")
    assert "Traceback" not in server[1].read_text()
    for path in (str(tmp_path / "image.png"), "../image.png", server[0]):
        for keys in ({}, {"url": path}, {"meta": {"_type": "gradio.FileData"}}):
            data = {"data": [{"path": path, **keys}, 0]}
            call = httpx.post(f"{server[0]}/gradio_api/call/detect", json=data).json()
            answer = httpx.get(f"{server[0]}/gradio_api/call/detect/{call['event_id']}", timeout=30).text
            assert answer.startswith("event: error"), answer


@pytest.mark.slow
def test_the_load_benchmark_measures_the_display(server, tmp_path):
    random_image().save(tmp_path / "image.png")
    first, complete = demo_load.visitor(server[0])(tmp_path / "image.png")
    assert complete - first > 0.9 * (NUM_TOKENS - 1) / 30
    (seconds,) = demo_load.program(server[0])(tmp_path / "image.png")
    assert seconds > 0
    (tmp_path / "broken.png").write_bytes(zip_file())
    with pytest.raises(RuntimeError, match="not an image"):
        demo_load.visitor(server[0])(tmp_path / "broken.png")


@pytest.mark.slow
def test_too_large_files_and_too_many_requests_are_rejected(server, tmp_path):
    url, _ = server
    large = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", bytes(2**20 + 1))})
    assert large.status_code == 413
    random_image().save(tmp_path / "image.png")
    (path,) = httpx.post(f"{url}/gradio_api/upload", files={"files": (tmp_path / "image.png").open("rb")}).json()
    call, data = f"{url}/gradio_api/call/detect", {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, 0]}
    with ThreadPoolExecutor(16) as pool:
        calls = list(pool.map(lambda _: httpx.post(call, json=data, timeout=30), range(60)))
        events = [response.json()["event_id"] for response in calls]
        answers = list(pool.map(lambda event: httpx.get(f"{call}/{event}", timeout=60).text, events))
    assert any(answer.startswith("event: complete") for answer in answers)
    assert all(QUEUE_FULL in answer for answer in answers if not answer.startswith("event: complete"))
    assert demo_load.program(url)(tmp_path / "image.png")
