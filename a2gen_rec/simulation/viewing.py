"""Viewing process over the segments of a video: sampling and exact marginal probabilities [ours].

While a user watches, each segment has one Bernoulli draw per remaining action and one for leaving. The draws of a
segment depend only on the user, the segment and the *state at the segment's start*:

- a **like inside a highlight** increases later follows and collects;
- a **follow before any like** ("loyal") decreases leaving afterwards.

Times are uniform within the segment, up to the exit if the user leaves in it. A like and a follow in one segment have
either order with probability one half. The state is therefore (like: no | plain | in a highlight) × (follow: no |
before the like | after it), with eight reachable cells. All probabilities follow from a forward recursion over at most
:data:`MAX_SEGMENTS` segments, without Monte Carlo sampling.
"""

from dataclasses import dataclass

import numpy as np

from a2gen_rec.config import SimulateConfig
from a2gen_rec.simulation.population import (
    ACTIONS,
    HOOK_DURATION_MS,
    LONG_VIEW_THRESHOLD_MS,
    SimulatedItems,
    SimulatedUsers,
)

LIKE, COMMENT, FOLLOW, COLLECT, FORWARD = range(len(ACTIONS))

# Log-odds per unit of interest match and of highlight appeal, in ACTIONS order, and for leaving.
MATCH_WEIGHTS = (0.65, 0.60, 0.75, 0.75, 0.65)
APPEAL_WEIGHTS = (0.60, 0.50, 0.60, 0.70, 0.50)
LEAVE_MATCH_WEIGHT, LEAVE_APPEAL_WEIGHT, LEAVE_QUALITY_WEIGHT = 0.6, 0.5, 0.8
# The hook of three seconds leaves little time for actions.
HOOK_ACTION_LOGIT = -1.0


@dataclass(frozen=True)
class BaseLogits:
    """Base log-odds per segment: (A,) per action, leaving in the hook, leaving later."""

    action: np.ndarray
    glance: float
    leave: float


@dataclass(frozen=True)
class SegmentProbabilities:
    """Probabilities of the draws per segment for ``N`` impressions; all (K, N), 0 for absent segments.

    ``follow`` and ``collect`` are pairs (plain, after a like in a highlight), ``leave`` is a pair (plain, loyal).
    """

    like: np.ndarray
    comment: np.ndarray
    forward: np.ndarray
    follow: tuple[np.ndarray, np.ndarray]
    collect: tuple[np.ndarray, np.ndarray]
    leave: tuple[np.ndarray, np.ndarray]
    highlight: np.ndarray
    edges_ms: np.ndarray


@dataclass(frozen=True)
class ExactMarginals:
    """Exact probabilities of ``N`` impressions.

    Attributes:
        action: (A, N), probability of the action in the impression.
        long_view: (N,), watch time >= min(18 s, duration).
        glance: (N,), watch time < 3 s.
        log1p_watch: (N,), expected log1p of the watch time in seconds.
    """

    action: np.ndarray
    long_view: np.ndarray
    glance: np.ndarray
    log1p_watch: np.ndarray


@dataclass(frozen=True)
class SampledViews:
    """Sampled impressions.

    Attributes:
        dwell_ms: (N,) int64 watch time.
        offset_ms: (A, N) int64 action time, -1 if the action did not occur.
    """

    dwell_ms: np.ndarray
    offset_ms: np.ndarray


def _sigmoid(log_odds: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-log_odds))


def _shift_log_odds(probability: np.ndarray, shift: float) -> np.ndarray:
    """Return the probability after adding ``shift`` to its log-odds."""
    factor = np.exp(shift)
    return probability * factor / (1.0 + probability * (factor - 1.0))


