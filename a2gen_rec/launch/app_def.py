"""TorchX job definitions: one role whose hosts each run torchrun.

The components in ``torchx_apps/`` are thin wrappers of :func:`build_app_def`. TorchX executes a component's file by
its path, where no sibling can be imported, so their shared code is here.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torchx import specs
from torchx.specs.finder import ComponentValidationException

from a2gen_rec.errors import ConfigError

# "--" ends torchrun's options; without it, torchrun reads --run as an abbreviation of its own --run-path.
CLI = ("-m", "--", "a2gen_rec.cli")


class ResourceError(ConfigError, ComponentValidationException):
    """Invalid resources of a job. TorchX prints its own exceptions as one message, without a traceback."""


@dataclass(frozen=True)
class JobResources:
    """Resources of a job. All but ``hosts`` and ``max_retries`` are per host.

    Attributes:
        hosts: Number of replicas of the role; the first one also hosts the rendezvous.
        ranks: Number of processes; with GPUs, one per GPU.
        cpu: Number of cores, divided evenly among the ranks' threads.
        gpus: Number of GPUs.
        mem_mb: Memory in MiB.
        image: Container image; empty for schedulers that run in this environment (local_cwd, slurm).
        python: Interpreter; empty uses the current one, or the image's ``python``.
        port: Rendezvous port on the first host, if there are several.
        max_retries: Maximum number of times the scheduler restarts the job after a failure.
        mounts: TorchX mounts, ``type=volume,src=NAME,dst=PATH`` (comma-separated, may repeat).
    """

    hosts: int = 1
    ranks: int = 2
    gpus: int = 0
    cpu: int = 2
    mem_mb: int = 8192
    image: str = ""
    python: str = ""
    port: int = 29500
    max_retries: int = 0
    mounts: str = ""

    def __post_init__(self) -> None:
        for name, minimum in (("hosts", 1), ("ranks", 1), ("cpu", 1), ("mem_mb", 1), ("gpus", 0), ("max_retries", 0)):
            if getattr(self, name) < minimum:
                raise ResourceError(f"--{name} {getattr(self, name)} must be at least {minimum}")
        if self.gpus and self.ranks > self.gpus:
            raise ResourceError(f"--ranks {self.ranks} is more than --gpus {self.gpus}: each rank needs its own")

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "JobResources":
        """Return the resources among a component's arguments (its ``locals()``).

        TorchX checks a component's source and reads its signature and docstring, so every component must list these
        parameters itself.
        """
        names = [field.name for field in fields(cls)]
        return cls(**{name: arguments[name] for name in names if name in arguments})

    @property
    def python_executable(self) -> str:
        return self.python or ("python" if self.image else sys.executable)

    @property
    def threads_per_rank(self) -> int:
        """Number of threads of each rank."""
        return max(1, self.cpu // self.ranks)


def _torchrun(resources: JobResources) -> list[str]:
    """Return torchrun's command on one host, without the program and without a multi-host rendezvous."""
    module = [resources.python_executable, "-m", "a2gen_rec.launch.torchrun"]
    return [*module, "--nnodes", str(resources.hosts), "--nproc_per_node", str(resources.ranks)]


def _single_host_command(command: Sequence[str], resources: JobResources) -> list[str]:
    return [*_torchrun(resources), "--standalone", *command]


def _multi_host_command(command: Sequence[str], resources: JobResources) -> list[str]:
    """Return the command of each host; hosts meet at the first one, whose name the scheduler stores in a variable.

    A shell must expand it. ``$$`` becomes ``$`` when TorchX replaces its macros. Schedulers that set no name on the
    first host itself leave the variable empty there.
    """
    endpoint = f"$${{{specs.macros.rank0_env}:-localhost}}:{resources.port}"
    rendezvous = f'--rdzv_backend c10d --rdzv_id {specs.macros.app_id} --rdzv_endpoint "{endpoint}"'
    shell_command = f"exec {shlex.join(_torchrun(resources))} {rendezvous} {shlex.join(command)}"
    return ["bash", "-c", shell_command]


def build_app_def(name: str, role: str, command: Sequence[str], resources: JobResources) -> specs.AppDef:
    """Return a TorchX application that runs a command on every rank and fails if any rank fails.

    Args:
        name: Name of the job in the scheduler.
        role: Name of the role, which prefixes its log lines.
        command: Arguments of torchrun: a script or ``-m module``, then its arguments. TorchX replaces macros such as
            ``${app_id}`` in them.
        resources: Hosts, ranks and memory of the job.
    """
    host_command = (_single_host_command if resources.hosts == 1 else _multi_host_command)(command, resources)
    return specs.AppDef(
        name=name,
        roles=[
            specs.Role(
                name=role,
                image=resources.image,
                entrypoint=host_command[0],
                args=host_command[1:],
                env={
                    "OMP_NUM_THREADS": str(resources.threads_per_rank),
                    "PYTHONUNBUFFERED": "1",
                    "LOGLEVEL": "WARNING",
                },
                num_replicas=resources.hosts,
                max_retries=resources.max_retries,
                port_map={"c10d": resources.port} if resources.hosts > 1 else {},
                resource=specs.Resource(cpu=resources.cpu, gpu=resources.gpus, memMB=resources.mem_mb),
                mounts=specs.parse_mounts(resources.mounts.split(",")) if resources.mounts else [],
            )
        ],
    )
