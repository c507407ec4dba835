"""Many visitors of the demo page at once: how long they wait, whether all get an answer, what memory the server keeps.

python -m benchmarks.demo_load --checkpoint DIR --output FILE --page docs/demo.md        (2 cores, 4 minutes)

The page is served by a process of its own on this machine, which the visitors share with it. Each has one picture
after the other, drawn shapes of its own. Programs ask `/detect`; visitors are told what a browser would be told.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from gradio_client import Client, handle_file

from benchmarks.record import environment
from pix2seq.data.shapes import draw_image
from pix2seq.progress import progress

SIDE, SHAPES = 320, 4
WARM_UP = 10  # pictures
PATIENCE = 120  # seconds without a word from the server
MARK, END = "<!-- load -->\n", "<!-- end -->"


@contextmanager
def served(checkpoint: str):
    """The page's address, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--checkpoint", checkpoint, "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-m", "pix2seq.demo", *words], stdout=subprocess.PIPE, text=True)
    try:
        if not (line := server.stdout.readline()):
            raise SystemExit("error: the page is not served")
        yield line.split()[0], psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def program(url: str) -> Callable[[Path], list[float]]:
    """Asks about a picture: seconds until the boxes are there."""
    client = Client(url, verbose=False)

    def ask(path: Path) -> list[float]:
        started = time.perf_counter()
        client.predict(handle_file(path), 0.5, api_name="/detect")
        return [time.perf_counter() - started]

    return ask


def visitor(url: str) -> Callable[[Path], list[float]]:
    """Opens the page, sees its example, and uploads a picture: seconds until the first token about it is shown, and
    until the whole sentence is."""
    browser = httpx.Client(base_url=url, timeout=PATIENCE)

    def look(path: Path) -> list[float]:
        browser.get("/")
        calls = {call["targets"][0][1]: call["id"] for call in browser.get("/config").json()["dependencies"][:2]}
        list(_shown(browser, calls["load"], None))
        started = time.perf_counter()
        (place,) = browser.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())}).json()
        file = {"path": place, "meta": {"_type": "gradio.FileData"}}
        times = [time.perf_counter() - started for _ in _shown(browser, calls["upload"], file)]
        return [times[0], times[-1]]

    return look


def _shown(browser: httpx.Client, function: int, argument: object) -> Iterator[None]:
    """Whenever the page shows more of a sentence, from its first token to its end."""
    call = {"fn_index": function, "data": [argument], "session_hash": uuid.uuid4().hex}
    browser.post("/gradio_api/queue/join", json=call).raise_for_status()
    begun = False
    with browser.stream("GET", "/gradio_api/queue/data", params={"session_hash": call["session_hash"]}) as events:
        for line in filter(None, events.iter_lines()):
            message = json.loads(line.removeprefix("data: "))
            if 'class=\\"fault\\"' in line or not message.get("success", True):
                raise RuntimeError(line)
            begun = begun or "<td>" in line
            if begun:
                yield
            if message["msg"] == "process_completed":
                return
    raise RuntimeError("the server ended before the sentence")


def visit(kind: Callable, url: str, number: int, pictures: int, folder: Path) -> list[tuple[list[float], str]]:
    """Of each picture the seconds, and what went wrong."""
    ask, answers = kind(url), []
    for picture in range(pictures):
        path = folder / f"{number}_{picture}.png"
        draw_image(np.random.default_rng((number, picture)), SIDE, SHAPES)[0].save(path)
        try:
            answers.append((ask(path), ""))
        except Exception as problem:  # each is counted
            answers.append(([], repr(problem)))
    return answers


def rush(kind: Callable, url: str, count: int, pictures: int, folder: Path) -> dict:
    started, answers = time.perf_counter(), []
    with ThreadPoolExecutor(count) as pool:
        visits = [pool.submit(visit, kind, url, number, pictures, folder) for number in range(count)]
        for done in progress(as_completed(visits), f"{count} {kind.__name__}s", count):
            answers += done.result()
    columns = zip(*(seconds for seconds, error in answers if not error), strict=True)
    spread = [{"median": statistics.median(column), "95 %": float(np.quantile(column, 0.95))} for column in columns]
    return {
        "at once": count,
        "pictures": len(answers),
        "errors": [error for _, error in answers if error],
        "seconds": dict(zip(KINDS[kind], spread, strict=False)),
        "pictures_per_s": sum(not error for _, error in answers) / (time.perf_counter() - started),
    }


KINDS = {program: ("boxes",), visitor: ("first token", "whole sentence")}  # who comes, and waits for what


def measure(checkpoint: str, visitors: int, pictures: int) -> dict:
    found = {}
    with served(checkpoint) as (url, process), tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            visit(kind, url, visitors, WARM_UP, Path(folder))
        memory = {"before": process.memory_info().rss / 1e6}
        for kind in KINDS:
            found[kind.__name__] = [rush(kind, url, count, pictures, Path(folder)) for count in (1, visitors)]
        memory["after"] = process.memory_info().rss / 1e6
        for kind in KINDS:
            rush(kind, url, visitors, pictures, Path(folder))
        memory["after as many again"] = process.memory_info().rss / 1e6
    return found | {"memory_mb": memory}


def fill(page: str, record: dict) -> str:
    """The page, with what was measured between its marks, `<!-- load -->` and `<!-- end -->`."""
    where = record["environment"]
    lines = [
        f"{where['processor']}, load average {record['load_average_before']:.1f} before, from other work "
        "([record](results/demo_load.json)). Seconds, the median and what 95 % stay within:",
        "",
        "| at once | pictures | errors | until | median | 95 % | pictures/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        for part in record[kind.__name__]:
            count = part["at once"]
            for until, seconds in part["seconds"].items():
                cells = [f"{count} {kind.__name__}{'s' * (count > 1)}", part["pictures"], len(part["errors"]), until]
                cells += [f"{seconds['median']:.2f}", f"{seconds['95 %']:.2f}", f"{part['pictures_per_s']:.1f}"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    memory = [f"{record['memory_mb'][when]:.0f} MB" for when in ("before", "after", "after as many again")]
    lines += ["", "The server held {} before, {} after, and {} after as many again.".format(*memory)]
    (before, _), (_, after) = page.split(MARK), page.split(END)  # or there is no place for them
    return "\n".join([before + MARK.rstrip(), *lines, END + after])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo page under load.")
    parser.add_argument("--checkpoint", required=True, help="folder of a trained detector")
    parser.add_argument("--visitors", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=20, help="of each visitor")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--page", type=Path, help="Markdown file whose figures to fill in")
    args = parser.parse_args()
    # Whatever else the machine does makes visitors wait.
    record = {"environment": environment(torch.device("cpu")), "load_average_before": os.getloadavg()[0]}
    record |= measure(args.checkpoint, args.visitors, args.pictures)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.page:
        args.page.write_text(fill(args.page.read_text(), record))
    print(args.output)


if __name__ == "__main__":
    main()
