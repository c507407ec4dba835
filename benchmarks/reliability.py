"""Runs the tests that docs/reliability.md names and writes what they measured into its last column.

python -m benchmarks.reliability --output docs/results/reliability.json        (10 minutes on 2 cores)
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.record import environment

PAGE = Path("docs/reliability.md")
TEST = re.compile(r"`(test_\w+\.py::test_\w+)`")


def run_tests(names: list[str]) -> dict[str, dict]:
    """By name: how often a test passed and failed, and the largest of each figure that it recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "not gpu", f"--junitxml={report}"]
        subprocess.run([*command, *(f"tests/{name}" for name in names)], check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    found: dict[str, dict] = {}
    for case in cases:
        name = f"{case.get('classname').rsplit('.', 1)[-1]}.py::{case.get('name').split('[')[0]}"
        entry = found.setdefault(name, {"passed": 0, "failed": 0, "figures": {}})
        good = not any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
        entry["passed" if good else "failed"] += 1
        for item in case.iter("property"):
            figures, figure = entry["figures"], item.get("name")
            figures[figure] = max(float(item.get("value")), figures.get(figure, 0.0))
    return found


def fill(page: str, record: dict) -> str:
    """The page, with the figures of each row's tests in its last cell, and where they were measured."""
    lines = []
    for line in page.splitlines():
        names = TEST.findall(line)
        if line.startswith("| ") and names:
            figures = {k: v for name in names for k, v in record["tests"][name]["figures"].items()}
            said = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items())
            line = "|".join([*line.split("|")[:3], f" {said} |" if said else " |"])
        elif line.startswith("Measured"):
            where = record["environment"]
            line = (
                f"Measured on {where['device']} ({where['processor']}, torch {where['torch']}) at commit "
                f"{where['commit'][:8]}: [record](results/reliability.json). On a GPU: [below](#on-a-gpu)."
            )
        lines.append(line)
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the tests behind docs/reliability.md and write their figures.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    names = TEST.findall(PAGE.read_text())
    record = {"environment": environment(torch.device("cpu")), "tests": run_tests(names)}
    if broken := [name for name in names if record["tests"].get(name, {"failed": 1})["failed"]]:
        raise SystemExit(f"error: not passed: {', '.join(broken)}")
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), record))


if __name__ == "__main__":
    main()
