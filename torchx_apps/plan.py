"""TorchX component: check whether embedding tables fit a cluster, and how to shard them; one process, no GPU.

torchx run -s local_cwd torchx_apps/plan.py:plan --config configs/scale/short_video.yaml \
    --topology configs/topologies/h200_64x8.yaml --html plan.html
"""

from torchx import specs

from a2gen_rec.launch import app_def


def plan(
    *args: str,
    config: str,
    topology: str,
    data: str = "",
    json: str = "",
    html: str = "",
    save: str = "",
    cpu: int = 1,
    mem_mb: int = 4096,
    image: str = "",
    python: str = "",
    name: str = "a2gen-plan",
) -> specs.AppDef:
    """Plan the sharding with `a2gen plan` in one process; the job fails if the tables do not fit.

    Args:
        args: further options of `a2gen plan`, after `--`, such as `-- --sweep ranks=8,16`
        config: YAML file of settings
        topology: YAML file of the cluster
        data: prepared dataset, local or remote; empty plans the features described in the config
        json: file for the report; empty only prints it
        html: file for the report as an HTML page
        save: file for the plan, for `a2gen train --plan`
        cpu: number of cores of the host
        mem_mb: memory of the host in MiB
        image: container image; empty for local_cwd and slurm, which run in this environment
        python: interpreter; empty uses TorchX's own, or the image's `python`
        name: name of the job
    """
    options = {"--data": data, "--json": json, "--html": html, "--save": save}
    files = [word for option, file in options.items() if file for word in (option, file)]
    command = [*app_def.CLI, "plan", "--config", config, "--topology", topology, *files, *args]
    resources = app_def.JobResources(ranks=1, cpu=cpu, mem_mb=mem_mb, image=image, python=python)
    return app_def.build_app_def(name, "planner", command, resources)
