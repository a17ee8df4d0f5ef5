"""Plain types of ranking queries and results, independent of the transport (HTTP, file, test).

Values are raw, as in the log: identifiers and categories as text, numbers as numbers, None if missing. This module
imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from a2gen_rec.ranking.contributions import Contribution

if TYPE_CHECKING:
    from a2gen_rec.ranking.history import EncodedHistory

MAX_SEQUENCES = 8
"""Maximum number of action sequences returned per candidate."""

Scalar = str | int | float | None
Value = Scalar | Sequence[str | int | float] | Mapping[str, float]
"""Raw value: text or number for vocabulary and hash features, number for bucket features and numbers, None if missing.
The value of a multi-valued feature is a list, or a mapping of texts to weights. Categories are compared as text: 1 as
"1" and 1.0 as "1.0"."""
Timeline = list[tuple[str, float | None]]
"""Actions in order, with seconds since the start of the impression; None if the log records no such times."""


@dataclass(frozen=True)
class Impression:
    """One item shown to one user and the user's actions: a log row in the canonical form of ``sources/base``.

    Attributes:
        item: Raw item identifier.
        ts_ms: Start of the impression, milliseconds since 1970, in 2000 or later. The origin is arbitrary, and so are
            the years, if the log has no calendar time.
        watch_s: Watch time in seconds; None if not recorded or if the impression is still open.
        actions: (name, seconds since the start) pairs, None for an unknown time. Names are the dataset's actions
            except ``start`` and ``exit``; each at most once, in any order.
        features: Raw values by feature name: context features (except those computed from time), and item features
            that override the model's. Missing context features have no value.
        labels: Label -> whether it was set, such as ``long_view``; missing if unknown.
    """

    item: str
    ts_ms: int
    watch_s: float | None = None
    actions: Sequence[tuple[str, float | None]] = ()
    features: Mapping[str, Value] = field(default_factory=dict)
    labels: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class WhatIf:
    """What-if query: change one predicted objective of one candidate, all else equal.

    Attributes:
        item: Raw identifier of a candidate.
        objective: Name of an objective of the ensemble.
        changes: Offsets to the prediction in the ensemble's input scale: log odds for probabilities, log1p seconds for
            watch time.
    """

    item: str
    objective: str
    changes: Sequence[float]


@dataclass(frozen=True)
class WhatIfResult:
    """Result of one change of a what-if query.

    Attributes:
        change: Offset as in the query.
        prediction: Changed prediction, a probability or seconds.
        contribution: Contribution of the objective to the score.
        score: Ensemble score.
        rank: Rank among all candidates, from 1.
    """

    change: float
    prediction: float
    contribution: float
    score: float
    rank: int


@dataclass(frozen=True)
class RankQuery:
    """Candidates to rank for one user at one query time.

    Attributes:
        user: Raw user identifier; unknown users have row 0 of the user table.
        candidates: Raw item identifiers, at least one; duplicates are ranked once.
        now_ms: Query time in milliseconds, like the times of impressions. None is one second after the end of the last
            impression in the history, or the current time without history. A service uses the current time with its
            stored history.
        history: Past impressions of the user, encoded (:meth:`Ranker.encode`) or raw, in any order; impressions after
            ``now_ms`` are dropped.
        user_features: Raw values by feature name that override the model's.
        context: Raw values by feature name; a missing context feature has the value of the last impression [ours].
            Features computed from time always use ``now_ms``.
        k: Number of top candidates to return.
        sort_by: Sort key: ``ensemble``, ``watch`` or an outcome; empty selects the first available.
        explain: Return the contributions to each score (requires an ensemble).
        include_timelines: Return the most probable action sequence of each top candidate.
        num_sequences: Number of most probable sequences per candidate, if ``include_timelines``.
        what_if: What-if query; requires ``ensemble`` as sort key.
    """

    user: str
    candidates: Sequence[str]
    now_ms: int | None = None
    history: "EncodedHistory | Sequence[Impression]" = ()
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
    """Predictions for one candidate, should it be shown to the user.

    Attributes:
        item: Raw item identifier.
        known: Whether the dataset contains the item; unknown items have the features of row 0.
        probability: Probability of every action, label and predicted objective.
        expected_watch_s: Expected watch time in seconds (mean in log1p seconds, transformed back); None if the log
            does not record it.
        timeline: Most probable action sequence from ``start`` to ``exit`` with seconds since the start of the
            impression, None for actions without recorded times. Empty if the model generates no sequences. It is the
            maximum over explored sequences; all unexplored ones together have at most probability
            ``evaluate.max_unexplored_mass``.
        timeline_probability: Probability of that action sequence; None without one.
        score: Ensemble score, the sum of the ``explanation``'s contributions; None without an ensemble.
        explanation: Contributions to the score; empty without an ensemble.
        expected_time_s: Expected seconds since the start of the impression of every action and ``exit``, given that it
            occurs; None if the log does not record its times.
        sequences: Most probable action sequences with their probabilities, starting with ``timeline``: the requested
            number, or fewer if fewer were explored.
        duration_s: Duration of the video in seconds; None if unknown.
    """

    item: str
    known: bool
    probability: dict[str, float]
    expected_watch_s: float | None
    timeline: Timeline
    timeline_probability: float | None = None
    score: float | None = None
    explanation: list[Contribution] = field(default_factory=list)
    expected_time_s: dict[str, float | None] = field(default_factory=dict)
    sequences: list[tuple[Timeline, float]] = field(default_factory=list)
    duration_s: float | None = None


@dataclass(frozen=True)
class RankedList:
    """Top candidates for one user.

    Attributes:
        user: Raw user identifier.
        user_known: Whether the dataset contains impressions of this user.
        history_length: Number of past impressions used.
        sort_by: Sort key: ``ensemble`` (score), ``watch`` (expected watch time) or an outcome (its probability).
        num_candidates: Number of distinct candidates.
        unknown_items: Number of candidates that the dataset does not contain.
        candidates: Top candidates, best first; ties are sorted by raw identifier.
        ascending: Whether lower values of the sort key are better, as for glances and explicit negatives: the least
            likely come first.
        model_version: Version of the exported model; empty for a run.
        what_if: Results of the what-if query, one per change.
    """

    user: str
    user_known: bool
    history_length: int
    sort_by: str
    num_candidates: int
    unknown_items: int
    candidates: list[ScoredCandidate]
    ascending: bool = False
    model_version: str = ""
    what_if: list[WhatIfResult] = field(default_factory=list)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Fallbacks used by the ranking: any of ``unknown_user``, ``unknown_items``, ``empty_history``."""
        used = {
            "unknown_user": not self.user_known,
            "unknown_items": self.unknown_items > 0,
            "empty_history": self.history_length == 0,
        }
        return tuple(name for name, is_used in used.items() if is_used)


@dataclass(frozen=True)
class CacheStats:
    """Counters of a ranker's cache of action-level states.

    Attributes:
        hits: Lookups of cached states.
        misses: Lookups of states that were not cached.
        states: Number of states in the cache.
        bytes: Memory of the cache in bytes.
    """

    hits: int
    misses: int
    states: int
    bytes: int
