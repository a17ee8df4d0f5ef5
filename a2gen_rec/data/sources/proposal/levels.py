"""Level of a proposed feature, by how its values vary within items and users."""

from typing import Literal

from a2gen_rec.data.sources.proposal.profiles import Variation

Level = Literal["user", "item", "context"]


def level_of(by_item: Variation | None, by_user: Variation | None) -> tuple[Level, str]:
    """Return the level at which a column is constant, of two the one with more evidence; else the context."""
    item_groups = by_item.groups if by_item and by_item.is_constant else 0
    user_groups = by_user.groups if by_user and by_user.is_constant else 0
    if item_groups >= user_groups and by_item and item_groups:
        return "item", _evidence(by_item, "items")
    if by_user and user_groups:
        return "user", _evidence(by_user, "users")
    if not (by_item and by_item.groups) and not (by_user and by_user.groups):
        return "context", "guess: no item and no user has several rows"
    return "context", "varies within items and users"


def _evidence(variation: Variation, entities: str) -> str:
    exceptions = f", except {variation.varying:,}" if variation.varying else ""
    return f"one value in each of {variation.groups:,} {entities}{exceptions}"
