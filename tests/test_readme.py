"""The commands of the documents parse, their links lead somewhere, and their numbers come from the records."""

import ast
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import curves, demo_load, flags
from benchmarks.reliability import fill
from export import ExportArguments
from pix2seq.command_line import parse
from pix2seq.config import Arguments, EvaluateArguments
from pix2seq.data.commands import COMMANDS as COMMANDS_OF_DATA
from pix2seq.data.commands import ShardArguments, ShowArguments, convert_parser
from pix2seq.data.faults import KINDS
from pix2seq.demo.__main__ import DemoArguments
from pix2seq.evaluation.commands import COMMANDS as COMMANDS_OF_EVALUATION
from pix2seq.evaluation.commands import compare_parser, tokens_parser
from pix2seq.metrics import NAMES
from pix2seq.processing import Pix2SeqImageProcessor
from plan import PlanArguments
from predict import PredictArguments

README = Path("README.md").read_text()
DOCUMENTS = {str(path): path.read_text() for path in sorted((*Path().glob("*.md"), *Path("docs").glob("*.md")))}
BLOCKS = [
    (name, *block)
    for name, page in DOCUMENTS.items()
    for block in re.findall(r"^ *```(.*)\n((?:.*\n)*?) *```$", page, flags=re.MULTILINE)
]
SCRIPTS = [block for _, kind, block in BLOCKS if kind == "bash"]
COMMANDS = {line: None for block in SCRIPTS for line in block.replace("\\\n", " ").splitlines() if line.strip()}


def test_every_block_says_what_it_is():
    """So that no command escapes. What is Python is run or compiled by a test of its page."""
    assert 2 * len(BLOCKS) == sum(page.count("```") for page in DOCUMENTS.values())
    assert {kind for _, kind, _ in BLOCKS} == {"bash", "python", "text", "bibtex"}
    tested = {"README.md", "docs/predict.md", "docs/demo.md", "docs/export.md"}
    assert {name for name, kind, _ in BLOCKS if kind == "python"} == tested
    assert len(COMMANDS) >= 50


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    words = shlex.split(command, comments=True)
    environment = list(itertools.takewhile(re.compile(r"[A-Z]+=").match, words))
    words = words[len(environment) :]
    if words[0] == "make":
        makefile = Path("Makefile").read_text()
        assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE)
        settings = dict(word.split("=", 1) for word in words[2:])
        assert settings.keys() <= set(re.search(r"^SETTINGS := (.*)$", makefile, flags=re.MULTILINE)[1].split())
        if words[1] == "local":
            parse(Arguments, shlex.split(settings["args"]))
    elif "train.py" in words:
        parse(Arguments, words[words.index("train.py") + 1 :])
    elif "export.py" in words:
        parse(ExportArguments, words[words.index("export.py") + 1 :])
    elif "plan.py" in words:
        parse(PlanArguments, words[words.index("plan.py") + 1 :])
    elif "evaluate.py" in words:
        parse(EvaluateArguments, words[words.index("evaluate.py") + 1 :])
    elif "predict.py" in words:
        parse(PredictArguments, words[words.index("predict.py") + 1 :])
    elif words[0] == "sbatch":
        script = next(word for word in words if word.endswith(".sbatch"))
        assert Path(script).exists()
        parse(Arguments, words[words.index(script) + 1 :])
    elif words[0] == "deploy/torchrun.sh":
        script = Path(words[0]).read_text()
        assert all(f"${{{word.split('=')[0]}:-" in script for word in environment)
        parse(Arguments, words[1:])
    elif words[0] == "git":
        assert words[1] in ("add", "commit")
    elif words[0] == "source":
        assert words[1:] == [".venv/bin/activate"]
    elif words[:2] == ["pip", "install"]:
        known = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
        extras = {f".[{name}]" for name in known}
        packages = {re.match(r"[\w-]+", needed)[0] for several in known.values() for needed in several}
        assert set(words[2:]) - {"-e"} <= extras | packages
    elif words[0] == "cp":
        assert Path(words[1]).exists()
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all(Path(word).exists() for word in words[3:])
    elif words[0] == "./get_coco.sh":
        assert Path(words[0]).stat().st_mode & 0o111
        assert all(word in Path(words[0]).read_text() for word in words[1:] if word.startswith("--"))
    elif words[:3] == ["python", "-m", "pix2seq.data"]:
        kinds = {"check": Arguments, "show": ShowArguments, "shard": ShardArguments}
        assert words[3] in COMMANDS_OF_DATA
        if words[3] in kinds:
            parse(kinds[words[3]], words[4:])
        else:
            convert_parser().parse_args(words[4:])
    elif words[:3] == ["python", "-m", "pix2seq.evaluation"]:
        assert words[3] in COMMANDS_OF_EVALUATION
        {"compare": compare_parser, "tokens": tokens_parser}[words[3]]().parse_args(words[4:])
    elif words[:3] == ["python", "-m", "pix2seq.demo"]:
        parse(DemoArguments, words[3:])
    elif words[:2] == ["python", "-m"]:
        script = Path(words[2].replace(".", "/") + ".py").read_text()
        assert all(f'"{word}"' in script for word in words if word.startswith("--"))
    else:
        raise AssertionError(f"no test knows this command: {command}")


