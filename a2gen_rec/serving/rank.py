"""Ranking candidates for one user with a trained run (``a2gen rank``).

The user's recent impressions and all candidates form one window whose targets are alternatives for one moment, so
the history is read once and the factorised attention (METHODS §2.1) answers for every candidate together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from a2gen_rec import paths
from a2gen_rec.data.batch import ALL, collate
from a2gen_rec.data.columns import WindowColumns, read_table, read_user, take_windows
from a2gen_rec.data.schema import EXIT, FEEDBACK, ITEM, ITEM_STATISTICS, SPLITS, UNKNOWN, WATCH_TIME, DatasetCard
from a2gen_rec.data.sessions import session_rows
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.models.ensemble import Ensemble, EnsembleOutput, Objective
from a2gen_rec.serving.explain import Contribution
from a2gen_rec.serving.timelines import likely_timelines
from a2gen_rec.sharding.tables import whole_tables
from a2gen_rec.training import ensemble_run
from a2gen_rec.training.ensemble_store import EnsembleCard
from a2gen_rec.training.run import Device, OpenRun, open_run
from a2gen_rec.training.scores import events_before, judge, objectives

ITEMS = "items.parquet"
WATCH, ENSEMBLE = "watch", "ensemble"
POPULAR = 100


@dataclass(frozen=True)
class Candidate:
    """What is predicted should the user be shown an item.

    Attributes:
        item: raw identifier; ``known``: whether the dataset has it, else it is ranked by "unknown" features.
        probability: of every action, label and predicted objective.
        expected_watch_s: expected watch time in seconds (the mean in log1p seconds, brought back); None where the
            log does not record it.
        timeline: the most probable action sequence, ``start`` to ``exit``, with seconds since the impression
            began; None for actions whose times the log does not record. Empty if the model generates none.
        timeline_probability: of that sequence of actions; NaN without.
        score: the ensemble's, whose parts are the ``explanation``; NaN and none without one.
    """

    item: str
    known: bool
    probability: dict[str, float]
    expected_watch_s: float | None
    timeline: list[tuple[str, float | None]]
    timeline_probability: float
    score: float = math.nan
    explanation: list[Contribution] = field(default_factory=list)


@dataclass(frozen=True)
class Ranking:
    """The best candidates for one user.

    Attributes:
        user: raw identifier; ``user_known``: whether the dataset has any impression of this user.
        history: past impressions the ranking rests on.
        by: ``ensemble`` (its score), ``watch`` (expected watch time) or the outcome whose probability orders the
            candidates.
        least_first: whether less of that is better, as of glances and explicit negatives: the least likely come first.
        ranked: candidates there were; unknown_items: those of them that the dataset does not have.
        candidates: the best of them, best first.
    """

    user: str
    user_known: bool
    history: int
    by: str
    ranked: int
    unknown_items: int
    candidates: list[Candidate]
    least_first: bool = False


@dataclass(frozen=True)
class Items:
    """Items to rank: raw identifiers ``raw`` and ``known``, [items]; item feature -> [items] table ``rows``."""

    raw: list[str]
    known: np.ndarray
    rows: dict[str, np.ndarray]


def rank(
    run: str,
    user: str,
    candidates: str = "",
    by: str = "",
    top: int = 10,
    data: str = "",
    device: Device = "auto",
    ensemble: str = "",
) -> Ranking:
    """Rank candidates for a user by a run's best checkpoint, right after the user's last impression.

    Args:
        run: the run's folder.
        user: raw identifier; one that the dataset does not have is ranked for without history.
        candidates: file of raw item identifiers, one a line; by default the items most shown in training.
        by: ``ensemble``, ``watch``, or an outcome; by default the first of these that there is. Where less is better
            (glances, explicit negatives), the least likely come first.
        top: how many of the best to return.
        data: dataset folder; by default the run's own.
        ensemble: its folder; by default the run's own, if it has one.

    Raises:
        UserError: no such run or file, no candidate, nothing of the name ``by``; the dataset breaks its contract; the
            ensemble is of another checkpoint.
    """
    wanted = read_candidates(candidates) if candidates else []
    with open_run(run, data, device) as opened:
        card = opened.card
        fused = _ensemble(opened, run, ensemble)
        by = order_by(card, by, opened.built.model.ranker.tasks, fused is not None)
        items = find_items(opened.data, card, wanted) if wanted else popular_items(opened.data, card, POPULAR)
        window = latest_window(opened.data, card, user)
        history = no_history(card) if window is None else window
        seen = min(len(history.ts_ms), opened.built.model.ranker.history)
        best = best_candidates(opened, history, items, by, top, fused)
        least_first = by in _less(objectives(card, opened.built.model.ranker.tasks))
    unknown = int((~items.known).sum())
    return Ranking(user, window is not None, seen, by, len(items.raw), unknown, best, least_first)


def read_candidates(file: str) -> list[str]:
    """Raw item identifiers of a file, one a line, each once, in order.

    Raises:
        UserError: the file cannot be read or has no identifier.
    """
    names = (line.strip() for line in paths.read_text(file).splitlines())
    found = list(dict.fromkeys(name for name in names if name))
    if not found:
        raise UserError(f"{file}: no candidates; put one raw item identifier on each line")
    return found


def order_by(card: DatasetCard, by: str, tasks: Sequence[str] = (), fused: bool = False) -> str:
    """What to rank by, ``by`` or the default.

    Args:
        tasks: that the model predicts beside actions and labels; fused: whether there is an ensemble.

    Raises:
        ConfigError: there is nothing of that name.
    """
    outcomes = [*card.events, *card.labels, *(name for name in card.objectives if name in tasks)]
    choices = [*([ENSEMBLE] if fused else []), *([WATCH] if EXIT in card.timed else []), *outcomes]
    if by == ENSEMBLE and not fused:
        raise ConfigError("cannot rank by ensemble: the run has none; `a2gen train-ensemble` trains one")
    if by not in [*choices, ""]:
        raise ConfigError(f"cannot rank by {by!r}; this run predicts {', '.join(choices)}")
    if not choices:
        raise UserError(f"the dataset {card.name!r} has no action, label or watch time to rank by")
    return by or choices[0]


def find_items(data: str, card: DatasetCard, raw: Sequence[str]) -> Items:
    """Table rows of raw item identifiers; row 0 of every item feature for those the dataset does not have.

    Raises:
        DataError: ``items.parquet`` is not there or breaks its contract.
    """
    wanted = pa.array(raw, pa.string())
    table = _read_items(data, card, pc.field("item").isin(wanted))
    place = pc.index_in(wanted, table["item"].combine_chunks())
    known = place.is_valid().to_numpy(zero_copy_only=False)
    at = place.filter(place.is_valid()).to_numpy()
    rows = {}
    for feature in card.at_level("item"):
        rows[feature.name] = np.zeros(len(raw), np.int64)
        rows[feature.name][known] = table[feature.name].to_numpy()[at]
    return Items(list(raw), known, rows)


def popular_items(data: str, card: DatasetCard, count: int) -> Items:
    """The ``count`` items shown most in training, most shown first.

    Raises:
        DataError: ``item_statistics.parquet`` or ``items.parquet`` is not there or breaks its contract.
    """
    file = paths.join(data, ITEM_STATISTICS)
    shown = read_table(file, [ITEM, "impressions"], pc.field(ITEM) > 0)  # row 0 is many items, not one
    most = shown.sort_by([("impressions", "descending"), (ITEM, "ascending")])[ITEM].combine_chunks()[:count]
    table = _read_items(data, card, pc.field(ITEM).isin(most))
    # Hashed items may share a row: they keep their order in the file.
    order = np.argsort(pc.index_in(table[ITEM].combine_chunks(), most).to_numpy(), kind="stable")[:count]
    if not len(order):
        raise DataError("no item with training impressions to rank by default; give --candidates", file=file)
    table = table.take(order)
    rows = {feature.name: table[feature.name].to_numpy() for feature in card.at_level("item")}
    return Items(table["item"].to_pylist(), np.ones(len(order), bool), rows)


def latest_window(data: str, card: DatasetCard, user: str) -> WindowColumns | None:
    """The last window of a user in the latest split that has any, as columns of one window; None without one.

    Raises:
        DataError: a file of the dataset breaks the contract.
    """
    for split in reversed(SPLITS):
        folder = paths.join(data, split)
        files = [paths.join(folder, name) for name in paths.listdir(folder) if name.endswith(".parquet")]
        windows = read_user(files, card, user)
        if windows is not None:
            last = windows.ts_ms[windows.starts + windows.lengths - 1]
            return take_windows(windows, np.array([np.argmax(last)]))
    return None


def no_history(card: DatasetCard) -> WindowColumns:
    """One window of an unknown user, without any impression."""
    one, none = np.zeros(1, np.int64), np.zeros(0, np.int64)
    return WindowColumns(
        user_key=one,
        first_target=one,
        starts=one,
        lengths=one,
        user_ids={feature.name: one for feature in card.at_level("user")},
        impression_ids={feature.name: none for feature in [*card.at_level("item"), *card.at_level("context")]},
        session={feature.name: none for feature in card.at_level("session")},
        outcome={feature.name: none for feature in card.at_level("outcome")},
        ts_ms=none,
        end_ms=none,
        labels=np.zeros((0, len(card.labels)), np.float32),
        objectives=np.zeros((0, len(card.objectives)), np.float32),
        oracle=np.zeros((0, 0), np.float32),
        action_starts=none,
        action_lengths=none,
        action=none,
        offset_s=np.zeros(0, np.float32),
    )


def with_candidates(history: WindowColumns, items: Items, card: DatasetCard) -> WindowColumns:
    """One window: all of ``history`` (one window too), then every item at one moment, a second after its last end.

    Context features are those of the last impression, row 0 without any; session features are those of this moment, as
    far as the window reaches back [ours]. What the user would do is not known: a placeholder stands for it, which no
    prediction reads.
    """
    seen, count = len(history.ts_ms), len(items.raw)
    now = history.end_ms.max() + 1000 if seen else 0

    def then(past: np.ndarray, value: object) -> np.ndarray:
        return np.concatenate([past, np.broadcast_to(np.asarray(value, past.dtype), (count, *past.shape[1:]))])

    item = {name: np.concatenate([history.impression_ids[name], rows]) for name, rows in items.rows.items()}
    context = {
        feature.name: then(
            history.impression_ids[feature.name], history.impression_ids[feature.name][-1] if seen else 0
        )
        for feature in card.at_level("context")
    }
    session = _session(history, now, card)
    action_lengths = then(history.action_lengths, 2)
    return replace(
        history,
        first_target=np.array([seen]),
        starts=np.zeros(1, np.int64),
        lengths=np.array([seen + count]),
        impression_ids=item | context,
        session={name: then(history.session[name], row) for name, row in session.items()},
        outcome={name: then(rows, UNKNOWN) for name, rows in history.outcome.items()},
        ts_ms=then(history.ts_ms, now),
        end_ms=then(history.end_ms, now),
        labels=then(history.labels, np.nan),
        objectives=then(history.objectives, np.nan),
        oracle=then(history.oracle, np.nan),
        action_starts=np.cumsum(action_lengths) - action_lengths,
        action_lengths=action_lengths,
        action=np.concatenate([history.action, np.tile([0, len(card.actions) - 1], count)]),
        offset_s=np.concatenate([history.offset_s, np.tile(np.array([0, np.nan], np.float32), count)]),
    )


def _session(history: WindowColumns, now: int, card: DatasetCard) -> dict[str, int]:
    """Session feature -> row of an impression that begins ``now``, after ``history`` (one window)."""
    seen = len(history.ts_ms)
    rows = session_rows(
        card.at_level("session"),
        np.arange(seen + 1) == 0,
        np.append(history.ts_ms, now),
        np.append(history.end_ms, now),
        np.append(history.outcome.get(FEEDBACK, np.zeros(seen, np.int64)), UNKNOWN),
        card.session_gap_s,
    )
    return {name: int(values[-1]) for name, values in rows.items()}


def _ensemble(opened: OpenRun, run: str, folder: str) -> tuple[Ensemble, EnsembleCard] | None:
    """The ensemble of a folder, or the run's own if it has one."""
    folder = folder or ensemble_run.found(run)
    if not folder:
        return None
    model, card = ensemble_run.load_fitting(opened, folder)
    return model.to(opened.process.device), card


