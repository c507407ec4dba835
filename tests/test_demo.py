"""The demo page: the sentence while it is written, strangers' files, and the page in a browser, without a network."""

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

import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from pix2seq import Pix2Seq, demo
from pix2seq.command_line import parse, write_flags
from pix2seq.decoding import write
from pix2seq.decoding.sentences import Sentences
from pix2seq.demo import DemoArguments, find_examples, frames, watch
from pix2seq.errors import UserError
from pix2seq.shapes import SHAPES
from pix2seq.tokenizer import TOKENS_PER_OBJECT
from tests.runs import arguments


def noise(height: int = 48, width: int = 80, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def flags(folder, *words) -> DemoArguments:
    return parse(DemoArguments, ["--checkpoint", str(folder), "--pace", "0", *words], demo.PROGRAM)


# -- the sentence ----------------------------------------------------------------------------------


def test_who_looks_on_sees_each_token_as_it_is_written(detector):
    model, options = detector.model, detector.options
    pixels, seen = noise(64, 64)[None], []
    writing = Sentences.new(pixels, model.tokenizer, options)

    def look_on() -> bool:
        seen.append(writing.tokens[0].clone())
        return False

    done = write(model, pixels, model.tokenizer, options, look_on, writing)
    assert len(seen) == TOKENS_PER_OBJECT * options.max_objects
    for count, tokens in enumerate(seen):
        assert tokens[:count].tolist() == done.tokens[0, :count].tolist()
        assert (tokens[count:] == model.tokenizer.eos_id).all()


def test_the_sentence_grows_and_ends_as_the_detector_writes_it(detector):
    """Each part begins as the whole; a box appears with its object's last word, where the detector says it is."""
    pixels = noise()
    *parts, whole = watch(detector, pixels, pace=100)
    words = [word for line in whole for word in line.words]
    counts = []
    for part in parts:
        said = [word for line in part for word in line.words]
        assert said == words[: len(said)]
        assert [line.box is not None for line in part] == [len(line.words) == TOKENS_PER_OBJECT for line in part]
        counts.append(len(said))
    assert counts == sorted(counts)
    assert len(set(counts)) > TOKENS_PER_OBJECT
    found = detector(pixels.permute(1, 2, 0).numpy(), threshold=0)
    order = np.argsort([-line.score for line in whole], kind="stable")
    np.testing.assert_allclose([whole[place].box for place in order], found.boxes)
    assert [whole[place].name for place in order] == found.names
    assert {word for line in whole for word in line.words[4:]} <= {*SHAPES, "NOISE"}


def test_the_pace_is_kept(detector):
    started = time.monotonic()
    whole = list(watch(detector, noise(), pace=100))[-1]
    assert time.monotonic() - started > 0.9 * (sum(len(line.words) for line in whole) - 1) / 100


def test_who_leaves_ends_the_writing(detector, monkeypatch):
    """What is not watched would hold the next visitor up."""
    steps = []
    monkeypatch.setattr(detector.model, "step", lambda *args, do=detector.model.step: steps.append(1) or do(*args))
    watching = watch(detector, noise(), pace=20)
    next(watching)
    watching.close()
    assert len(steps) < 5


def test_a_detector_that_says_nan_is_told(folder, tmp_path):
    broken = Pix2Seq.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        broken.model.decoder.lm_head.weight.fill_(torch.nan)
    photo().save(tmp_path / "photo.png")
    *_, (picture, sentence) = frames(broken, str(tmp_path / "photo.png"), flags(folder))
    assert picture == ""
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


def photo(width: int = 90, height: int = 40) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(noise(height, width).permute(1, 2, 0)))


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
def test_bad_files_are_told(detector, folder, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    ((picture, sentence),) = frames(detector, str(tmp_path / name), flags(folder))
    assert picture == ""
    assert message in sentence


def test_a_bomb_is_refused_from_its_header(detector, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pix2seq.data.images.Picture.pixels", lambda *args: pytest.fail("it was decoded"))
    (tmp_path / "bomb.png").write_bytes(png_that_claims(8000, 8193))
    ((_, sentence),) = frames(detector, str(tmp_path / "bomb.png"), flags(folder))
    assert "8000 x 8193 pixels" in sentence


@pytest.mark.parametrize(("name", "content"), GOOD, ids=[name for name, _ in GOOD])
def test_other_files_are_shown(detector, folder, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    *_, (picture, sentence) = frames(detector, str(tmp_path / name), flags(folder))
    assert picture.count('class="box') == sentence.count("<tr class=") == detector.options.max_objects
    assert sentence.count("<td>") == TOKENS_PER_OBJECT * detector.options.max_objects


def test_a_turned_picture_is_upright(detector, folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.jpg").write_bytes(saved(photo(90, 40), "JPEG", exif=exif))
    assert demo.open_upload(str(tmp_path / "turned.jpg"), 100).shape == (3, 90, 40)


def test_what_grows_is_only_added_to(detector, folder, tmp_path):
    """The picture is sent once, boxes follow; names of classes are text."""
    photo().save(tmp_path / "a.png")
    pictures = [picture for picture, _ in frames(detector, str(tmp_path / "a.png"), flags(folder, "--pace", "200"))]
    assert all(after.startswith(before) for before, after in zip(pictures, pictures[1:], strict=False))
    line = demo.Line(["<b>"] * TOKENS_PER_OBJECT, "#E69F00", "<script>", 0.5, np.array([0.0, 1, 2, 3]))
    assert "<b>&lt;script&gt; 0.50</b>" in demo.boxes_html([line], (10, 10))
    assert demo.sentence_html([line]).count("<td>&lt;b&gt;</td>") == TOKENS_PER_OBJECT


# -- examples and flags ----------------------------------------------------------------------------


def test_examples_are_of_the_detectors_own_dataset(tmp_path, shapes_root):
    args = arguments(shapes_root, tmp_path / "out")
    write_flags(args, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    files = find_examples(str(tmp_path), tmp_path)
    assert len(files) == demo.EXAMPLES == 5
    for path, own in zip(files, sorted((shapes_root / "images" / "val2017").iterdir()), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(own).convert("RGB")))


@pytest.mark.parametrize("flags_file", ["root: /no/such/folder\n", None])
def test_examples_are_drawn_where_it_is_gone(tmp_path, flags_file):
    if flags_file:
        (tmp_path / "training.yaml").write_text(flags_file)
    files = find_examples(str(tmp_path), tmp_path)
    assert len(files) == demo.EXAMPLES
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
        parse(DemoArguments, words, demo.PROGRAM)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_mistakes_that_take_a_look(folder, monkeypatch):
    with pytest.raises(UserError, match="--checkpoint /no/such: no such folder"):
        demo.serve(flags("/no/such"))
    with pytest.raises(UserError, match="--device nonsense"):
        demo.serve(flags(folder, "--device", "nonsense"))
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="needs gradio: pip install"):
        demo.serve(flags(folder))


# -- the page --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """A page of its own process, and what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--checkpoint", folder, "--port", port, "--threshold", 0, "--max_mb", 1, "--max_queue", 4, "--pace", 60]
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
    scores = [float(text.split()[-1]) for text in page.locator(".picture .box b").all_inner_texts()]
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
def test_what_is_too_much_is_refused(server):
    """A file by its size whoever sends it, visitors by their number; and the next one is served."""
    url, _ = server
    large = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", bytes(2**20 + 1))})
    assert large.status_code == 413
    with ThreadPoolExecutor(8) as pool:
        data = {"data": [None, 0]}
        asked = [pool.submit(httpx.post, f"{url}/gradio_api/call/detect", json=data, timeout=30) for _ in range(60)]
        codes = {call.result().status_code for call in asked}
    assert codes == {200, 503}
    time.sleep(2)
    assert httpx.post(f"{url}/gradio_api/call/detect", json=data).status_code == 200