def segment_probabilities(
    config: SimulateConfig,
    base_logits: BaseLogits,
    items: SimulatedItems,
    users: SimulatedUsers,
    user_row: np.ndarray,
    item: np.ndarray,
) -> SegmentProbabilities:
    """Return the draw probabilities of ``N`` impressions of ``user_row`` (N,) of ``users`` and ``item`` (N,)."""
    edges_ms = items.edges_ms[:, item]
    duration_s = np.diff(edges_ms, axis=0) / 1000.0
    is_present = duration_s > 0
    highlight = items.highlight[:, item]
    match = config.interest_strength * users.affinity[user_row, items.segment_topic[:, item]]
    appeal = config.highlight_strength * highlight * np.maximum(match, 0.0)
    quality = items.quality[item]

    def action(code: int) -> np.ndarray:
        level = base_logits.action[code] + users.propensity[user_row, code] + quality
        log_odds = level + MATCH_WEIGHTS[code] * match + APPEAL_WEIGHTS[code] * appeal
        log_odds[0] += HOOK_ACTION_LOGIT
        return _sigmoid(log_odds) * is_present

    leave_offset = users.leave_propensity[user_row] - LEAVE_QUALITY_WEIGHT * quality
    leave_logits = base_logits.leave + leave_offset - LEAVE_MATCH_WEIGHT * match - LEAVE_APPEAL_WEIGHT * appeal
    leave_logits += 0.5 * np.log(np.maximum(duration_s, 0.1) / 6.0)
    leave_logits[0] = base_logits.glance + leave_offset - config.hook_penalty * match[0]
    leave = _sigmoid(leave_logits) * is_present
    follow, collect = action(FOLLOW), action(COLLECT)
    return SegmentProbabilities(
        like=action(LIKE),
        comment=action(COMMENT),
        forward=action(FORWARD),
        follow=(follow, _shift_log_odds(follow, config.highlight_like_boost)),
        collect=(collect, _shift_log_odds(collect, config.highlight_like_boost)),
        leave=(leave, _shift_log_odds(leave, -config.follow_retention_boost)),
        highlight=highlight,
        edges_ms=edges_ms,
    )


def long_view_threshold_ms(duration_ms: np.ndarray) -> np.ndarray:
    """Return the minimum watch time of a long view: min(18 s, duration), in ms."""
    return np.minimum(duration_ms, LONG_VIEW_THRESHOLD_MS)


def _advance_segment(
    mass: np.ndarray, like: np.ndarray, follow: tuple[np.ndarray, np.ndarray], highlight: np.ndarray
) -> np.ndarray:
    """Advance mass (3, 3, N) over (like: no, plain, highlight) × (follow: no, before like, after) past a segment."""
    none, loyal = mass[0, 0], mass[0, 1]
    plain, boosted = follow
    after = np.empty_like(mass)
    after[0, 0] = none * (1 - like) * (1 - plain)
    after[0, 1] = (none * plain + loyal) * (1 - like)
    after[0, 2] = 0.0
    for liked, arrives, rate in (1, like * ~highlight, plain), (2, like * highlight, boosted):
        both = 0.5 * none * arrives * plain
        after[liked, 0] = mass[liked, 0] * (1 - rate) + none * arrives * (1 - plain)
        after[liked, 1] = mass[liked, 1] + loyal * arrives + both
        after[liked, 2] = mass[liked, 2] + mass[liked, 0] * rate + both
    return after


