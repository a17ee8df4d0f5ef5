"""What a service is loaded with: a simulated world, a model exported from it, pasts of its users, and requests."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from a2gen_rec.config import PrepareConfig, SimulateConfig
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.data.sources.simulated import Simulated
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.experiments.command_runner import CommandRunner
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.serving.backfill import latest_impressions
from a2gen_rec.serving.http.schema import ImpressionSchema
from a2gen_rec.simulation.simulator import simulate

CONFIG = Path(__file__).parents[1] / "configs" / "simulated.yaml"
ROUNDS = 4
"""Requests of every user, each with candidates of its own."""
LATER_MS = 60_000
"""After a user's last impression: the pasts are simulated ones, and far from now."""
CHECKED = 5

Ask = Callable[[str, bytes], tuple[int, Any]]
"""Post a body to a route: status, and the answer's JSON."""


@dataclass(frozen=True)
class World:
    """An exported model, the past of users with full histories, and requests: in turn one of every user."""

    model: str
    pasts: dict[str, list[Impression]]
    requests: list[RankQuery]

    @property
    def bodies(self) -> list[bytes]:
        """The requests as they are sent; histories are those recorded."""
        return [
            as_body(
                user=each.user,
                candidates=list(each.candidates),
                now_ms=each.now_ms,
                k=each.k,
                timelines=each.include_timelines,
            )
            for each in self.requests
        ]

    def record(self, ask: Ask) -> None:
        """Tell the service the users' pasts.

        Raises:
            RuntimeError: it does not take them.
        """
        for user, past in self.pasts.items():
            told = [ImpressionSchema.from_impression(each).model_dump() for each in past]
            status, answer = ask("/v1/events", as_body(user=user, impressions=told))
            if status != 200 or answer != {"recorded": len(past)}:
                raise RuntimeError(f"events of a user are answered with {status} {answer}")

    def check(self, ask: Ask) -> None:
        """Raise RuntimeError unless a few answers are what the model says itself; then ask for every user once."""
        ranker = Ranker.load(self.model)
        for number, (request, body) in enumerate(zip(self.requests, self.bodies, strict=True)):
            if number >= len(self.pasts):
                return
            status, answer = ask("/v1/rank", body)
            items = [each["item"] for each in answer["candidates"]] if status == 200 else []
            if len(set(items)) != min(request.k, len(request.candidates)) or not set(items) <= set(request.candidates):
                raise RuntimeError(f"a request for {request.k} of its candidates is answered with {status} {answer}")
            if number < CHECKED:
                _compare(items, answer, request, ranker, self.pasts[request.user])


def _compare(items: list[str], answer: Any, request: RankQuery, ranker: Ranker, past: Sequence[Impression]) -> None:
    asked = RankQuery(request.user, request.candidates, request.now_ms, past, k=request.k, include_timelines=False)
    expected = ranker.rank(asked)
    if items != [each.item for each in expected.candidates] or answer["history_length"] != expected.history_length:
        raise RuntimeError(f"the service ranks {items}, the model {[each.item for each in expected.candidates]}")
    for mine, theirs in zip(answer["candidates"], expected.candidates, strict=True):
        if any(abs(mine["probability"][name] - chance) > 1e-4 for name, chance in theirs.probability.items()):
            raise RuntimeError(f"the service predicts {mine['probability']}, the model {theirs.probability}")


def as_body(**fields: object) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def make_world(
    folder: Path,
    users: int,
    candidates: int,
    history: int,
    k: int,
    timelines: bool,
    steps: int,
    seed: int,
    tell: Callable[[str], None],
) -> World:
    """Simulate, prepare, train and export into ``folder``, by the commands where they are a process's job.

    Args:
        users: with full histories, about half of those simulated.
        tell: told what is being done.

    Raises:
        ConfigError: there are no such users.
        UserError: a command failed.
    """
    log, data, run, model = (str(folder / name) for name in ("log", "data", "run", "model"))
    tell(f"simulating a world of {2 * users:,} users")
    items = max(2000, 5 * candidates)
    world = SimulateConfig(
        users=2 * users, items=items, authors=items // 5, impressions_per_user=2 * history, seed=seed
    )
    simulate(log, world)
    prepare("simulated", log, data, PrepareConfig(max_history=history))
    tell(f"training {steps:,} steps, exporting")
    bounds = [f"--train.max_steps={steps}", f"--train.validation_interval={steps}", "--train.epochs=1000"]
    a2gen(folder, "train", "--config", str(CONFIG), "--data", data, "--run", run, *bounds)
    # What little training gives may be rounded more; ranking takes as long.
    a2gen(folder, "export", "--run", run, "--out", model, "--dtype", "int8", "--max-auc-drop", "0.01")
    pasts = dict(_full(log, data, history, users))
    if not pasts:
        raise ConfigError(f"no simulated user has {history} impressions; raise users")
    rng = np.random.default_rng(seed)
    known = Ranker.load(model).sample_items(items)
    requests = [
        RankQuery(
            user,
            rng.choice(known, min(candidates, len(known)), replace=False).tolist(),
            past[-1].ts_ms + LATER_MS,
            k=k,
            include_timelines=timelines,
        )
        for _ in range(ROUNDS)
        for user, past in pasts.items()
    ]
    return World(model, pasts, requests)


def _full(log: str, data: str, history: int, users: int) -> list[tuple[str, list[Impression]]]:
    latest = latest_impressions(Simulated(log), log, DatasetCard.load(data), history)
    return [(user, past) for user, past in latest if len(past) == history][:users]


def a2gen(folder: Path, *arguments: str) -> None:
    """Run a command in a process of its own, which ends with this one.

    Raises:
        UserError: it failed.
    """
    log = folder / f"{arguments[0]}.log"
    if code := CommandRunner()(arguments, str(log)):
        raise UserError(f"a2gen {arguments[0]} failed with exit code {code}: {last_line(log)}")


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it told nothing"