def test_the_python_runs(tmp_path, monkeypatch, make_model, capsys):
    """On a small detector, in the place of the demo's."""
    model = make_model()
    model.save_pretrained(tmp_path / "runs" / "demo" / "best")
    Pix2SeqImageProcessor.for_detector(model.config).save_pretrained(tmp_path / "runs" / "demo" / "best")
    Image.new("RGB", (60, 40)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README + DOCUMENTS["docs/predict.md"], flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block.replace("threshold=0.5", "threshold=0"), {})
    *lines, answers = capsys.readouterr().out.splitlines()
    assert lines[:4] == lines[4:]
    assert len(lines) == 8
    assert len(eval(answers)) == 4
    assert (tmp_path / "boxes.png").exists()


def test_the_file_list_is_the_tree():
    listed = set(re.findall(r"^((?:pix2seq/)?[a-z_0-9/]+(?:\.py|/))  ", README, flags=re.MULTILINE))
    modules = {str(path) for path in Path("pix2seq").glob("*.py") if path.name != "__init__.py"}
    modules |= {f"pix2seq/{path.name}/" for path in Path("pix2seq").iterdir() if (path / "__init__.py").exists()}
    assert {name for name in listed if name.startswith("pix2seq/")} == modules
    for name in listed:
        assert Path(name).exists(), name


def test_what_is_extended_has_these_names():
    page = " ".join(Path("docs/extending.md").read_text().split())
    named = re.findall(r"`(\w+)` in `([\w/]+\.py)`", page)
    assert len(named) >= 25
    for name, file in named:
        assert re.search(rf"^ *(?:class|def) {name}\b|^{name}\b.* = ", Path(file).read_text(), re.MULTILINE), (
            name,
            file,
        )
    for file in re.findall(r"`([\w/]+/\w+\.py)`", page):
        assert Path(file).exists(), file


def test_every_kind_of_fault_is_explained():
    rows = re.findall(r"^\| `(\S+)` \| (error|warning) \| (.*) \|$", Path("docs/data.md").read_text(), re.MULTILINE)
    assert {kind: (severity, effect) for kind, severity, effect in rows} == KINDS


def anchors(page: str) -> set[str]:
    """Those that GitHub gives to the headings of a page."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", [*DOCUMENTS, "experiments/template/notes.md"])
def test_links_lead_somewhere(name):
    page = Path(name)
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target


def test_the_readme_leads_to_every_page():
    linked = {target.partition("#")[0] for target in re.findall(r"\]\((docs/[^)]+)\)", README)}
    assert {name for name in DOCUMENTS if name.startswith("docs/")} <= linked


def test_the_page_of_flags_is_what_the_command_writes():
    assert Path("docs/flags.md").read_text() == flags.page(), "python -m benchmarks.flags --output docs/flags.md"


def told(node: ast.AST) -> str | None:
    """A text of the source, with "..." for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return None


