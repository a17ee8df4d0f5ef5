"""Server process: socket, signals and log."""

import asyncio
import ipaddress
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
import uvloop
from starlette.types import ASGIApp

from a2gen_rec.config.serving import ServeConfig
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.serving.engine.service import ModelLoadError, RankingService
from a2gen_rec.serving.http.app import create_app
from a2gen_rec.serving.http.connection import BoundedHttpProtocol
from a2gen_rec.serving.logs import configure_logging
from a2gen_rec.serving.stores.factory import open_store
from a2gen_rec.utils import paths

KEEP_ALIVE_S = 20
BACKLOG = 2048
MIN_KEY_LENGTH = 16
THREAD_SWITCH_INTERVAL_S = 0.0002
"""Interval after which a thread releases the GIL to another. Ranking releases it in hundreds of operations, and would
wait 5 ms each time (Python's default) while the event loop is busy."""

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn server with this package's protocol and log; the caller handles signals.

    Args:
        app: The application.
        graceful_timeout_s: Maximum seconds for requests in progress at shutdown.
    """

    def __init__(self, app: ASGIApp, graceful_timeout_s: float) -> None:
        config = uvicorn.Config(
            app,
            http=BoundedHttpProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(graceful_timeout_s)),
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(model: str, config: ServeConfig, log: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads the API keys and the model.

    Args:
        model: See :class:`RankingService`.
        config: Settings.
        log: Called with the address once requests are accepted.

    Raises:
        ConfigError: The address can be reached by other machines, and there is no API key.
        UserError: The model, the store or the keys cannot be used, or the port is in use.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until a model is loaded
    configure_logging()
    keys = read_keys(config.api_key_file) if config.api_key_file else []
    listening = bind_socket(config.host, config.port)
    with listening:
        address = listening.getsockname()
        if not keys and not ipaddress.ip_address(address[0]).is_loopback:
            raise ConfigError(f"binding to {config.host} requires --api-key-file")
        service = RankingService(model, partial(open_store, config.event_store), config)
        _raise_fd_limit()
        sys.setswitchinterval(THREAD_SWITCH_INTERVAL_S)
        host = f"[{address[0]}]" if ":" in address[0] else address[0]

        def ready() -> None:
            log(f"model {service.ranker.version} at http://{host}:{address[1]}")

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(service, create_app(service, keys), keys, listening, ready))


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address.

    Raises:
        UserError: The address is invalid or in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(BACKLOG)  # now, so that no other process takes the port while the model is loading
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror or error})") from error
    return bound


def read_keys(file: str) -> list[str]:
    """Return the API keys of a file, one per line; empty lines and lines that start with # are ignored.

    Raises:
        UserError: The file has no key, or an invalid one.
    """
    lines = [line.strip() for line in paths.read_text(file).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UserError(f"{file}: no API key; expected one per line")
    if any(len(key) < MIN_KEY_LENGTH or not key.isascii() for key in keys):
        raise UserError(f"{file}: API keys must have at least {MIN_KEY_LENGTH} ASCII characters")
    return keys


async def _serve(
    service: RankingService, app: ASGIApp, keys: list[str], listening: socket.socket, ready: Callable[[], None]
) -> None:
    server, loop = Server(app, service.config.graceful_timeout_s), asyncio.get_running_loop()
    tasks = set()

    def shut_down(delay_s: float) -> None:
        service.draining = True
        loop.call_later(delay_s, setattr, server, "should_exit", True)

    def reload() -> None:
        tasks.add(task := asyncio.ensure_future(_reload(service, keys)))
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGTERM, shut_down, service.config.pre_stop_delay_s)
    loop.add_signal_handler(signal.SIGINT, shut_down, 0.0)
    loop.add_signal_handler(signal.SIGHUP, reload)
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        ready()
    await serving


async def _reload(service: RankingService, keys: list[str]) -> None:
    """Reload the keys, which the application shares, and the model."""
    try:
        if service.config.api_key_file:
            keys[:] = await asyncio.to_thread(read_keys, service.config.api_key_file)
    except UserError as error:
        log.error("keeping previous API keys: %s", error)
    try:
        version, previous = await service.reload()
    except ModelLoadError:
        return  # already logged
    if version == previous:
        log.warning("model %s already loaded", version)


def _raise_fd_limit() -> None:
    """Raise the limit of file descriptors: every connection needs one, and the soft limit is low."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
