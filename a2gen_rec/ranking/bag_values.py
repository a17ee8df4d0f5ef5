"""Raw values of multi-valued features in requests, and their encoded rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from a2gen_rec.data.bags import Bags
from a2gen_rec.data.text import value_text
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.checks import describe_value, is_number


def check_bag(value: object, name: str) -> None:
    """Check that a value is missing, a list of texts or numbers, or a mapping of texts to weights.

    Raises:
        UserError: It is not.
    """
    if value is None:
        return
    if isinstance(value, Mapping):
        for text, weight in value.items():
            if not isinstance(text, str) or not (is_number(weight) and 0 <= weight < math.inf):
                raise UserError(f"{name}: weights must be numbers of at least 0, not {describe_value(weight)}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            if not isinstance(each, str) and not is_number(each):
                raise UserError(f"{name} must be a list of texts, not of {describe_value(each)}")
    else:
        raise UserError(f"{name} must be a list of texts, not {describe_value(value)}")


def bag_entries(value: Any) -> list[dict[str, Any]] | None:
    """Return a checked value as ``bag_sql.VALUES_TYPE``, as sources do; None if it is missing or empty."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        weights = {text: float(weight) for key, weight in value.items() if (text := value_text(key)) and weight > 0}
    else:
        weights = {text: 1.0 for each in value if (text := value_text(each))}
    return [{"value": text, "weight": weights[text]} for text in sorted(weights)] or None


def known_rows(entries: Sequence[Mapping[str, Any]] | None, rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the entries with a row in the vocabulary ``rows`` as ``bag_sql.ROWS_TYPE``."""
    return [
        {"row": rows[entry["value"]], "weight": entry["weight"]} for entry in entries or () if entry["value"] in rows
    ]


def bags_of_rows(ids: np.ndarray, weights: np.ndarray | None) -> Bags:
    """Return the bags of the query results ``ids`` and ``weights``, [bags] object arrays of lists."""
    lengths = np.array([len(part) for part in ids], np.int64)
    values = np.concatenate([np.zeros(0), *ids]).astype(np.int64)
    if weights is None:
        return Bags(lengths, values, np.ones(len(values), np.float32))
    return Bags(lengths, values, np.concatenate([np.zeros(0), *weights]).astype(np.float32))
