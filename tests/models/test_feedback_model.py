"""Feedback, session features and objectives in the full model, on one process in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from a2gen_rec.config import LossConfig
from a2gen_rec.data.batch import FULL_WINDOW, WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.columns import WindowColumns, concat_ranges
from a2gen_rec.data.schema import COMPLETE, EFFECTIVE, FEEDBACK_LEVELS, GLANCE, NEGATIVE, PARTIAL, UNKNOWN
from a2gen_rec.losses.loss import Loss, term_means, total_loss
from a2gen_rec.models.base import RankingModel
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.models.factory import build_model
from a2gen_rec.models.hierarchical import objective_tasks
from a2gen_rec.nn.feedback import DualViewAttention
from tests.helpers.cards import make_card, make_columns, small_config
from tests.helpers.models import all_predictions, build_double, forward, make_batch

CARD = make_card()
SIZES = {feature.name: feature.cardinality for feature in CARD.features}
EVERYTHING = {"session_features": True, "predict_objectives": True}
SWITCHES = {
    "tokens": {"feedback_encoding": "tokens"},
    "dual_view": {"feedback_encoding": "dual_view"},
    "dual_view_full": {"feedback_encoding": "dual_view_full"},
    "session": {"session_features": True},
    "objectives": {"predict_objectives": True},
    "all of it": {"feedback_encoding": "dual_view_full", **EVERYTHING},
    "all of it, implicit": {"feedback_encoding": "dual_view", "generator": "implicit", **EVERYTHING},
}


@pytest.fixture(scope="module")
def columns() -> WindowColumns:
    return make_columns(CARD, 12, np.random.default_rng(3))


@torch.no_grad()
def predictions(model: RankingModel, batch: WindowBatch) -> Tensor:
    """Return all predictions before the target's actions, one row per target."""
    return all_predictions(model, forward(model, batch))


def change_outcomes(columns: WindowColumns, which: np.ndarray, rng: np.random.Generator) -> WindowColumns:
    """Change actions, times, outcomes, labels and objectives of the impressions ``which`` [impressions] bool."""
    token = np.repeat(which, columns.action_lengths)
    inner = token & (columns.action > 0) & (columns.action < len(CARD.actions) - 1)
    action, offset_s = columns.action.copy(), columns.offset_s.copy()
    action[inner] = 1 + action[inner] % (len(CARD.actions) - 2)
    offset_s[token & (columns.action > 0)] += rng.random() * 100
    outcome = {name: np.where(which, (rows + 1) % SIZES[name], rows) for name, rows in columns.outcome.items()}
    end_ms = columns.end_ms + np.where(which, rng.integers(1, 20_000, len(which)), 0)
    labels, objectives = columns.labels.copy(), columns.objectives.copy()
    labels[which], objectives[which] = 1 - labels[which], np.nan_to_num(1 - objectives[which], nan=1.0)
    return dataclasses.replace(
        columns,
        end_ms=end_ms,
        action=action,
        offset_s=offset_s,
        outcome=outcome,
        labels=labels,
        objectives=objectives,
    )


def change_features(columns: WindowColumns, which: np.ndarray) -> WindowColumns:
    """Change item and session features of the impressions ``which`` [impressions] bool."""

    def other(ids: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.where(which, (rows + 1) % SIZES[name], rows) for name, rows in ids.items()}

    return dataclasses.replace(columns, impression_ids=other(columns.impression_ids), session=other(columns.session))


