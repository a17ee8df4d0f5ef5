"""What may be sent to the service, what it answers, and the way between these and what a ranker takes and gives."""

from dataclasses import asdict
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)

from a2gen_rec.ranking.contributions import Contribution
from a2gen_rec.ranking.timelines import MAX_SEQUENCES
from a2gen_rec.ranking.types import Impression, RankedList, RankQuery, ScoredCandidate, Timeline, WhatIf

MAX_CANDIDATES = 2000
MAX_IMPRESSIONS = 1000
MAX_FEATURES = 64
MAX_WHAT_IF_CHANGES = 101
MAX_WHAT_IF_CHANGE = 20.0
MAX_ID_LENGTH = 256
MAX_VALUE_LENGTH = 1024
MAX_WATCH_S = 1e7
MAX_TIMESTAMP_MS = 253_402_300_799_999  # the end of the year 9999, where calendars end
MAX_TIMEOUT_MS = 60_000


def _limit_fields(value: Any) -> Any:
    """Before anything in it is looked at: each unknown field of a hundred thousand would be an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_FEATURES:
        raise ValueError(f"must have at most {MAX_FEATURES} fields")
    return value


Identifier = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_LENGTH)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Text = Annotated[str, StringConstraints(max_length=MAX_VALUE_LENGTH)]
Int = Annotated[int, Field(ge=-(10**15), le=10**15)]
"""A number of its own: as a category, 1 is not 1.0."""
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Values = Annotated[
    dict[Name, Text | Int | Number | None], BeforeValidator(_limit_fields), Field(max_length=MAX_FEATURES)
]
Seconds = Annotated[float, Field(ge=0, le=MAX_WATCH_S)]
TimestampMs = Annotated[int, Field(ge=0, le=MAX_TIMESTAMP_MS)]


class _RequestModel(BaseModel):
    """Of exactly the fields and types that are declared."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: Any) -> Any:
        return _limit_fields(value)


class ActionSchema(_RequestModel):
    """Something the user did."""

    name: Name = Field(description="One of the model's actions.")
    at_s: Seconds | None = Field(None, description="Seconds since the impression began; null when not known.")


class ImpressionSchema(_RequestModel):
    """One item shown to the user, and what came of it."""

    item: Identifier
    ts_ms: TimestampMs = Field(description="Begin, milliseconds since 1970.")
    watch_s: Seconds | None = Field(None, description="Watch time in seconds; null when not known, or not over yet.")
    actions: list[ActionSchema] = Field(
        [], max_length=MAX_FEATURES, fail_fast=True, description="Each action at most once, in any order."
    )
    features: Values = Field({}, description="Raw context features; of the item, whatever differs from the model's.")

    def impression(self) -> Impression:
        actions = [(action.name, action.at_s) for action in self.actions]
        return Impression(self.item, self.ts_ms, self.watch_s, actions, self.features)

    @classmethod
    def of(cls, impression: Impression) -> "ImpressionSchema":
        return cls.model_construct(
            item=impression.item,
            ts_ms=impression.ts_ms,
            watch_s=impression.watch_s,
            actions=[ActionSchema.model_construct(name=name, at_s=at_s) for name, at_s in impression.actions],
            features=dict(impression.features),
        )


Impressions = Annotated[list[ImpressionSchema], Field(max_length=MAX_IMPRESSIONS, fail_fast=True)]
_IMPRESSION: dict[str, JsonValue] = {
    "item": "v42",
    "ts_ms": 1_700_000_000_000,
    "watch_s": 18.5,
    "actions": [{"name": "like", "at_s": 2.0}],
}


class WhatIfRequest(_RequestModel):
    """What if an objective of one candidate were predicted otherwise, all else equal?"""

    item: Identifier = Field(description="One of the candidates.")
    objective: Name
    changes: list[Annotated[float, Field(ge=-MAX_WHAT_IF_CHANGE, le=MAX_WHAT_IF_CHANGE)]] = Field(
        min_length=1, max_length=MAX_WHAT_IF_CHANGES, description="Of a probability's log odds, of log1p seconds."
    )

    def nudge(self) -> WhatIf:
        return WhatIf(self.item, self.objective, self.changes)


