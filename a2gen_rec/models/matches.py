"""Item features that a target and an impression of the history share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.utils.jagged import jagged_to_padded_dense


def item_matches(batch: WindowBatch, features: Sequence[str], with_history: bool = False) -> Tensor:
    """Return [windows, features, rows, max keys] bool, whether a row and an impression of the history share a feature.

    Two lists of values match if they share a value. Row 0, an unknown value, matches nothing.

    Args:
        batch: Targets and their history.
        features: Item features.
        with_history: Whether the history's impressions precede the targets as rows.
    """

    def rows_and_keys(ids: Tensor) -> tuple[Tensor, Tensor]:
        target = ids[batch.target]
        padded = jagged_to_padded_dense(target, batch.target_window, batch.target_column, batch.target_shape)
        keys = ids[batch.history_index]
        history = jagged_to_padded_dense(keys, batch.history_window, batch.history_column, batch.history_shape)
        return torch.cat([history, padded], dim=1) if with_history else padded, history

    single = [name for name in features if name not in batch.bags]
    matches = [feature_matches(*rows_and_keys(torch.stack([batch.ids(name) for name in single], dim=-1)))]
    for name in features:
        if name in batch.bags:
            rows, keys = rows_and_keys(batch.bags[name].to_dense(batch.ids(name)))
            # One value against one value at a time, as a list is short.
            pairs = [
                feature_matches(rows[..., i : i + 1], keys[..., j : j + 1])
                for i in range(rows.shape[-1])
                for j in range(keys.shape[-1])
            ]
            matches.append(torch.stack(pairs).any(0))
    if len(matches) == 1:
        return matches[0]
    by_name = dict(zip([*single, *(name for name in features if name in batch.bags)], _columns(matches), strict=True))
    return torch.cat([by_name[name] for name in features], dim=1)


def _columns(matches: Sequence[Tensor]) -> list[Tensor]:
    """Return the matches of each feature, [windows, 1, rows, max keys]."""
    first, *others = matches
    return [*first.split(1, dim=1), *(match if match.ndim == 4 else match[:, None] for match in others)]


def feature_matches(rows: Tensor, history: Tensor) -> Tensor:
    """Return [windows, features, rows, max keys] bool, whether a row and an impression of the history share a feature.

    Args:
        rows: [windows, rows, features] table rows. Row 0, an unknown value, matches nothing.
        history: [windows, max keys, features] table rows.
    """
    known = rows.masked_fill(rows == 0, -1)
    # Contiguous copies: comparing along a strided axis is several times slower on CPU.
    known, history = (ids.movedim(-1, 1).contiguous() for ids in (known, history))
    return known[..., None] == history[:, :, None]
