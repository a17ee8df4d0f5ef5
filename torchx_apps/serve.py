"""TorchX component: serve an exported model; one process per host, without torchrun, so that signals reach it.

torchx run -s local_cwd torchx_apps/serve.py:serve --model MODEL

A container (--image) needs --host 0.0.0.0 with --api_key_file, and a persistent --event_store: in a mount, or Redis.
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
    event_store: str = "a2gen-events.db",
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
        args: further options of `a2gen serve`, after `--`, such as `-- --batch-delay-ms 5`
        model: exported model directory from `a2gen export`, shared by all replicas
        host: address to listen on; containers need 0.0.0.0, which requires an API key
        port: port to listen on
        api_key_file: file of API keys, one a line
        event_store: event store: a SQLite file per replica, for containers in one of the mounts, or
            redis://HOST:PORT/NUMBER shared by all replicas
        replicas: number of processes, each on a separate host
        cpu: number of cores of each replica
        mem_mb: memory of each replica in MiB
        image: container image; empty for local_cwd and slurm, which run in this environment
        python: interpreter; empty uses TorchX's own, or the image's `python`
        max_retries: maximum number of restarts of a replica after a failure
        mounts: container volumes, such as `type=volume,src=NAME,dst=/data`
        name: name of the job
    """
    resources = app_def.JobResources(hosts=replicas, ranks=1, cpu=cpu, mem_mb=mem_mb, image=image, python=python)
    volumes = specs.parse_mounts(mounts.split(",")) if mounts else []
    if image:
        writable = [volume.dst_path for volume in volumes if not getattr(volume, "read_only", False)]
        _check_container(host, event_store, writable)
    keys = ["--api-key-file", api_key_file] if api_key_file else []
    options = ["--host", host, "--port", str(port), "--event-store", event_store, *keys]
    server = specs.Role(
        name="server",
        image=image,
        entrypoint=resources.python_executable,
        args=["-m", "a2gen_rec.cli", "serve", "--model", model, *options, *args],
        env={"PYTHONUNBUFFERED": "1"},
        num_replicas=replicas,
        max_retries=max_retries,
        port_map={"http": port},
        resource=specs.Resource(cpu=cpu, gpu=0, memMB=mem_mb),
        mounts=volumes,
    )
    return specs.AppDef(name=name, roles=[server])


def _check_container(host: str, event_store: str, writable: list[str]) -> None:
    """Raise a ResourceError for a service that is unreachable, or whose restart loses acknowledged events."""
    if host in ("127.0.0.1", "localhost", "::1"):
        raise app_def.ResourceError(f"--host {host} is unreachable from outside the container; use --host 0.0.0.0")
    if "://" not in event_store and not any(PurePosixPath(event_store).is_relative_to(path) for path in writable):
        raise app_def.ResourceError(
            f"--event_store {event_store} is lost with its container; use a file in one of --mounts, or redis://"
        )
