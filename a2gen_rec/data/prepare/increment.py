"""The dataset that an increment continues: its checks, and the settings that all increments share.

An increment starts after the last impression of its base. Earlier rows are *repeated* if the base has the same user,
item and time among the latest impressions of the user, otherwise *late*. Both are dropped and counted: a model may have
learned the base, whose windows do not change.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import ITEMS_FILE
from a2gen_rec.data.features.admission import DAY_MS, EarlierVocabulary
from a2gen_rec.data.prepare.carry import CarryFiles, source_difference
from a2gen_rec.data.prepare.staging import LATE, REPEATED
from a2gen_rec.data.schema import VOCABULARY_DIR
from a2gen_rec.errors import ConfigError, DataError
from a2gen_rec.utils import paths

SHARED_SETTINGS = ("max_history", "max_targets", "min_count", "statistics", "num_partitions")
"""Settings that all increments of a lineage share: those of the first dataset."""


@dataclass(frozen=True)
class Base:
    """The dataset that an increment continues.

    Attributes:
        path: dataset directory, for messages.
        folder: local directory.
        card: dataset card.
        source: facts of its source.
        settings: settings of its preparation.
    """

    path: str
    folder: Path
    card: DatasetCard
    source: Mapping[str, Any]
    settings: Mapping[str, Any]

    @classmethod
    def open(cls, path: str) -> "Base":
        """Open the dataset ``path``.

        Raises:
            DataError: the card or the carry is missing or invalid.
            UserError: the directory does not exist.
        """
        card = DatasetCard.load(path)
        folder = Path(paths.to_local_path(path))
        source, settings = CarryFiles(folder).read_source()
        if set(settings) != {*SHARED_SETTINGS, "ttl_days"}:
            raise DataError("invalid settings", file=CarryFiles(folder).source)
        return cls(path, folder, card, source, settings)

    @property
    def carry(self) -> CarryFiles:
        return CarryFiles(self.folder)

    @property
    def items_file(self) -> Path:
        return self.folder / ITEMS_FILE

    def resolve_config(self, config: PrepareConfig) -> PrepareConfig:
        """Return the settings of an increment: shared settings, and the base's ``ttl_days`` unless it is set.

        Raises:
            ConfigError: a shared setting is set to another value.
        """
        defaults = {each.name: each.default for each in fields(PrepareConfig)}
        for name in SHARED_SETTINGS:
            value = getattr(config, name)
            if value not in (defaults[name], self.settings[name]):
                raise ConfigError(f"{name} {value}, but {self.settings[name]} in {self.path}; leave it out")
        shared = {name: self.settings[name] for name in SHARED_SETTINGS}
        return replace(config, **shared, ttl_days=config.ttl_days or self.settings["ttl_days"])

    def check_source(self, source: Mapping[str, Any], raw: str) -> None:
        """Check that a log has the source of the base; ``source`` as in :func:`carry.describe_source`.

        Raises:
            DataError: naming the first difference.
        """
        if difference := source_difference(source, self.source):
            raise DataError(f"is another source than that of {self.path}: {difference} there", file=raw)

    def check_rows(self, kept: int, dropped: Mapping[str, int], max_late_share: float, raw: str) -> None:
        """Check that a log follows the base, up to some late and repeated rows.

        Raises:
            DataError: no row starts after the end of the base, or too few.
        """
        late, repeated = dropped.get(LATE, 0), dropped.get(REPEATED, 0)
        until = f"until {self.card.end_ms} ms, the end of {self.path}"
        if late + repeated and not kept:
            raise DataError(f"all {late + repeated:,} impressions start {until}", file=raw, field="ts_ms")
        if late + repeated > max_late_share * (kept + late + repeated):
            counts = f"{late + repeated:,} of {kept + late + repeated:,} impressions start {until}"
            raise DataError(
                f"overlaps its base: {counts} ({repeated:,} of them in it); set --max-late-share to drop them",
                file=raw,
                field="ts_ms",
            )

    def vocabulary(self, feature: str) -> EarlierVocabulary:
        cardinality = next(each.cardinality for each in self.card.features if each.name == feature)
        file = self.folder / VOCABULARY_DIR / f"{feature}.parquet"
        next_row = self.card.vocabularies[feature].next_row
        return EarlierVocabulary(file, self.carry.pending(feature), cardinality, next_row)


def shared_settings(config: PrepareConfig) -> dict[str, Any]:
    """Return the settings that the carry records."""
    return {name: value for name, value in asdict(config).items() if name in (*SHARED_SETTINGS, "ttl_days")}


def retire_before_ms(end_ms: int, ttl_days: float) -> int | None:
    """Return the time before which unseen values retire; None for never."""
    return end_ms - round(ttl_days * DAY_MS) if ttl_days else None
