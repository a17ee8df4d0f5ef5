"""How closely can anybody tell the times of actions in the simulated world before the video begins?

Impressions of the world's own policy are let happen many times over. The median over one half of the repetitions is
what a ranker would predict that knew everything about user and video but the dice; its mean absolute error over the
other half, in log1p seconds, is the least that any ranker can reach. Beside it stand the video's own median and one
median for all. Before anything is reported, the frequencies of the actions are held against their exact probabilities.
"""

from dataclasses import dataclass

import numpy as np
from harness import Report, ReportTable, main

from a2gen_rec.config import SimulateConfig
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.simulation import viewing
from a2gen_rec.simulation.population import ACTIONS, sample_user_block
from a2gen_rec.simulation.simulator import build_simulated_world
from a2gen_rec.utils.distributed import DistributedContext

QUICK = {"impressions": 500, "draws": 1_000}
FEWEST = 30  # repetitions with the action, for a median to be one


@dataclass(frozen=True)
class Settings:
    """What happens, and how often.

    Attributes:
        impressions: distinct ones; draws: repetitions of each, half to learn from and half to measure on.
        users, items: of the world; the others of its settings are those of `a2gen simulate`.
    """

    impressions: int = 2_000
    draws: int = 4_000
    users: int = SimulateConfig.users
    items: int = SimulateConfig.items
    seed: int = 0


def measure(settings: Settings, process: DistributedContext) -> Report:
    if process.world_size > 1:
        raise ConfigError(f"one process simulates: measure it on one rank, not {process.world_size}")
    if settings.impressions < 1 or settings.draws < 4:
        raise ConfigError(f"impressions {settings.impressions} and draws {settings.draws} must be at least 1 and 4")
    world = build_simulated_world(SimulateConfig(users=settings.users, items=settings.items, seed=settings.seed))
    users, rng = sample_user_block(world.config, 0), np.random.default_rng(settings.seed)
    row = rng.integers(len(users.user_id), size=settings.impressions)
    item = world.policy.sample_items(users, row, rng.random(len(row)) < world.config.personalized_share, rng)
    odds = viewing.segment_probabilities(world.config, world.base_logits, world.items, users, row, item)
    learnt, held = (repeated(odds, settings.draws // 2, rng) for _ in range(2))
    check(np.isfinite(learnt[:, :-1]), viewing.exact_marginals(odds).action)
    names = [*ACTIONS, "exit"]
    found = {name: errors(learnt[:, code], held[:, code], item) for code, name in enumerate(names)}
    columns = ["time of", "median of user and video", "median of the video", "one median"]
    note = "The first column is the bound: what is left is chance."
    table = ReportTable("mean absolute error, log1p s", columns, [[name, *each] for name, each in found.items()], note)
    return Report([table], figures={f"bound_{name}": bound for name, (bound, *_) in found.items()})


def repeated(odds: viewing.SegmentProbabilities, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[draws, actions and exit, impressions] log1p seconds of what happens in repetitions; NaN where it does not."""
    found = np.empty((draws, len(ACTIONS) + 1, odds.like.shape[1]), np.float32)
    for each in found:
        watched = viewing.sample_views(odds, rng)
        each[:-1] = np.where(watched.offset_ms < 0, np.nan, np.log1p(np.maximum(watched.offset_ms, 0) / 1000))
        each[-1] = np.log1p(watched.dwell_ms / 1000)
    return found


def check(happened: np.ndarray, exact: np.ndarray) -> None:
    """Refuse frequencies [draws, actions, impressions] that are not those of the exact probabilities."""
    expected = exact.mean(axis=1)
    spread = np.sqrt((exact * (1 - exact)).mean(axis=1) / happened[:, 0].size)
    if (np.abs(happened.mean(axis=(0, 2)) - expected) > 5 * spread).any():
        raise UserError("the simulated frequencies of actions are not their exact probabilities")


def errors(learnt: np.ndarray, held: np.ndarray, item: np.ndarray) -> list[float]:
    """Mean absolute errors on ``held`` [draws, impressions] of medians over ``learnt``: own, of the item, of all."""
    enough = np.isfinite(learnt).sum(axis=0) >= FEWEST
    learnt, held, item = learnt[:, enough], held[:, enough], item[enough]
    own = np.nanmedian(learnt, axis=0)
    of_item = np.empty_like(own)
    for each in np.unique(item):
        of_item[item == each] = np.nanmedian(learnt[:, item == each])
    return [float(np.nanmean(np.abs(held - told))) for told in (own, of_item, np.nanmedian(learnt))]


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
