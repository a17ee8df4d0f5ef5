"""TorchX component: serve an exported model; one process a host, without torchrun, so that signals reach it.

torchx run -s local_cwd torchx_apps/serve.py:serve --model MODEL

A container (--image) needs --host 0.0.0.0 with --api_key_file, and a --store that outlasts it: in a mount, or Redis.
"""

from pathlib import PurePosixPath

from torchx import specs

from a2gen_rec.launch import app_def


def serve(
    *args: str,
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str = "",
    store: str = "a2gen-events.db",
    replicas: int = 1,
    cpu: int = 2,
    mem_mb: int = 8192,
    image: str = "",
    python: str = "",
    max_retries: int = 3,
    mounts: str = "",
    name: str = "a2gen-serve",
) -> specs.AppDef:
    """Serve an exported model with `a2gen serve`.

    Args:
        args: further options of `a2gen serve`, after `--`, such as `-- --max_wait_ms 5`
        model: folder that `a2gen export` wrote, seen by every replica
        host: address to listen on; 0.0.0.0, as containers need, needs an API key
        port: to listen on
        api_key_file: file of API keys, one a line
        store: of what users did: a file of each replica's own, of a container in one of its mounts, or
            redis://HOST:PORT/NUMBER for all of them
        replicas: processes, each on a host of its own
        cpu: cores of each replica
        mem_mb: memory of each replica in MiB
        image: container image; leave empty for local_cwd and slurm, which run in this environment
        python: interpreter; empty takes the one TorchX runs in, or the image's `python`
        max_retries: times the scheduler restarts a replica after a failure
        mounts: volumes for containers, such as `type=volume,src=NAME,dst=/data`
        name: name of the job
    """
    placement = app_def.JobResources(hosts=replicas, ranks=1, cpu=cpu, mem_mb=mem_mb, image=image, python=python)
    volumes = specs.parse_mounts(mounts.split(",")) if mounts else []
    if image:
        _check_container(host, store, [each.dst_path for each in volumes if not getattr(each, "read_only", False)])
    keys = ["--api_key_file", api_key_file] if api_key_file else []
    where = ["--host", host, "--port", str(port), "--store", store, *keys]
    server = specs.Role(
        name="server",
        image=image,
        entrypoint=placement.python_executable,
        args=["-m", "a2gen_rec.cli", "serve", "--model", model, *where, *args],
        env={"PYTHONUNBUFFERED": "1"},
        num_replicas=replicas,
        max_retries=max_retries,
        port_map={"http": port},
        resource=specs.Resource(cpu=cpu, gpu=0, memMB=mem_mb),
        mounts=volumes,
    )
    return specs.AppDef(name=name, roles=[server])


def _check_container(host: str, store: str, mounted: list[str]) -> None:
    """Raise a PlacementError for a service that nobody reaches, or whose restart loses what it has acknowledged."""
    if host in ("127.0.0.1", "localhost", "::1"):
        raise app_def.ResourceError(f"--host {host} is not reached from outside a container: give --host 0.0.0.0")
    if "://" not in store and not any(PurePosixPath(store).is_relative_to(place) for place in mounted):
        raise app_def.ResourceError(
            f"--store {store} is lost with its container: give a file in one of --mounts, or redis://"
        )
