"""TorchX component: evaluate a trained run on any number of hosts and ranks.

torchx run -s local_cwd torchx_apps/evaluate.py:evaluate --run RUN --split test --json RUN/evaluation.json
"""

from torchx import specs

from a2gen_rec.launch import app_def


def evaluate(
    *args: str,
    run: str,
    split: str = "test",
    json: str = "",
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
    name: str = "a2gen-evaluate",
) -> specs.AppDef:
    """Evaluate a trained run with `a2gen evaluate` on hosts × ranks processes.

    Args:
        args: further options of `a2gen evaluate`, after `--`
        run: folder that `train` wrote, seen by every host
        split: part of the dataset to evaluate on: train, valid or test
        json: file for the results; empty only prints them
        ranks: processes on each host, one per GPU where there are any
        hosts: number of hosts
        gpus: GPUs of each host
        cpu: cores of each host
        mem_mb: memory of each host in MiB
        image: container image; leave empty for local_cwd and slurm, which run in this environment
        python: interpreter; empty takes the one TorchX runs in, or the image's `python`
        port: port on the first host at which several hosts meet
        max_retries: times the scheduler restarts the job after a failure
        mounts: volumes for containers, such as `type=volume,src=NAME,dst=/data`
        name: name of the job
    """
    results = ["--json", json] if json else []
    program = [*app_def.CLI, "evaluate", "--run", run, "--split", split, *results, *args]
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
    return app_def.build_app_def(name, "evaluator", program, placement)
