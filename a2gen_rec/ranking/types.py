"""What is asked of a ranker and what it answers: plain data, whatever carries it (a server, a file, a test).

Values are raw, as in the log: identifiers and categories as text, numbers as numbers, None for what is missing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from a2gen_rec.ranking.contributions import Contribution
from a2gen_rec.ranking.history import EncodedHistory

Value = str | int | float | None
"""A raw value: text or a number for vocabulary and hash features, a number for buckets, None when missing. Categories
are compared as text, 1 as "1" and 1.0 as "1.0"."""
Timeline = list[tuple[str, float | None]]


@dataclass(frozen=True)
class Impression:
    """One item shown to one user, and what the user did: a row of the log, in the canonical form of ``sources/base``.

    Attributes:
        item: raw identifier.
        ts_ms: begin, milliseconds.
        watch_s: watch time in seconds; None when not recorded, or not over yet.
        actions: name -> seconds since the begin, None at an unknown time; of the dataset's actions without ``start``
            and ``exit``, each at most once, in any order.
        features: raw values by name: the context's (those the log computes from time aside), and whatever of the item
            is to be used instead of what the model's catalogue has. Context features left out are missing.
    """

    item: str
    ts_ms: int
    watch_s: float | None = None
    actions: Sequence[tuple[str, float | None]] = ()
    features: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class WhatIf:
    """A question: what if an objective of one candidate were predicted otherwise, all else equal?

    Attributes:
        item: raw identifier of a candidate; objective: of the ensemble.
        changes: of the prediction, as the ensemble takes it: of a probability's log odds, of a watch time's log1p
            seconds.
    """

    item: str
    objective: str
    changes: Sequence[float]


@dataclass(frozen=True)
class WhatIfResult:
    """The answer for one change.

    Attributes:
        change: as it was asked for; prediction: what it makes of it, a probability or seconds.
        share: of the objective in the score; score: the ensemble's; place: among all candidates, from 1.
    """

    change: float
    prediction: float
    share: float
    score: float
    rank: int


@dataclass(frozen=True)
class RankQuery:
    """Candidates to rank for one user at one moment.

    Attributes:
        user: raw identifier; a user whom the model does not know is ranked for by row 0 of the user table.
        candidates: raw item identifiers, at least one; one given twice is ranked once.
        now_ms: the moment; None is a second after the last impression of the history ended, or now without any. A
            service takes now where the history is the one it has recorded.
        history: the user's past, as a caller keeps it (:meth:`Ranker.encode`) or raw, in any order; what began after
            ``now_ms`` is left out.
        user_features: raw values by name, used instead of those the model knows of the user, if any.
        context: raw values by name; a context feature left out is that of the last impression [ours], and those that
            the log computes from time are always of ``now_ms``.
        k: how many of the best to return.
        by: what to rank by: ``ensemble``, ``watch`` or an outcome; empty takes the first of these that there is.
        explain: say what each score is made of (needs an ensemble).
        timelines: tell the likeliest action sequence of each of the best.
        sequences: how many of the likeliest are told of each, where ``timelines`` are told.
        nudge: a question to the ensemble, by which the candidates must be ranked.
    """

    user: str
    candidates: Sequence[str]
    now_ms: int | None = None
    history: EncodedHistory | Sequence[Impression] = ()
    user_features: Mapping[str, Value] = field(default_factory=dict)
    context: Mapping[str, Value] = field(default_factory=dict)
    k: int = 10
    sort_by: str = ""
    explain: bool = False
    include_timelines: bool = True
    num_sequences: int = 0
    what_if: WhatIf | None = None


@dataclass(frozen=True)
class ScoredCandidate:
    """What is predicted should the user be shown an item.

    Attributes:
        item: raw identifier; ``known``: whether the dataset has it, else it is ranked by "unknown" features.
        probability: of every action, label and predicted objective.
        expected_watch_s: expected watch time in seconds (the mean in log1p seconds, brought back); None where the
            log does not record it.
        timeline: the most probable action sequence, ``start`` to ``exit``, with seconds since the impression
            began; None for actions whose times the log does not record. Empty if the model generates none. Of the
            sequences that were followed: all others together have at most ``evaluate.max_unexplored_mass``.
        timeline_probability: of that sequence of actions; NaN without.
        score: the ensemble's, whose parts are the ``explanation``; NaN and none without one.
        expected_at_s: of every action and ``exit``, expected seconds since the impression began, should it happen; None
            where the log does not record them.
        sequences: the likeliest action sequences and their probabilities, of which ``timeline`` is the first; as many
            as were asked for, if as many were followed.
        length_s: of the video; None where nothing tells.
    """

    item: str
    known: bool
    probability: dict[str, float]
    expected_watch_s: float | None
    timeline: Timeline
    timeline_probability: float
    score: float = math.nan
    explanation: list[Contribution] = field(default_factory=list)
    expected_time_s: dict[str, float | None] = field(default_factory=dict)
    sequences: list[tuple[Timeline, float]] = field(default_factory=list)
    duration_s: float | None = None


@dataclass(frozen=True)
class RankedList:
    """The best candidates for one user.

    Attributes:
        user: raw identifier; ``user_known``: whether the dataset has any impression of this user.
        history: past impressions the ranking rests on.
        by: ``ensemble`` (its score), ``watch`` (expected watch time) or the outcome whose probability orders the
            candidates.
        ranked: distinct candidates there were; unknown_items: those of them that the dataset does not have.
        candidates: the best of them, best first; equals by raw identifier.
        least_first: whether less of that is better, as of glances and explicit negatives: the least likely come first.
        model_version: of the exported model; empty for a run's.
        nudged: answers to the request's ``nudge``, a change each.
    """

    user: str
    user_known: bool
    history_length: int
    by: str
    num_candidates: int
    unknown_items: int
    candidates: list[ScoredCandidate]
    ascending: bool = False
    model_version: str = ""
    what_if: list[WhatIfResult] = field(default_factory=list)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Which of ``unknown_user``, ``unknown_items``, ``empty_history`` the ranking had to make do with."""
        used = {
            "unknown_user": not self.user_known,
            "unknown_items": self.unknown_items > 0,
            "empty_history": self.history_length == 0,
        }
        return tuple(name for name, is_used in used.items() if is_used)
