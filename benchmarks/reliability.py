"""Runs the tests that docs/reliability.md names, and writes their figures into its last column.

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
    """Runs tests.

    Args:
        names: tests such as "test_resuming.py::test_resume_is_bit_exact".

    Returns:
        By test: the number of cases that passed and failed, and the largest value of each figure that they recorded.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "not gpu", f"--junitxml={report}"]
        subprocess.run([*command, *(f"tests/{name}" for name in names)], check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    results: dict[str, dict] = {}
    for case in cases:
        name = f"{case.get('classname').rsplit('.', 1)[-1]}.py::{case.get('name').split('[')[0]}"
        result = results.setdefault(name, {"passed": 0, "failed": 0, "figures": {}})
        passed = not any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
        result["passed" if passed else "failed"] += 1
        for item in case.iter("property"):
            figures, figure = result["figures"], item.get("name")
            figures[figure] = max(float(item.get("value")), figures.get(figure, 0.0))
    return results


def fill(page: str, record: dict) -> str:
    """Returns the page with the figures of each row's tests in its last cell, and the machine of the measurement."""
    lines = []
    for line in page.splitlines():
        names = TEST.findall(line)
        if line.startswith("| ") and names:
            figures = {k: v for name in names for k, v in record["tests"][name]["figures"].items()}
            cell = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items())
            line = "|".join([*line.split("|")[:3], f" {cell} |" if cell else " |"])
        elif line.startswith("Measured"):
            machine = record["environment"]
            line = (
                f"Measured on {machine['device']} ({machine['processor']}, torch {machine['torch']}) at commit "
                f"{machine['commit'][:8]}: [record](results/reliability.json). On a GPU: [below](#on-a-gpu)."
            )
        lines.append(line)
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the tests behind docs/reliability.md and write their figures.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    names = TEST.findall(PAGE.read_text())
    record = {"environment": environment(torch.device("cpu")), "tests": run_tests(names)}
    if failed := [name for name in names if record["tests"].get(name, {"failed": 1})["failed"]]:
        raise SystemExit(f"error: these tests failed or do not exist: {', '.join(failed)}")
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), record))


if __name__ == "__main__":
    main()