class RankRequest(_RequestModel):
    """Candidates to rank for one user at one moment."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user": "u7", "candidates": ["v1", "v2", "v3"], "k": 2, "explain": True}]}
    )

    user: Identifier = Field(description="One whom the model does not know is ranked for as unknown users are.")
    candidates: list[Identifier] = Field(
        min_length=1, max_length=MAX_CANDIDATES, fail_fast=True, description="Items; one given twice is ranked once."
    )
    now_ms: TimestampMs | None = Field(
        None, description="The moment; null is now, or a second after the last impression of a `history` given ended."
    )
    history: Impressions | None = Field(None, description="The past, in any order; null takes what is recorded.")
    user_features: Values = Field({}, description="Raw values, instead of those the model knows of the user.")
    context: Values = Field({}, description="Raw values; one left out is that of the last impression.")
    k: int = Field(10, ge=1, le=MAX_CANDIDATES, description="How many of the best to answer.")
    by: str = Field(
        "", max_length=128, description="`ensemble`, `watch` or an outcome; empty takes the first there is."
    )
    explain: bool = Field(False, description="Say what scores are made of; needs an ensemble.")
    timelines: bool = Field(True, description="Say each candidate's likeliest sequence of actions.")
    sequences: int = Field(0, ge=0, le=MAX_SEQUENCES, description="Of how many of its likeliest sequences to tell.")
    nudge: WhatIfRequest | None = Field(None, description="A question to the ensemble, which must rank.")
    timeout_ms: int | None = Field(None, ge=1, le=MAX_TIMEOUT_MS, description="After which no answer is of use.")

    def request(self) -> RankQuery:
        """Without a history where none was given."""
        return RankQuery(
            user=self.user,
            candidates=self.candidates,
            now_ms=self.now_ms,
            history=[each.impression() for each in self.history or []],
            user_features=self.user_features,
            context=self.context,
            k=self.k,
            sort_by=self.by,
            explain=self.explain,
            include_timelines=self.timelines,
            num_sequences=self.sequences,
            what_if=self.nudge.nudge() if self.nudge else None,
        )


class EventsRequest(_RequestModel):
    """Impressions of one user to record; one of the same item and moment as before replaces it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user": "u7", "impressions": [_IMPRESSION]}]})

    user: Identifier
    impressions: Impressions = Field(min_length=1)


class TimelineStep(BaseModel):
    """One action of a sequence."""

    action: str
    at_s: float | None = Field(description="Seconds since the impression began; null where the log has no such times.")


class SequenceResponse(BaseModel):
    """One way that it may go."""

    probability: float
    steps: list[TimelineStep]


class ScoreContribution(BaseModel):
    """One objective's part in a score."""

    objective: str
    better: str = Field(description="`more` or `less` of it.")
    prediction: float
    unit: str = Field(description="Of the prediction: `probability` or `s`.")
    transform: float
    weight: float
    share: float = Field(description="weight · transform; a score is the sum of its shares.")


class RankedCandidate(BaseModel):
    """What is predicted should the user be shown an item."""

    item: str
    known: bool = Field(description="Whether the model knows the item.")
    score: float | None = Field(description="Of the ensemble; null without one.")
    probability: dict[str, float] = Field(description="Of every outcome.")
    expected_watch_s: float | None
    timeline: list[TimelineStep] = Field(
        description="The likeliest sequence of actions; empty where none was asked for."
    )
    timeline_probability: float | None
    sequences: list[SequenceResponse] = Field(
        description="The likeliest first: as many as asked for, or all but the least likely ones."
    )
    expected_at_s: dict[str, float | None] = Field(
        description="Of every action, should it happen; null where the log has no such times."
    )
    length_s: float | None = Field(description="Of the video; null where the model does not know it.")
    explanation: list[ScoreContribution]


class WhatIfResponse(BaseModel):
    """What becomes of a nudged candidate."""

    change: float
    prediction: float = Field(description="What the change makes of it: a probability or seconds.")
    share: float = Field(description="Of the objective in the score.")
    score: float
    place: int = Field(description="Among all candidates, from 1.")


