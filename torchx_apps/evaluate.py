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
        run: run directory, shared by all hosts
        split: split to evaluate on: train, valid or test
        json: file for the result; empty only prints it
        ranks: number of processes on each host, one per GPU if there are GPUs
        hosts: number of hosts
        gpus: number of GPUs of each host
        cpu: number of cores of each host
        mem_mb: memory of each host in MiB
        image: container image; empty for local_cwd and slurm, which run in this environment
        python: interpreter; empty uses TorchX's own, or the image's `python`
        port: rendezvous port on the first of several hosts
        max_retries: maximum number of restarts of the job after a failure
        mounts: container volumes, such as `type=volume,src=NAME,dst=/data`
        name: name of the job
    """
    resources = app_def.JobResources.from_arguments(locals())
    results = ["--json", json] if json else []
    command = [*app_def.CLI, "evaluate", "--run", run, "--split", split, *results, *args]
    return app_def.build_app_def(name, "evaluator", command, resources)
