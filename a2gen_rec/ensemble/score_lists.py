"""What a trained ranker predicts for session lists: the input of the ensemble (METHODS §6).

A user's targets of one session are taken as the candidates of one request and judged at its first moment, as they
would be when served: judged each at its own, a candidate would know what the user did with those before it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.loader import split_files
from a2gen_rec.data.schema import EXIT, ITEM, DatasetCard
from a2gen_rec.ensemble.session_lists import Lists, concatenate, read_lists, write_lists
from a2gen_rec.errors import DataError
from a2gen_rec.evaluation.evaluate import evaluation_batches
from a2gen_rec.losses.targets import observed
from a2gen_rec.models.scoring import events_before, judge, objectives
from a2gen_rec.training.loaded_run import OpenRun
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import agreed, gather

SCORES_VERSION = 2
"""Of what score files hold: raised whenever the same run and data would give others."""


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


def _lists(opened: OpenRun, batch: WindowBatch, events: int) -> Lists:
    """The lists of one batch of requests, scored."""
    card = opened.card
    model = opened.built.model
    judged = judge(model.embeddings(batch.sparse), model.ranker, batch, opened.config.evaluate.max_error)
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
        objectives=tuple(objective.name for objective in objectives(card, model.ranker.tasks)),
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
