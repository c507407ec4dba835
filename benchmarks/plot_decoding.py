"""Draws what the records of benchmarks.decode and benchmarks.writing say.

python -m benchmarks.plot_decoding docs/results/decode_cpu.json docs/results/writing_demo.json images/decoding.png
"""

import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

from pix2seq.charts import to_image
from pix2seq.visualize import PALETTE

BARS = {"no cache": "no cache", "loop": "loop, dynamic cache", "generate": "generate", "pix2seq": "pix2seq"}
BARS |= {"all right": "pix2seq, all guesses right"}
KINDS = {
    "draft": "drafts",
    "stop": "stop in noise",
    "expected": "averaged bins",
    "top_p": "sampling",
    "samples": "merged",
    "beams": "beam search",
}


def speeds(axis, record: dict) -> None:
    """Tokens a second of each way to write the same sentences, by images at a time."""
    for row, (name, label) in enumerate(BARS.items()):
        places = [index + (row - 2) * 0.16 for index in range(len(record["batches"]))]
        rates = [
            part["tokens_per_s"] * part["seconds"]["pix2seq"]["median"] / part["seconds"][name]["median"]
            for part in record["batches"].values()
        ]
        axis.bar(places, rates, 0.15, color=PALETTE[(row + 1) % len(PALETTE)], label=label)
        for place, rate in zip(places, rates, strict=True):
            axis.text(place, rate, f"{rate:.0f}", ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(record["batches"])), [f"{batch} at a time" for batch in record["batches"]])
    axis.set_yscale("log")
    axis.set_ylim(top=12_000)  # room for the legend
    axis.set_ylabel("tokens a second")
    axis.set_title(f"writing on {record['environment']['num_threads']} cores, random weights", fontsize=10)
    axis.legend(fontsize=7, loc="upper left")


def trades(axis, record: dict) -> None:
    """AP against decoder passes of each way."""
    greedy = record["ways"]["greedy"]
    axis.scatter(
        greedy["passes"], greedy["ap"], color="black", marker="*", s=90, zorder=3, label="greedy, token by token"
    )
    for row, (kind, label) in enumerate(KINDS.items()):
        ways = [way for name, way in record["ways"].items() if re.match(rf"(\d+ )?{kind}", name)]
        passes, aps = ([way[key] for way in ways] for key in ("passes", "ap"))
        axis.scatter(passes, aps, color=PALETTE[(row + 1) % len(PALETTE)], marker="osD^vP"[row], s=30, label=label)
    axis.axhline(greedy["ap"], color="grey", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel("decoder passes an image")
    axis.set_ylabel("AP")
    axis.set_title(f"a detector of {record['objects_asked_for']} slots, {record['images']} images", fontsize=10)
    axis.legend(fontsize=7, loc="lower right")


def main(decode: str, writing: str, output: str) -> None:
    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    speeds(left, json.loads(Path(decode).read_text()))
    trades(right, json.loads(Path(writing).read_text()))
    to_image(figure).save(output, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
