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
    """Run the script benchmarks/NAME.py on hosts × ranks processes, which measure together.

    Args:
        args: further options of the benchmark, after `--`, such as `-- --quick`
        name: benchmark, as `a2gen benchmark --help` lists them
        json: file for the results; empty only prints them
        device: cpu or cuda
        ranks: processes on each host, one per GPU where there are any
        hosts: number of hosts
        gpus: GPUs of each host
        cpu: cores of each host
        mem_mb: memory of each host in MiB
        image: container image whose working directory is the checkout; leave empty for local_cwd and slurm
        python: interpreter; empty takes the one TorchX runs in, or the image's `python`
        port: port on the first host at which several hosts meet
        max_retries: times the scheduler restarts the job after a failure
        mounts: volumes for containers, such as `type=volume,src=NAME,dst=/data`
    """
    try:
        script = f"benchmarks/{name}.py" if image else str(benchmark_scripts.script_path(name))
    except UserError as error:
        raise app_def.ResourceError(str(error)) from error
    results = ["--json", json] if json else []
    program = ["--", script, "--device", device, *results, *args]
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
    return app_def.build_app_def(f"a2gen-{name}".replace("_", "-"), "benchmark", program, placement)
