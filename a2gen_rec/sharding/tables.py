"""The embedding tables a dataset card and a model configuration ask for."""

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.schema import DatasetCard

ACTION, TIME, GAP = "action", "time_bucket", "gap_bucket"


def whole_tables(card: DatasetCard, config: ModelConfig) -> dict[str, int]:
    """Small tables, name -> rows, that every batch looks up whole.

    Each of their rows is read by thousands of tokens and, while decoding, by actions and times not known in
    advance. Looking a table's few rows up once per batch costs less than once per token, on any sharding.
    """
    return {ACTION: len(card.actions), TIME: config.time_buckets, GAP: config.time_buckets}


def table_rows(card: DatasetCard, config: ModelConfig) -> dict[str, int]:
    """Every table, name -> rows: one per user, item and context feature of the card, then the whole ones."""
    levels = ("user", "item", "context")
    return {x.name: x.cardinality for x in card.features if x.level in levels} | whole_tables(card, config)
