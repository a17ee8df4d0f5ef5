"""Words of column names and of event names, in the vocabulary of public and industrial logs."""

import re


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


ID_WORDS = _set("id ids key hash no code pk raw md5")
USERS = _list(
    """user uid userid member viewer visitor customer account reader listener buyer shopper subscriber consumer person
    client device did cookie session"""
)
ITEMS = _list(
    """item video vid photo clip product sku goods article news post note pin movie song track episode content document
    doc asin iid pid gid ad creative"""
)
"""Nouns of users and of items, the most specific ones first."""

MOMENTS = _set("timestamp ts time datetime at when vtime ctime")
DAYS = _set("date dt day ds hour hourmin hr minute month week weekday year")
STARTS = _set(
    "start started begin began show shown expose exposed event happened occurred impression view viewed visit"
)
STARTS |= _set("request log client")
OTHER_MOMENTS = _set(
    """upload uploaded create created publish published release released register registered birth update updated
    modified end ended expire expired finish leave exit ingest"""
)
ORDER_WORDS = _set("step sequence seq order position index")

WATCHES = _set("dwell watch watched play played playing playback")
WEAK_WATCHES = _set("view viewed viewing watching stay stayed spent listen listened consumed")
DURATIONS = _set("duration length len dur runtime")
LENGTHS_OF_TIME = DURATIONS | {"time", "span", "total", "real"}
UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("ms", "msec", "millis", "millisecond", "milliseconds"), "ms"),
}
LISTS = _set("tag tags hashtag hashtags topic topics keyword keywords genre genres category categories")
"""Nouns of columns whose text may have several values."""
COUNTS = _set("count cnt num number counts total")
SHARES = _set("ratio rate percent percentage pct progress completion rating")
SIZES = COUNTS | SHARES | LENGTHS_OF_TIME | WATCHES
SIZES |= _set("age size height width price score position rank index days amount level")

ACTIONS = {
    "like": ("like", "liked", "likes", "thumb", "upvote", "digg"),
    "follow": ("follow", "followed", "subscribe", "subscribed"),
    "comment": ("comment", "commented", "comments", "reply", "replied"),
    "share": ("share", "shared"),
    "forward": ("forward", "forwarded", "repost", "reposted", "retweet"),
    "collect": ("collect", "collected", "favorite", "favorited", "favourite", "fav", "bookmark", "save", "saved"),
    "download": ("download", "downloaded"),
    "cart": ("cart", "basket"),
    "order": ("order", "ordered", "checkout"),
    "purchase": ("purchase", "purchased", "buy", "bought", "pay", "paid", "transaction"),
    "profile": ("profile", "homepage"),
    "gift": ("gift", "reward", "coin", "tip"),
    "hate": ("hate", "hated", "dislike", "disliked", "uninterested"),
    "report": ("report", "reported"),
    "block": ("block", "blocked"),
}
"""Name of an action -> words."""
ACTION_OF = {word: name for name, words in ACTIONS.items() for word in words}
NEGATIVE = _set("hate report block")
LABELS = _set(
    """click clicked clk clicks valid effective finish finished complete completed skip skipped long converted
    conversion label target"""
)
OFFSETS = _set("after at offset time delay since")
FLAG_WORDS = _set("is has did if flag label")

EVENT_COLUMNS = _set("action event behavior behaviour interaction activity operation verb btag")
OPENS = _list(
    "impression exposure expose exposed show shown open start view detail pv click clk play enter visit read watch"
)
"""Words of events that start an impression, the earliest ones first."""
CLOSES = _set("leave left exit close closed end stop quit")


def words(name: str) -> list[str]:
    """Return the words of a name in lower case: ``playTimeMs`` has three, ``userid`` and ``user_id`` have two."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    parts = [part for part in re.split(r"[\W_]+", spaced) if part]
    return [word for part in parts for word in _without_id(part)]


def _without_id(word: str) -> list[str]:
    noun = word.removesuffix("id")
    return [noun, "id"] if word != noun and noun in (*USERS, *ITEMS) else [word]


def identifier_score(name: str, nouns: tuple[str, ...]) -> int:
    """Return how clearly a name is that of users or items; 0 if it is not."""
    parts = words(name)
    rest = [word for word in parts if word not in ID_WORDS]
    if not rest or rest[-1] not in nouns or len(rest) > 2:
        return 0
    return 200 - 100 * (len(rest) - 1) - 2 * nouns.index(rest[-1]) + (len(rest) < len(parts))


def unit_of(name: str) -> str:
    """Return the unit of a duration by its name; empty if the name has none."""
    return next((UNITS[word] for word in reversed(words(name)) if word in UNITS), "")


def action_of(name: str) -> str:
    """Return the action that a name contains; empty if there is none."""
    return next((ACTION_OF[word] for word in words(name) if word in ACTION_OF), "")


def may_be_outcome(name: str) -> bool:
    """Return whether a column's name suggests an outcome of the impression."""
    return bool(set(words(name)) & (WATCHES | WEAK_WATCHES | ACTION_OF.keys() | LABELS | SHARES))
