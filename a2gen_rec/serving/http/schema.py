"""Request and response models of the HTTP API, and the conversion of requests to the types of ranking."""

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

from a2gen_rec.data import time_zone
from a2gen_rec.ranking.types import MAX_SEQUENCES, Impression, RankQuery, WhatIf

MAX_CANDIDATES = 2000
MAX_IMPRESSIONS = 1000
MAX_FEATURES = 64
MAX_WHAT_IF_CHANGES = 101
MAX_WHAT_IF_CHANGE = 20.0
MAX_ID_LENGTH = 256
MAX_VALUE_LENGTH = 1024
MAX_VALUES = 64
MAX_WATCH_S = 1e7
MAX_TIMESTAMP_MS = time_zone.MAX_TIMESTAMP_MS - 1
MAX_TIMEOUT_MS = 60_000


def _limit_fields(value: Any) -> Any:
    """Reject objects with too many fields before their validation, which reports an error per unknown field."""
    if isinstance(value, dict) and len(value) > MAX_FEATURES:
        raise ValueError(f"must have at most {MAX_FEATURES} fields")
    return value


Identifier = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_LENGTH)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Text = Annotated[str, StringConstraints(max_length=MAX_VALUE_LENGTH)]
Int = Annotated[int, Field(ge=-(10**15), le=10**15)]
"""Integers are kept apart from floats, which merge whole numbers from 2^53."""
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Scalar = Text | Int | Number
Texts = Annotated[list[Scalar], Field(max_length=MAX_VALUES, fail_fast=True)]
Weights = Annotated[dict[Text, Annotated[float, Field(ge=0, le=1e15)]], Field(max_length=MAX_VALUES)]
Values = Annotated[
    dict[Name, Scalar | Texts | Weights | None], BeforeValidator(_limit_fields), Field(max_length=MAX_FEATURES)
]
Seconds = Annotated[float, Field(ge=0, le=MAX_WATCH_S)]
TimestampMs = Annotated[int, Field(ge=0, le=MAX_TIMESTAMP_MS)]


class _RequestModel(BaseModel):
    """Base of request models: strict types, no additional fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: Any) -> Any:
        return _limit_fields(value)


class ActionSchema(_RequestModel):
    """User action within an impression."""

    name: Name = Field(description="One of the model's actions.")
    at_s: Seconds | None = Field(None, description="Seconds since the start of the impression; null if unknown.")


class ImpressionSchema(_RequestModel):
    """One item shown to the user, with the user's actions."""

    item: Identifier
    ts_ms: TimestampMs = Field(
        description="Start time in milliseconds since 1970, in 2000 or later; of any origin if the model's log has no "
        "calendar time."
    )
    watch_s: Seconds | None = Field(
        None, description="Watch time in seconds; null if unknown, or if the impression is still open."
    )
    actions: list[ActionSchema] = Field(
        [], max_length=MAX_FEATURES, fail_fast=True, description="Each action at most once, in any order."
    )
    features: Values = Field(
        {},
        description="Raw context features, and item features that override the model's; the video's duration in "
        "seconds.",
    )
    labels: dict[Name, bool] = Field(
        {}, max_length=MAX_FEATURES, description="The model's labels and whether each was set; omit unknown ones."
    )

    def to_impression(self) -> Impression:
        actions = [(action.name, action.at_s) for action in self.actions]
        return Impression(self.item, self.ts_ms, self.watch_s, actions, self.features, self.labels)

    @classmethod
    def from_impression(cls, impression: Impression) -> "ImpressionSchema":
        return cls.model_construct(
            item=impression.item,
            ts_ms=impression.ts_ms,
            watch_s=impression.watch_s,
            actions=[ActionSchema.model_construct(name=name, at_s=at_s) for name, at_s in impression.actions],
            features=dict(impression.features),
            labels=dict(impression.labels),
        )


Impressions = Annotated[list[ImpressionSchema], Field(max_length=MAX_IMPRESSIONS, fail_fast=True)]
_IMPRESSION: dict[str, JsonValue] = {
    "item": "v42",
    "ts_ms": 1_700_000_000_000,
    "watch_s": 18.5,
    "actions": [{"name": "like", "at_s": 2.0}],
}


