"""The demo page: the sentence while it is written, strangers' files, and the page in a browser, without a network."""

import asyncio
import io
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
from pix2seq.demo.page import boxes_html, build_page, sentence_html, watch
from pix2seq.demo.serve import EXAMPLES, PROGRAM, DemoArguments, find_examples, serve
from pix2seq.demo.worker import FAILED, FULL, InferenceWorker, Line, beginning, lines_of
from pix2seq.errors import UserError
from pix2seq.generation import write
from pix2seq.generation.decoding_state import DecodingState
from pix2seq.tokenizer import TOKENS_PER_OBJECT
from pix2seq.visualization import GREY
from tests.runs import arguments


@pytest.fixture
def desk(detector):
    with closing(InferenceWorker(detector, max_side=8192, max_queue=2)) as desk:
        yield desk


@pytest.fixture
def picture(tmp_path):
    path = str(tmp_path / "photo.png")
    photo(80, 48).save(path)
    return path


def noise(height: int = 48, width: int = 80, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def photo(width: int = 90, height: int = 40) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(noise(height, width).permute(1, 2, 0)))


def frames(desk: InferenceWorker, path: str, pace: int = 0) -> list[tuple[str, str]]:
    """All that a page shows."""

    async def run():
        return [frame async for frame in watch(desk, desk.ask(path), pace)]

    return asyncio.run(run())


def slowed(monkeypatch, detector, seconds: float = 0.02) -> list:
    """From now on a token takes so long; grows by one with each."""
    steps, step = [], detector.model.step

    def slow(*args):
        steps.append(time.sleep(seconds))
        return step(*args)

    monkeypatch.setattr(detector.model, "step", slow)
    return steps


def count(lines: list[Line]) -> int:
    return sum(len(line.words) for line in lines)


# -- the sentence ----------------------------------------------------------------------------------


def test_who_looks_on_sees_each_token_as_it_is_written(detector):
    model, options = detector.model, detector.options
    pixels, seen = noise(64, 64)[None], []
    writing = DecodingState.create(pixels, model.tokenizer, options)

    def look_on() -> bool:
        seen.append(writing.tokens[0].clone())
        return False

    done = write(model, pixels, model.tokenizer, options, look_on, writing)
    assert len(seen) == TOKENS_PER_OBJECT * options.max_objects
    for count, tokens in enumerate(seen):
        assert tokens[:count].tolist() == done.tokens[0, :count].tolist()
        assert (tokens[count:] == model.tokenizer.eos_id).all()


def test_the_sentence_grows_and_ends_as_the_detector_writes_it(desk, detector, picture, monkeypatch):
    """Each part begins as the whole; a box appears with its object's last word, where the detector says it is."""
    parts = []
    monkeypatch.setattr("pix2seq.demo.worker.lines_of", lambda *args: parts.append(lines_of(*args)) or parts[-1])
    sentence = desk.ask(picture)
    sentence.work.result()
    whole = sentence.lines
    assert [count(part) for part in parts] == list(range(TOKENS_PER_OBJECT * len(whole) + 1))
    for part in parts:
        assert [line.words for line in part] == [line.words for line in beginning(whole, count(part))]
        assert [line.box is not None for line in part] == [len(line.words) == TOKENS_PER_OBJECT for line in part]
    found = detector(picture, threshold=0)
    order = np.argsort([-line.score for line in whole], kind="stable")
    np.testing.assert_allclose([whole[place].box for place in order], found.boxes)
    assert [whole[place].name for place in order] == found.names
    assert {word for line in whole for word in line.words[4:]} <= {*SHAPES, "NOISE"}


def test_the_pace_is_kept(desk, picture):
    started = time.monotonic()
    sentences = [sentence for _, sentence in frames(desk, picture, pace=60)]
    tokens = [sentence.count("<td>") for sentence in sentences]
    assert time.monotonic() - started > 0.9 * (tokens[-1] - 1) / 60
    assert tokens == sorted(tokens)
    assert len(set(tokens)) > TOKENS_PER_OBJECT


def test_what_is_shown_slowly_holds_nobody_up(desk, picture):
    async def run():
        showing = watch(desk, desk.ask(picture), pace=1)
        while "<td>" not in (await anext(showing))[1]:
            pass
        other = desk.ask(picture)
        await asyncio.wait_for(asyncio.wrap_future(other.work), 10)
        return count(other.lines), (await anext(showing))[1].count("<td>")

    whole, shown = asyncio.run(run())
    assert whole == 20
    assert shown < 5