def test_the_messages_that_are_explained_are_printed():
    """A first cell that is nothing but code is a message, each part between two "..." of one text in the source."""
    rows = re.findall(r"^\| `([^`]+)` \|", DOCUMENTS["docs/troubleshooting.md"], re.MULTILINE)
    assert len(rows) >= 25
    files = [*Path("pix2seq").rglob("*.py"), *Path().glob("*.py")]
    texts = {text for file in files for node in ast.walk(ast.parse(file.read_text())) if (text := told(node))}
    for message in rows:
        assert any(message.strip(". ") in text for text in texts), message


EXPECT = "docs/what-to-expect.md"
PAGES = ["README.md", "docs/experiments.md"]
WITH_RECORDS = ("data", "decoding", "demo", "reliability", "scaling")


@pytest.mark.parametrize("page", PAGES)
def test_results_come_from_records(page):
    """AP, AP50 and AP75 stand in this order before the link to the record; a row without one says "not run"."""
    rows = [line for line in Path(page).read_text().splitlines() if re.match(r"^\| `", line)]
    assert rows
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        link = re.search(r"\]\((\S+\.json)\)", cells[-1])
        if link is None:
            assert "not run" in cells, row
            continue
        record = json.loads((Path(page).parent / link[1]).read_text())
        assert record["environment"]["commit"]
        first = next(index for index, cell in enumerate(cells) if re.fullmatch(r"\d\.\d{3}", cell))
        assert cells[first : first + 3] == [f"{record['best'][name]:.3f}" for name in ("AP", "AP50", "AP75")], row


def test_every_promise_names_tests_that_exist():
    pages = [Path(f"{page}.md").read_text() for page in ("docs/reliability", "docs/what-to-expect", "SECURITY")]
    named = [re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page) for page in pages]
    assert len(named[0]) >= 12
    assert len(named[1]) >= 4
    assert len(named[2]) >= 3
    named = sum(named, [])
    for file, test in named:
        assert f"def {test}(" in (Path("tests") / file).read_text() if test else (Path("tests") / file).exists()


def test_figures_of_the_promises_come_from_their_record():
    page = Path("docs/reliability.md").read_text()
    assert fill(page, json.loads(Path("docs/results/reliability.json").read_text())) == page


def test_figures_of_the_step_come_from_their_record():
    page = Path("docs/scaling.md").read_text()
    for record in Path("docs/results").glob("train_step_*.json"):
        found = json.loads(record.read_text())["times_as_fast"]
        for name in ("pix2seq as detr", "decoder as llama"):
            if found[name] is not None:
                figures = "{median:.2f} ({min:.2f} to {max:.2f})".format(**found[name])
                assert f"| {figures} | [record](results/{record.name}) |" in page
    found = json.loads(Path("docs/results/train_step_gpu.json").read_text())
    ours = found["rows"]["pix2seq"]
    assert f"trains on {ours['images_per_s']:.0f} images/s, {ours['mfu']:.0%} of its peak".replace("%", " %") in page
    assert f"waiting for {100 * found['data_wait_share']:.1f} % of the time" in " ".join(page.split())


def test_figures_of_the_metrics_come_from_their_records():
    page = Path("docs/what-to-expect.md").read_text()
    ratios = [
        f"{recipe['times_as_long']['median']:.3f}"
        for recipe in json.loads(Path("docs/results/metrics_cpu.json").read_text())["recipes"].values()
    ]
    text = " ".join(page.split())
    on_gpu = json.loads(Path("docs/results/metrics_gpu.json").read_text())["recipes"]["r50"]["times_as_long"]
    assert f"on an H200 with 32 images in bf16 {on_gpu['median']:.3f} times" in text
    assert f"takes {ratios[0]} times as long with them, of an R50 at 640 pixels {ratios[1]} times" in text
    runs = json.loads(Path("docs/results/curves.json").read_text())["runs"]
    assert all(run["environment"]["commit"] for run in runs.values())
    assert curves.fill(page, runs) == page
    assert curves.table(runs["demo"]["curves"]) in page