class WhatIfRequest(_RequestModel):
    """What-if query: change one predicted objective of one candidate, all else equal."""

    item: Identifier = Field(description="One of the candidates.")
    objective: Name
    changes: list[Annotated[float, Field(ge=-MAX_WHAT_IF_CHANGE, le=MAX_WHAT_IF_CHANGE)]] = Field(
        min_length=1,
        max_length=MAX_WHAT_IF_CHANGES,
        description="Offsets to the prediction: log odds for probabilities, log1p seconds for watch time.",
    )

    def to_what_if(self) -> WhatIf:
        return WhatIf(self.item, self.objective, self.changes)


class RankRequest(_RequestModel):
    """Candidates to rank for one user at one query time."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user": "u7", "candidates": ["v1", "v2", "v3"], "k": 2, "explain": True}]}
    )

    user: Identifier = Field(description="User identifier; users unknown to the model are ranked as new users.")
    candidates: list[Identifier] = Field(
        min_length=1,
        max_length=MAX_CANDIDATES,
        fail_fast=True,
        description="Item identifiers; duplicates are ranked once.",
    )
    now_ms: TimestampMs | None = Field(
        None,
        description="Query time in milliseconds like `ts_ms`; null is now, or with `history` one second after the end "
        "of its last impression.",
    )
    history: Impressions | None = Field(
        None, description="Past impressions in any order; null uses the recorded history."
    )
    user_features: Values = Field({}, description="Raw user features that override the model's.")
    context: Values = Field({}, description="Raw context features; missing ones have the value of the last impression.")
    k: int = Field(10, ge=1, le=MAX_CANDIDATES, description="Number of top candidates to return.")
    sort_by: str = Field(
        "",
        max_length=128,
        description="Sort key: `ensemble`, `watch` or an outcome; empty selects the first available.",
    )
    explain: bool = Field(False, description="Return the contributions to each score; requires an ensemble.")
    include_timelines: bool = Field(True, description="Return the most probable action sequence of each candidate.")
    num_sequences: int = Field(
        0, ge=0, le=MAX_SEQUENCES, description="Number of most probable sequences to return per candidate."
    )
    what_if: WhatIfRequest | None = Field(None, description="What-if query; requires `ensemble` as sort key.")
    timeout_ms: int | None = Field(None, ge=1, le=MAX_TIMEOUT_MS, description="Deadline in milliseconds.")

    def to_query(self) -> RankQuery:
        """Return the query; without ``history`` in the request, its history is empty."""
        return RankQuery(
            user=self.user,
            candidates=self.candidates,
            now_ms=self.now_ms,
            history=[impression.to_impression() for impression in self.history or []],
            user_features=self.user_features,
            context=self.context,
            k=self.k,
            sort_by=self.sort_by,
            explain=self.explain,
            include_timelines=self.include_timelines,
            num_sequences=self.num_sequences,
            what_if=self.what_if.to_what_if() if self.what_if else None,
        )


class EventsRequest(_RequestModel):
    """Impressions of one user to record; an impression with the same item and time is replaced."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user": "u7", "impressions": [_IMPRESSION]}]})

    user: Identifier
    impressions: Impressions = Field(min_length=1)


class TimelineStep(BaseModel):
    """One action of a sequence."""

    action: str
    at_s: float | None = Field(
        description="Seconds since the start of the impression; null if the log does not record such times."
    )


class SequenceResponse(BaseModel):
    """One action sequence with its probability."""

    probability: float
    steps: list[TimelineStep]


class ScoreContribution(BaseModel):
    """Contribution of one objective to a score."""

    objective: str
    higher_is_better: bool = Field(description="Whether a higher prediction raises the score.")
    prediction: float
    unit: str = Field(description="Unit of the prediction: `probability` or `s`.")
    transform: float
    weight: float
    contribution: float = Field(description="weight · transform; a score is the sum of its contributions.")


