"""What a trained ranker predicts for session lists: the input of the ensemble (METHODS §6).

A user's targets of one session are taken as the candidates of one request and judged at its first moment, as they
would be when served: judged each at its own, a candidate would know what the user did with those before it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from a2gen_rec import paths
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.loader import split_files
from a2gen_rec.data.schema import EXIT, ITEM, WATCH_TIME, DatasetCard
from a2gen_rec.errors import DataError
from a2gen_rec.models.ensemble import Objective
from a2gen_rec.models.ranker import Encoded
from a2gen_rec.training.evaluate import evaluation_batches
from a2gen_rec.training.lists import Lists, concatenate, read_lists, write_lists
from a2gen_rec.training.observed import observed
from a2gen_rec.training.process import agreed, gather
from a2gen_rec.training.run import OpenRun

SCORES_VERSION = 1
"""Of what score files hold: raised whenever the same run and data would give others."""
SMALLEST = 1e-7
"""Probabilities are told apart from this to one less this: sums of float32 may leave [0, 1] by as much."""


def objectives(card: DatasetCard, tasks: tuple[str, ...]) -> tuple[Objective, ...]:
    """What a ranker predicts of a candidate, each once, and whether more of it is better.

    Glances and explicit negatives are better the fewer they are.

    Args:
        tasks: that the model predicts beside actions and labels.
    """
    less = {"glance", "negative", *card.negative}
    watch = [WATCH_TIME] if EXIT in card.timed else []
    names = [*card.events, *card.labels, *(task for task in tasks if task != WATCH_TIME), *watch]
    return tuple(Objective(name, "less" if name in less else "more") for name in names)


def behaviours(card: DatasetCard) -> tuple[str, ...]:
    """What users may do that is worth ranking for: actions, labels and effective views, none of them negative."""
    kept = [*card.events, *card.labels, *(name for name in card.objectives if name == "effective")]
    return tuple(name for name in kept if name not in card.negative)


def score_split(
    opened: OpenRun,
    split: str,
    folder: str,
    events: int,
    gap_s: float,
    progress: Callable[[int, int], None] | None = None,
) -> Lists | None:
    """The session lists of a split, scored by the run's model. All ranks call it; rank 0 gets the lists.

    Scores are kept in ``folder``, a file per file of the split; those already there are not made again.

    Args:
        events: most recent impressions before a list that go with it.
        gap_s: seconds between the begins of two impressions beyond which a list ends.
        progress: called with the number of files done and of all.

    Raises:
        UserError: the split has no windows, the folder cannot be written, or a file in it is damaged.
    """
    files = split_files(opened.data, split)
    with agreed():
        if not files:
            raise DataError(f"split {split!r} has no windows", file=paths.join(opened.data, split))
        if opened.process.leads:
            paths.make_folder(folder)
    made = []
    for number, file in enumerate(files):
        if progress is not None:
            progress(number, len(files))
        scored = paths.join(folder, file.rsplit("/", 1)[-1])
        # One rank's view counts: ranks that disagreed would wait for each other.
        if not gather(paths.exists(scored))[0]:
            lists = _score_file(opened, split, file, events, gap_s)
            with agreed():
                if opened.process.leads:
                    write_lists(scored, lists)
        made.append(scored)
    if progress is not None:
        progress(len(files), len(files))
    with agreed():
        return read_lists(made) if opened.process.leads else None


@torch.no_grad()
def _score_file(opened: OpenRun, split: str, file: str, events: int, gap_s: float) -> Lists:
    """The lists of one file, of all ranks, in the order of users and time: that of batches depends on the ranks."""
    card, config, process = opened.card, opened.config, opened.process
    batches = evaluation_batches(opened.data, split, card, config, process, request_gap_s=gap_s, file=file)
    opened.built.dmp.eval()
    parts = [_lists(opened, batch.to(process.device), events) for batch in batches]
    lists = concatenate([part for rank in gather(parts) for part in rank])
    return lists.take(np.lexsort((lists.ts_ms, lists.user)))


@dataclass(frozen=True)
class Judged:
    """Targets as a ranker sees them before anything happens in them.

    The watch time is the generator's, also where a head of its own predicts one: the generator's had the lower error
    on KuaiRand and the same on simulated data, and every ranker has it [ours].

    METHODS' events are ``[item ‖ category ‖ action]``. Here the item's embedding and the encoding of what the user did
    in it stand for them, which sees the category as it sees all the impression's context [ours].

    Attributes:
        encoded: see :class:`Encoded`.
        probability: [targets, events + labels + predicted objectives].
        watch_time: [targets] expected log1p seconds; NaN where the log does not record them.
        context: [targets, d_item] embeddings of what is shown.
        event: [keys, d_event] past impressions, each as its item's embedding and what the user did in it.
    """

    encoded: Encoded
    probability: Tensor
    watch_time: Tensor
    context: Tensor
    event: Tensor

    def value(self, with_watch_time: bool) -> Tensor:
        """[targets, objectives] float32 as the ensemble takes them: logits, and log1p seconds of a watch time."""
        logits = torch.logit(self.probability.double(), eps=SMALLEST).float()
        return torch.cat([logits, self.watch_time[:, None]], 1) if with_watch_time else logits


def judge(opened: OpenRun, batch: WindowBatch) -> Judged:
    """Predictions for a batch's targets, and what an ensemble needs besides."""
    model, ranker = opened.built.model, opened.built.model.ranker
    rows = model.embeddings(batch.sparse)
    actions = ranker.encode_actions(rows, batch)
    encoded = ranker.encode(rows, batch, actions)
    what = ranker.occurrence(encoded, opened.config.evaluate.max_error)
    outcomes = [what.probability[:, 1:-1], encoded.label_logits.sigmoid(), encoded.objective_logits.sigmoid()]
    item = rows[ITEM].values()[batch.index[ITEM]]
    return Judged(
        encoded=encoded,
        probability=torch.cat(outcomes, 1),
        watch_time=what.time[:, -1],
        context=ranker.shown(rows, batch),
        event=torch.cat([item[batch.key], actions], 1),
    )


