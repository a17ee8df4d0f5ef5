"""Open an event store by its path or address."""

from a2gen_rec.errors import UserError
from a2gen_rec.serving.stores.base import EventStore


def open_store(where: str) -> EventStore:
    """The store at a path (SQLite) or at a ``redis://`` address.

    Raises:
        UserError: it cannot be opened, is no such store, or of a newer version.
    """
    if where.startswith(("redis://", "rediss://")):
        try:
            from a2gen_rec.serving.stores.redis import RedisStore
        except ModuleNotFoundError:
            raise UserError(f"{where}: needs Redis's client: pip install 'a2gen_rec[redis]'") from None
        return RedisStore(where)
    if "://" in where or not where:
        raise UserError(f"store {where!r}: neither a file on this machine nor an address redis://HOST:PORT/NUMBER")
    from a2gen_rec.serving.stores.sqlite import SqliteStore

    return SqliteStore(where)
