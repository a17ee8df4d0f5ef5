"""What tests of the page need: a ranker with all that the page shows, in known figures, and a real browser."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from a2gen_rec.ranking.contributions import Contribution
from a2gen_rec.ranking.types import RankedList, RankQuery, ScoredCandidate, Timeline, WhatIfResult
from tests.helpers.cards import make_card
from tests.helpers.service import FakeRanker, Past, chance

WEIGHT = {"like": 0.6, "glance": 0.3, "watch_time": 0.1}


@dataclass
class PageRanker(FakeRanker):
    """Chances are hashes of user, item and length of the past; a score is that of three objectives.

    Its ``version`` says what it does without, in words: ensemble, objectives, times, sequences.
    """

    known: set[str] = field(default_factory=lambda: {f"v{number}" for number in range(40)})

    def __post_init__(self) -> None:
        timed = () if self.without("times") else ("like", "follow", "exit")
        self.card = replace(make_card(timed=timed), objectives=[] if self.without("objectives") else ["glance"])

    def without(self, what: str) -> bool:
        return what in self.version

    @property
    def orders(self) -> list[str]:
        outcomes = [*self.card.events, *self.card.labels, *self.card.objectives]
        ensemble, watch = [] if self.without("ensemble") else ["ensemble"], [] if self.without("times") else ["watch"]
        return [*ensemble, *watch, *outcomes]

    def _ranked(self, request: RankQuery) -> RankedList:
        past = request.history if isinstance(request.history, Past) else self.encode(request.history)
        by, items = request.sort_by or self.orders[0], set(request.candidates)
        candidates = sorted(
            (self._candidate(request, item, len(past)) for item in items),
            key=lambda each: (-_value(each, by), each.item),
        )
        return RankedList(
            user=request.user,
            user_known=request.user in self.some_users(9),
            history_length=len(past),
            sort_by=by,
            num_candidates=len(items),
            unknown_items=len(items - self.known),
            candidates=candidates[: request.k],
            model_version=self.version,
            what_if=_nudged(request, candidates),
        )

    def _candidate(self, request: RankQuery, item: str, past: int) -> ScoredCandidate:
        outcomes = [*self.card.events, *self.card.labels, *self.card.objectives]
        probability = {name: 0.01 + 0.98 * chance(request.user, f"{item} {name} {past}") for name in outcomes}
        watch_s = None if self.without("times") else 5 + 50 * chance(request.user, f"{item} watch {past}")
        at_s = {name: watch_s and (watch_s if name == "exit" else 0.4 * watch_s) for name in self.card.actions[1:]}
        at_s |= dict.fromkeys(set(at_s) - set(self.card.timed))
        ways = [("exit",), ("like", "exit"), ("comment", "follow", "exit")]
        sequences: list[tuple[Timeline, float]] = [
            ([("start", 0.0), *((name, at_s[name]) for name in way)], 0.5**place) for place, way in enumerate(ways, 1)
        ]
        if self.without("sequences"):
            sequences = []
        parts = [] if self.without("ensemble") else _parts(probability, watch_s)
        return ScoredCandidate(
            item,
            item in self.known,
            probability,
            watch_s,
            *(sequences[0] if sequences else ([], math.nan)),
            score=sum(part.contribution for part in parts) if parts else math.nan,
            explanation=parts if request.explain else [],
            expected_time_s=at_s,
            sequences=sequences[: request.num_sequences],
            duration_s=self.length_s(item),
        )


def _parts(probability: dict[str, float], watch_s: float | None) -> list[Contribution]:
    known = [name for name in WEIGHT if name in probability or (name == "watch_time" and watch_s is not None)]
    return [_part(name, probability.get(name, watch_s or 0.0)) for name in known]


def _part(name: str, prediction: float) -> Contribution:
    if name == "watch_time":
        return Contribution(name, True, prediction, math.log1p(prediction) - 3, WEIGHT[name], "s")
    transform = prediction - 0.2 if name == "like" else 0.8 - prediction
    return Contribution(name, name == "like", prediction, transform, WEIGHT[name])


def _nudged(request: RankQuery, candidates: list[ScoredCandidate]) -> list[WhatIfResult]:
    if request.what_if is None:
        return []
    item, name = request.what_if.item, request.what_if.objective
    own = next(each for each in candidates if each.item == item)
    before = _part(name, own.expected_watch_s or 0.0 if name == "watch_time" else own.probability[name])
    answers = []
    for change in request.what_if.changes:
        if name == "watch_time":
            now = _part(name, max(0.0, math.expm1(math.log1p(before.prediction) + change)))
        else:
            odds = before.prediction / (1 - before.prediction) * math.exp(change)
            now = _part(name, odds / (1 + odds))
        score = own.score - before.contribution + now.contribution
        ahead = sum(each.score > score for each in candidates if each is not own)
        answers.append(WhatIfResult(change, now.prediction, now.contribution, score, 1 + ahead))
    return answers


def _value(candidate: ScoredCandidate, by: str) -> float:
    watch_s = candidate.expected_watch_s
    return {"ensemble": candidate.score, "watch": watch_s or 0.0}.get(by, candidate.probability.get(by, 0.0))


@contextmanager
def chromium() -> Iterator[Browser]:
    """Headless; the test is skipped where there is none to run."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        if found is None and not Path(own).exists():
            pytest.skip("no Chromium: install it (apt-get install chromium), or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=found or own, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Witness:
    """What went on in a page that should not."""

    origin: str
    errors: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda asked: None if asked.url.startswith(self.origin) else self.errors.append(asked.url))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', event => console.error('policy', event.violatedDirective))"
        )

    def forgive(self, status: int) -> None:
        """Browsers call an answer of an error an error."""
        self.errors = [each for each in self.errors if f"status of {status}" not in each and "net::ERR" not in each]