@torch.no_grad()
def best_candidates(
    opened: OpenRun,
    history: WindowColumns,
    items: Items,
    by: str,
    top: int,
    fused: tuple[Ensemble, EnsembleCard] | None = None,
) -> list[Candidate]:
    """The best ``top`` of the items after ``history`` (one window); where less is better, those with the least."""
    card = opened.card
    columns = with_candidates(history, items, card)
    whole = whole_tables(card, opened.config.model)
    loader = opened.config.loader
    batch = collate(
        columns, np.zeros(1, np.int64), whole, loader.dedup, request_gap_s=ALL, group_cost=loader.group_cost
    )
    opened.built.dmp.eval()
    batch = batch.to(opened.process.device)
    judged, ranker = judge(opened, batch), opened.built.model.ranker
    named = objectives(card, ranker.tasks)
    outcomes = [objective.name for objective in named if objective.name != WATCH_TIME]
    output = None
    if fused is not None:
        model, settings = fused
        seen, length = events_before(batch, torch.zeros_like(batch.target[:1]), settings.config.events)
        output = model(judged.value(EXIT in card.timed)[None], judged.event[seen][None], length, judged.context[None])
    if by == ENSEMBLE and output is not None:
        value = output.score[0]
    elif by == WATCH:
        value = judged.watch_time
    else:
        value = judged.probability[:, outcomes.index(by)]
    best = value.argsort(descending=by not in _less(named), stable=True)[:top]
    watch = torch.expm1(judged.watch_time[best]).clamp(min=0).tolist() if EXIT in card.timed else [None] * len(best)
    # Whole sequences cost more than all else: only what is shown gets one.
    likely = likely_timelines(ranker, judged.encoded, best, card)
    found = []
    for place, watch_s, timeline in zip(best.tolist(), watch, likely, strict=True):
        chances = dict(zip(outcomes, judged.probability[place].tolist(), strict=True))
        candidate = Candidate(items.raw[place], bool(items.known[place]), chances, watch_s, *timeline)
        found.append(candidate if output is None else _explained(candidate, named, output, place))
    return found


