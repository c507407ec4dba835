"""get_coco.sh downloads, resumes, verifies and unpacks small archives from a local server."""

import hashlib
import io
import os
import shutil
import subprocess
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "get_coco.sh"
JSONS = ["annotations/instances_train2017.json", "annotations/instances_val2017.json"]
MEMBERS = {
    "annotations/annotations_trainval2017.zip": ["annotations/captions_val2017.json", *JSONS],
    "zips/train2017.zip": ["train2017/1.jpg", "train2017/2.jpg"],
    "zips/val2017.zip": ["val2017/3.jpg"],
}

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not all(map(shutil.which, ("bash", "curl", "unzip"))), reason="needs bash, curl and unzip"
)


def make_zip(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, name * 500)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Serves `files` with support for ranges and appends (path, first byte) to `requests`."""

    def __init__(self, files: dict[str, bytes], requests: list[tuple[str, int]], *args):
        self.files, self.requests = files, requests
        super().__init__(*args)

    def do_GET(self):
        path, content = self.path[1:], self.files[self.path[1:]]
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].split("-")[0])
        self.requests.append((path, start))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:])

    def log_message(self, *args):
        pass


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_download_resumes_verifies_and_unpacks(tmp_path):
    files = {path: make_zip(names) for path, names in MEMBERS.items()}
    requests = []
    checksums = tmp_path / "checksums"
    checksums.write_text("".join(f"{hashlib.md5(data).hexdigest()} {path}\n" for path, data in files.items()))
    root = tmp_path / "coco"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, files, requests))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    environment = os.environ | {"COCO_URL": f"http://127.0.0.1:{server.server_port}", "COCO_CHECKSUMS": str(checksums)}
    environment["no_proxy"] = "127.0.0.1"

    def run() -> subprocess.CompletedProcess:
        return subprocess.run([str(SCRIPT), str(root)], env=environment, capture_output=True, text=True, timeout=60)

    try:
        (root / "images").mkdir(parents=True)
        part = root / "images" / "train2017.zip.part"
        part.write_bytes(bytes(100))
        done = run()
        assert done.returncode == 1
        assert "the checksum of" in done.stderr
        assert list_files(root) == [*JSONS, "images/val2017/3.jpg"]

        images = ["images/train2017/1.jpg", "images/train2017/2.jpg", "images/val2017/3.jpg"]
        part.write_bytes(files["zips/train2017.zip"][:100])
        for _ in range(2):
            assert run().returncode == 0
            assert list_files(root) == [*JSONS, *images]
            assert requests[-1] == ("zips/train2017.zip", 100)
        assert (root / images[-1]).read_text() == "val2017/3.jpg" * 500

        shutil.rmtree(root / "images" / "train2017")  # interrupted before the archive was unpacked
        (root / "images" / "train2017.zip").write_bytes(files["zips/train2017.zip"])
        assert run().returncode == 0
        assert list_files(root) == [*JSONS, *images]
        assert len(requests) == 4  # complete files are not downloaded again
    finally:
        server.shutdown()
        server.server_close()
