"""Measures the demo page under load: response times, errors and memory of the server.

python -m benchmarks.demo_load --checkpoint DIR --output FILE --page docs/demo.md        (2 cores, 4 minutes)

The server is a process of its own on this machine, and the clients share the machine with it. Each client sends drawn
images one after the other. Programs call `/detect`; visitors open the page, receive its example and upload an image.
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

NUM_WARM_UP = 10  # images
TIMEOUT = 120  # seconds without an answer of the server
BEGIN, END = "<!-- load -->\n", "<!-- end -->"


@contextmanager
def serve(checkpoint: str) -> Iterator[tuple[str, psutil.Process]]:
    """Starts the server; yields its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["demo", "--checkpoint", checkpoint, "--port", str(port), "--device", "cpu"]
    with subprocess.Popen([sys.executable, "-m", "pix2seq", *words], stdout=subprocess.PIPE, text=True) as server:
        try:
            if not (line := server.stdout.readline()):
                raise SystemExit("error: the server did not start")
            yield line.split()[0], psutil.Process(server.pid)
        finally:
            server.terminate()


def program(url: str) -> Callable[[Path], list[float]]:
    """A client that calls `/detect`. It returns the seconds until the boxes arrive."""
    client = Client(url, verbose=False)

    def call(path: Path) -> list[float]:
        started = time.perf_counter()
        client.predict(handle_file(path), 0.5, api_name="/detect")
        return [time.perf_counter() - started]

    return call


def visitor(url: str) -> Callable[[Path], list[float]]:
    """A client that behaves as a browser. It returns the seconds until the first token and until the last one."""
    client = httpx.Client(base_url=url, timeout=TIMEOUT)

    def call(path: Path) -> list[float]:
        client.get("/")
        functions = {item["targets"][0][1]: item["id"] for item in client.get("/config").json()["dependencies"][:2]}
        list(_frames(client, functions["load"], None))
        started = time.perf_counter()
        (uploaded,) = client.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())}).json()
        file = {"path": uploaded, "meta": {"_type": "gradio.FileData"}}
        times = [time.perf_counter() - started for _ in _frames(client, functions["upload"], file)]
        return [times[0], times[-1]]

    return call


def _frames(client: httpx.Client, function: int, argument: object) -> Iterator[None]:
    """Yields for each frame of a sequence, from its first token on."""
    call = {"fn_index": function, "data": [argument], "session_hash": uuid.uuid4().hex}
    client.post("/gradio_api/queue/join", json=call).raise_for_status()
    has_tokens = False
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": call["session_hash"]}) as events:
        for line in filter(None, events.iter_lines()):
            message = json.loads(line.removeprefix("data: "))
            if 'class=\\"error\\"' in line or not message.get("success", True):
                raise RuntimeError(line)
            has_tokens = has_tokens or "<td>" in line
            if has_tokens:
                yield
            if message["msg"] == "process_completed":
                return
    raise RuntimeError("the connection ended before the sequence")


# Clients, and what their times measure.
CLIENTS = {program: ("boxes",), visitor: ("first token", "last token")}


def send_images(client: Callable, url: str, seed: int, num_images: int, folder: Path) -> list[tuple[list[float], str]]:
    """Sends images one after the other. Returns the times and the error of each."""
    call, answers = client(url), []
    for number in range(num_images):
        path = folder / f"{seed}_{number}.png"
        draw_image(np.random.default_rng((seed, number)), 320, 4)[0].save(path)
        try:
            answers.append((call(path), ""))
        except Exception as error:  # counted
            answers.append(([], repr(error)))
    return answers


def measure_clients(client: Callable, url: str, num_clients: int, num_images: int, folder: Path) -> dict:
    """Runs clients at the same time."""
    started, answers = time.perf_counter(), []
    with ThreadPoolExecutor(num_clients) as pool:
        runs = [pool.submit(send_images, client, url, seed, num_images, folder) for seed in range(num_clients)]
        for run in progress(as_completed(runs), f"{num_clients} {client.__name__}s", num_clients):
            answers += run.result()
    columns = zip(*(seconds for seconds, error in answers if not error), strict=True)
    spread = [{"median": statistics.median(column), "95 %": float(np.quantile(column, 0.95))} for column in columns]
    return {
        "clients": num_clients,
        "images": len(answers),
        "errors": [error for _, error in answers if error],
        "seconds": dict(zip(CLIENTS[client], spread, strict=False)),
        "images_per_s": sum(not error for _, error in answers) / (time.perf_counter() - started),
    }


def measure(checkpoint: str, num_clients: int, num_images: int) -> dict:
    """Measures one client and `num_clients` clients of each kind, and the memory of the server."""
    results = {}
    with serve(checkpoint) as (url, process), tempfile.TemporaryDirectory() as folder:
        for client in CLIENTS:
            send_images(client, url, num_clients, NUM_WARM_UP, Path(folder))
        memory = {"before": process.memory_info().rss / 1e6}
        for client in CLIENTS:
            results[client.__name__] = [
                measure_clients(client, url, count, num_images, Path(folder)) for count in (1, num_clients)
            ]
        memory["after"] = process.memory_info().rss / 1e6
    return results | {"memory_mb": memory}


def fill_page(page: str, record: dict) -> str:
    """Replaces the text between the comments BEGIN and END of a Markdown page by the measurements."""
    lines = [
        f"{record['environment']['processor']}, load average {record['load_average_before']:.1f} before "
        "([record](results/demo_load.json)). Times in seconds:",
        "",
        "| clients | images | errors | time until | median | 95 % | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for client in CLIENTS:
        for part in record[client.__name__]:
            for until, seconds in part["seconds"].items():
                name = f"{part['clients']} {client.__name__}{'s' * (part['clients'] > 1)}"
                cells = [name, part["images"], len(part["errors"]), until]
                cells += [f"{seconds['median']:.2f}", f"{seconds['95 %']:.2f}", f"{part['images_per_s']:.1f}"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    memory = record["memory_mb"]
    lines += ["", f"Memory of the server: {memory['before']:.0f} MB before, {memory['after']:.0f} MB after."]
    (before, _), (_, after) = page.split(BEGIN), page.split(END)
    return "\n".join([before + BEGIN.rstrip(), *lines, END + after])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo page under load.")
    parser.add_argument("--checkpoint", required=True, help="folder of a trained model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--images", type=int, default=20, help="images per client")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--page", type=Path, help="Markdown file whose measurements are replaced")
    args = parser.parse_args()
    record = {"environment": environment(torch.device("cpu")), "load_average_before": os.getloadavg()[0]}
    record |= measure(args.checkpoint, args.clients, args.images)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.page:
        args.page.write_text(fill_page(args.page.read_text(), record))
    print(args.output)


if __name__ == "__main__":
    main()