def test_who_waits_is_told_how_long(desk, picture, monkeypatch):
    slowed(monkeypatch, desk.detector, 0.05)
    desk.ask(picture)
    told = [sentence for _, sentence in frames(desk, picture)]
    assert "1 picture comes before yours" in told[0]
    assert told[-1].count("<td>") == 20


def test_who_leaves_ends_the_writing(desk, picture, monkeypatch):
    """What is not watched would hold the next visitor up, and need not even be begun."""
    steps = slowed(monkeypatch, desk.detector)
    first, waiting, last = (desk.ask(picture) for _ in range(3))
    while not first.lines:
        time.sleep(0.001)
    first.leave()
    waiting.leave()
    last.work.result()
    assert count(last.lines) == 20
    assert waiting.preview is None
    assert len(steps) < 20 + 5


def test_too_many_are_told_to_come_back(desk, picture, monkeypatch):
    slowed(monkeypatch, desk.detector)
    taken = [desk.ask(picture) for _ in range(3)]
    assert frames(desk, picture) == [("", f'<p class="fault">{FULL}</p>')]
    taken[2].leave()
    for _ in range(4):  # who is done, too, makes room
        sentence = desk.ask(picture)
        sentence.work.result()
        assert (sentence.fault, count(sentence.lines)) == ("", 20)


def test_a_desk_that_closes_waits_for_no_sentence(detector, picture, monkeypatch):
    steps = slowed(monkeypatch, detector)
    with closing(InferenceWorker(detector, 8192, 2)) as desk:
        asked = [desk.ask(picture) for _ in range(2)]
        while not asked[0].lines:
            time.sleep(0.001)
    assert len(steps) < 10


def test_a_failure_is_told_and_logged_and_the_next_picture_is_written(desk, picture, monkeypatch, caplog):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError(f"CUDA out of memory, says {picture}")

    with monkeypatch.context() as patch:
        patch.setattr(desk.detector.model, "step", out_of_memory)
        shown = frames(desk, picture)
    assert shown[-1] == ("", f'<p class="fault">{FAILED.replace(chr(39), "&#x27;")}</p>')
    assert "CUDA out of memory" in caplog.text
    assert frames(desk, picture)[-1][1].count("<td>") == 20


def test_a_detector_that_says_nan_is_told(folder, picture):
    broken = Pix2Seq.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        broken.model.decoder.lm_head.weight.fill_(torch.nan)
    with closing(InferenceWorker(broken, 8192, 2)) as desk:
        *_, (shown, sentence) = frames(desk, picture)
    assert shown == ""
    assert "not finite" in sentence


# -- files of strangers ----------------------------------------------------------------------------


def png_that_claims(width: int, height: int) -> bytes:
    """A header without pixels."""
    data = io.BytesIO()
    Image.new("RGB", (1, 1)).save(data, "PNG")
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    old = data.getvalue()
    return old[:12] + header + zlib.crc32(header).to_bytes(4, "big") + old[33:]


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.txt", "text")
    return data.getvalue()


