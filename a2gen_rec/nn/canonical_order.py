"""Actions of an impression as a set: which of them came first is told by nothing [ours].

What carries order are the actions' times, and the sequence in which a generator emits them. Both are set right here:
actions take the vocabulary's order, in which ``start`` is first and ``exit`` last, and recorded times are dealt to
them in that order, earliest first.
"""

import torch
from torch import Tensor


def sequence_ids(action: Tensor) -> Tensor:
    """[tokens] number of the sequence that each token of ``action`` [tokens] is in; each begins with ``start``."""
    return (action == 0).cumsum(0) - 1


def sort_by_vocabulary(action: Tensor, owner: Tensor, actions: int) -> Tensor:
    """[tokens] the places of the tokens, sequence by sequence, in the order of their codes.

    Args:
        action: [tokens] codes below ``actions``, each at most once in a sequence; owner: [tokens] ascending.
    """
    return torch.argsort(owner * actions + action)


def canonicalize_order(action: Tensor, offset_s: Tensor, actions: int) -> tuple[Tensor, Tensor]:
    """What happened and at what times, but not which action came first.

    An action whose time is missing keeps a missing time; ``start`` and ``exit`` keep theirs.

    Args:
        action, offset_s: [tokens] of sequences one after another; actions: size of the vocabulary.

    Returns:
        The same codes and times, [tokens] each, in the vocabulary's order.
    """
    owner = sequence_ids(action)
    place = sort_by_vocabulary(action, owner, actions)
    action, offset_s = action[place], offset_s[place]
    between = torch.isfinite(offset_s) & (action > 0) & (action < actions - 1)
    at = between.nonzero().squeeze(1)
    ascending = torch.argsort(offset_s[at], stable=True)
    ascending = ascending[torch.argsort(owner[at][ascending], stable=True)]
    return action, offset_s.index_copy(0, at, offset_s[at][ascending])
