"""Settings of the ranking service."""

from dataclasses import dataclass

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, check_fields
from a2gen_rec.errors import ConfigError


@dataclass
class ServeConfig:
    """How ``a2gen serve`` takes requests and what bounds them.

    Attributes:
        host: address to listen on; any that other machines can reach needs an API key.
        port: to listen on; 0 takes a free one.
        store: of what users did: a SQLite file, made if absent, or redis://HOST:PORT/NUMBER.
        api_key_file: file of keys, one a line, each of which lets a caller in; empty asks for none.
        workers: batches ranked at a time. With one, this process ranks; more are processes of their own, which take a
            core each, and each hold the model as this one does.
        max_wait_ms: for which a free worker waits, from when a request came, for others to rank it with, if no other
            worker is free. Those that come while all are busy are ranked together anyway.
        max_batch: candidates ranked together; one request may have more.
        max_waiting: candidates that may wait in all; further requests are refused.
        max_queue_ms: for which those that wait may take to rank, by the speed of late; further requests are refused.
        max_requests: requests in progress at a time, slow senders included; further ones are refused.
        timeout_ms: for which a request may wait and be ranked, where it does not say itself.
        max_body_kb: largest request, in KiB.
        read_timeout_s: for which a client may take to send a request.
        history_cache_mb: memory of encoded histories, of all workers, in MiB.
        state_cache_mb: the same of the model's states of past impressions.
        notice_s: after SIGTERM, for which /readyz says no and requests are still taken, that balancers may notice.
        drain_s: after it, for which requests in progress may take to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    event_store: str = "a2gen-events.db"
    api_key_file: str = ""
    num_workers: int = 1
    batch_delay_ms: float = 0.0
    max_batch_candidates: int = 500
    max_queued_candidates: int = 20_000
    max_backlog_ms: float = 250.0
    max_concurrent_requests: int = 1000
    default_timeout_ms: int = 1000
    max_body_kb: int = 1024
    read_timeout_s: float = 10.0
    history_cache_mb: int = 256
    action_cache_mb: int = 256
    pre_stop_delay_s: float = 0.0
    graceful_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        check_fields(
            "serve",
            self,
            *POSITIVE,
            "max_batch_candidates",
            "max_queued_candidates",
            "max_backlog_ms",
            "max_concurrent_requests",
            "max_body_kb",
        )
        check_fields(
            "serve", self, *POSITIVE, "num_workers", "default_timeout_ms", "read_timeout_s", "graceful_timeout_s"
        )
        check_fields(
            "serve", self, *NON_NEGATIVE, "batch_delay_ms", "history_cache_mb", "action_cache_mb", "pre_stop_delay_s"
        )
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"serve.port {self.port} must be from 0 to 65535")

    @property
    def history_cache_bytes(self) -> int:
        """Of each worker."""
        return self.history_cache_mb * 2**20 // self.num_workers

    @property
    def state_cache_bytes(self) -> int:
        """Of each worker."""
        return self.action_cache_mb * 2**20 // self.num_workers
