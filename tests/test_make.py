"""The Makefile's commands. docker, az and nvidia-smi are stand-ins that note what they were called with."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pix2seq.command_line import parse
from pix2seq.config import Arguments

ROOT = Path(__file__).parent.parent
TOOLS = ("awk", "date", "git", "grep", "id", "mkdir", "sed", "sh", "tar")
SETTINGS = {"WORKSPACE": "space", "RESOURCE_GROUP": "group", "COMPUTE": "gpus", "AZURE_ROOT": "azureml:coco:1"}
COMMANDS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()

STAND_IN = """#!{python} -S
import json, os, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + chr(10))
"""


class Checkout:
    """A git checkout with one experiment, `tried`, and a PATH with nothing on it but what a test puts there."""

    def __init__(self, folder: Path):
        self.root, self._programs, self._calls = folder / "checkout", folder / "bin", folder / "calls"
        self._programs.mkdir()
        for name in TOOLS:
            (self._programs / name).symlink_to(shutil.which(name))
        self.root.mkdir()
        for name in ("deploy", "experiments", "configs"):
            shutil.copytree(ROOT / name, self.root / name)
        for name in ("Makefile", ".gitignore", "train.py", "requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / name, self.root)
        self.git("init", "--quiet")
        assert self.make("new-exp", "exp=tried").returncode == 0
        self.git("add", "--all")
        self.git("-c", "user.name=test", "-c", "user.email=test@example.com", "commit", "--quiet", "--message=all")
        self.configure(**SETTINGS, CACHE=str(folder / "cache"))

    def git(self, *words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=self.root, check=True, capture_output=True, text=True, timeout=30
        ).stdout

    def configure(self, **settings: str) -> None:
        (self.root / "config.env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def install(self, *names: str) -> None:
        for name in names:
            (self._programs / name).write_text(STAND_IN.format(python=sys.executable, calls=str(self._calls)))
            (self._programs / name).chmod(0o755)

    def make(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [shutil.which("make"), "--no-print-directory", *words],
            cwd=self.root,
            env={"PATH": str(self._programs), "HOME": str(self.root.parent)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self._calls.read_text().splitlines()] if self._calls.exists() else []

    def refuses(self, *words: str) -> str:
        """The line a command ends with, before anything is done."""
        done = self.make(*words)
        assert (done.returncode, done.stdout, self.calls()) == (2, "", [])
        (line,) = done.stderr.splitlines()
        return re.fullmatch(r"Makefile:\d+: \*\*\* (.*)\.  Stop\.", line)[1]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def test_help_lists_every_command(checkout):
    lines = checkout.make("help").stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == COMMANDS
    assert checkout.make().stdout.splitlines() == lines
    assert checkout.refuses("help", "cmd=jbo") == "cmd=jbo: no such command; make help lists them"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example_that_works(checkout, command):
    checkout.install("docker", "az")
    first, *rest = checkout.make("help", f"cmd={command}").stdout.splitlines()
    assert first in (ROOT / "Makefile").read_text().replace("## ", "").splitlines()
    examples = [line.split(None, 1)[1] for line in rest if line.startswith("    make ")]
    assert examples
    for example in examples:
        example = example.replace("/datasets", str(checkout.root.parent))
        example = example.replace("bigger-canvas", "tried" if command != "new-exp" else "other")
        words = ["--dry-run", *re.findall(r'(?:"[^"]*"|\S)+', example)]
        done = checkout.make(*(word.replace('"', "") for word in words))
        assert done.returncode == 0, done.stderr


def test_an_experiment_is_trained_in_the_container(checkout):
    checkout.install("docker")
    data = checkout.root.parent / "data"
    data.mkdir()
    words = ["exp=tried", "processes=2", f"DATA={data}", "args=--root '/data/my coco'", "docker_args=--env=KEY"]
    assert checkout.make("local", *words).returncode == 0
    build, run = checkout.calls()
    assert build == ["docker", "build", "--tag", "pix2seq", "deploy/docker"]
    options, image, words = run[2 : run.index("pix2seq")], run[run.index("pix2seq")], run[run.index("pix2seq") + 1 :]
    assert run[:2] + [image] == ["docker", "run", "pix2seq"]
    assert words == ["deploy/torchrun.sh", "--config", "experiments/tried/recipe.yaml", "--root", "/data/my coco"]
    assert {"--rm", "--init", "--ipc=host", "--env=PROCESSES=2", "--env=KEY"} <= set(options)
    assert f"--user={os.getuid()}:{os.getgid()}" in options
    assert f"--volume={checkout.root}:/workspace" in options
    assert f"--volume={data}:/data:ro" in options
    # Docker makes a folder that is missing, as root.
    cache = next(word for word in options if word.endswith(":/cache"))
    assert Path(cache.removeprefix("--volume=").removesuffix(":/cache")).is_dir()
    assert not {"--gpus=all", "--tty"} & set(options)  # neither GPU nor terminal here


def test_the_container_has_the_gpus_of_the_machine(checkout):
    checkout.install("docker", "nvidia-smi")
    assert checkout.make("local").returncode == 0
    assert "--gpus=all" in checkout.calls()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["test", "in=docker", "args=-x tests"], ["python", "-m", "pytest", "-x", "tests"]),
        (["jupyter", "port=9000"], ["jupyter", "lab", "--ip=0.0.0.0", "--port=9000", "--no-browser"]),
        (["terminal"], ["bash"]),
    ],
    ids=["test", "jupyter", "terminal"],
)
def test_other_things_run_in_the_container_too(checkout, words, expected):
    checkout.install("docker")
    assert checkout.make(*words, "IMAGE=mine").returncode == 0
    build, run = checkout.calls()
    assert build == ["docker", "build", "--tag", "mine", "deploy/docker"]
    assert run[run.index("mine") + 1 :] == expected
    assert ("--publish=127.0.0.1:9000:9000" in run) == (words[0] == "jupyter")  # reached from this machine alone
    assert ("--tty" in run) == (words[0] == "terminal")


def test_the_image_is_built_with_more_words(checkout):
    checkout.install("docker")
    assert checkout.make("build-exp", "build_args=--pull --no-cache").returncode == 0
    assert checkout.calls() == [["docker", "build", "--tag", "pix2seq", "--pull", "--no-cache", "deploy/docker"]]


@pytest.mark.parametrize("command", ["build-exp", "local", "jupyter", "terminal", "test"])
def test_without_docker_a_line_says_so(checkout, command):
    assert checkout.refuses(command, "in=docker").startswith("docker: not found; install Docker Engine")


def test_mistakes_are_told_before_anything_is_built(checkout):
    checkout.install("docker", "az")
    assert checkout.refuses("local", "DATA=/nowhere") == "DATA=/nowhere: no such folder"
    assert checkout.refuses("local", "exp=tired").startswith("exp=tired: there is no experiments/tired/recipe.yaml")
    assert checkout.refuses("job").startswith("exp=: there is no experiments//recipe.yaml")
    assert checkout.refuses("test", "in=dcoker") == "in=dcoker: must be docker, or left out"


def test_a_new_experiment_is_a_recipe_that_parses(checkout):
    done = checkout.make("new-exp", "exp=bigger-canvas")
    assert done.returncode == 0
    assert "make local exp=bigger-canvas" in done.stdout
    folder = checkout.root / "experiments" / "bigger-canvas"
    assert sorted(path.name for path in folder.iterdir()) == ["notes.md", "recipe.yaml"]
    assert all("bigger-canvas" in path.read_text() and "NAME" not in path.read_text() for path in folder.iterdir())
    args = parse(Arguments, ["--config", str(folder / "recipe.yaml"), "--root", "/data"])
    assert args.output_dir == "runs/bigger-canvas"
    assert checkout.refuses("new-exp", "exp=bigger-canvas").endswith("experiments/bigger-canvas is there already")
    for name in ("", "a b", "../out", "-x", "a/b"):
        assert checkout.refuses("new-exp", f"exp={name}").startswith(f"exp={name}: must be a word of letters")


def test_a_job_sends_what_is_committed_and_nothing_else(checkout):
    checkout.install("az")
    for name in ("runs/a/secret", "data/secret", ".venv/secret", "wandb/secret"):
        (checkout.root / name).parent.mkdir(parents=True)
        (checkout.root / name).write_text("not to be sent")
    done = checkout.make("job", "exp=tried", "file=two_nodes.yaml", "args=resources.instance_count=4")
    assert done.returncode == 0, done.stderr
    (call,) = checkout.calls()
    (snapshot,) = (checkout.root / "build" / "jobs").iterdir()
    assert re.fullmatch(r"tried_\d{8}_\d{6}", snapshot.name)
    assert call == [
        *("az", "ml", "job", "create", "--file", f"build/jobs/{snapshot.name}/deploy/azureml/two_nodes.yaml"),
        *("--resource-group", "group", "--workspace-name", "space"),
        *("--set", f"name={snapshot.name}", "compute=azureml:gpus", "inputs.root.path=azureml:coco:1"),
        *("inputs.recipe=experiments/tried/recipe.yaml", "resources.instance_count=4"),
    ]
    sent = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}
    assert sent == set(checkout.git("ls-files").splitlines())
    assert "config.env" not in sent
    # The job's code is this copy: what is edited while the job waits is not part of it.
    job = yaml.safe_load((checkout.root / call[5]).read_text())
    assert ((checkout.root / call[5]).parent / job["code"]).resolve() == snapshot
    (checkout.root / "train.py").write_text("edited")
    assert (snapshot / "train.py").read_text() == (ROOT / "train.py").read_text()


@pytest.mark.parametrize("edit", ["train.py", "experiments/tried/more.yaml"])
def test_a_job_with_uncommitted_changes_is_refused(checkout, edit):
    checkout.install("az")
    (checkout.root / edit).write_text("edited")
    assert checkout.refuses("job", "exp=tried").startswith("job: there are changes that are not committed")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_job_without_a_setting_is_refused(checkout, name):
    checkout.install("az")
    checkout.configure(**{**SETTINGS, name: ""})
    assert checkout.refuses("job", "exp=tried").startswith(f"{name}: missing; set it in config.env")


def test_without_the_azure_cli_a_line_says_so(checkout):
    assert checkout.refuses("job", "exp=tried").startswith("az: not found; install the Azure CLI")


def test_the_example_of_the_settings_has_them_all_and_is_no_secret():
    example = (ROOT / "config.env.example").read_text()
    names = re.findall(r"^(\w+)=", example, flags=re.MULTILINE)
    assert set(names) == {*SETTINGS, "IMAGE", "DATA", "CACHE"}
    assert "/config.env" in (ROOT / ".gitignore").read_text().splitlines()
