"""TorchX components, loaded and materialized like by `torchx run`, and real jobs on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torchx import specs
from torchx.runner import get_runner
from torchx.specs.builders import materialize_appdef
from torchx.specs.file_linter import get_fn_docstring
from torchx.specs.finder import ComponentValidationException, get_component

from a2gen_rec.errors import ConfigError
from a2gen_rec.launch.app_def import JobResources, ResourceError
from tests.helpers import REPOSITORY

pytestmark = pytest.mark.processes

APPS = REPOSITORY / "torchx_apps"
TRAIN, EVALUATE = f"{APPS}/train.py:train", f"{APPS}/evaluate.py:evaluate"
BENCHMARK = f"{APPS}/benchmark.py:benchmark"
PLAN, SERVE = f"{APPS}/plan.py:plan", f"{APPS}/serve.py:serve"
PLAN_ARGS = ["--config", "configs/x.yaml", "--topology", "configs/topologies/laptop.yaml"]
TRAIN_ARGS = ["--config", "configs/x.yaml", "--data", "data", "--run", "run"]


def app(component: str, *arguments: str) -> specs.AppDef:
    return materialize_appdef(get_component(component).fn, list(arguments))


def role(component: str, *arguments: str) -> specs.Role:
    (single_role,) = app(component, *arguments).roles
    return single_role


def shell_command(name: specs.Role) -> str:
    assert (name.entrypoint, name.args[0]) == ("bash", "-c")
    return name.args[1]


@pytest.mark.parametrize("component", [TRAIN, EVALUATE, BENCHMARK])
def test_every_parameter_is_documented(component: str) -> None:
    definition = get_component(component)
    assert definition.validation_errors == []
    description, parameters = get_fn_docstring(definition.fn)
    assert "hosts × ranks" in description
    assert [name for name, text in parameters.items() if not text.strip()] == []


def test_train_on_one_host() -> None:
    trainer = role(TRAIN, *TRAIN_ARGS, "--ranks", "3", "--cpu", "8", "--", "--train.epochs", "1")
    assert trainer.entrypoint == sys.executable
    assert trainer.args == [
        *("-m", "a2gen_rec.launch.torchrun", "--nnodes", "1", "--nproc_per_node", "3", "--standalone"),
        *("-m", "--", "a2gen_rec.cli", "train", "--config", "configs/x.yaml", "--data", "data", "--run", "run"),
        *("--train.epochs", "1"),
    ]
    assert trainer.env["OMP_NUM_THREADS"] == "2"
    assert trainer.num_replicas == 1


def test_evaluate_on_one_host() -> None:
    evaluator = role(EVALUATE, "--run", "run", "--split", "valid", "--json", "out.json", "--ranks", "4")
    program = evaluator.args[evaluator.args.index("--") + 1 :]
    assert program == ["a2gen_rec.cli", "evaluate", "--run", "run", "--split", "valid", "--json", "out.json"]
    assert evaluator.env["OMP_NUM_THREADS"] == "1"
    assert "--json" not in role(EVALUATE, "--run", "run").args


def test_benchmark_on_one_host() -> None:
    options = ["--ranks", "4", "--json", "p.json", "--device", "cuda"]
    benchmark = role(BENCHMARK, "--name", "prepare", *options, "--", "--quick")
    script = str(APPS.parent / "benchmarks" / "prepare.py")
    program = benchmark.args[benchmark.args.index("--standalone") + 1 :]
    assert program == ["--", script, "--device", "cuda", "--json", "p.json", "--quick"]
    in_image = role(BENCHMARK, "--name", "prepare", "--image", "a:1")
    assert in_image.args[-3:] == ["benchmarks/prepare.py", "--device", "cpu"]
    assert app(BENCHMARK, "--name", "prepare").name == "a2gen-prepare"


def test_rejects_unknown_benchmarks_before_the_job() -> None:
    with pytest.raises(ResourceError, match=r"unknown benchmark 'harness'; choose one of .*prepare"):
        app(BENCHMARK, "--name", "harness")


def test_plan_runs_in_one_process() -> None:
    planner = role(PLAN, *PLAN_ARGS, "--save", "p.yaml", "--html", "p.html", "--", "--sweep", "ranks=2,4")
    assert planner.args[planner.args.index("--nproc_per_node") + 1] == "1"
    program = planner.args[planner.args.index("--") + 1 :]
    files = ["--html", "p.html", "--save", "p.yaml"]
    assert program == ["a2gen_rec.cli", "plan", *PLAN_ARGS, *files, "--sweep", "ranks=2,4"]
    assert (planner.num_replicas, planner.resource.gpu) == (1, 0)
    definition = get_component(PLAN)
    assert definition.validation_errors == []
    assert [name for name, text in get_fn_docstring(definition.fn)[1].items() if not text.strip()] == []


def test_serve_runs_without_torchrun() -> None:
    server = role(SERVE, "--model", "m", "--host", "0.0.0.0", "--api_key_file", "keys", "--", "--batch-delay-ms", "5")
    assert server.entrypoint == sys.executable
    options = ["--host", "0.0.0.0", "--port", "8000", "--event-store", "a2gen-events.db", "--api-key-file", "keys"]
    assert server.args == ["-m", "a2gen_rec.cli", "serve", "--model", "m", *options, "--batch-delay-ms", "5"]
    assert server.port_map == {"http": 8000}
    definition = get_component(SERVE)
    assert definition.validation_errors == []
    assert [name for name, text in get_fn_docstring(definition.fn)[1].items() if not text.strip()] == []


IN_CONTAINER = ["--model", "m", "--image", "a:1", "--host", "0.0.0.0", "--api_key_file", "/data/keys"]
MOUNTED = ["--mounts", "type=volume,src=claim,dst=/data"]


def test_serve_in_a_container_is_reachable_and_keeps_events() -> None:
    shared = role(SERVE, *IN_CONTAINER, "--event_store", "redis://host:6379/0", "--replicas", "3")
    assert (shared.num_replicas, shared.image, shared.entrypoint) == (3, "a:1", "python")
    mounted = role(SERVE, *IN_CONTAINER, "--event_store", "/data/events.db", *MOUNTED)
    assert mounted.mounts == [specs.VolumeMount(src="claim", dst_path="/data")]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--host", "127.0.0.1", "--event_store", "redis://h"],
            "--host 127.0.0.1 is unreachable from outside the container",
        ),
        ([], "--event_store a2gen-events.db is lost with its container"),
        (
            ["--event_store", "/database/events.db", *MOUNTED],
            "--event_store /database/events.db is lost with its container",
        ),
        (["--event_store", "/data/e.db", "--mounts", f"{MOUNTED[1]},readonly"], "--event_store /data/e.db is lost"),
        (["--event_store", "events.db", *MOUNTED], "use a file in one of --mounts, or redis://"),
    ],
)
def test_serve_in_a_container_rejects_losing_events(arguments: list[str], reason: str) -> None:
    with pytest.raises(ResourceError, match=reason):
        role(SERVE, *IN_CONTAINER, *arguments)


def test_host_resources() -> None:
    hosts = ["--hosts", "2", "--ranks", "8", "--gpus", "8", "--cpu", "96", "--mem_mb", "1000", "--max_retries", "3"]
    trainer = role(TRAIN, *TRAIN_ARGS, *hosts, "--mounts", "type=volume,src=claim,dst=/data,readonly")
    assert trainer.resource == specs.Resource(cpu=96, gpu=8, memMB=1000)
    assert (trainer.num_replicas, trainer.max_retries, trainer.env["OMP_NUM_THREADS"]) == (2, 3, "12")
    assert trainer.mounts == [specs.VolumeMount(src="claim", dst_path="/data", read_only=True)]


def test_images_use_their_python() -> None:
    assert role(TRAIN, *TRAIN_ARGS, "--image", "a:1").entrypoint == "python"
    assert role(TRAIN, *TRAIN_ARGS, "--image", "a:1", "--python", "/opt/python").entrypoint == "/opt/python"
    assert role(TRAIN, *TRAIN_ARGS, "--python", "/opt/python").entrypoint == "/opt/python"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ranks": 0}, "--ranks 0 must be at least 1"),
        ({"hosts": 0}, "--hosts 0 must be at least 1"),
        ({"gpus": -1}, "--gpus -1 must be at least 0"),
        ({"ranks": 4, "gpus": 2}, "--ranks 4 is more than --gpus 2"),
    ],
)
def test_rejects_invalid_resources(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(ResourceError, match=reason) as raised:
        JobResources(**settings)
    # TorchX prints the first class without a traceback, a2gen the second.
    assert isinstance(raised.value, ComponentValidationException)
    assert isinstance(raised.value, ConfigError)


def test_slurm_expands_the_first_host_in_a_shell() -> None:
    arguments = [*TRAIN_ARGS, "--hosts", "2", "--port", "29999", "--", "--run.note", "two words"]
    with get_runner() as runner:
        script = str(runner.dryrun_component(TRAIN, arguments, "slurm", cfg={"partition": "gpu"}))
    assert script.count("#SBATCH") == 3  # two hosts, and the line between them
    assert "--cpus-per-task=2 --mem=8192" in script
    assert '--rdzv_endpoint "${SLURM_JOB_NODELIST_HET_GROUP_0:-localhost}:29999"' in script
    assert "--rdzv_id '\"$SLURM_JOB_ID\"'" in script
    # The script is shell: the argument of bash -c must still be one command with its quoting intact.
    srun = next(line for line in script.splitlines() if line.startswith("srun "))
    command = subprocess.run(
        ["bash", "-c", f'srun() {{ printf "%s" "${{@: -1}}"; }}\n{srun.removesuffix(":" + chr(92))}'],
        env={"SLURM_JOB_ID": "17", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--rdzv_id 17 " in command
    assert command.endswith("--run.note 'two words'")


def test_kubernetes_runs_the_image() -> None:
    pytest.importorskip("kubernetes", reason="the Kubernetes client is an optional dependency")
    arguments = [*TRAIN_ARGS, "--image", "registry/a2gen:1", "--hosts", "2"]
    with get_runner() as runner:
        manifest = str(runner.dryrun_component(TRAIN, arguments, "kubernetes", cfg={"queue": "default"}))
    assert manifest.count("image: registry/a2gen:1") == 2
    assert "VC_TRAINER_0_0_HOSTS" in manifest or "TORCHX_RANK0_HOST" in manifest
    assert sys.executable not in manifest


def test_macros_and_quoting_survive_the_shell() -> None:
    arguments = [*TRAIN_ARGS[:-1], "runs/${app_id}", "--hosts", "2", "--", "--note", "it's $HOME"]
    with get_runner() as runner:
        info = runner.dryrun_component(TRAIN, arguments, "local_cwd")
    (replica, _) = info.request.role_params["trainer"]
    words = replica.args[-1].replace("exec ", "printf '%s\\n' ", 1)
    first_host = {"TORCHX_RANK0_HOST": "host-0", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", words], env=first_host, capture_output=True, text=True, check=True)
    echoed = done.stdout.splitlines()
    assert echoed[-4:] == ["--run", f"runs/{info.request.app_id}", "--note", "it's $HOME"]
    assert echoed[echoed.index("--rdzv_endpoint") + 1] == "host-0:29500"


PROGRAM = """
import os, sys
rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
print(f"rank {rank} of {world_size}, {os.environ['OMP_NUM_THREADS']} thread, {sys.argv[2:]}", flush=True)
sys.exit(int(sys.argv[1]) if rank == "1" else 0)
"""

COMPONENT = """
from torchx import specs
from a2gen_rec.launch import app_def