def saved(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


# Name, content, what the page says.
BAD = [
    ("bomb.png", png_that_claims(60000, 60000), "pixels"),
    ("renamed.jpg", zipped(), "not an image"),
    ("empty.jpg", b"", "it is empty (0 bytes)"),
    ("cut.jpg", saved(photo(), "JPEG")[:400], "Truncated File Read"),
    ("dot.png", saved(Image.new("RGB", (1, 1))), "1 x 1 pixels: each side must have 8 to 8192"),
    ("wide.png", saved(Image.new("RGB", (20000, 10))), "20000 x 10 pixels: each side must have 8 to 8192"),
]
GOOD = [
    ("cmyk.jpg", saved(photo().convert("CMYK"), "JPEG")),
    ("grey.png", saved(photo().convert("L"))),
    ("palette.gif", saved(photo().convert("P"), "GIF")),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[name for name, *_ in BAD])
def test_bad_files_are_told(desk, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    ((picture, sentence),) = frames(desk, str(tmp_path / name))
    assert picture == ""
    assert message in sentence
    assert "/" not in sentence.replace("</p>", "")  # no path


def test_a_bomb_is_refused_from_its_header(desk, tmp_path, monkeypatch):
    monkeypatch.setattr("pix2seq.data.image_files.Picture.pixels", lambda *args: pytest.fail("it was decoded"))
    (tmp_path / "bomb.png").write_bytes(png_that_claims(8000, 8193))
    ((_, sentence),) = frames(desk, str(tmp_path / "bomb.png"))
    assert "8000 x 8193 pixels" in sentence


@pytest.mark.parametrize(("name", "content"), GOOD, ids=[name for name, _ in GOOD])
def test_other_files_are_shown(desk, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    *_, (picture, sentence) = frames(desk, str(tmp_path / name))
    assert picture.count('class="box') == sentence.count("<tr class=") == desk.detector.options.max_objects
    assert sentence.count("<td>") == TOKENS_PER_OBJECT * desk.detector.options.max_objects


def test_a_turned_picture_is_upright(desk, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.jpg").write_bytes(saved(photo(90, 40), "JPEG", exif=exif))
    sentence = desk.ask(str(tmp_path / "turned.jpg"))
    sentence.work.result()
    assert sentence.size == (90, 40)
    assert sentence.preview.size == (40, 90)


def test_what_grows_is_only_added_to(desk, picture):
    """The picture is sent once, boxes follow; names of classes are text."""
    pictures = [shown for shown, _ in frames(desk, picture, pace=200)]
    assert all(after.startswith(before) for before, after in zip(pictures, pictures[1:], strict=False))
    line = Line(["<b>"] * TOKENS_PER_OBJECT, "#E69F00", "<script>", 0.5, np.array([0.0, 1, 2, 3]))
    assert "<b>&lt;script&gt; 0.50</b>" in boxes_html([line], (10, 10))
    assert sentence_html([line]).count("<td>&lt;b&gt;</td>") == TOKENS_PER_OBJECT


def test_noise_is_called_noise():
    line = Line(["1", "2", "3", "4", "NOISE"], GREY, "ellipse", 0.2, np.array([0.0, 1, 2, 3]))
    box = boxes_html([line], (10, 10))
    assert '<div class="box noise' in box
    assert "<b>noise</b>" in box
    assert "ellipse" not in box + sentence_html([line])


# -- what is asked of the page ---------------------------------------------------------------------


def asked(desk: InferenceWorker, examples: list[str]) -> dict:
    """What the page calls: first and foremost at its opening, for an upload, for an example; and "detect"."""
    page = build_page(desk, examples, 0.5, 0)
    functions = [function for function in page.fns.values() if function.fn]
    return dict(zip(("open", "upload", "example", "detect"), (function.fn for function in functions), strict=True))


def visitor(name: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


async def last(showing) -> tuple[str, str] | None:
    shown = [frame async for frame in showing]
    return shown[-1] if shown else None


def test_an_example_is_written_once(desk, picture, monkeypatch):
    """Also if the first who wants to see it leaves; and again after a failure."""
    steps, page = slowed(monkeypatch, desk.detector, 0.005), asked(desk, [picture])

    async def run():
        leaving = page["open"](0, visitor("a"))
        await anext(leaving)
        await leaving.aclose()
        return await asyncio.gather(last(page["open"](0, visitor("b"))), last(page["example"](0, visitor("c"))))

    first, second = asyncio.run(run())
    assert first == second
    assert first[1].count("<td>") == len(steps) == 20


def test_an_example_that_failed_is_written_anew(desk, picture, monkeypatch):
    page = asked(desk, [picture])
    with monkeypatch.context() as patch:
        patch.setattr("pix2seq.demo.worker.write", lambda *args: 1 / 0)
        assert "failed" in asyncio.run(last(page["open"](0, visitor("a"))))[1]
    assert asyncio.run(last(page["open"](0, visitor("a"))))[1].count("<td>") == 20


@pytest.mark.parametrize("closes", [True, False])
def test_who_closes_the_page_or_asks_for_something_else_ends_the_writing(desk, picture, monkeypatch, closes):
    steps, page = slowed(monkeypatch, desk.detector), asked(desk, [])

    async def run():
        first = page["upload"](picture, visitor("a"))
        await anext(first)
        if closes:
            await first.aclose()
        second = asyncio.create_task(last(page["upload"](picture, visitor("a"))))
        await asyncio.sleep(0)
        assert await last(first) is None
        return (await second)[1]

    assert asyncio.run(run()).count("<td>") == 20
    assert len(steps) < 20 + 15


def test_what_ended_at_once_disturbs_nothing_before_it(desk, picture, tmp_path, monkeypatch):
    """A file that is no picture, while the sentence of another is being shown."""
    slowed(monkeypatch, desk.detector)
    (tmp_path / "empty.png").touch()
    page = asked(desk, [])

    async def run():
        first = page["upload"](picture, visitor("a"))
        await anext(first)
        assert "it is empty" in (await last(page["upload"](str(tmp_path / "empty.png"), visitor("a"))))[1]
        return await last(first)

    assert asyncio.run(run()) is None


def test_programs_leave_room_for_visitors(desk, picture, monkeypatch):
    """Of two lines of two, each with one more who does not wait: theirs is full, and the other is not."""
    slowed(monkeypatch, desk.detector, 0.002)
    page = asked(desk, [])

    async def run():
        programs = [asyncio.create_task(page["detect"](picture, 0)) for _ in range(6)]
        await asyncio.sleep(0)
        shown = await last(page["upload"](picture, visitor("a")))
        assert [program.done() for program in programs].count(False) >= 2  # one at a time came before
        return shown, await asyncio.gather(*programs, return_exceptions=True)

    shown, answers = asyncio.run(run())
    assert shown[1].count("<td>") == 20
    assert [getattr(answer, "message", len(answer)) for answer in answers[:3]] == [4, 4, 4]
    assert [answer.message for answer in answers[3:]] == [FULL] * 3
    assert asyncio.run(page["detect"](picture, 0))


def test_programs_get_the_best_first(desk, tmp_path):
    detect, seeds = asked(desk, [])["detect"], iter(range(100))
    for seed in seeds:
        Image.fromarray(noise(seed=seed).permute(1, 2, 0).numpy()).save(tmp_path / "noise.png")
        sentence = desk.ask(str(tmp_path / "noise.png"))
        sentence.work.result()
        said = [line.score for line in sentence.lines]
        if said != sorted(said, reverse=True):
            break
    assert next(seeds)
    assert [one["score"] for one in asyncio.run(detect(str(tmp_path / "noise.png"), 0))] == sorted(said, reverse=True)


def test_a_program_is_answered_by_one_decoding(desk, detector, picture, monkeypatch):
    decoded, pixels = [], ImageFile.pixels
    monkeypatch.setattr(ImageFile, "pixels", lambda self, *args: decoded.append(self) or pixels(self, *args))
    detect = asked(desk, [])["detect"]
    objects = asyncio.run(detect(picture, 0))
    assert len(decoded) == 1
    found = detector(picture, threshold=0)
    assert [one["class"] for one in objects] == found.names
    np.testing.assert_allclose([one["score"] for one in objects], found.scores)
    middle = float(np.median(found.scores))
    assert asyncio.run(detect(picture, middle)) == objects[: int((found.scores > middle).sum())]


@pytest.mark.parametrize("threshold", [None, "0.5", float("nan"), 1.1, -1, [0.5], True])
def test_a_threshold_that_is_none_is_told(desk, picture, threshold):
    with pytest.raises(gradio.Error, match="threshold: must be a number from 0 to 1"):
        asyncio.run(asked(desk, [])["detect"](picture, threshold))


@pytest.mark.parametrize("index", [7, -1, {}, None])
def test_an_example_that_is_none_is_told(desk, picture, index):
    with pytest.raises(gradio.Error, match="there is no such example"):
        asyncio.run(last(asked(desk, [picture])["example"](index, visitor("a"))))


def test_a_program_is_told_no_path(desk, tmp_path):
    detect = asked(desk, [])["detect"]
    for path, why in ((None, "none was sent"), (tmp_path / "gone.png", "No such file"), (tmp_path, "regular file")):
        with pytest.raises(gradio.Error, match=why) as told:
            asyncio.run(detect(path and str(path), 0.5))
        assert str(tmp_path) not in told.value.message


# -- examples and flags ----------------------------------------------------------------------------


def test_examples_are_of_the_detectors_own_dataset(tmp_path, shapes_root):
    args = arguments(shapes_root, tmp_path / "out")
    write_training_arguments(args, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    files = find_examples(str(tmp_path), tmp_path, "127.0.0.1")
    assert len(files) == EXAMPLES == 5
    for path, own in zip(files, sorted((shapes_root / "images" / "val2017").iterdir()), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(own).convert("RGB")))
    # Strangers are shown none of it.
    assert {Image.open(path).size for path in find_examples(str(tmp_path), tmp_path, "0.0.0.0")} == {(320, 320)}


@pytest.mark.parametrize("flags_file", ["root: /no/such/folder\n", None])
def test_examples_are_drawn_where_it_is_gone(tmp_path, flags_file):
    if flags_file:
        (tmp_path / "training.yaml").write_text(flags_file)
    files = find_examples(str(tmp_path), tmp_path, "localhost")
    assert len(files) == EXAMPLES
    assert all(Image.open(path).size == (320, 320) for path in files)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--checkpoint: missing"),
        (["--checkpoint", "x", "--threshold", "2"], "--threshold 2.0: must be 0 to 1"),
        (["--checkpoint", "x", "--port", "0"], "--port 0: must be 1 to 65535"),
        (["--checkpoint", "x", "--max_side", "4"], "--max_side 4: must be at least 8"),
        (["--checkpoint", "x", "--max_queue", "0"], "--max_queue 0"),
        (["--checkpoint", "x", "--max_objects", "0"], "max_objects"),
    ],
)
def test_mistakes_in_the_flags(capsys, words, message):
    with pytest.raises(SystemExit) as exit:
        parse(DemoArguments, words, PROGRAM)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_mistakes_that_take_a_look(folder, monkeypatch):
    def flags(folder, *words) -> DemoArguments:
        return parse(DemoArguments, ["--checkpoint", str(folder), *words], PROGRAM)

    with pytest.raises(UserError, match="--checkpoint /no/such: no such folder"):
        serve(flags("/no/such"))
    with pytest.raises(UserError, match="--device nonsense"):
        serve(flags(folder, "--device", "nonsense"))
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="needs gradio: pip install"):
        serve(flags(folder))


# -- the page --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """A page of its own process, and what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--checkpoint", folder, "--port", port, "--threshold", 0, "--max_mb", 1, "--max_queue", 4, "--pace", 30]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pix2seq.demo", *map(str, words)], stdout=file, stderr=subprocess.STDOUT
        )
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
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """As it opens, having written about its first example. No other machine is asked for anything, and the console
    stays empty."""
    url, _ = server
    page, asked, said = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    wait_for_the_end(page)
    yield page
    page.close()
    assert {address for address in asked if not address.startswith((url, "data:", "blob:"))} == set()
    assert [line for line in said if "413" not in line] == []  # a file that is too large is refused by its status


def wait_for_the_end(page) -> None:
    page.locator("#sentence td.score").nth(3).wait_for()


def opacities(page) -> list[float]:
    page.wait_for_timeout(400)  # they fade
    return page.eval_on_selector_all(".picture .box", "boxes => boxes.map(box => +getComputedStyle(box).opacity)")


def upload(page, name: str, content: bytes) -> None:
    page.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": "", "buffer": content})


@pytest.mark.slow
def test_an_example_is_written_token_by_token(page):
    before = page.locator(".picture img").get_attribute("src")
    page.evaluate(
        "() => { window.counts = new Set(); const count = what => document.querySelectorAll(what).length;"
        "const see = () => { counts.add(`${count('#sentence td:not(.score)')} ${count('.picture .box')}`);"
        "requestAnimationFrame(see); }; see(); }"
    )
    page.locator("button.gallery-item").nth(2).click()
    page.wait_for_function("before => document.querySelector('.picture img').src != before", arg=before)
    wait_for_the_end(page)
    page.wait_for_timeout(500)
    counts = [tuple(map(int, pair.split())) for pair in page.evaluate("() => [...counts]")]
    assert max(counts) == (20, 4)
    assert len({tokens for tokens, _ in counts}) > 10
    assert all(boxes == tokens // TOKENS_PER_OBJECT for tokens, boxes in counts if tokens)


@pytest.mark.slow
def test_the_slider_hides_boxes(page):
    """By their scores, and nothing is asked of the server."""
    asked, slider = [], page.locator("input[type=number]")
    scores = [float(text) for text in page.locator("#sentence td.score").all_inner_texts()]
    assert opacities(page) == [1.0] * 4
    page.on("request", lambda request: asked.append(request.url))
    middle = round((max(scores) + min(scores)) / 2, 2)
    for threshold in (middle, 1, 0):
        slider.fill(str(threshold))
        slider.press("Enter")
        assert opacities(page) == [float(score > threshold) for score in scores]
    assert asked == []


@pytest.mark.slow
def test_bad_uploads_are_told_and_the_next_good_one_works(page, server):
    for name, content, message in [*BAD, ("text.txt", b"no picture", "Invalid file type")]:
        upload(page, name, content)
        page.get_by_text(message).first.wait_for()
    upload(page, "large.png", saved(photo(700, 700)))
    page.get_by_text("exceed the maximum allowed size of 1").first.wait_for()
    upload(page, "photo.jpg", saved(photo(), "JPEG"))
    wait_for_the_end(page)
    assert page.locator(".fault").count() == 0
    assert page.locator(".picture .box").count() == 4
    assert "Traceback" not in server[1].read_text()


@pytest.mark.slow
def test_a_program_asks_the_page(server, detector, tmp_path):
    """It gets the detector's boxes, a line for what cannot be read, and no file of the server's."""
    photo().save(tmp_path / "photo.png")
    client = Client(server[0], verbose=False)
    objects = client.predict(handle_file(tmp_path / "photo.png"), 0, api_name="/detect")
    found = detector(tmp_path / "photo.png", threshold=0)
    assert [one["class"] for one in objects] == found.names
    np.testing.assert_allclose([one["box"] for one in objects], found.boxes)
    (tmp_path / "broken.png").write_bytes(zipped())
    with pytest.raises(AppError, match="not an image"):
        client.predict(handle_file(tmp_path / "broken.png"), 0, api_name="/detect")
    for path in (str(tmp_path / "photo.png"), "../photo.png", server[0]):
        for kind in ({}, {"url": path}, {"meta": {"_type": "gradio.FileData"}}):
            call = httpx.post(f"{server[0]}/gradio_api/call/detect", json={"data": [{"path": path, **kind}, 0]}).json()
            answer = httpx.get(f"{server[0]}/gradio_api/call/detect/{call['event_id']}", timeout=30).text
            assert answer.startswith("event: error"), answer


@pytest.mark.slow
def test_the_benchmark_sees_what_a_browser_sees(server, tmp_path):
    """At its pace: 20 tokens, 30 a second."""
    photo().save(tmp_path / "photo.png")
    first, whole = demo_load.visitor(server[0])(tmp_path / "photo.png")
    assert whole - first > 0.9 * 19 / 30
    (boxes,) = demo_load.program(server[0])(tmp_path / "photo.png")
    assert boxes > 0
    (tmp_path / "broken.png").write_bytes(zipped())
    with pytest.raises(RuntimeError, match="not an image"):
        demo_load.visitor(server[0])(tmp_path / "broken.png")


@pytest.mark.slow
def test_what_is_too_much_is_refused(server, tmp_path):
    """A file by its size whoever sends it, programs by their number; visitors and the next one are served."""
    url, _ = server
    large = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", bytes(2**20 + 1))})
    assert large.status_code == 413
    photo().save(tmp_path / "photo.png")
    (place,) = httpx.post(f"{url}/gradio_api/upload", files={"files": (tmp_path / "photo.png").open("rb")}).json()
    call, data = f"{url}/gradio_api/call/detect", {"data": [{"path": place, "meta": {"_type": "gradio.FileData"}}, 0]}
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(httpx.post, call, json=data, timeout=30) for _ in range(60)]
        shown = demo_load.visitor(url)(tmp_path / "photo.png")  # meanwhile
        events = [asking.result().json()["event_id"] for asking in asked]
        answers = list(pool.map(lambda event: httpx.get(f"{call}/{event}", timeout=60).text, events))
    assert len(shown) == 2
    told = {answer for answer in answers if not answer.startswith("event: complete")}
    assert all(FULL in answer for answer in told)
    assert demo_load.program(url)(tmp_path / "photo.png")


@pytest.mark.parametrize(("host", "why"), [("nope.invalid", "not known|resolution"), ("127.0.0.1", "in use")])
def test_an_address_that_cannot_be_had_is_told(folder, host, why):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["--checkpoint", str(folder), "--host", host, "--port", str(taken.getsockname()[1])]
        with pytest.raises(UserError, match=rf"^--host {host} --port \d+: cannot be served at \(.*({why})"):
            serve(parse(DemoArguments, words, PROGRAM))
