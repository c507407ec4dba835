"""Many visitors of the demo page at once: how long they wait, whether all get an answer, what memory the server keeps.

python -m benchmarks.demo_load --checkpoint runs/demo/best --output docs/results/demo_load.json    (2 cores, 2 minutes)

The page is served by a process of its own on this machine, which the visitors share with it. Each sends one picture
after the other to `/detect`, drawn shapes of its own, and waits for the boxes.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from gradio_client import Client, handle_file

from benchmarks.record import environment
from pix2seq.progress import progress
from pix2seq.shapes import draw_picture

SIDE, SHAPES = 320, 4
WARM_UP = 10  # pictures


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


def visit(url: str, visitor: int, pictures: int, folder: Path) -> list[tuple[float, str]]:
    """Seconds until the boxes of each picture are there, and what went wrong."""
    client, answers = Client(url, verbose=False), []
    for number in range(pictures):
        path = folder / f"{visitor}_{number}.png"
        draw_picture(np.random.default_rng((visitor, number)), SIDE, SHAPES)[0].save(path)
        started, error = time.perf_counter(), ""
        try:
            client.predict(handle_file(path), 0.5, api_name="/detect")
        except Exception as problem:  # each is counted
            error = repr(problem)
        answers.append((time.perf_counter() - started, error))
    return answers


def rush(url: str, clients: int, pictures: int, folder: Path) -> dict:
    started, answers = time.perf_counter(), []
    with ThreadPoolExecutor(clients) as pool:
        visits = [pool.submit(visit, url, visitor, pictures, folder) for visitor in range(clients)]
        for done in progress(as_completed(visits), f"{clients} visitors", clients):
            answers += done.result()
    seconds = sorted(second for second, _ in answers)
    return {
        "clients": clients,
        "pictures": len(answers),
        "errors": [error for _, error in answers if error],
        "latency_s": {"median": statistics.median(seconds), "95 %": float(np.quantile(seconds, 0.95))},
        "pictures_per_s": len(answers) / (time.perf_counter() - started),
    }


def measure(checkpoint: str, clients: int, pictures: int) -> dict:
    with served(checkpoint) as (url, process), tempfile.TemporaryDirectory() as folder:
        visit(url, clients, WARM_UP, Path(folder))
        memory = {"before": process.memory_info().rss / 1e6}
        alone = rush(url, 1, pictures, Path(folder))
        together = rush(url, clients, pictures, Path(folder))
        memory["after"] = process.memory_info().rss / 1e6
        rush(url, clients, pictures, Path(folder))
        memory["after as many again"] = process.memory_info().rss / 1e6
    return {"alone": alone, "together": together, "memory_mb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo page under load.")
    parser.add_argument("--checkpoint", required=True, help="folder of a trained detector")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=20, help="of each client")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    # Whatever else the machine does makes visitors wait.
    record = {"environment": environment(torch.device("cpu")), "load_average_before": os.getloadavg()[0]}
    record |= measure(args.checkpoint, args.clients, args.pictures)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(args.output)


if __name__ == "__main__":
    main()