def exact_marginals(probabilities: SegmentProbabilities) -> ExactMarginals:
    """Compute the marginal probabilities of all random outcomes by forward recursion."""
    segments, count = probabilities.like.shape
    mass = np.zeros((3, 3, count))
    mass[0, 0] = 1.0
    uncollected = mass.copy()
    uncommented, unforwarded = np.ones(count), np.ones(count)
    action = np.zeros((len(ACTIONS), count))
    leave_mass = np.empty((segments, count))
    for k in range(segments):
        like, comment, forward = probabilities.like[k], probabilities.comment[k], probabilities.forward[k]
        follow = (probabilities.follow[0][k], probabilities.follow[1][k])
        collect, boosted = probabilities.collect[0][k], probabilities.collect[1][k]
        leave, loyal_leave = probabilities.leave[0][k], probabilities.leave[1][k]
        watching, loyal = mass.sum(axis=(0, 1)), mass[:, 1].sum(axis=0)

        action[LIKE] += mass[0].sum(axis=0) * like
        action[FOLLOW] += (mass[0, 0] + mass[1, 0]) * follow[0] + mass[2, 0] * follow[1]
        action[COLLECT] += uncollected[:2].sum(axis=(0, 1)) * collect + uncollected[2].sum(axis=0) * boosted
        # Comments and forwards do not depend on the state. Their absence is independent of continued watching.
        action[COMMENT] += watching * uncommented * comment
        action[FORWARD] += watching * unforwarded * forward
        uncommented *= 1 - comment
        unforwarded *= 1 - forward
        leave_mass[k] = (watching - loyal) * leave + loyal * loyal_leave

        uncollected[:2] *= 1 - collect
        uncollected[2] *= 1 - boosted
        for cells in (mass, uncollected):
            cells[:, ::2] *= 1 - leave
            cells[:, 1] *= 1 - loyal_leave
        mass = _advance_segment(mass, like, follow, probabilities.highlight[k])
        uncollected = _advance_segment(uncollected, like, follow, probabilities.highlight[k])

    completed = mass.sum(axis=(0, 1))
    start, end = probabilities.edges_ms[:-1], probabilities.edges_ms[1:]
    duration_ms = np.maximum(end - start, 1)

    def survival(time_ms: np.ndarray | int) -> np.ndarray:
        return completed + (leave_mass * np.clip((end - time_ms) / duration_ms, 0.0, 1.0)).sum(axis=0)

    # The mean of log1p over a segment is a difference of its integral, (1+x) log(1+x) - x.
    seconds = probabilities.edges_ms / 1000.0
    integral = (1 + seconds) * np.log1p(seconds) - seconds
    mean_log1p = np.diff(integral, axis=0) / (duration_ms / 1000.0)
    return ExactMarginals(
        action=action,
        long_view=survival(long_view_threshold_ms(probabilities.edges_ms[-1])),
        glance=1.0 - survival(HOOK_DURATION_MS),
        log1p_watch=completed * np.log1p(seconds[-1]) + (leave_mass * mean_log1p).sum(axis=0),
    )


def sample_views(probabilities: SegmentProbabilities, rng: np.random.Generator) -> SampledViews:
    """Sample every impression once."""
    segments, count = probabilities.like.shape
    offset = np.full((len(ACTIONS), count), np.inf)
    dwell = probabilities.edges_ms[-1].astype(np.float64)
    watching = np.arange(count)
    liked_highlight, loyal = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    for k in range(segments):
        # Finished impressions are dropped: the cost is proportional to the impressions still watched.
        start = probabilities.edges_ms[k, watching]
        is_boosted, is_loyal = liked_highlight[watching], loyal[watching]
        uniform = rng.random((len(ACTIONS) + 1, len(watching)))
        leaves = uniform[-1] < np.where(
            is_loyal, probabilities.leave[1][k, watching], probabilities.leave[0][k, watching]
        )
        watched_ms = (probabilities.edges_ms[k + 1, watching] - start) * np.where(
            leaves, rng.random(len(watching)), 1.0
        )
        probability = (
            probabilities.like[k, watching],
            probabilities.comment[k, watching],
            np.where(is_boosted, probabilities.follow[1][k, watching], probabilities.follow[0][k, watching]),
            np.where(is_boosted, probabilities.collect[1][k, watching], probabilities.collect[0][k, watching]),
            probabilities.forward[k, watching],
        )
        occurrences = []
        for code in range(len(ACTIONS)):
            occurred = (uniform[code] < probability[code]) & np.isinf(offset[code, watching])
            rows = np.flatnonzero(occurred)
            offset[code, watching[rows]] = start[rows] + watched_ms[rows] * rng.random(len(rows))
            occurrences.append(watching[rows])
        liked, followed = occurrences[LIKE], occurrences[FOLLOW]
        liked_highlight[liked] = probabilities.highlight[k, liked]
        loyal[followed] = offset[FOLLOW, followed] < offset[LIKE, followed]
        dwell[watching[leaves]] = (start + watched_ms)[leaves]
        watching = watching[~leaves]
    offset_ms = np.where(np.isinf(offset), -1.0, offset)
    return SampledViews(np.floor(dwell).astype(np.int64), np.floor(offset_ms).astype(np.int64))
