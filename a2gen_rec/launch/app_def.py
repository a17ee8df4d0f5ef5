"""How a job is started on many ranks: one TorchX role, and torchrun on every host of it.

The components in ``torchx_apps/`` are thin forms of :func:`application`. TorchX executes a component's file by
its path, where no sibling can be imported, so what they share is here.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torchx import specs
from torchx.specs.finder import ComponentValidationException

from a2gen_rec.errors import ConfigError

# What follows "--" is the program's: torchrun would else take --run for a short form of its own --run-path.
CLI = ("-m", "--", "a2gen_rec.cli")


class ResourceError(ConfigError, ComponentValidationException):
    """A job cannot be placed as asked. TorchX prints its own exceptions as one message, without a traceback."""


@dataclass(frozen=True)
class JobResources:
    """Where a job runs. Everything but ``hosts`` and ``max_retries`` counts per host.

    Attributes:
        hosts: replicas of the role; the first one also holds the rendezvous.
        ranks: processes; with GPUs, each has its own.
        cpu: cores, shared out evenly among the ranks' threads.
        mem_mb: memory in MiB.
        image: container image; empty where the scheduler runs in this environment (local_cwd, slurm).
        python: interpreter; empty takes this one, or the image's ``python``.
        port: of the rendezvous, on the first host of several.
        max_retries: times the scheduler starts the whole job again after a failure.
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
        for name, least in (("hosts", 1), ("ranks", 1), ("cpu", 1), ("mem_mb", 1), ("gpus", 0), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise ResourceError(f"--{name} {getattr(self, name)} must be at least {least}")
        if self.gpus and self.ranks > self.gpus:
            raise ResourceError(f"--ranks {self.ranks} is more than --gpus {self.gpus}: each rank needs its own")

    @property
    def python_executable(self) -> str:
        return self.python or ("python" if self.image else sys.executable)

    @property
    def threads_per_rank(self) -> int:
        """Threads of each rank."""
        return max(1, self.cpu // self.ranks)


def _torchrun(placement: JobResources) -> list[str]:
    """torchrun's command on one host, without the program and without a multi-host rendezvous."""
    module = [placement.python_executable, "-m", "a2gen_rec.launch.torchrun"]
    return [*module, "--nnodes", str(placement.hosts), "--nproc_per_node", str(placement.ranks)]


def _single_host_command(program: Sequence[str], placement: JobResources) -> list[str]:
    return [*_torchrun(placement), "--standalone", *program]


def _multi_host_command(program: Sequence[str], placement: JobResources) -> list[str]:
    """Every host meets the others at the first one, whose name the scheduler leaves in a variable.

    A shell must expand it. ``$$`` becomes ``$`` when TorchX fills in its macros; schedulers that set no name on
    the first host itself leave the variable empty there.
    """
    endpoint = f"$${{{specs.macros.rank0_env}:-localhost}}:{placement.port}"
    rendezvous = f'--rdzv_backend c10d --rdzv_id {specs.macros.app_id} --rdzv_endpoint "{endpoint}"'
    command = f"exec {shlex.join(_torchrun(placement))} {rendezvous} {shlex.join(program)}"
    return ["bash", "-c", command]


def build_app_def(name: str, role: str, program: Sequence[str], placement: JobResources) -> specs.AppDef:
    """A TorchX application that runs ``program`` on every rank; its exit code is not 0 when one of theirs is not.

    Args:
        name: of the job, as the scheduler shows it.
        role: prefix of its log lines.
        program: torchrun's view of it: a script or ``-m module``, then arguments. TorchX replaces its macros in
            them, such as ``${app_id}``.
    """
    command = (_single_host_command if placement.hosts == 1 else _multi_host_command)(program, placement)
    return specs.AppDef(
        name=name,
        roles=[
            specs.Role(
                name=role,
                image=placement.image,
                entrypoint=command[0],
                args=command[1:],
                env={
                    "OMP_NUM_THREADS": str(placement.threads_per_rank),
                    "PYTHONUNBUFFERED": "1",
                    "LOGLEVEL": "WARNING",
                },
                num_replicas=placement.hosts,
                max_retries=placement.max_retries,
                port_map={"c10d": placement.port} if placement.hosts > 1 else {},
                resource=specs.Resource(cpu=placement.cpu, gpu=placement.gpus, memMB=placement.mem_mb),
                mounts=specs.parse_mounts(placement.mounts.split(",")) if placement.mounts else [],
            )
        ],
    )
