"""TorchX component: train on any number of hosts and ranks.

torchx run -s local_cwd torchx_apps/train.py:train --config configs/quickstart.yaml --data DATA --run RUN
"""

from torchx import specs

from a2gen_rec.launch import app_def


def train(
    *args: str,
    config: str,
    data: str,
    run: str,
    ranks: int = 2,
    hosts: int = 1,
    gpus: int = 0,
    cpu: int = 2,
    mem_mb: int = 8192,
    image: str = "",
    python: str = "",
    port: int = 29500,
    max_retries: int = 0,
    mounts: str = "",
    name: str = "a2gen-train",
) -> specs.AppDef:
    """Train a model with `a2gen train` on hosts × ranks processes.

    Args:
        args: settings that override the configuration, after `--`, such as `-- --train.epochs 1`
        config: YAML file of settings
        data: prepared dataset, local or remote
        run: folder for checkpoints, logs and results, seen by every host; a run that was stopped resumes
        ranks: processes on each host, one per GPU where there are any
        hosts: number of hosts
        gpus: GPUs of each host
        cpu: cores of each host
        mem_mb: memory of each host in MiB
        image: container image; leave empty for local_cwd and slurm, which run in this environment
        python: interpreter; empty takes the one TorchX runs in, or the image's `python`
        port: port on the first host at which several hosts meet
        max_retries: times the scheduler restarts the job after a failure; it resumes from its last checkpoint
        mounts: volumes for containers, such as `type=volume,src=NAME,dst=/data`
        name: name of the job
    """
    program = [*app_def.CLI, "train", "--config", config, "--data", data, "--run", run, *args]
    placement = app_def.JobResources(
        hosts=hosts,
        ranks=ranks,
        gpus=gpus,
        cpu=cpu,
        mem_mb=mem_mb,
        image=image,
        python=python,
        port=port,
        max_retries=max_retries,
        mounts=mounts,
    )
    return app_def.build_app_def(name, "trainer", program, placement)