def _lists(opened: OpenRun, batch: WindowBatch, events: int) -> Lists:
    """The lists of one batch of requests, scored."""
    card = opened.card
    judged = judge(opened, batch)
    moment, length = torch.unique_consecutive(batch.moment, return_counts=True)
    first = torch.cumsum(length, 0) - length
    seen, seen_length = events_before(batch, first, events)
    happened, _ = observed(batch, len(card.actions))
    outcome = {name: happened[:, code] for code, name in enumerate(card.actions)}
    outcome |= dict(zip(card.labels, batch.labels.T, strict=True))
    outcome |= dict(zip(card.objectives, batch.objectives.T, strict=True))

    def host(values: Tensor, kind: torch.dtype | None = None) -> np.ndarray:
        array: np.ndarray = (values if kind is None else values.to(kind)).cpu().numpy()
        return array

    wanted = behaviours(card)
    return Lists(
        objectives=tuple(objective.name for objective in objectives(card, opened.built.model.ranker.tasks)),
        behaviours=wanted,
        user=host(batch.user_key[batch.target_window[first]]),
        ts_ms=host(batch.ts_ms[moment]),
        length=host(length),
        events_length=host(seen_length),
        item=host(batch.ids(ITEM)[batch.target]),
        value=host(judged.value(EXIT in card.timed)),
        label=host(torch.stack([outcome[name] for name in wanted], 1), torch.float32),
        context=host(judged.context, torch.float16),
        events=host(judged.event[seen], torch.float16),
    )


def events_before(batch: WindowBatch, first: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Of the ``most`` keys right before each list, those that a ranker may see: that had begun before and ended.

    Oldest first.

    Args:
        first: [lists] first target of each.

    Returns:
        [events] keys of all lists, one list after another, and [lists] how many each has.
    """
    window, end = batch.target_window[first], batch.history_end[first]
    keys = torch.bincount(batch.key_window, minlength=batch.key_shape[0])
    column = end[:, None] + torch.arange(-most, 0, device=end.device)
    key = (torch.cumsum(keys, 0) - keys)[window][:, None] + column
    row, place = torch.nonzero(column >= 0, as_tuple=True)
    key, now = key[row, place], batch.ts_ms[batch.moment[first]][row]
    past = (batch.ts_ms[batch.key[key]] < now) & (batch.end_ms[batch.key[key]] <= now)
    return key[past], torch.bincount(row[past], minlength=len(first))
