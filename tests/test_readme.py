"""The README's commands parse, its files exist, and its numbers come from the records."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from pix2seq.command_line import parse
from pix2seq.config import Arguments, EvaluateArguments
from pix2seq.processing import Pix2SeqImageProcessor

README = Path("README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", Path("Makefile").read_text(), flags=re.MULTILINE)
    elif "train.py" in words:
        parse(Arguments, words[words.index("train.py") + 1 :])
    elif "evaluate.py" in words:
        parse(EvaluateArguments, words[words.index("evaluate.py") + 1 :])
    else:
        raise AssertionError(f"no test knows this command: {command}")


def test_the_python_runs(tmp_path, monkeypatch, make_model, capsys):
    """On a small detector, in the place of the demo's."""
    model = make_model()
    model.save_pretrained(tmp_path / "runs" / "demo" / "best")
    Pix2SeqImageProcessor.for_detector(model.config).save_pretrained(tmp_path / "runs" / "demo" / "best")
    Image.new("RGB", (60, 40)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("threshold=0.5", "threshold=0"), {})
    *lines, answers = capsys.readouterr().out.splitlines()
    assert len(lines) == len(eval(answers)) == 4


def test_the_file_list_is_the_tree():
    listed = set(re.findall(r"^((?:pix2seq/)?[a-z_0-9/]+(?:\.py|/))  ", README, flags=re.MULTILINE))
    modules = {str(path) for path in Path("pix2seq").glob("*.py") if path.name != "__init__.py"} | {"pix2seq/model/"}
    assert {name for name in listed if name.startswith("pix2seq/")} == modules
    for name in listed:
        assert Path(name).exists(), name


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or Path(target).exists(), target


def test_results_come_from_records():
    rows = re.findall(r"^\| `(\S+)\.yaml` \|(.*)\|$", README, flags=re.MULTILINE)
    assert rows
    for recipe, row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        if cells[1] == "not run":
            assert not Path(f"docs/results/{recipe}.json").exists()
            continue
        best = json.loads(Path(f"docs/results/{recipe}.json").read_text())["best"]
        assert cells[1:4] == [f"{best[name]:.3f}" for name in ("AP", "AP50", "AP75")]
