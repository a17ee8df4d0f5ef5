"""The definition of a dataset's inputs and outcomes: fitted on training impressions, or that of the base.

An increment takes everything but vocabularies from its base: the same edges, scales, rules and priors. Its vocabularies
continue those of the base.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.features import encodings, feedback
from a2gen_rec.data.features.admission import AdmissionRule, admit_values
from a2gen_rec.data.features.calendar import CALENDAR_FEATURES
from a2gen_rec.data.features.encodings import FeatureEncoding
from a2gen_rec.data.features.numbers import NumberEncoding, fit_number, number_encoding
from a2gen_rec.data.prepare import statistics
from a2gen_rec.data.prepare.increment import Base
from a2gen_rec.data.prepare.point_in_time import Outcome, fit_outcomes, fitted_outcomes
from a2gen_rec.data.prepare.staging import StagedColumns
from a2gen_rec.data.schema import EXIT, Feature, FeatureSpec, FeedbackRule, VocabularyRows
from a2gen_rec.data.sources.base import SourceInfo
from a2gen_rec.data.sql import quote_identifier


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of impressions.

    Attributes:
        actions: actions without ``start`` and ``exit``.
        median_time_s: action with recorded times -> median seconds since the start.
        rule: rule of feedback levels; None without watch times.
        objectives: names of the objectives of the rule.
        flags: label or objective -> SQL of its column.
    """

    actions: tuple[str, ...]
    median_time_s: dict[str, float]
    rule: FeedbackRule | None
    objectives: list[str]
    flags: dict[str, str]

    @classmethod
    def fit(cls, connection: duckdb.DuckDBPyConnection, train: str, info: SourceInfo) -> "Outcomes":
        """Fit medians and the rule on the relation ``train``."""
        medians = statistics.median_times(connection, train, info.actions)
        return cls._of(info, medians, feedback.fit_feedback_rule(connection, train, info, medians.get(EXIT)))

    @classmethod
    def of_base(cls, info: SourceInfo, card: DatasetCard) -> "Outcomes":
        return cls._of(info, {name: card.median_time_s[name] for name in card.timed_actions}, card.feedback)

    @classmethod
    def _of(cls, info: SourceInfo, medians: dict[str, float], rule: FeedbackRule | None) -> "Outcomes":
        objectives = feedback.derived_objectives(rule)
        flags = {name: quote_identifier(f"label_{name}") for name in info.labels}
        flags |= {name: quote_identifier(f"objective_{name}") for name in objectives}
        return cls(info.actions, medians, rule, objectives, flags)

    def summarized(self, connection: duckdb.DuckDBPyConnection, train: str, card: DatasetCard | None) -> list[Outcome]:
        """Return the outcomes of statistics: those of the card of the base, or fitted on the relation ``train``."""
        names = self.actions, self.flags, list(self.median_time_s)
        return fit_outcomes(connection, train, *names) if card is None else fitted_outcomes(card.statistics, *names)


@dataclass(frozen=True)
class Vocabularies:
    """Writer of the vocabularies of a dataset.

    Attributes:
        connection: DuckDB connection.
        impressions: relation of all impressions, with ``split``.
        columns: roles of the columns.
        config: settings.
        folder: folder of the vocabularies.
        pending_files: feature -> file of its values without a row; empty for none.
        base: dataset to continue; None for none.
        retire_before_ms: values last seen before this time lose their row; None for never.
        rows: vocabulary feature -> use of its rows, filled by :meth:`encoding`.
    """

    connection: duckdb.DuckDBPyConnection
    impressions: str
    columns: StagedColumns
    config: PrepareConfig
    folder: Path
    pending_files: Mapping[str, Path]
    base: Base | None
    retire_before_ms: int | None
    rows: dict[str, VocabularyRows]

    def encoding(self, spec: FeatureSpec) -> FeatureEncoding:
        """Write the vocabulary of a feature, and return its encoding."""
        is_calendar = spec.name in self.columns.calendar_features
        rule = AdmissionRule(
            min_count=1 if is_calendar else self.config.min_count or spec.min_count,
            capacity=self.config.capacity,
            max_values=spec.size,
            min_values=CALENDAR_FEATURES[spec.name] if is_calendar else 0,
            increment=len(self.base.card.identity.lineage) if self.base is not None else 0,
            retire_before_ms=None if is_calendar else self.retire_before_ms,
        )
        file = self.folder / f"{spec.name}.parquet"
        earlier = self.base.vocabulary(spec.name) if self.base is not None else None
        pending_file = self.pending_files.get(spec.name)
        cardinality, rows = admit_values(self.connection, self.impressions, spec, rule, file, pending_file, earlier)
        self.rows[spec.name] = rows
        if self.base is not None:
            feature = replace(_feature(self.base.card, spec.name), cardinality=cardinality)
        else:
            feature = Feature(spec.name, spec.level, "vocabulary", cardinality)
            if spec.multi_valued:
                train = f"(SELECT * FROM {self.impressions} WHERE split = 0)"
                mean = encodings.mean_values(self.connection, train, spec)
                feature = replace(feature, multi_valued=True, weighted=spec.weighted, mean_values=mean)
        return encodings.vocabulary_encoding(feature, file)


def fit_feature(
    connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec, vocabularies: Vocabularies
) -> FeatureEncoding:
    """Return the encoding of a feature: that of the base, or fitted on the relation ``train``."""
    if spec.kind == "vocabulary":
        return vocabularies.encoding(spec)
    if vocabularies.base is not None:
        feature = _feature(vocabularies.base.card, spec.name)
        return replace(encodings.encoding_from_card(feature, ""), feature=feature)
    return encodings.fit_encoding(connection, train, spec)


def fit_numbers(
    connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec, base: Base | None
) -> NumberEncoding:
    """Return the encoding of a number: that of the base, or fitted on the relation ``train``."""
    if base is None:
        return fit_number(connection, train, spec)
    return number_encoding(next(number for number in base.card.numbers if number.name == spec.name))


def _feature(card: DatasetCard, name: str) -> Feature:
    return next(feature for feature in card.features if feature.name == name)