class RankResponse(BaseModel):
    """The best candidates, best first."""

    user: str
    user_known: bool
    history: int = Field(description="Past impressions that the ranking rests on.")
    by: str
    least_first: bool = Field(description="Whether less of `by` is better.")
    ranked: int = Field(description="Distinct candidates.")
    unknown_items: int
    fallbacks: list[str] = Field(
        description="Of `unknown_user`, `unknown_items`, `empty_history`, and `history_unavailable`: the store is down."
    )
    model_version: str
    candidates: list[RankedCandidate]
    nudged: list[WhatIfResponse] = Field(description="Of each change that was asked about.")


class EventsResponse(BaseModel):
    """What is recorded now, whatever happens to the service."""

    recorded: int


class HistoryResponse(BaseModel):
    """The last impressions recorded of a user, oldest first."""

    user: str
    impressions: list[ImpressionSchema]
    lengths_s: dict[str, float] = Field(description="Of the videos, where the model knows them.")


class DeleteHistoryResponse(BaseModel):
    """What is recorded no more."""

    num_deleted: int = Field(description="Impressions.")


class UsersResponse(BaseModel):
    """Some users of whom something is recorded."""

    users: list[str]


class FeatureInfo(BaseModel):
    """An input of the model."""

    name: str
    level: str
    kind: str


class ModelResponse(BaseModel):
    """The model in service."""

    version: str
    dataset: str
    actions: list[str] = Field(description="In code order: `start` first, `exit` last.")
    timed: list[str] = Field(description="Those whose times are predicted.")
    labels: list[str]
    objectives: list[str]
    negative: list[str] = Field(description="Actions of which less is better.")
    features: list[FeatureInfo] = Field(description="Raw features that requests and impressions may have.")
    sort_keys: list[str] = Field(description="What requests may rank `by`, the default first.")
    session_gap_s: float = Field(description="Pause between impressions after which a new session begins.")
    history: int = Field(description="Most past impressions that count.")
    limits: dict[str, int]
    sample_users: list[str]
    sample_items: list[str]


class ReloadResponse(BaseModel):
    """What became of a request to load the model again."""

    version: str
    previous_version: str
    swapped: bool = Field(description="False where the same model is in service already.")


class HealthResponse(BaseModel):
    """How the service is."""

    status: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str
    message: str
    request_id: str


class ErrorResponse(BaseModel):
    """The one form of all errors."""

    error: ErrorDetail


def rank_answer(ranked: RankedList, fallbacks: list[str]) -> dict[str, Any]:
    """A :class:`RankAnswer` as plain data, in which NaN stands for null still."""
    return {
        "user": ranked.user,
        "user_known": ranked.user_known,
        "history": ranked.history_length,
        "by": ranked.by,
        "least_first": ranked.ascending,
        "ranked": ranked.num_candidates,
        "unknown_items": ranked.unknown_items,
        "fallbacks": fallbacks,
        "model_version": ranked.model_version,
        "candidates": [_candidate(each) for each in ranked.candidates],
        "nudged": [asdict(each) for each in ranked.what_if],
    }


def _candidate(candidate: ScoredCandidate) -> dict[str, Any]:
    return {
        "item": candidate.item,
        "known": candidate.known,
        "score": candidate.score,
        "probability": candidate.probability,
        "expected_watch_s": candidate.expected_watch_s,
        "timeline": _steps(candidate.timeline),
        "timeline_probability": candidate.timeline_probability,
        "sequences": [{"probability": chance, "steps": _steps(timeline)} for timeline, chance in candidate.sequences],
        "expected_at_s": candidate.expected_time_s,
        "length_s": candidate.duration_s,
        "explanation": [_part(each) for each in candidate.explanation],
    }


def _steps(timeline: Timeline) -> list[dict[str, Any]]:
    return [{"action": action, "at_s": at_s} for action, at_s in timeline]


def _part(part: Contribution) -> dict[str, Any]:
    return {
        "objective": part.objective,
        "better": "more" if part.higher_is_better else "less",
        "prediction": part.prediction,
        "unit": part.unit,
        "transform": part.transform,
        "weight": part.weight,
        "share": part.contribution,
    }
