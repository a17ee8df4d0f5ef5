"""Helpers of the page's tests: a ranker with known predictions for everything the page shows, and a real browser."""

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
from tests.helpers.fake_ranker import ITEMS, FakeHistory, FakeRanker, probability
from tests.helpers.random_card import make_card

WEIGHT = {"like": 0.6, "glance": 0.3, "watch_time": 0.1}


@dataclass
class PageRanker(FakeRanker):
    """Probabilities are hashes of user, item and history length; a score combines three objectives.

    The words of its ``version`` name missing features: ensemble, objectives, times, sequences.
    """

    known: set[str] = field(default_factory=lambda: set(ITEMS))

    def __post_init__(self) -> None:
        timed = () if self.lacks("times") else ("like", "follow", "exit")
        self.card = replace(make_card(timed=timed), objectives=[] if self.lacks("objectives") else ["glance"])

    def lacks(self, feature: str) -> bool:
        return feature in self.version

    @property
    def sort_keys(self) -> list[str]:
        outcomes = [*self.card.predicted_actions, *self.card.labels, *self.card.objectives]
        ensemble, watch = [] if self.lacks("ensemble") else ["ensemble"], [] if self.lacks("times") else ["watch"]
        return [*ensemble, *watch, *outcomes]

    def _ranked(self, request: RankQuery) -> RankedList:
        history = request.history if isinstance(request.history, FakeHistory) else self.encode(request.history)  # type: ignore[arg-type]
        sort_by, items = request.sort_by or self.sort_keys[0], set(request.candidates)
        candidates = sorted(
            (self._candidate(request, item, len(history)) for item in items),
            key=lambda candidate: (-_sort_value(candidate, sort_by), candidate.item),
        )
        return RankedList(
            user=request.user,
            user_known=request.user in self.sample_users(9),
            history_length=len(history),
            sort_by=sort_by,
            num_candidates=len(items),
            unknown_items=len(items - self.known),
            candidates=candidates[: request.k],
            model_version=self.version,
            what_if=_what_if(request, candidates),
        )

    def _candidate(self, request: RankQuery, item: str, history_length: int) -> ScoredCandidate:
        def hashed(name: str) -> float:
            return probability(request.user, f"{item} {name} {history_length}")

        outcomes = [*self.card.predicted_actions, *self.card.labels, *self.card.objectives]
        probabilities = {name: 0.01 + 0.98 * hashed(name) for name in outcomes}
        watch_s = None if self.lacks("times") else 5 + 50 * hashed("watch")
        time_s = {name: watch_s and (watch_s if name == "exit" else 0.4 * watch_s) for name in self.card.actions[1:]}
        time_s |= dict.fromkeys(set(time_s) - set(self.card.timed_actions))
        paths = [("exit",), ("like", "exit"), ("comment", "follow", "exit")]
        sequences: list[tuple[Timeline, float]] = [
            ([("start", 0.0), *((name, time_s[name]) for name in path)], 0.5**rank)
            for rank, path in enumerate(paths, 1)
        ]
        if self.lacks("sequences"):
            sequences = []
        explanation = [] if self.lacks("ensemble") else _explanation(probabilities, watch_s)
        return ScoredCandidate(
            item,
            item in self.known,
            probabilities,
            watch_s,
            *(sequences[0] if sequences else ([], None)),
            score=sum(part.contribution for part in explanation) if explanation else None,
            explanation=explanation if request.explain else [],
            expected_time_s=time_s,
            sequences=sequences[: request.num_sequences],
            duration_s=self.duration_s(item),
        )


def _explanation(probabilities: dict[str, float], watch_s: float | None) -> list[Contribution]:
    names = [name for name in WEIGHT if name in probabilities or (name == "watch_time" and watch_s is not None)]
    return [_contribution(name, probabilities.get(name, watch_s or 0.0)) for name in names]


def _contribution(name: str, prediction: float) -> Contribution:
    if name == "watch_time":
        return Contribution(name, True, prediction, math.log1p(prediction) - 3, WEIGHT[name], "s")
    transform = prediction - 0.2 if name == "like" else 0.8 - prediction
    return Contribution(name, name == "like", prediction, transform, WEIGHT[name])


def _what_if(request: RankQuery, candidates: list[ScoredCandidate]) -> list[WhatIfResult]:
    if request.what_if is None:
        return []
    item, name = request.what_if.item, request.what_if.objective
    candidate = next(candidate for candidate in candidates if candidate.item == item)
    watch_s = candidate.expected_watch_s or 0.0
    before = _contribution(name, watch_s if name == "watch_time" else candidate.probability[name])
    results = []
    for change in request.what_if.changes:
        if name == "watch_time":
            after = _contribution(name, max(0.0, math.expm1(math.log1p(before.prediction) + change)))
        else:
            odds = before.prediction / (1 - before.prediction) * math.exp(change)
            after = _contribution(name, odds / (1 + odds))
        score = candidate.score - before.contribution + after.contribution
        ahead = sum(other.score > score for other in candidates if other is not candidate)
        results.append(WhatIfResult(change, after.prediction, after.contribution, score, 1 + ahead))
    return results


def _sort_value(candidate: ScoredCandidate, sort_by: str) -> float:
    watch_s = candidate.expected_watch_s
    return {"ensemble": candidate.score, "watch": watch_s or 0.0}.get(sort_by, candidate.probability.get(sort_by, 0.0))


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run headless Chromium; skip the test if none is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    installed = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        bundled = playwright.chromium.executable_path
        if installed is None and not Path(bundled).exists():
            pytest.skip("no Chromium: install it (apt-get install chromium), or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=installed or bundled, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class PageMonitor:
    """Records errors, dialogs, policy violations and requests to other origins."""

    origin: str
    errors: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: None if request.url.startswith(self.origin) else self.errors.append(request.url),
        )
        page.add_init_script(
            "addEventListener('securitypolicyviolation', event => console.error('policy', event.violatedDirective))"
        )

    def ignore_status(self, status: int) -> None:
        """Drop the console errors that browsers log for an error response."""
        self.errors = [error for error in self.errors if f"status of {status}" not in error and "net::ERR" not in error]
