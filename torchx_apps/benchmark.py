"""TorchX component: run one benchmark of this checkout on any number of hosts and ranks.

torchx run -s local_cwd torchx_apps/benchmark.py:benchmark --name train_throughput --ranks 2 --json T.json -- --quick
"""

from torchx import specs

from a2gen_rec.errors import UserError
from a2gen_rec.launch import app_def, benchmark_scripts


def benchmark(
    *args: str,
    name: str,
    json: str = "",
    device: str = "cpu",
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
) -> specs.AppDef:
    """Run the script benchmarks/NAME.py on hosts × ranks processes together.

    Args:
        args: further options of the benchmark, after `--`, such as `-- --quick`
        name: name of the benchmark, as listed by `a2gen benchmark --help`
        json: file for the results; empty only prints them
        device: cpu or cuda
        ranks: number of processes on each host, one per GPU if there are GPUs
        hosts: number of hosts
        gpus: number of GPUs of each host
        cpu: number of cores of each host
        mem_mb: memory of each host in MiB
        image: container image whose working directory is the checkout; empty for local_cwd and slurm
        python: interpreter; empty uses TorchX's own, or the image's `python`
        port: rendezvous port on the first of several hosts
        max_retries: maximum number of restarts of the job after a failure
        mounts: container volumes, such as `type=volume,src=NAME,dst=/data`
    """
    resources = app_def.JobResources.from_arguments(locals())
    try:
        script = f"benchmarks/{name}.py" if image else str(benchmark_scripts.script_path(name))
    except UserError as error:
        raise app_def.ResourceError(str(error)) from error
    results = ["--json", json] if json else []
    command = ["--", script, "--device", device, *results, *args]
    return app_def.build_app_def(f"a2gen-{name}".replace("_", "-"), "benchmark", command, resources)