class RankedCandidate(BaseModel):
    """Predictions for one candidate, should it be shown to the user."""

    item: str
    known: bool = Field(description="Whether the model knows the item.")
    score: float | None = Field(description="Ensemble score; null without an ensemble.")
    probability: dict[str, float] = Field(description="Probability of every outcome.")
    expected_watch_s: float | None = Field(
        description="Expected watch time in seconds; null if the log does not record it."
    )
    timeline: list[TimelineStep] = Field(
        description="Most probable action sequence; empty if not requested or not supported by the model."
    )
    timeline_probability: float | None
    sequences: list[SequenceResponse] = Field(
        description="Most probable sequences, most probable first; fewer than requested if fewer were explored."
    )
    expected_time_s: dict[str, float | None] = Field(
        description="Expected seconds of every action, given that it occurs; null if the log does not record its times."
    )
    duration_s: float | None = Field(description="Duration of the video in seconds; null if unknown.")
    explanation: list[ScoreContribution]


class WhatIfResponse(BaseModel):
    """Result of one change of a what-if query."""

    change: float
    prediction: float = Field(description="Changed prediction: a probability or seconds.")
    contribution: float = Field(description="Contribution of the objective to the score.")
    score: float
    rank: int = Field(description="Rank among all candidates, from 1.")


class RankResponse(BaseModel):
    """Top candidates, best first."""

    user: str
    user_known: bool
    history_length: int = Field(description="Number of past impressions used.")
    sort_by: str
    ascending: bool = Field(description="Whether lower values of `sort_by` are better.")
    num_candidates: int = Field(description="Number of distinct candidates.")
    unknown_items: int = Field(description="Number of candidates unknown to the model.")
    fallbacks: list[str] = Field(
        description="Any of `unknown_user`, `unknown_items`, `empty_history` and `history_unavailable` (event store "
        "failure)."
    )
    model_version: str
    candidates: list[RankedCandidate]
    what_if: list[WhatIfResponse] = Field(description="Results of the what-if query, one per change.")


class EventsResponse(BaseModel):
    """Number of durably recorded impressions."""

    recorded: int


class HistoryResponse(BaseModel):
    """Most recent recorded impressions of a user, oldest first."""

    user: str
    impressions: list[ImpressionSchema]
    durations_s: dict[str, float] = Field(description="Durations of the videos in seconds, if known.")


class DeleteHistoryResponse(BaseModel):
    """Result of a deletion."""

    num_deleted: int = Field(description="Number of deleted impressions.")
    overwritten: bool | None = Field(
        description="Whether deleted content is overwritten in the files of the event store. False: deleted, but not "
        "yet overwritten, because another program reads the file; the service retries, and a repeated request returns "
        "the current state. Null: unknown, for Redis."
    )


class UsersResponse(BaseModel):
    """Some users with recorded impressions."""

    users: list[str]


class FeatureInfo(BaseModel):
    """Input feature of the model."""

    name: str
    level: str
    kind: str = Field(description="Kind of the raw value; `number` and `buckets` are numbers.")
    multi_valued: bool = Field(description="Whether the value is a list, or an object of texts with weights.")


class ModelResponse(BaseModel):
    """The model in service."""

    version: str
    dataset: str
    actions: list[str] = Field(description="Actions in code order: `start` first, `exit` last.")
    timed_actions: list[str] = Field(description="Actions with predicted times.")
    labels: list[str]
    objectives: list[str]
    negative_actions: list[str] = Field(description="Actions where a lower probability is better.")
    features: list[FeatureInfo] = Field(
        description="Raw features accepted in requests and impressions; the video's duration in seconds."
    )
    sort_keys: list[str] = Field(description="Values of `sort_by`, the default first.")
    session_gap_s: float = Field(description="Seconds between impressions after which a new session starts.")
    max_history: int = Field(description="Maximum number of past impressions used.")
    limits: dict[str, int]
    sample_users: list[str]
    sample_items: list[str]


class ReloadResponse(BaseModel):
    """Result of a model reload."""

    version: str
    previous_version: str
    swapped: bool = Field(description="False if the same model was already loaded.")


class HealthResponse(BaseModel):
    """Status of the service."""

    status: str


class ErrorDetail(BaseModel):
    """Description of an error."""

    code: str
    message: str
    request_id: str


class ErrorResponse(BaseModel):
    """Body of all error responses."""

    error: ErrorDetail
