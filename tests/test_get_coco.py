"""get_coco.sh against a server of our own, with archives of a few bytes: it fetches, resumes, checks and unpacks."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "get_coco.sh"
TRAIN, VAL = "zips/train2017.zip", "zips/val2017.zip"
ANNOTATIONS = "annotations/annotations_trainval2017.zip"

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl", "unzip"))), reason="needs curl and unzip")


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        for name in names:
            content.writestr(name, name * 500)
    return file.getvalue()


class Server:
    """Serves `files`, with ranges; notes (path, first byte asked for, bytes sent). `cut` bytes and it hangs up."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.requests, self.cut, self.has_ranges = files, [], {}, True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path[1:]
                if path not in outer.files:
                    self.send_error(404)
                    return
                in_part = outer.has_ranges and "Range" in self.headers
                start = int(self.headers["Range"][len("bytes=") :].split("-")[0]) if in_part else 0
                body = outer.files[path][start:]
                self.send_response(206 if in_part else 200)
                self.send_header("Content-Length", str(len(body)))
                if in_part:
                    size = len(outer.files[path])
                    self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                self.end_headers()
                body = body[: outer.cut.pop(path, None)]
                outer.requests.append((path, start, len(body)))
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server():
    server = Server(
        {
            TRAIN: archive("train2017/1.jpg", "train2017/2.jpg"),
            VAL: archive("val2017/3.jpg"),
            ANNOTATIONS: archive(
                "annotations/captions_val2017.json",
                "annotations/instances_train2017.json",
                "annotations/instances_val2017.json",
            ),
        }
    )
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def get(server, tmp_path):
    """Runs the script into tmp_path/coco; returns its exit code and what it said."""
    checksums = tmp_path / "checksums"
    checksums.write_text(
        "".join(f"{hashlib.md5(data).hexdigest()} {len(data)} {path}\n" for path, data in server.files.items())
    )

    def run(*flags: str, **variables: str) -> tuple[int, str]:
        variables = {"COCO_URL": server.url, "COCO_CHECKSUMS": str(checksums), "COCO_RETRIES": "0"} | variables
        done = subprocess.run(
            [SCRIPT, *flags, str(tmp_path / "coco")],
            env={**os.environ, "no_proxy": "127.0.0.1", **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr

    return run


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


JSONS = ["annotations/instances_train2017.json", "annotations/instances_val2017.json"]
UNPACKED = [*JSONS, "images/train2017/1.jpg", "images/train2017/2.jpg", "images/val2017/3.jpg"]


def test_everything_is_fetched_and_unpacked_once(server, get, tmp_path):
    code, said = get()
    assert code == 0, said
    assert f"finished: train.py --root {tmp_path}/coco" in said
    assert listing(tmp_path / "coco") == UNPACKED
    assert (tmp_path / "coco/images/val2017/3.jpg").read_text() == "val2017/3.jpg" * 500
    assert len(server.requests) == 3
    assert get()[0] == 0
    assert len(server.requests) == 3
    assert listing(tmp_path / "coco") == UNPACKED


def test_archives_can_be_kept_and_unpacked_later(server, get, tmp_path):
    kept = ["annotations/annotations_trainval2017.zip", *JSONS, "images/train2017.zip", "images/val2017.zip"]
    for _ in range(2):
        assert get("--keep_zips")[0] == 0
        assert listing(tmp_path / "coco") == kept
    assert (tmp_path / "coco/images/train2017.zip").read_bytes() == server.files[TRAIN]
    assert get()[0] == 0
    assert listing(tmp_path / "coco") == [kept[0], *UNPACKED]
    assert len(server.requests) == 3


def test_a_part_is_resumed(server, get, tmp_path):
    (tmp_path / "coco/images").mkdir(parents=True)
    (tmp_path / "coco/images/train2017.zip.part").write_bytes(server.files[TRAIN][:100])
    assert get()[0] == 0
    assert (TRAIN, 100, len(server.files[TRAIN]) - 100) in server.requests
    assert listing(tmp_path / "coco") == UNPACKED


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(server, get, tmp_path):
    server.cut[TRAIN] = 1000
    code, said = get()
    assert code == 0, said
    served = [(start, sent) for path, start, sent in server.requests if path == TRAIN]
    assert served == [(0, 1000), (1000, len(server.files[TRAIN]) - 1000)]
    assert listing(tmp_path / "coco") == UNPACKED


@pytest.mark.parametrize("name", ["train2017.zip", "train2017.zip.part"])
def test_what_is_whole_already_is_not_downloaded(server, get, tmp_path, name):
    (tmp_path / "coco/images").mkdir(parents=True)
    (tmp_path / "coco/images" / name).write_bytes(server.files[TRAIN])
    assert get()[0] == 0
    assert TRAIN not in [path for path, _, _ in server.requests]
    assert listing(tmp_path / "coco") == UNPACKED


@pytest.mark.parametrize("name", ["train2017.zip", "train2017.zip.part"])
def test_a_corrupt_file_is_put_aside_and_fetched_anew(server, get, tmp_path, name):
    (tmp_path / "coco/images").mkdir(parents=True)
    (tmp_path / "coco/images" / name).write_bytes(bytes(len(server.files[TRAIN])))
    code, said = get()
    assert code == 1
    assert f"train2017.zip: wrong checksum, so it is now {tmp_path}/coco/images/train2017.zip.bad" in said
    assert said.endswith("not finished: train2017.zip\n")
    assert listing(tmp_path / "coco") == [*JSONS, "images/train2017.zip.bad", "images/val2017/3.jpg"]
    assert get()[0] == 0
    assert (tmp_path / "coco/images/train2017/2.jpg").is_file()


def test_a_corrupt_download_is_found(server, get, tmp_path):
    server.files[VAL] = bytes(len(server.files[VAL]))
    code, said = get("--keep_zips")
    assert code == 1
    assert "val2017.zip: wrong checksum" in said
    assert not (tmp_path / "coco/images/val2017.zip").exists()


def test_an_interrupted_unpacking_is_begun_anew(server, get, tmp_path):
    unpacking = tmp_path / "coco/images/train2017.zip.unpacking/train2017"
    unpacking.mkdir(parents=True)
    (unpacking / "1.jpg").write_text("half")
    (unpacking.parent.parent / "train2017.zip").write_bytes(server.files[TRAIN])
    assert get()[0] == 0
    assert listing(tmp_path / "coco") == UNPACKED
    assert (tmp_path / "coco/images/train2017/1.jpg").read_text() == "train2017/1.jpg" * 500


def test_other_annotations_are_left_alone(get, tmp_path):
    other = tmp_path / "coco/annotations/mine.json"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    assert get()[0] == 0
    assert other.read_text() == "mine"
    assert (other.parent / "instances_val2017.json").is_file()


def test_a_server_that_does_not_answer_is_named(get):
    code, said = get(COCO_URL="http://127.0.0.1:9")
    assert code == 1
    assert f"error: http://127.0.0.1:9/{ANNOTATIONS}: cannot be downloaded (curl's error 7)" in said
    assert "not finished: " in said


def test_a_file_the_server_lacks_is_named_and_the_others_are_fetched(server, get, tmp_path):
    del server.files[TRAIN]
    code, said = get()
    assert code == 1
    assert f"{TRAIN}: cannot be downloaded (curl's error 22)" in said
    assert listing(tmp_path / "coco") == [*JSONS, "images/val2017/3.jpg"]


def test_too_little_space_is_told_before_the_download(server, get, tmp_path):
    table = tmp_path / "huge"
    table.write_text(f"0 1{'0' * 17} {TRAIN}\n")
    code, said = get(COCO_CHECKSUMS=str(table))
    assert code == 1
    assert "200000000000 MB of free space are needed" in said
    assert not server.requests


def test_a_missing_program_is_named(get, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "curl", "env"):
        (tools / name).symlink_to(shutil.which(name))
    code, said = get(PATH=str(tools))
    assert (code, said) == (1, "get_coco.sh: error: unzip is not installed\n")


@pytest.mark.parametrize("flags", [["--help"], ["other"]])
def test_wrong_words_are_named(get, flags):
    code, said = get(*flags)
    assert code == 1
    assert "./get_coco.sh [--keep_zips] DIR" in said


def test_it_can_be_killed_anywhere(server, get, tmp_path):
    """Whenever the clock kills it, it comes to the same end."""
    for wait in (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08):
        process = subprocess.Popen(
            [SCRIPT, str(tmp_path / "coco")],
            env={**os.environ, "COCO_URL": server.url, "COCO_CHECKSUMS": str(tmp_path / "checksums")},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert get()[0] == 0
    assert listing(tmp_path / "coco") == UNPACKED


def test_killed_before_it_removed_an_archive_it_does_so_later(server, get, tmp_path):
    """But an archive that somebody put beside the unpacked pictures stays."""
    assert get()[0] == 0
    for name in ("train2017.zip", "val2017.zip"):
        (tmp_path / "coco/images" / name).write_bytes(b"")
    (tmp_path / "coco/images/train2017.zip.unpacking").mkdir()
    assert get()[0] == 0
    assert listing(tmp_path / "coco") == sorted([*UNPACKED, "images/val2017.zip"])
    assert not (tmp_path / "coco/images/train2017.zip.unpacking").exists()


def test_a_server_without_ranges_sends_everything_anew(server, get, tmp_path):
    server.has_ranges, server.cut[TRAIN] = False, 100
    code, said = get(COCO_RETRIES="2")
    assert code == 0, said
    assert listing(tmp_path / "coco") == UNPACKED


def test_an_empty_folder_is_not_what_was_to_be_unpacked(get, tmp_path):
    (tmp_path / "coco/images/val2017").mkdir(parents=True)
    assert get()[0] == 0
    assert listing(tmp_path / "coco") == UNPACKED


def test_a_server_that_always_breaks_off_is_given_up(server, get):
    """Also one that sends files from their beginning only, and never gets further than before."""

    class Always(dict):
        def pop(self, path, default=None):
            return 100 if path == TRAIN else default

    server.has_ranges, server.cut = False, Always()
    code, said = get(COCO_RETRIES="1")
    assert code == 1
    assert "train2017.zip: cannot be downloaded" in said
    assert sum(path == TRAIN for path, *_ in server.requests) <= 4
