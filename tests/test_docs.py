"""Every command in the documentation parses and every link leads somewhere."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.cli import COMMANDS
from pix2seq.data.commands import ShardArguments, ShowArguments, convert_parser
from pix2seq.demo.serve import DemoArguments
from pix2seq.evaluate import EvaluateArguments
from pix2seq.evaluation.commands import compare_parser
from pix2seq.export import ExportArguments
from pix2seq.plan import PlanArguments
from pix2seq.predict import PredictArguments

PAGES = {str(path): path.read_text(encoding="utf-8") for path in (*Path().glob("*.md"), *Path("docs").glob("*.md"))}
BLOCKS = [
    (name, language, content)
    for name, page in PAGES.items()
    for language, content in re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
]
LINES = [
    (name, line)
    for name, language, content in BLOCKS
    if language == "bash"
    for line in content.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
ARGUMENTS = {
    "train": TrainArguments,
    "evaluate": EvaluateArguments,
    "predict": PredictArguments,
    "export": ExportArguments,
    "plan": PlanArguments,
    "demo": DemoArguments,
    "check": TrainArguments,
    "show": ShowArguments,
    "shard": ShardArguments,
}
PARSERS = {"convert": convert_parser, "compare": compare_parser}


def parse_command(command: str, words: list[str]) -> None:
    """Parses the words after a subcommand as the subcommand does."""
    assert command in COMMANDS
    if command in ARGUMENTS:
        parse(ARGUMENTS[command], words)
    elif command in PARSERS:
        PARSERS[command]().parse_args(words)


@pytest.mark.parametrize(("page", "line"), LINES)
def test_commands_parse(page, line):
    words = shlex.split(line, comments=True)
    assert words[0] != "pix2seq"  # requirements.txt does not install the package
    script = next((word for word in words if re.fullmatch(r"(train|evaluate|predict|export|plan)\.py", word)), None)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", Path("Makefile").read_text(), flags=re.MULTILINE)
    elif script:
        parse_command(script.removesuffix(".py"), words[words.index(script) + 1 :])
    elif words[:3] == ["python", "-m", "pix2seq"]:
        parse_command(words[3], words[4:])
    elif any(word.endswith(".sbatch") for word in words):
        script = next(word for word in words if word.endswith(".sbatch"))
        assert Path(script).exists()
        parse(TrainArguments, words[words.index(script) + 1 :])
    elif "deploy/torchrun.sh" in words:
        parse(TrainArguments, words[words.index("deploy/torchrun.sh") + 1 :])
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
        assert Path(words[2].replace(".", "/") + ".py").exists()


def anchors(page: str) -> set[str]:
    """Anchors of the headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (Path(name).parent / path).resolve() if path else Path(name).resolve()
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("content", [content for _, language, content in BLOCKS if language == "python"])
def test_python_blocks_compile(content):
    ast.parse(content)


def test_every_page_is_linked_from_the_readme():
    pages = {name for name in PAGES if name.startswith("docs")}
    assert pages <= {f"docs/{page}" for page in re.findall(r"\(docs/([\w-]+\.md)", PAGES["README.md"])}


def test_named_tests_exist():
    for name, page in PAGES.items():
        for file, test in re.findall(r"`((?:hf/)?test_\w+\.py)::(test_\w+)`", page):
            assert f"def {test}(" in (Path("tests") / file).read_text(encoding="utf-8"), f"{name}: {file}::{test}"
