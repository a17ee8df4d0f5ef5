"""Canonical order of an impression's actions, which removes the information which action came first [ours].

Order is contained in the actions' times and in the sequence in which a generator emits them. Both are canonicalized
here: actions are sorted by the vocabulary, with ``start`` first and ``exit`` last, and the recorded times are assigned
to them in that order, earliest first.
"""

import torch
from torch import Tensor


def sequence_ids(action: Tensor) -> Tensor:
    """Return [tokens] the sequence of each token of ``action`` [tokens]; sequences begin with ``start``."""
    return (action == 0).cumsum(0) - 1


def sort_by_vocabulary(action: Tensor, sequence: Tensor, num_actions: int) -> Tensor:
    """Return the permutation [tokens] that sorts the tokens of each sequence by code.

    Args:
        action: [tokens] codes below ``num_actions``, each at most once in a sequence.
        sequence: [tokens] sequence of each token, ascending.
        num_actions: Size of the vocabulary.
    """
    return torch.argsort(sequence * num_actions + action)


def canonicalize_order(action: Tensor, offset_s: Tensor, num_actions: int) -> tuple[Tensor, Tensor]:
    """Return the actions and times in canonical order, independent of which action came first.

    An action without a time keeps a missing time; ``start`` and ``exit`` keep theirs.

    Args:
        action: [tokens] codes of concatenated sequences.
        offset_s: [tokens] seconds; NaN if missing.
        num_actions: Size of the vocabulary.

    Returns:
        The same codes and times, [tokens] each, sorted by the vocabulary.
    """
    sequence = sequence_ids(action)
    order = sort_by_vocabulary(action, sequence, num_actions)
    action, offset_s = action[order], offset_s[order]
    is_inner = torch.isfinite(offset_s) & (action > 0) & (action < num_actions - 1)
    index = is_inner.nonzero().squeeze(1)
    ascending = torch.argsort(offset_s[index], stable=True)
    ascending = ascending[torch.argsort(sequence[index][ascending], stable=True)]
    return action, offset_s.index_copy(0, index, offset_s[index][ascending])
