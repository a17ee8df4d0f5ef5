"""Fixture of the serving benchmarks: simulated data, an exported model, user histories and requests."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from a2gen_rec.config import PrepareConfig, SimulateConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.sources.simulated import Simulated
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.experiments.command_runner import CommandRunner
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.serving.backfill import latest_impressions
from a2gen_rec.serving.http.schema import ImpressionSchema
from a2gen_rec.simulation.simulator import simulate

CONFIG_FILE = Path(__file__).parents[1] / "configs" / "simulated.yaml"
REQUESTS_PER_USER = 4
"""Number of requests of every user, with different candidates each."""
QUERY_DELAY_MS = 60_000
"""Query time after a user's last impression; the simulated histories are far in the past."""
NUM_COMPARED = 5
"""Number of responses that are compared with the model."""

Post = Callable[[str, bytes], tuple[int, Any]]
"""Function that posts a body to a route and returns the status and the JSON response."""


@dataclass(frozen=True)
class ServingFixture:
    """Exported model, users with full histories, and requests that cycle through the users."""

    model_dir: str
    histories: dict[str, list[Impression]]
    requests: list[RankQuery]

    @property
    def request_bodies(self) -> list[bytes]:
        """Request bodies without histories: the service reads the recorded ones."""
        return [
            to_json(
                user=request.user,
                candidates=list(request.candidates),
                now_ms=request.now_ms,
                k=request.k,
                include_timelines=request.include_timelines,
            )
            for request in self.requests
        ]

    def record_histories(self, post: Post) -> None:
        """Record the users' histories in the service.

        Raises:
            RuntimeError: the service rejects them.
        """
        for user, history in self.histories.items():
            impressions = [ImpressionSchema.from_impression(impression).model_dump() for impression in history]
            status, response = post("/v1/events", to_json(user=user, impressions=impressions))
            if status != 200 or response != {"recorded": len(history)}:
                raise RuntimeError(f"unexpected response to the events of a user: {status} {response}")

    def check_responses(self, post: Post) -> None:
        """Send one request for every user and compare the first responses with the model.

        Raises:
            RuntimeError: a response is not a ranking, or differs from the model.
        """
        ranker = Ranker.load(self.model_dir)
        for number, (request, body) in enumerate(zip(self.requests, self.request_bodies, strict=True)):
            if number >= len(self.histories):
                return
            status, response = post("/v1/rank", body)
            items = [candidate["item"] for candidate in response["candidates"]] if status == 200 else []
            if len(set(items)) != min(request.k, len(request.candidates)) or not set(items) <= set(request.candidates):
                raise RuntimeError(f"unexpected response to a request for {request.k} candidates: {status} {response}")
            if number < NUM_COMPARED:
                check_same_ranking(items, response, request, ranker, self.histories[request.user])


def check_same_ranking(
    items: list[str], response: Any, request: RankQuery, ranker: Ranker, history: Sequence[Impression]
) -> None:
    """Check that a response has the items, history length and probabilities of the model's ranking.

    Raises:
        RuntimeError: it does not.
    """
    query = RankQuery(request.user, request.candidates, request.now_ms, history, k=request.k, include_timelines=False)
    expected = ranker.rank(query)
    expected_items = [candidate.item for candidate in expected.candidates]
    if items != expected_items or response["history_length"] != expected.history_length:
        raise RuntimeError(f"the service ranks {items}, the model {expected_items}")
    for candidate, reference in zip(response["candidates"], expected.candidates, strict=True):
        probability = candidate["probability"]
        if any(abs(probability[name] - value) > 1e-4 for name, value in reference.probability.items()):
            raise RuntimeError(f"the service predicts {probability}, the model {reference.probability}")


def to_json(**fields: object) -> bytes:
    """Serialize fields as compact JSON."""
    return json.dumps(fields, separators=(",", ":")).encode()


def make_fixture(
    folder: Path,
    users: int,
    candidates: int,
    history: int,
    k: int,
    include_timelines: bool,
    steps: int,
    seed: int,
    log: Callable[[str], None],
) -> ServingFixture:
    """Simulate, prepare, train and export into ``folder``; training and export run as separate processes.

    Args:
        folder: directory of the log, dataset, run and model.
        users: maximum users with full histories, about half of the simulated ones.
        candidates: candidates of a request.
        history: length of the histories.
        k: candidates of a response.
        include_timelines: whether responses have timelines.
        steps: training steps.
        seed: random seed.
        log: function that prints a progress line.

    Raises:
        ConfigError: no user has a full history.
        UserError: a command failed.
    """
    raw, data, run, model = (str(folder / name) for name in ("log", "data", "run", "model"))
    log(f"simulating {2 * users:,} users")
    items = max(2000, 5 * candidates)
    config = SimulateConfig(
        users=2 * users, items=items, authors=items // 5, impressions_per_user=2 * history, seed=seed
    )
    simulate(raw, config)
    prepare("simulated", raw, data, PrepareConfig(max_history=history))
    log(f"training {steps:,} steps, exporting")
    options = [f"--train.max_steps={steps}", f"--train.validation_interval={steps}", "--train.epochs=1000"]
    run_command(folder, "train", "--config", str(CONFIG_FILE), "--data", data, "--run", run, *options)
    # A loose tolerance suffices for a briefly trained model; ranking takes as long.
    run_command(folder, "export", "--run", run, "--out", model, "--dtype", "int8", "--max-auc-drop", "0.01")
    histories = dict(_full_histories(raw, data, history, users))
    if not histories:
        raise ConfigError(f"no simulated user has {history} impressions; raise users")
    rng = np.random.default_rng(seed)
    known_items = Ranker.load(model).sample_items(items)
    requests = [
        RankQuery(
            user,
            rng.choice(known_items, min(candidates, len(known_items)), replace=False).tolist(),
            user_history[-1].ts_ms + QUERY_DELAY_MS,
            k=k,
            include_timelines=include_timelines,
        )
        for _ in range(REQUESTS_PER_USER)
        for user, user_history in histories.items()
    ]
    return ServingFixture(model, histories, requests)


def _full_histories(log: str, data: str, history: int, users: int) -> list[tuple[str, list[Impression]]]:
    latest = latest_impressions(Simulated(log), log, DatasetCard.load(data), history)
    return [(user, impressions) for user, impressions in latest if len(impressions) == history][:users]


def run_command(folder: Path, *arguments: str) -> None:
    """Run an `a2gen` command in a new process, which ends with this one.

    Raises:
        UserError: the command failed.
    """
    log = folder / f"{arguments[0]}.log"
    if code := CommandRunner()(arguments, str(log)):
        raise UserError(f"a2gen {arguments[0]} failed with exit code {code}: {last_line(log)}")


def last_line(log: Path) -> str:
    """Return the last line of a log file."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