@pytest.mark.parametrize("impl", ["factorized", "reference"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_targets_do_not_see_their_own_or_later_outcomes(switch: str, impl: str, columns: WindowColumns) -> None:
    """Bit-equal, except for rounding of the factorization, whose scale depends on the keys of all targets."""
    rounding = {"rtol": 1e-10, "atol": 1e-12} if impl == "factorized" else {"rtol": 0, "atol": 0}
    config = small_config(attention_impl=impl, max_history=3, **SWITCHES[switch])
    model, rng = build_double(CARD, config, randomize=True), np.random.default_rng(0)
    before = predictions(model, make_batch(CARD, columns, config))
    window = np.repeat(np.arange(len(columns)), columns.lengths)
    position = np.arange(len(window))
    column = position - columns.starts[window]
    targets = position[column >= columns.first_target[window]]
    for row, target in enumerate(targets):
        same_window = window == window[target]
        hidden_changed = same_window & (
            (position >= target) | (columns.end_ms > columns.ts_ms[target]) | (position < target - 3)
        )
        changed = change_outcomes(columns, hidden_changed, rng)
        changed = change_features(changed, hidden_changed & (position != target))
        after = predictions(model, make_batch(CARD, changed, config))
        torch.testing.assert_close(after[row], before[row], **rounding)
        assert torch.equal(after[window[targets] != window[target]], before[window[targets] != window[target]])
    assert len(targets) > 30


@pytest.mark.parametrize("switch", ["off", *SWITCHES])
def test_outcomes_and_session_features_affect_predictions_if_used(switch: str, columns: WindowColumns) -> None:
    variant = SWITCHES.get(switch, {})
    config = small_config(**variant)
    model = build_double(CARD, config, randomize=True)
    before = predictions(model, make_batch(CARD, columns, config))
    batch = make_batch(CARD, columns, config)
    seeing = model.ranker._layout(batch).attention_mask.any(-1)[batch.target_window, batch.target_column]

    def moved(field: str, name: str) -> Tensor:
        rows = getattr(columns, field)
        # Shifted by two levels, every impression moves to another view or out of the views.
        other = {name: (rows[name] + 2) % SIZES[name]}
        changed = predictions(model, make_batch(CARD, dataclasses.replace(columns, **{field: rows | other}), config))
        return (changed != before).any(1)

    feedback = variant.get("feedback_encoding", "none") != "none"
    for name in columns.outcome:
        assert torch.equal(moved("outcome", name), seeing & feedback), name
    for name in columns.session:
        assert bool(moved("session", name).all()) is variant.get("session_features", False), name
        assert bool(moved("session", name).any()) is variant.get("session_features", False), name
    assert 5 < seeing.sum() < len(seeing)
    other = dataclasses.replace(columns, objectives=1 - columns.objectives)
    assert torch.equal(predictions(model, make_batch(CARD, other, config)), before), "objectives must not be inputs"
    other = dataclasses.replace(columns, labels=1 - columns.labels)
    changed = (predictions(model, make_batch(CARD, other, config)) != before).any(1)
    assert torch.equal(changed, seeing), "labels must be inputs of later targets only"


@pytest.mark.parametrize("feedback", ["tokens", "dual_view", "dual_view_full"])
def test_views_distinguish_feedback_levels(feedback: str, columns: WindowColumns) -> None:
    """With one embedding for all levels, only views distinguish levels, and only those of different views."""
    config = small_config(feedback_encoding=feedback, statistics=False)
    model = build_double(CARD, config, randomize=True)
    with torch.no_grad():
        for name in ("feedback", "watch_ratio"):
            table = model.embeddings.embeddings[module_key(name)].weight
            table.copy_(table[:1].expand_as(table))
    rng = np.random.default_rng(0)
    levels = rng.integers(0, len(FEEDBACK_LEVELS), len(columns.ts_ms))

    def of(levels: np.ndarray) -> Tensor:
        outcome = columns.outcome | {"feedback": levels}
        return predictions(model, make_batch(CARD, dataclasses.replace(columns, outcome=outcome), config))

    before = of(levels)
    views = [{NEGATIVE, GLANCE}, {UNKNOWN, PARTIAL}, {EFFECTIVE, COMPLETE}]
    for first in range(len(FEEDBACK_LEVELS)):
        for second in range(len(FEEDBACK_LEVELS)):
            joint = any({first, second} <= view for view in views)
            same = torch.equal(of(np.where(levels == first, second, levels)), before)
            assert same is (joint or feedback == "tokens"), (FEEDBACK_LEVELS[first], FEEDBACK_LEVELS[second])


@pytest.mark.parametrize("switch", SWITCHES)
def test_factorized_equals_reference_model_with_gradients(switch: str, columns: WindowColumns) -> None:
    results = []
    for impl in ("factorized", "reference"):
        config = small_config(attention_impl=impl, **SWITCHES[switch])
        model = build_double(CARD, config, randomize=True)
        batch = make_batch(CARD, columns, config)
        loss, _ = Loss(config.loss, tasks=model.ranker.objective_tasks)(forward(model, batch), batch)
        loss.backward()
        results.append([predictions(model, batch), loss.detach(), *(p.grad for p in model.parameters())])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


def bare(card: DatasetCard, columns: WindowColumns, *names: str) -> tuple[DatasetCard, WindowColumns]:
    """Return card and columns without the features of these names."""
    features = [feature for feature in card.features if feature.name not in names]
    session, outcome = (
        {name: rows for name, rows in one.items() if name not in names} for one in (columns.session, columns.outcome)
    )
    return dataclasses.replace(card, features=features), dataclasses.replace(columns, session=session, outcome=outcome)


@pytest.mark.parametrize("feedback", ["tokens", "dual_view", "dual_view_full"])
def test_feedback_is_ignored_without_watch_times(feedback: str, columns: WindowColumns) -> None:
    """With all options on, the model then equals that with session features alone."""
    card, data = bare(CARD, columns, "previous_feedback", "feedback", "watch_ratio")
    card = dataclasses.replace(card, feedback=None, objectives=[], timed_actions=["like", "follow"])
    data = dataclasses.replace(data, objectives=columns.objectives[:, :0])
    runs = []
    for variant in ({"feedback_encoding": feedback, "predict_objectives": True}, {}):
        config = small_config(session_features=True, **variant)
        model = build_double(card, config, randomize=True)
        assert not isinstance(model.ranker.encoder.item_pooling, DualViewAttention)
        assert model.ranker.objective_tasks == ()
        runs.append({"output": predictions(model, make_batch(card, data, config)), **model.state_dict()})
    assert list(runs[0]) == list(runs[1])
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_log_without_durations_has_levels_but_no_watch_ratio(columns: WindowColumns) -> None:
    card, data = bare(CARD, columns, "watch_ratio")
    config = small_config(feedback_encoding="dual_view", **EVERYTHING)
    model = build_double(card, config, randomize=True)
    assert isinstance(model.ranker.encoder.item_pooling, DualViewAttention)
    assert predictions(model, make_batch(card, data, config)).isfinite().all()


def test_objective_tasks_follow_the_card() -> None:
    on, off = (small_config(predict_objectives=objectives).model for objectives in (True, False))
    untimed = dataclasses.replace(CARD, timed_actions=["like"])
    plain = dataclasses.replace(CARD, objectives=[])
    assert objective_tasks(CARD, on) == ("glance", "effective", "watch_time")
    assert objective_tasks(untimed, on) == ("glance", "effective")
    assert objective_tasks(plain, on) == ("watch_time",)
    assert objective_tasks(dataclasses.replace(plain, timed_actions=[]), on) == objective_tasks(CARD, off) == ()


@pytest.mark.parametrize("labels", [(), ("click", "long_view")])
@pytest.mark.parametrize("timed", [("like",), ("like", "exit")])
def test_initial_outputs_are_base_rates_and_median_time(labels: tuple, timed: tuple) -> None:
    card = make_card(labels, timed)
    names = [*labels, *card.objectives]
    card = dataclasses.replace(card, base_rate=card.base_rate | {n: 0.1 * (i + 1) for i, n in enumerate(names)})
    data = make_columns(card, 5, np.random.default_rng(0))
    config = small_config(predict_objectives=True)
    torch.manual_seed(0)
    model = build_model(card, config, torch.device("cpu")).double()
    output = forward(model, make_batch(card, data, config))
    chances = torch.cat([output.label_logits, output.objective_logits], 1).sigmoid()
    expected = torch.tensor([card.base_rate[name] for name in names]).double().expand_as(chances)
    torch.testing.assert_close(chances, expected, rtol=1e-5, atol=1e-6)
    assert output.label_logits.shape[1] == len(labels)
    if "exit" in timed:
        seconds = output.watch_time.expm1()
        torch.testing.assert_close(seconds, torch.full_like(seconds, 5.0), rtol=1e-5, atol=0)
    else:
        assert output.watch_time is None


def as_requests(columns: WindowColumns, gap_s: float) -> WindowColumns:
    """Return one window per target: the history before its request, then the target at query time."""
    members: list[np.ndarray] = []
    moments = []
    for row in range(len(columns)):
        start, first = int(columns.starts[row]), int(columns.first_target[row])
        opens = start + first
        for position in range(start + first, start + int(columns.lengths[row])):
            if position > start + first and columns.ts_ms[position] - columns.ts_ms[position - 1] > 1000 * gap_s:
                opens = position
            members.append(np.append(np.arange(start, opens), position))
            moments.append((row, opens))
    windows, opens_at = (np.array(one) for one in zip(*moments, strict=True))
    context = {feature.name for feature in CARD.features_at("context")}
    lengths = np.array([len(one) for one in members])
    flat, last = np.concatenate(members), np.cumsum(lengths) - 1
    action_lengths = columns.action_lengths[flat]
    tokens = concat_ranges(columns.action_starts[flat], action_lengths)

    def moved(rows: np.ndarray) -> np.ndarray:
        taken = rows[flat]
        taken[last] = rows[opens_at]
        return taken

    first_targets = (columns.starts + columns.first_target)[windows]
    target_rows = columns.target_starts[windows] + flat[last] - first_targets
    return WindowColumns(
        user_key=columns.user_key[windows],
        first_target=lengths - 1,
        starts=last + 1 - lengths,
        lengths=lengths,
        user_ids={name: rows[windows] for name, rows in columns.user_ids.items()},
        impression_ids={
            name: moved(rows) if name in context else rows[flat] for name, rows in columns.impression_ids.items()
        },
        session={name: moved(rows) for name, rows in columns.session.items()},
        outcome={name: rows[flat] for name, rows in columns.outcome.items()},
        ts_ms=moved(columns.ts_ms),
        end_ms=columns.end_ms[flat],
        labels=columns.labels[flat],
        objectives=columns.objectives[flat],
        oracle=columns.oracle[flat],
        action_starts=np.cumsum(action_lengths) - action_lengths,
        action_lengths=action_lengths,
        action=columns.action[tokens],
        offset_s=columns.offset_s[tokens],
        target_starts=np.arange(len(windows)),
        statistics=columns.statistics[target_rows],
        user_numbers=columns.user_numbers[windows],
        numbers=columns.numbers[flat],
        item_index=columns.item_index[flat],
    )


@pytest.mark.parametrize("gap_s", [0.0, 12.0, 25.0, FULL_WINDOW])
@pytest.mark.parametrize("switch", ["off", "session", "all of it"])
def test_targets_of_a_request_equal_single_candidates_at_query_time(
    switch: str, gap_s: float, columns: WindowColumns
) -> None:
    config = small_config(max_history=4, **SWITCHES.get(switch, {}))
    model = build_double(CARD, config, randomize=True)
    joint = predictions(model, make_batch(CARD, columns, config, request_gap_s=gap_s))
    single = predictions(model, make_batch(CARD, as_requests(columns, gap_s), config))
    torch.testing.assert_close(joint, single, rtol=1e-9, atol=1e-10)
    one = torch.isclose(joint, predictions(model, make_batch(CARD, columns, config)), rtol=1e-9, atol=1e-10).all(1)
    assert one.all().item() is (gap_s == 0), "targets must be encoded at query time, not at their own"


@pytest.mark.parametrize("uncertainty", [False, True])
def test_training_with_all_options_reduces_the_loss(uncertainty: bool, columns: WindowColumns) -> None:
    config = small_config(feedback_encoding="dual_view_full", **EVERYTHING)
    config.loss = LossConfig(uncertainty_weighting=uncertainty)
    torch.manual_seed(0)
    model = build_model(CARD, config, torch.device("cpu"))
    loss, batch = Loss(config.loss, tasks=model.ranker.objective_tasks), make_batch(CARD, columns, config)
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], 0.01)
    runs = []
    for _ in range(40):
        optimizer.zero_grad()
        value, (sums, _) = loss(model(batch), batch)
        value.backward()
        optimizer.step()
        runs.append(term_means(sums, batch.counts))
    first, last = (total_loss(terms, config.loss, model.ranker.objective_tasks) for terms in (runs[0], runs[-1]))
    assert last < 0.7 * first
    assert (runs[-1][6:] < 0.9 * runs[0][6:]).all(), "every objective must improve"