def test_every_metric_is_explained():
    """Each by its whole name in a row of the table, and no other."""
    rows = [
        row
        for row in Path("docs/what-to-expect.md").read_text().split("## Three healthy runs")[0].splitlines()
        if row[:1] == "|"
    ]
    named = [name for row in rows for name in re.findall(r"`((?:train|data)/\w+)`", row.split("|")[1])]
    of_the_loop = ("lr", "grad_norm", "skipped_steps", "unreadable_images")
    assert sorted(named) == sorted([*NAMES, *(f"train/{name}" for name in of_the_loop)])


def test_figures_of_the_loader_come_from_their_record():
    page = " ".join(Path("docs/data.md").read_text().split())
    found = json.loads(Path("docs/results/data_cpu.json").read_text())
    for peer in ("torchvision_raw", "torchvision", "torchvision_pil", "detr-style"):
        races = found["as_batches"], found["as_examples"], found["large_images"]["as_batches"]
        ratios = ["{median:.2f} ({min:.2f} to {max:.2f})".format(**race["times_as_fast"][peer]) for race in races]
        assert f"| {' | '.join(ratios)} |" in page
    memory, wait = found["memory_mb"], found["data_wait"]
    step = json.loads(Path("docs/results/train_step_gpu.json").read_text())["rows"]["pix2seq"]
    assert wait["images_per_s_eaten"] == pytest.approx(step["images_per_s"], rel=1e-3)
    for figure in (
        f"makes {found['as_batches']['images_per_s']['pix2seq']['median']:.0f} images/s",
        f"trains the R50 recipe at {step['images_per_s']:.0f} images/s (bf16, 32 images a step",
        f"needs {wait['cores_for_less_than_5%_wait']} such cores",
        f"holds {memory['worker_after_1']['mean']:.0f} MB of its own after one pass",
        f"and {memory['worker_after_3']['mean']:.0f} MB after three",
    ):
        assert figure in page, figure


def test_figures_of_decoding_come_from_their_records():
    page = Path("docs/decoding.md").read_text()
    for batch, part in json.loads(Path("docs/results/decode_cpu.json").read_text())["batches"].items():
        ratios = {
            name: "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio)
            for name, ratio in part["times_as_fast"].items()
        }
        cells = " | ".join(ratios[name] for name in ("generate", "loop", "no cache"))
        assert f"| {batch} | {part['tokens_per_s']:.0f} | {cells} |" in page
        # The record says how many times as fast as these one token at a time is.
        wrong, right = (1 / part["times_as_fast"][name]["median"] for name in ("all wrong", "all right"))
        assert f"| {batch} | {wrong:.2f} | {right:.2f} |" in page
    found = json.loads(Path("docs/results/decode_gpu.json").read_text())
    for batch, part in found["batches"].items():
        rates = " | ".join(
            f"{found['images_per_s'][batch][name]['median']:.0f}" for name in ("pix2seq", "encoder", "detr")
        )
        ratios = " | ".join(
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**part["times_as_fast"][name])
            for name in ("generate", "loop")
        )
        assert f"| {batch} | {part['tokens_per_s']:.0f} | {rates} | {ratios} |" in page
    right = sorted(part["times_as_fast"]["all right"]["median"] for part in found["batches"].values())
    assert f"takes {right[0]:.1f} to {right[-1]:.1f} times as long" in " ".join(page.split())
    for name in ("demo", "demo20", "bccd"):
        assert markdown(json.loads(Path(f"docs/results/writing_{name}.json").read_text())) in page


def test_figures_of_the_load_come_from_their_record():
    page = Path("docs/demo.md").read_text()
    assert demo_load.fill(page, json.loads(Path("docs/results/demo_load.json").read_text())) == page


def test_the_python_of_the_demo_page_parses():
    (block,) = re.findall(r"```python\n(.*?)```", Path("docs/demo.md").read_text(), flags=re.DOTALL)
    compile(block, "docs/demo.md", "exec")


def test_every_record_is_shown():
    shown = {
        (Path(page).parent / link).resolve()
        for page in (*PAGES, *(f"docs/{name}.md" for name in WITH_RECORDS), EXPECT)
        for link in re.findall(r"\]\((\S+\.json)\)", Path(page).read_text())
    }
    assert {path.resolve() for path in Path("docs/results").rglob("*.json")} - shown == {
        Path("docs/results/models.json").resolve()
    }
