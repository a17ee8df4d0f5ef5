"""What is the lower bound of the error of predicted action times on simulated data?

Impressions of the simulator's policy are sampled many times. The median over one half of the samples is the prediction
of a ranker that knows all parameters of the simulator. Its mean absolute error on the other half, in log1p seconds, is
the lower bound for any ranker. The table also lists the median of each video and one global median. Before reporting,
the sampled frequencies of the actions are compared with their exact probabilities.
"""

from dataclasses import dataclass

import numpy as np
from harness import Report, ReportTable, main

from a2gen_rec.config import SimulateConfig
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.simulation import viewing
from a2gen_rec.simulation.population import ACTIONS, sample_user_block
from a2gen_rec.simulation.simulator import build_simulation
from a2gen_rec.utils.distributed import DistributedContext

QUICK = {"impressions": 500, "draws": 1_000}
MIN_OCCURRENCES = 30
"""Samples with the action that an impression needs for its median to count."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the simulation.

    Attributes:
        impressions: number of distinct impressions.
        draws: samples of each impression; half fit the medians, half measure the errors.
        users: simulated users; other settings are the defaults of `a2gen simulate`.
        items: simulated items.
        seed: random seed.
    """

    impressions: int = 2_000
    draws: int = 4_000
    users: int = SimulateConfig.users
    items: int = SimulateConfig.items
    seed: int = 0


def measure(settings: Settings, process: DistributedContext) -> Report:
    if process.world_size > 1:
        raise ConfigError(f"the simulation runs in one process: use one rank, not {process.world_size}")
    if settings.impressions < 1 or settings.draws < 4:
        raise ConfigError(
            f"impressions {settings.impressions} must be at least 1 and draws {settings.draws} at least 4"
        )
    simulated = build_simulation(SimulateConfig(users=settings.users, items=settings.items, seed=settings.seed))
    users, rng = sample_user_block(simulated.config, 0), np.random.default_rng(settings.seed)
    row = rng.integers(len(users.user_id), size=settings.impressions)
    by_interest = rng.random(len(row)) < simulated.config.personalized_share
    item = simulated.catalog.policies[0].sample_items(users, row, by_interest, rng)
    probabilities = viewing.segment_probabilities(
        simulated.config, simulated.base_logits, simulated.catalog.items, users, row, item
    )
    fit, held_out = (sample_times(probabilities, settings.draws // 2, rng) for _ in range(2))
    check_frequencies(np.isfinite(fit[:, :-1]), viewing.exact_marginals(probabilities).action)
    names = [*ACTIONS, "exit"]
    errors = {name: median_errors(fit[:, code], held_out[:, code], item) for code, name in enumerate(names)}
    columns = ["action", "median per user and video", "median per video", "global median"]
    note = "The first column of errors is the lower bound: the rest is random."
    table = ReportTable(
        "Mean absolute error of times, log1p s", columns, [[name, *row] for name, row in errors.items()], note
    )
    return Report([table], metrics={f"bound_{name}": bound for name, (bound, *_) in errors.items()})


def sample_times(probabilities: viewing.SegmentProbabilities, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Sample log1p seconds of actions and exit, [draws, actions + 1, impressions]; NaN if an action does not occur."""
    times = np.empty((draws, len(ACTIONS) + 1, probabilities.like.shape[1]), np.float32)
    for sample in times:
        views = viewing.sample_views(probabilities, rng)
        sample[:-1] = np.where(views.offset_ms < 0, np.nan, np.log1p(np.maximum(views.offset_ms, 0) / 1000))
        sample[-1] = np.log1p(views.dwell_ms / 1000)
    return times


def check_frequencies(occurred: np.ndarray, exact: np.ndarray) -> None:
    """Compare sampled actions [draws, actions, impressions] with their exact probabilities [actions, impressions].

    Raises:
        UserError: the frequencies differ by more than 5 standard errors.
    """
    expected = exact.mean(axis=1)
    standard_error = np.sqrt((exact * (1 - exact)).mean(axis=1) / occurred[:, 0].size)
    if (np.abs(occurred.mean(axis=(0, 2)) - expected) > 5 * standard_error).any():
        raise UserError("the simulated frequencies of actions differ from their exact probabilities")


def median_errors(fit: np.ndarray, held_out: np.ndarray, item: np.ndarray) -> list[float]:
    """Return the mean absolute errors on ``held_out`` [draws, impressions] of three medians over ``fit``.

    The medians are those per impression, per item, and over all.
    """
    enough = np.isfinite(fit).sum(axis=0) >= MIN_OCCURRENCES
    fit, held_out, item = fit[:, enough], held_out[:, enough], item[enough]
    per_impression = np.nanmedian(fit, axis=0)
    per_item = np.empty_like(per_impression)
    for item_id in np.unique(item):
        per_item[item == item_id] = np.nanmedian(fit[:, item == item_id])
    medians = (per_impression, per_item, np.nanmedian(fit))
    return [float(np.nanmean(np.abs(held_out - median))) for median in medians]


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
