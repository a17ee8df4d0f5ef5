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
        args: settings that override the config, after `--`, such as `-- --train.epochs 1`
        config: YAML file of settings
        data: prepared dataset, local or remote
        run: run directory for checkpoints, logs and results, shared by all hosts; an existing run is resumed
        ranks: number of processes on each host, one per GPU if there are GPUs
        hosts: number of hosts
        gpus: number of GPUs of each host
        cpu: number of cores of each host
        mem_mb: memory of each host in MiB
        image: container image; empty for local_cwd and slurm, which run in this environment
        python: interpreter; empty uses TorchX's own, or the image's `python`
        port: rendezvous port on the first of several hosts
        max_retries: maximum number of restarts of the job after a failure; it resumes from the last checkpoint
        mounts: container volumes, such as `type=volume,src=NAME,dst=/data`
        name: name of the job
    """
    resources = app_def.JobResources.from_arguments(locals())
    command = [*app_def.CLI, "train", "--config", config, "--data", data, "--run", run, *args]
    return app_def.build_app_def(name, "trainer", command, resources)
