"""Ranker without a model, for tests of the service; imports no torch, so that worker processes start quickly."""

import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from a2gen_rec.errors import UserError
from a2gen_rec.ranking.types import CacheStats, Impression, RankedList, RankQuery, ScoredCandidate
from a2gen_rec.ranking.window import check_time
from tests.helpers.random_card import make_card

ITEMS = [f"v{number}" for number in range(40)]


@dataclass(frozen=True)
class FakeHistory:
    """Stands for an encoded history: items by time."""

    item_at: dict[str, str]

    def __len__(self) -> int:
        return len(self.item_at)

    @property
    def ts_ms(self) -> list[int]:
        return [int(key.split()[0]) for key in self.item_at]


@dataclass
class FakeRanker:
    """Ranks by a hash of user and item, and returns the items of the history as every candidate's timeline.

    The model is a directory with a file ``version``. A batch with a candidate ``slow`` takes ``delay_s``, one with
    ``bad`` fails in ``rank_batch``, and any user feature is an error.
    """

    version: str
    delay_s: float = 0.2
    max_history: int = 10**6
    card: Any = field(default_factory=lambda: replace(make_card(), has_calendar_time=False))
    batches: list[list[str]] = field(default_factory=list)
    query_times: list[int | None] = field(default_factory=list)
    encoded: int = 0

    @classmethod
    def load(cls, model_dir: str, cache_bytes: int = 0) -> "FakeRanker":
        version = Path(model_dir) / "version"
        if not version.exists():
            raise UserError(f"{model_dir}: no exported model found")
        return cls(version.read_text())

    def rank(self, request: RankQuery) -> RankedList:
        return self.rank_batch([request])[0]

    def rank_batch(self, requests: Sequence[RankQuery]) -> list[RankedList]:
        self.batches.append([request.user for request in requests])
        self.query_times += [request.now_ms for request in requests]
        if any("slow" in request.candidates for request in requests):
            time.sleep(self.delay_s)
        if any("bad" in request.candidates for request in requests):
            raise KeyError(requests[0].user)
        return [self._ranked(request) for request in requests]

    def validate(self, request: RankQuery) -> None:
        if request.now_ms is not None:
            check_time(request.now_ms, "request: now_ms", self.card.has_calendar_time)
        if request.user_features:
            raise UserError(f"request: unknown user feature {next(iter(request.user_features))!r}")
        if not isinstance(request.history, FakeHistory):
            self._validate(request.history)

    def encode(self, impressions: Sequence[Impression], after: FakeHistory | None = None) -> FakeHistory:
        self._validate(impressions)
        self.encoded += len(impressions)
        new = {f"{impression.ts_ms:020d} {impression.item}": impression.item for impression in impressions}
        return FakeHistory(dict(sorted({**(after.item_at if after else {}), **new}.items())))

    def sample_users(self, count: int) -> list[str]:
        return ["u1", "u2"][:count]

    def sample_items(self, count: int) -> list[str]:
        return ITEMS[:count]

    @property
    def sort_keys(self) -> list[str]:
        return ["like"]

    def duration_s(self, item: str) -> float | None:
        return float(item[1:]) if item in ITEMS else None

    @property
    def cache_stats(self) -> CacheStats:
        return CacheStats(1, 2, 3, 4)

    def _validate(self, impressions: Sequence[Impression]) -> None:
        for impression in impressions:
            check_time(impression.ts_ms, f"impression of {impression.item!r}: ts_ms", self.card.has_calendar_time)
            for name, _ in impression.actions:
                if name not in self.card.predicted_actions:
                    raise UserError(f"impression of {impression.item!r}: unknown action {name!r}")

    def _ranked(self, request: RankQuery) -> RankedList:
        history: Any = request.history
        if not isinstance(history, FakeHistory):
            history = self.encode(history)
        ranked = sorted(set(request.candidates), key=lambda item: (-probability(request.user, item), item))
        timeline = [(item, None) for item in history.item_at.values()]
        return RankedList(
            user=request.user,
            user_known=True,
            history_length=len(history),
            sort_by="like",
            num_candidates=len(ranked),
            unknown_items=0,
            candidates=[
                ScoredCandidate(
                    item,
                    True,
                    {"like": probability(request.user, item), self.version: 1.0},
                    None,
                    timeline,
                )
                for item in ranked[: request.k]
            ],
            model_version=self.version,
        )


class SlowRanker(FakeRanker):
    """Takes two seconds for a batch with a candidate ``slow``."""

    @classmethod
    def load(cls, model_dir: str, cache_bytes: int = 0) -> "FakeRanker":
        return cls("one", delay_s=2.0)


class CrashingRanker(FakeRanker):
    """Ends the process that loads it."""

    @classmethod
    def load(cls, model_dir: str, cache_bytes: int = 0) -> "FakeRanker":
        os._exit(3)


def probability(user: str, item: str) -> float:
    return zlib.crc32(f"{user} {item}".encode()) / 2**32


def expected_order(user: str, candidates: Sequence[str], k: int = 10) -> list[str]:
    """Return the items that the ranker returns."""
    return sorted(set(candidates), key=lambda item: (-probability(user, item), item))[:k]


def make_model(folder: Path, version: str = "one") -> Path:
    """Create the directory of a fake model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "version").write_text(version)
    return folder


if __name__ == "__main__":  # `a2gen serve` with this ranker and the command's arguments
    import sys
    from functools import partial

    from a2gen_rec.cli.main import main
    from a2gen_rec.serving.http import server
    from tests.helpers import fake_ranker

    server.RankingService = partial(  # type: ignore[misc,assignment]
        server.RankingService, load=fake_ranker.FakeRanker.load
    )
    main(["serve", *sys.argv[1:]])
