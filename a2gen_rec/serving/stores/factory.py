"""Open an event store by its path or address."""

from a2gen_rec.errors import UserError
from a2gen_rec.serving.stores.base import EventStore


def open_store(location: str) -> EventStore:
    """Open the store at a local path (SQLite) or at a ``redis://`` address.

    Raises:
        UserError: It cannot be opened, is not an event store, or has an unsupported version.
    """
    if location.startswith(("redis://", "rediss://")):
        try:
            from a2gen_rec.serving.stores.redis import RedisStore
        except ModuleNotFoundError:
            raise UserError(f"{location}: requires the Redis client: pip install 'a2gen_rec[redis]'") from None
        return RedisStore(location)
    if "://" in location or not location:
        raise UserError(f"event_store {location!r} must be a local file path or redis://HOST:PORT/DB")
    from a2gen_rec.serving.stores.sqlite import SqliteStore

    return SqliteStore(location)