def job(code: int, hosts: int, ranks: int, port: int) -> specs.AppDef:
    command = ["--", "program.py", str(code), "--run", "relative/path"]
    return app_def.build_app_def("job", "worker", command, app_def.JobResources(hosts=hosts, ranks=ranks, port=port))
"""


@pytest.fixture
def job_dir(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "component.py").write_text(COMPONENT)
    return tmp_path


def torchx(job_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    command = [Path(sys.executable).parent / "torchx", "--log_level", "WARNING", "run", "-s", "local_cwd"]
    job = ["component.py:job", *arguments, "--port", str(port)]
    return subprocess.run([*command, *job], cwd=job_dir, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("hosts", "ranks"), [(1, 2), (2, 1)])
def test_ranks_start_in_the_working_directory(job_dir: Path, hosts: int, ranks: int) -> None:
    done = torchx(job_dir, "--code", "0", "--hosts", str(hosts), "--ranks", str(ranks))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2, {2 // ranks} thread, ['--run', 'relative/path']" in done.stderr


def test_failing_rank_fails_the_job(job_dir: Path) -> None:
    done = torchx(job_dir, "--code", "3", "--hosts", "1", "--ranks", "2")
    assert done.returncode == 1
    assert "failed with exit code 3" in done.stderr
    assert "Traceback" not in done.stderr
