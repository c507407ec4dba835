"""The Makefile's commands. docker, az and nvidia-smi are stand-ins that note what they were called with."""

import json
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
TOOLS = ("awk", "date", "git", "grep", "head", "id", "mkdir", "rm", "sed", "sh", "tar")
SETTINGS = {"WORKSPACE": "space", "RESOURCE_GROUP": "group", "COMPUTE": "gpus", "AZURE_ROOT": "azureml:coco:1"}
COMMANDS = re.search(r"^COMMANDS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
NAMES = re.search(r"^SETTINGS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()

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

    def replace(self, name: str, script: str) -> None:
        """A program of the PATH by another, of which `script` is the text for sh."""
        (self._programs / name).unlink()
        (self._programs / name).write_text(f"#!{shutil.which('sh')}\n{script}\n")
        (self._programs / name).chmod(0o755)

    def make(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [shutil.which("make"), "--no-print-directory", *words],
            cwd=self.root,
            env={"PATH": str(self._programs), "HOME": str(self.root.parent)} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self._calls.read_text().splitlines()] if self._calls.exists() else []

    def refuses(self, *words: str) -> str:
        """The line a command ends with, before anything is done."""
        before = set(self.root.parent.rglob("*"))
        done = self.make(*words)
        assert (done.returncode, done.stdout, self.calls()) == (2, "", [])
        assert set(self.root.parent.rglob("*")) == before
        (line,) = done.stderr.splitlines()
        return re.fullmatch(r"Makefile:\d+: \*\*\* (.*)\.  Stop\.", line)[1]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def test_help_lists_every_command(checkout):
    lines = checkout.make("help").stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == COMMANDS
    assert checkout.make().stdout.splitlines() == lines


@pytest.mark.parametrize("words", ["jbo", ".*", "%", "job clean", "a'b", "'; touch made; '", "$(touch made)"])
def test_help_takes_a_command_and_nothing_else(checkout, words):
    message = f"cmd={words}: no such command; make help lists them"
    assert checkout.refuses("help", "cmd=" + words.replace("$", "$$")) == message


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
    checkout.replace("id", 'case "$1" in -u) echo 1234 ;; -g) echo 5678 ;; esac')
    words = ["exp=tried", "processes=2", f"DATA={data}", "args=--root '/data/my coco'", "docker_args=--env=KEY"]
    assert checkout.make("local", *words).returncode == 0
    build, run = checkout.calls()
    assert build == ["docker", "build", "--tag", "pix2seq", "deploy/docker"]
    options, image, words = run[2 : run.index("pix2seq")], run[run.index("pix2seq")], run[run.index("pix2seq") + 1 :]
    assert run[:2] + [image] == ["docker", "run", "pix2seq"]
    assert words == ["deploy/torchrun.sh", "--config", "experiments/tried/recipe.yaml", "--root", "/data/my coco"]
    assert {"--rm", "--init", "--ipc=host", "--env=PROCESSES=2", "--env=KEY", "--user=1234:5678"} <= set(options)
    # A user without a name or a home, for whom weights and a login are kept; keys of the environment, if it has them.
    assert {"--env=USER=pix2seq", "--env=HOME=/tmp", "--env=HF_HOME=/cache"} <= set(options)
    assert {"--env=HF_TOKEN", "--env=WANDB_API_KEY"} <= set(options)
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
    for name in ("DATA", "CACHE"):
        message = f"{name}=/my data: must be a folder without spaces in its name"
        assert checkout.refuses("local", f"{name}=/my data") == message
    for word in ("0", "two", "-1", "1.5", "", "2'"):
        assert checkout.refuses("local", f"processes={word}") == f"processes={word}: must be a whole number from 1 on"
    assert checkout.refuses("jupyter", "port=http").startswith("port=http: must be a whole number")
    assert checkout.refuses("local", "exp=tired").startswith("exp=tired: there is no experiments/tired/recipe.yaml")
    assert checkout.refuses("local", "exp=*").startswith("exp=*: must be a word of letters")
    assert checkout.refuses("test", "in=dcoker") == "in=dcoker: must be docker, or left out"


def test_a_setting_that_does_not_exist_is_refused(checkout):
    checkout.install("docker", "az")
    message = "data: no such setting; make help cmd=NAME lists those of a command"
    assert checkout.refuses("local", "data=/datasets") == message


def test_an_environment_with_the_names_of_settings_changes_nothing(checkout):
    checkout.install("docker", "az")
    checkout.replace("date", "echo 20260102_030405")
    environment = dict.fromkeys(NAMES, "docker")  # all there are: others are refused
    commands = [["help"], ["local", "exp=tried"], ["jupyter"], ["terminal"]]
    commands += [["--dry-run", "test"], ["job", "exp=tried"]]
    outputs, calls = [], []
    for extra in ({}, environment):
        outputs.append([checkout.make(*words, **extra).stdout for words in commands])
        calls.append(checkout.calls()[sum(map(len, calls)) :])
        shutil.rmtree(checkout.root / "build")
    assert outputs[0] == outputs[1]
    assert calls[0] == calls[1]
    assert len(calls[0]) == 7
    for call, word in ((1, "--env=PROCESSES=1"), (3, "--port=8888"), (6, "resources.instance_count=1")):
        assert word in calls[0][call]
    checkout.configure()
    assert "RESOURCE_GROUP: missing" in checkout.make("job", "exp=tried", **environment).stderr


def test_the_example_of_the_settings_does_no_harm(checkout):
    checkout.install("docker")
    shutil.copy(ROOT / "config.env.example", checkout.root / "config.env")
    assert checkout.make("local").returncode == 0
    build, run = checkout.calls()
    assert build == ["docker", "build", "--tag", "pix2seq", "deploy/docker"]
    assert f"--volume={checkout.root.parent}/.cache/huggingface:/cache" in run
    assert not any(word.endswith(":/data:ro") for word in run)


def test_folders_of_the_settings_are_from_home_or_from_the_checkout(checkout):
    checkout.install("docker")
    (checkout.root.parent / "datasets").mkdir()
    checkout.configure(DATA="~/datasets", CACHE="runs/cache")
    assert checkout.make("local").returncode == 0
    run = checkout.calls()[-1]
    assert f"--volume={checkout.root.parent}/datasets:/data:ro" in run
    assert f"--volume={checkout.root}/runs/cache:/cache" in run  # a word without / would be Docker's own volume
    assert (checkout.root / "runs" / "cache").is_dir()


@pytest.mark.parametrize("value", ['"/datasets"', "/data'sets", "/datasets # mine", "$HOME/datasets", "/data#1"])
def test_what_make_would_read_otherwise_is_refused(checkout, value):
    checkout.install("docker")
    (checkout.root / "config.env").write_text(f'# Quotes, # and $ may be said here: "it\'s $1".\n\nDATA={value}\n')
    says = "must be NAME=VALUE, a setting without quotes, # or $ in it"
    assert checkout.refuses("local") == f"config.env:3:DATA={value}: {says}"
    for line in ("DTA=/datasets", "just words"):
        (checkout.root / "config.env").write_text(f"{line}\n")
        assert checkout.refuses("local") == f"config.env:1:{line}: {says}"


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
    for name in ("", "a b", "../out", "-x", "a/b", "a'b", "'; touch made; '", "*", "template"):
        assert checkout.refuses("new-exp", f"exp={name}").startswith(f"exp={name}: must be a word of letters")


@pytest.mark.parametrize("name", ["123", "007", "1e5", "yes", "null"])
def test_an_experiment_is_called_as_it_was_asked_for(checkout, name):
    """Though YAML would read a number, a truth or nothing."""
    assert checkout.make("new-exp", f"exp={name}").returncode == 0
    recipe = checkout.root / "experiments" / name / "recipe.yaml"
    args = parse(Arguments, ["--config", str(recipe), "--root", "/data"])
    assert (args.project_name, args.output_dir) == (name, f"runs/{name}")
    assert yaml.safe_load(recipe.read_text())["project_name"] == name


def test_a_job_sends_what_is_committed_and_nothing_else(checkout):
    checkout.install("az")
    for name in ("runs/a/secret", "data/secret", ".venv/secret", "wandb/secret"):
        (checkout.root / name).parent.mkdir(parents=True)
        (checkout.root / name).write_text("not to be sent")
    done = checkout.make("job", "exp=tried", "nodes=2", "args=distribution.process_count_per_instance=4")
    assert done.returncode == 0, done.stderr
    (call,) = checkout.calls()
    (snapshot,) = (checkout.root / "build" / "jobs").iterdir()
    assert re.fullmatch(r"tried_\d{8}_\d{6}", snapshot.name)
    assert call == [
        *("az", "ml", "job", "create", "--file", f"build/jobs/{snapshot.name}/deploy/azureml/train.yaml"),
        *("--resource-group", "group", "--workspace-name", "space"),
        *("--set", f"name={snapshot.name}", "compute=azureml:gpus", "inputs.root.path=azureml:coco:1"),
        *("inputs.recipe=experiments/tried/recipe.yaml", "resources.instance_count=2"),
        "distribution.process_count_per_instance=4",
    ]
    sent = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}
    assert sent == set(checkout.git("ls-files").splitlines())
    assert "config.env" not in sent
    # The job's code is this copy: what is edited while the job waits is not part of it.
    job = yaml.safe_load((checkout.root / call[5]).read_text())
    assert ((checkout.root / call[5]).parent / job["code"]).resolve() == snapshot
    for name in (word.split("=")[0] for word in call[call.index("--set") + 2 :]):
        place = job
        for key in name.split("."):
            assert key in place, name
            place = place[key]
    (checkout.root / "train.py").write_text("edited")
    assert (snapshot / "train.py").read_text() == (ROOT / "train.py").read_text()


@pytest.mark.parametrize("edit", ["train.py", "experiments/tried/more.yaml"])
def test_a_job_with_uncommitted_changes_is_refused(checkout, edit):
    checkout.install("az")
    (checkout.root / edit).write_text("edited")
    message = checkout.refuses("job", "exp=tried")
    assert message.startswith("job: sends what is committed, and nothing may be left to commit; git status says: ")
    assert message.endswith(edit)


def test_a_job_is_refused_before_anything_is_copied(checkout):
    checkout.install("az")
    assert checkout.refuses("job").startswith("exp=: must be a word of letters")
    assert checkout.refuses("job", "exp=template").endswith("and - and _; not template")
    assert checkout.refuses("job", "exp=tired").startswith("exp=tired: there is no experiments/tired/recipe.yaml")
    assert checkout.refuses("job", "exp=tried", "nodes=two") == "nodes=two: must be a whole number from 1 on"
    shutil.rmtree(checkout.root / ".git")
    message = checkout.refuses("job", "exp=tried")
    assert "git status says: fatal: not a git repository" in message


def test_two_jobs_in_a_second_are_not_mixed(checkout):
    """Neither one after the other nor at once, where the second comes between the look and the copy."""
    checkout.install("az")
    checkout.replace("date", "echo 20260102_030405")
    snapshot = checkout.root / "build" / "jobs" / "tried_20260102_030405"
    snapshot.mkdir(parents=True)
    message = "job: build/jobs/tried_20260102_030405 was sent this very second; try again"
    assert checkout.refuses("job", "exp=tried") == message
    snapshot.rmdir()
    mkdir = shutil.which("mkdir")
    checkout.replace("mkdir", f'{mkdir} -p {snapshot}\nexec {mkdir} "$@"')
    assert checkout.make("job", "exp=tried").returncode == 2
    assert list(snapshot.iterdir()) == checkout.calls() == []


def test_copies_of_jobs_stay_until_they_are_cleaned_away(checkout):
    checkout.install("az")
    assert checkout.make("job", "exp=tried").returncode == 0
    for name in (".venv/bin/python", "runs/a/metrics.jsonl", "build/lib/more.py"):
        (checkout.root / name).parent.mkdir(parents=True)
        (checkout.root / name).touch()
    assert "stays until make clean" in checkout.make("help", "cmd=job").stdout
    assert checkout.make("clean").returncode == 0
    left = {path.name for path in (checkout.root, checkout.root / "build") for path in path.iterdir()}
    assert {"runs", "lib", "config.env", "experiments"} <= left
    assert not {".venv", "jobs"} & left


@pytest.mark.parametrize("name", SETTINGS)
def test_a_job_without_a_setting_is_refused(checkout, name):
    checkout.install("az")
    checkout.configure(**{**SETTINGS, name: ""})
    assert checkout.refuses("job", "exp=tried").startswith(f"{name}: missing; set it in config.env")


def test_without_the_azure_cli_a_line_says_so(checkout):
    assert checkout.refuses("job", "exp=tried").startswith("az: not found; install the Azure CLI")


def test_the_example_of_the_settings_has_them_all_and_is_no_secret():
    example = (ROOT / "config.env.example").read_text()
    names = re.findall(r"^#(\w+)=", example, flags=re.MULTILINE)
    assert set(names) == {*SETTINGS, "IMAGE", "DATA", "CACHE"}
    assert "/config.env" in (ROOT / ".gitignore").read_text().splitlines()
