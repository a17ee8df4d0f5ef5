"""Settings of the ranking service."""

import re
from dataclasses import dataclass

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, check_fields
from a2gen_rec.errors import ConfigError

ROOT_PATH = re.compile(r"((/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+)?")


@dataclass
class ServeConfig:
    """Network, batching, limits and caches of ``a2gen serve``."""

    host: str = "127.0.0.1"
    """Address to listen on; an address that other machines can reach requires an API key."""
    port: int = 8000
    """Port to listen on; 0 selects a free port."""
    root_path: str = ""
    """Path prefix under which a reverse proxy serves the service, for example /ranking. Removed from request paths;
    paths without it are accepted too."""
    event_store: str = "a2gen-events.db"
    """Event store: a SQLite file, created if absent, or redis://HOST:PORT/NUMBER."""
    api_key_file: str = ""
    """File of API keys, one a line; empty disables authentication."""
    num_workers: int = 1
    """Number of batches ranked concurrently. With 1, the server process ranks. With more, each worker is a process
    that uses one core and holds its own copy of the model."""
    batch_delay_ms: float = 0.0
    """Maximum time in ms that an idle worker waits for more requests to batch, if no other worker is idle. Requests
    that arrive while all workers are busy are batched anyway."""
    max_batch_candidates: int = 500
    """Maximum number of candidates in a batch; a single request may have more."""
    max_queued_candidates: int = 20_000
    """Maximum number of queued candidates; beyond it requests are rejected."""
    max_backlog_ms: float = 250.0
    """Maximum estimated time in ms to drain the queue at the recent throughput; beyond it requests are rejected."""
    max_concurrent_requests: int = 1000
    """Maximum number of concurrent requests, slow senders included; beyond it requests are rejected."""
    default_timeout_ms: int = 1000
    """Deadline in ms of requests that specify none."""
    max_body_kb: int = 1024
    """Maximum size of a request body in KiB."""
    read_timeout_s: float = 10.0
    """Maximum time in seconds to receive a request."""
    history_cache_mb: int = 256
    """Memory in MiB of encoded histories, of all workers together."""
    action_cache_mb: int = 256
    """Memory in MiB of the model's action states of past impressions, of all workers together."""
    pre_stop_delay_s: float = 0.0
    """Seconds between failing /readyz and refusing connections after SIGTERM, so that load balancers can react."""
    graceful_timeout_s: float = 10.0
    """Seconds after that delay for requests in progress to complete."""

    def __post_init__(self) -> None:
        limits = ("max_batch_candidates", "max_queued_candidates", "max_backlog_ms", "max_concurrent_requests")
        check_fields("serve", self, *POSITIVE, *limits, "max_body_kb")
        positive = ("num_workers", "default_timeout_ms", "read_timeout_s", "graceful_timeout_s")
        check_fields("serve", self, *POSITIVE, *positive)
        non_negative = ("batch_delay_ms", "history_cache_mb", "action_cache_mb", "pre_stop_delay_s")
        check_fields("serve", self, *NON_NEGATIVE, *non_negative)
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"serve.port {self.port} must be from 0 to 65535")
        if not ROOT_PATH.fullmatch(self.root_path) or self.root_path.split("/")[1:2] == ["v1"]:
            raise ConfigError(
                f"serve.root_path {self.root_path!r} must be empty or like /ranking: starting with / but not with /v1, "
                "ending without /, of letters, digits, dots, underscores, tildes and hyphens"
            )

    @property
    def history_cache_bytes(self) -> int:
        """Bytes of the history cache of each worker."""
        return self.history_cache_mb * 2**20 // self.num_workers

    @property
    def action_cache_bytes(self) -> int:
        """Bytes of the action cache of each worker."""
        return self.action_cache_mb * 2**20 // self.num_workers