def _less(named: Sequence[Objective]) -> set[str]:
    """Names of what less is better of."""
    return {objective.name for objective in named if objective.better == "less"}


def _explained(candidate: Candidate, named: Sequence[Objective], output: EnsembleOutput, place: int) -> Candidate:
    """The candidate with its score and what that is made of."""
    transform, weight = output.transform[0, place].tolist(), output.weight[0, place].tolist()
    explanation = []
    for objective, part, share in zip(named, transform, weight, strict=True):
        if objective.name == WATCH_TIME:
            assert candidate.expected_watch_s is not None
            explanation.append(
                Contribution(objective.name, objective.better, candidate.expected_watch_s, part, share, "s")
            )
        else:
            chance = candidate.probability[objective.name]
            explanation.append(Contribution(objective.name, objective.better, chance, part, share))
    return replace(candidate, score=float(output.score[0, place]), explanation=explanation)


def _read_items(data: str, card: DatasetCard, rows: pc.Expression) -> pa.Table:
    """Rows of ``items.parquet``, their ids checked against the card."""
    file = paths.join(data, ITEMS)
    features = card.at_level("item")
    table = read_table(file, ["item", *(feature.name for feature in features)], rows)
    for feature in features:
        ids = table[feature.name]
        if not pa.types.is_integer(ids.type):
            raise DataError(f"is {ids.type}, not an integer", file=file, field=feature.name)
        values = ids.to_numpy()
        if ids.null_count or ((values < 0) | (values >= feature.cardinality)).any():
            raise DataError(f"id is not in [0, {feature.cardinality})", file=file, field=feature.name)
    return table
