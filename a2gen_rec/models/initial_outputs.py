"""Initial outputs of networks with one output per outcome and per time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from a2gen_rec.data.card import DatasetCard


def initial_outputs(card: DatasetCard, occurrences: Sequence[str]) -> Tensor:
    """Return [occurrences + timed actions] log-odds of training rates, then log1p seconds of training medians.

    Args:
        card: Dataset card.
        occurrences: Actions, labels and objectives.
    """
    rates = torch.tensor([card.base_rate[name] for name in occurrences])
    timed = [name for name in card.actions if name in card.timed_actions]
    seconds = torch.tensor([card.median_time_s.get(name, 0.0) for name in timed]).nan_to_num()
    return torch.cat([torch.logit(rates, eps=1e-4), torch.log1p(seconds)])
