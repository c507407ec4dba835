"""deploy/: launchers and linters read its files as they are meant, and each way to start a run is rehearsed.

There is no SLURM here: srun and scontrol are small programs that do what SLURM's documentation says of theirs. Nor is
there AzureML: what it sets for the processes of a job is set by hand, and its files were read with azure-ai-ml 1.35.2.
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
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from packaging.requirements import Requirement
from torch.distributed.fsdp import StateDictType
from torch.distributed.launcher.api import LaunchConfig

from pix2seq.command_line import parse
from pix2seq.config import Arguments
from tests.runs import TINY, rows

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "deploy" / "slurm" / "train.sbatch"
TORCHRUN = ROOT / "deploy" / "torchrun.sh"
DOCKER = ROOT / "deploy" / "docker"
AZUREML = ROOT / "deploy" / "azureml"
JOB = AZUREML / "train.yaml"
CONFIGS = {path.stem: path for path in (ROOT / "deploy" / "accelerate").glob("*.yaml")}

SRUN = """#!{python}
import os, signal, subprocess, sys, time
import psutil

words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = []

def family(task):
    try:
        process = psutil.Process(task.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []

def send(processes, number):
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass

def forward(number, frame):
    for task in tasks:
        everyone = os.environ["SIGNAL_CHILDREN_PROCESSES"] == "yes"
        send(family(task) if everyone else family(task)[:1], number)

def abort(number=None, frame=None):
    for task in tasks:
        send(family(task), signal.SIGKILL)

signal.signal(signal.SIGUSR1, forward)
signal.signal(signal.SIGTERM, abort)
for node in range(int(os.environ["SLURM_NNODES"])):
    here = {{"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}}
    tasks.append(subprocess.Popen(words, env=os.environ | here, start_new_session=True))
started = {{task.pid: [] for task in tasks}}
while any(task.poll() is None for task in tasks):
    for task in tasks:
        if task.poll() is None:
            started[task.pid] = family(task)[1:]
        else:
            send(started.pop(task.pid, []), signal.SIGKILL)  # nothing a task has started outlives it
            if task.returncode != 0:
                abort()  # --kill-on-bad-exit=1
    time.sleep(0.05)
for processes in started.values():
    send(processes, signal.SIGKILL)
sys.exit(max(abs(task.returncode) for task in tasks))
"""

SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") for _ in $(seq "$SLURM_NNODES"); do echo 127.0.0.1; done ;;
    "requeue $SLURM_JOB_ID") echo "$2" >> "$REQUEUED" ;;
    *) exit 1 ;;
esac
"""


def launcher_arguments(name: str, *words: str):
    """What `accelerate launch --config_file deploy/accelerate/NAME.yaml WORDS train.py` goes by."""
    words = ["--config_file", str(CONFIGS[name]), *words, "train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def test_there_are_four_configs():
    assert CONFIGS.keys() == {"one_gpu", "eight_gpus", "two_nodes", "fsdp"}


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one_gpu", "NO", 1, 1),
        ("eight_gpus", "MULTI_GPU", 1, 8),
        ("two_nodes", "MULTI_GPU", 2, 16),
        ("fsdp", "FSDP", 1, 8),
    ],
)
def test_accelerate_reads_its_configs_as_they_are_meant(name, kind, machines, processes):
    config = load_config_from_file(str(CONFIGS[name]))  # an unknown key would raise
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    arguments = launcher_arguments(name)
    assert (arguments.num_machines, arguments.num_processes) == (machines, processes)
    assert (arguments.mixed_precision, arguments.dynamo_backend) == ("bf16", "no")
    assert (arguments.multi_gpu, arguments.use_fsdp) == (kind == "MULTI_GPU", kind == "FSDP")
    assert not any((arguments.use_cpu, arguments.use_deepspeed, arguments.use_megatron_lm))
    # The flags of an unknown name inside fsdp_config would be set, and never read.
    assert config.fsdp_config.keys() <= vars(launch_command_parser().parse_args(["train.py"])).keys()


def test_each_config_says_how_it_is_used():
    for path in CONFIGS.values():
        comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert f"accelerate launch --config_file deploy/accelerate/{path.name}" in " ".join(comment)


def test_two_nodes_take_rank_and_address_from_the_command_line():
    arguments = launcher_arguments("two_nodes", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")


def test_the_fsdp_config_wraps_the_layers_the_model_names(make_model):
    # Port 0 is any free one: the machine of rank 0 would look whether the usual one is taken.
    environment = prepare_multi_gpu_env(launcher_arguments("fsdp", "--main_process_port", "0"))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    with patch_environment(**{key: value for key, value in environment.items() if "FSDP" in key}):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    model = make_model()
    plugin.set_auto_wrap_policy(model)
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {kind.__name__ for kind in wrapped} == set(model._no_split_modules) != set()


def lint(program: str, *words: str) -> None:
    """The machine's own linter if it has one, or that of requirements-dev.txt."""
    places = [os.environ["PATH"], str(Path(sys.executable).parent)]
    done = subprocess.run(
        [shutil.which(program, path=os.pathsep.join(places)), *words], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize(
    "script", [SCRIPT, TORCHRUN, ROOT / "get_coco.sh", ROOT / ".ci" / "run"], ids=lambda p: p.name
)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    lint("shellcheck", str(script))


def test_the_slurm_script_asks_for_what_it_needs():
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--ntasks-per-node=1", "--signal=B:USR1@300", "--open-mode=append"} <= set(options)


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: (name, what follows)."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


def test_the_image_is_pinned_and_has_a_user():
    lint("hadolint", str(DOCKER / "Dockerfile"))
    found = instructions()
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-base-ubuntu[\d.]+@sha256:[0-9a-f]{64}", dict(found)["FROM"])
    user = dict(found)["USER"]
    assert [name for name, _ in found].index("USER") > max(i for i, (name, _) in enumerate(found) if name == "RUN")
    assert all(int(number) > 0 for number in user.split(":"))
    assert [words.split()[0] for name, words in found if name in ("COPY", "ADD")] == ["requirements.txt"]
    # So nothing else is sent to the builder, and another file in the folder does not spoil its cache.
    assert (DOCKER / ".dockerignore").read_text().split() == ["*", "!requirements.txt"]


def test_the_image_has_the_packages_at_one_version_each():
    lines = [line for line in (DOCKER / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.+!]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    files = (ROOT / "requirements.txt", ROOT / "requirements-dev.txt", DOCKER / "requirements.in")
    wanted = [line for file in files for line in file.read_text().splitlines() if line and line[0] not in "#-"]
    assert len(wanted) > 20
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name.replace("_", "-").lower()]), requirement


def test_the_devcontainer_is_the_image():
    """The keys are some of those of the schema of containers.dev, which knows no others."""
    folder = ROOT / ".devcontainer"
    config = json.loads((folder / "devcontainer.json").read_text())
    keys = {"name", "build", "remoteUser", "init", "runArgs", "hostRequirements", "forwardPorts", "customizations"}
    keys |= {"containerEnv"}
    assert config.keys() == keys
    assert (folder / config["build"]["dockerfile"]).resolve() == DOCKER / "Dockerfile"
    assert (folder / config["build"]["context"]).resolve() == DOCKER
    assert config["build"].keys() == {"dockerfile", "context"}
    assert config["hostRequirements"] == {"gpu": "optional"}
    assert (config["init"], config["runArgs"]) == (True, ["--ipc=host"])  # as make local does it
    assert config["remoteUser"] != "root"
    assert all(isinstance(port, int) for port in config["forwardPorts"])
    python = config["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    words = dict(instructions())["ENV"].split()
    assert f"PATH={Path(python).parent}:$PATH" in words
    # Where the container's folder is that of the Makefile; a notebook would not find the package otherwise.
    assert f"PYTHONPATH={dict(instructions())['WORKDIR']}" in words
    assert config["containerEnv"] == {"PYTHONPATH": "${containerWorkspaceFolder}"}


def words_of_a_job(**values: str) -> list[str]:
    """The job's command, with `values` in the places of inputs and outputs."""
    command = yaml.safe_load(JOB.read_text())["command"]
    return shlex.split(re.sub(r"\$\{\{(?:inputs|outputs)\.(\w+)\}\}", lambda found: values[found[1]], command))


def test_azureml_reads_its_job_as_it_is_meant():
    """Keys and allowed values are those of commandJob.schema.json, which knows no others."""
    one = yaml.safe_load(JOB.read_text())
    required = {"$schema", "type", "experiment_name", "code", "environment", "command", "inputs", "outputs"}
    assert one.keys() == required | {"compute", "distribution", "resources"}
    assert one["type"] == "command"
    assert (AZUREML / one["code"]).resolve() == ROOT
    assert one["distribution"] == {"type": "pytorch", "process_count_per_instance": 8}
    assert one["resources"].keys() == {"instance_count", "shm_size", "docker_args"}
    assert one["resources"]["instance_count"] == 1
    assert int(re.fullmatch(r"(\d+)g", one["resources"]["shm_size"])[1]) >= 32  # for the workers of eight GPUs
    assert one["inputs"]["root"].keys() == {"type", "path", "mode"}
    assert one["inputs"]["root"]["mode"] in ("ro_mount", "download", "direct")
    assert one["outputs"] == {"run": {"type": "uri_folder", "mode": "rw_mount"}}
    assert (ROOT / one["inputs"]["recipe"]).exists()
    used = re.findall(r"\$\{\{(\w+)\.(\w+)\}\}", one["command"])
    assert sorted(used) == [("inputs", "recipe"), ("inputs", "root"), ("outputs", "run")]

    file = one["environment"].removeprefix("file:")
    environment = yaml.safe_load((AZUREML / file).read_text())
    assert environment.keys() == {"$schema", "name", "build"}
    assert (AZUREML / environment["build"]["path"]).resolve() == DOCKER
    assert (DOCKER / environment["build"]["dockerfile_path"]).exists()


def test_a_job_on_azureml_trains_with_flags_that_exist():
    program, script, *words = words_of_a_job(recipe="configs/coco_r50.yaml", root="/data", run="/run")
    assert (program, script) == ("python", "train.py")
    args = parse(Arguments, words)
    assert (args.root, args.output_dir, args.resume, args.report_to) == ("/data", "/run", "auto", ["mlflow"])


def seconds(pattern: str, file: Path) -> int:
    return int(re.search(pattern, file.read_text())[1])


def stand_in(folder: Path, **programs: str) -> str:
    """A PATH on which the scripts `programs` are found first."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_torchrun_and_docker_let_a_save_take_its_time(tmp_path):
    path = stand_in(tmp_path / "bin", torchrun='echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"')
    told = subprocess.run([TORCHRUN], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=30)
    with patch_environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT=told.stdout.strip()):
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    waits = getattr(config, "shutdown_timeout", int(told.stdout))  # PyTorch before 2.12 reads no such variable
    assert waits >= 240
    assert seconds(r"--stop-timeout=(\d+)", ROOT / "Makefile") >= waits + 30  # before Docker kills the launcher


def test_slurm_lets_a_save_take_its_time(tmp_path):
    slurm = Slurm(tmp_path, 1, False)
    accelerate = f"""echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > {tmp_path}/told
        echo '"state": "finished"' > {tmp_path}/status.json"""
    stand_in(tmp_path / "bin", accelerate=accelerate, python=f"echo {tmp_path}")
    job = slurm.submit("--root", "anywhere")
    try:
        assert job.wait(timeout=60) == 0, slurm.log.read_text()
    finally:
        kill_all(job)
    waits = int((tmp_path / "told").read_text())
    assert waits >= 240
    assert seconds(r"#SBATCH --signal=B:USR1@(\d+)", SCRIPT) >= waits + 30


def port_of(job: int) -> int:
    """As the script has it."""
    return 10000 + job % 20000


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


class Slurm:
    """A rehearsal stage: runs the script as SLURM would, with every node on this machine."""

    def __init__(self, folder: Path, nodes: int, signal_children_processes: bool):
        programs = folder / "bin"
        programs.mkdir()
        for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.requeued = folder / "requeued"
        self.log = folder / "slurm.out"
        job = next(number for number in range(os.getpid(), os.getpid() + 1000) if is_free(port_of(number)))
        self.environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": str(job),
            "SLURM_NNODES": str(nodes),
            "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_CPUS_PER_TASK": "1",
            "SIGNAL_CHILDREN_PROCESSES": "yes" if signal_children_processes else "no",
            "REQUEUED": str(self.requeued),
        }

    def submit(self, *words: str) -> subprocess.Popen:
        with self.log.open("a") as log:
            return subprocess.Popen(
                ["bash", str(SCRIPT), *words],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def requeues(self) -> int:
        return len(self.requeued.read_text().splitlines()) if self.requeued.exists() else 0


def kill_all(job: subprocess.Popen) -> None:
    """The script and all it has started; training processes have sessions of their own."""
    try:
        everyone = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in everyone:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.wait(timeout=30)


def words_of_a_run(root: Path, output: Path, nodes: int) -> list[str]:
    words = [*TINY, "--root", str(root), "--output_dir", str(output), "--mixed_precision", "no"]
    words += ["--batch_size", str(4 // nodes), "--eval_every", "0", "--sample_every", "0", "--ckpt_every", "0"]
    return [*words, "--log_every", "1", "--lr_scheduler", "constant"]


def wait_for_steps(slurm: Slurm, job: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + 180
    while not (output / "metrics.jsonl").exists():
        assert job.poll() is None, slurm.log.read_text()
        assert time.monotonic() < deadline, slurm.log.read_text()
        time.sleep(0.1)


def status(output: Path) -> dict:
    return json.loads((output / "status.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "signal_children_processes"),
    [(1, False), (2, False), (2, True)],
    ids=["one", "two", "two, all signalled"],
)
def test_a_slurm_job_saves_requeues_itself_and_goes_on(
    shapes_root, tmp_path, record_property, nodes, signal_children_processes
):
    """SLURM signals what srun has started itself, or everything below it too: SignalChildrenProcesses."""
    slurm = Slurm(tmp_path, nodes, signal_children_processes)
    output = tmp_path / "a run"
    words = words_of_a_run(shapes_root, output, nodes)
    job = slurm.submit(*words, "--max_steps", "100000")
    try:
        wait_for_steps(slurm, job, output)
        told = time.monotonic()
        os.kill(job.pid, signal.SIGUSR1)
        assert job.wait(timeout=90) == 0, slurm.log.read_text()
        record_property("seconds_from_signal_to_requeue", time.monotonic() - told)
    finally:
        kill_all(job)
    assert status(output)["state"] == "preempted"
    assert slurm.requeues() == 1
    assert f"x {nodes} processes" in (output / "train.log").read_text()

    step = status(output)["step"]
    job = slurm.submit(*words, "--max_steps", str(step + 2))
    try:
        assert job.wait(timeout=180) == 0, slurm.log.read_text()
    finally:
        kill_all(job)
    assert f"resumed from {output / 'checkpoints'}/step_{step:08d}" in (output / "train.log").read_text()
    assert [row["step"] for row in rows(output) if "train/loss" in row] == list(range(1, step + 3))
    assert status(output)["state"] == "finished"
    assert slurm.requeues() == 1


@pytest.mark.slow
def test_a_slurm_job_that_is_cancelled_saves_and_is_not_requeued(shapes_root, tmp_path):
    """SLURM sends SIGTERM to the tasks, before it preempts a job too: then the queue is its own business."""
    slurm = Slurm(tmp_path, 2, False)
    output = tmp_path / "a run"
    job = slurm.submit(*words_of_a_run(shapes_root, output, 2), "--max_steps", "100000")
    try:
        wait_for_steps(slurm, job, output)
        srun = next(child for child in psutil.Process(job.pid).children() if "srun" in " ".join(child.cmdline()))
        for task in srun.children():
            task.terminate()
        assert job.wait(timeout=90) == 1, slurm.log.read_text()
    finally:
        kill_all(job)
    assert status(output)["state"] == "preempted"
    assert slurm.requeues() == 0


@pytest.mark.slow
def test_a_slurm_job_that_fails_says_so(tmp_path):
    """Also where a run has finished before."""
    slurm = Slurm(tmp_path, 1, False)
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    job = slurm.submit("--root", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path))
    try:
        assert job.wait(timeout=120) == 1
    finally:
        kill_all(job)
    assert "train.py: error: " in slurm.log.read_text()
    assert slurm.requeues() == 0


def test_a_mistake_ends_a_slurm_job_at_once(tmp_path):
    slurm = Slurm(tmp_path, 1, False)
    job = slurm.submit("--root", "nowhere", "--batch_siez", "4")
    try:
        assert job.wait(timeout=60) == 2
    finally:
        kill_all(job)
    assert "--batch_siez: no such flag (did you mean --batch_size?)" in slurm.log.read_text()
    assert slurm.requeues() == 0


def start(words: list[str], **environment: str) -> subprocess.Popen:
    """In the place of a node or of AzureML, which tell processes by their environment where they are."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | {"PATH": path} | environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(processes: list[subprocess.Popen], allowed: float = 180) -> None:
    try:
        for process in processes:
            _, errors = process.communicate(timeout=allowed)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            kill_all(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_with_torchrun_find_each_other_and_go_on(shapes_root, tmp_path):
    output = tmp_path / "a run"
    words = [str(TORCHRUN), *words_of_a_run(shapes_root, output, nodes=2)]
    for steps in (2, 4):
        host = {"NODES": "2", "HOST": f"localhost:{free_port()}"}
        finish([start([*words, "--max_steps", str(steps)], **host) for _ in range(2)])
    log = (output / "train.log").read_text()
    assert "x 2 processes" in log
    assert f"resumed from {output / 'checkpoints'}/step_00000002" in log
    assert [row["step"] for row in rows(output) if "train/loss" in row] == [1, 2, 3, 4]
    assert status(output)["state"] == "finished"


@pytest.mark.slow
def test_a_run_with_torchrun_that_is_stopped_saves(shapes_root, tmp_path):
    """As docker stop does it, to the only process that the container's init knows."""
    output = tmp_path / "a run"
    run = start([str(TORCHRUN), *words_of_a_run(shapes_root, output, nodes=1), "--max_steps", "100000"])
    try:
        deadline = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists():
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run.terminate()
        run.communicate(timeout=90)
    finally:
        kill_all(run)
    assert status(output)["state"] == "preempted"
    assert (output / "checkpoints" / f"step_{status(output)['step']:08d}" / "MANIFEST.json").exists()


@pytest.mark.slow
def test_the_processes_of_a_job_on_azureml_find_each_other(shapes_root, tmp_path):
    """Its command as it stands, but for a small recipe, precision, and MLflow, which the tests go without."""
    output = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    flags = words_of_a_run(shapes_root, output, nodes=2)
    recipe.write_text(yaml.safe_dump({name[2:]: value for name, value in zip(flags[::2], flags[1::2], strict=True)}))
    words = words_of_a_job(recipe=str(recipe), root=str(shapes_root), run=str(output))
    words[0] = sys.executable
    words[words.index("bf16")], words[words.index("mlflow")] = "no", "none"
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    finish([start([*words, "--max_steps", "2"], **world, RANK=rank, NODE_RANK=rank) for rank in ("0", "1")])
    assert "x 2 processes" in (output / "train.log").read_text()
    assert status(output)["state"] == "finished"
