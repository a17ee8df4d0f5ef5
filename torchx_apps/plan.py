"""TorchX component: tell whether and how the embedding tables fit on a cluster; one process, no GPU.

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
    """Plan a sharding with `a2gen plan` in one process; the job fails where the tables do not fit.

    Args:
        args: further options of `a2gen plan`, after `--`, such as `-- --sweep ranks=8,16`
        config: YAML file of settings
        topology: YAML file of the cluster
        data: prepared dataset, local or remote; empty plans the features that the configuration describes
        json: file for the report; empty only prints it
        html: file for the report as a page
        save: file for the plan, which `a2gen train --plan` follows
        cpu: cores of the host
        mem_mb: memory of the host in MiB
        image: container image; leave empty for local_cwd and slurm, which run in this environment
        python: interpreter; empty takes the one TorchX runs in, or the image's `python`
        name: name of the job
    """
    given = {"--data": data, "--json": json, "--html": html, "--save": save}
    files = [word for option, file in given.items() if file for word in (option, file)]
    program = [*app_def.CLI, "plan", "--config", config, "--topology", topology, *files, *args]
    placement = app_def.JobResources(ranks=1, cpu=cpu, mem_mb=mem_mb, image=image, python=python)
    return app_def.build_app_def(name, "planner", program, placement)
