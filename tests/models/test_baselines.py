"""Baseline rankers on one process in float64, with the same properties as A2Gen."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from a2gen_rec.data.batch import FULL_WINDOW, WindowBatch
from a2gen_rec.data.columns import CandidateItems, WindowColumns
from a2gen_rec.losses.loss import Loss, loss_sums, term_means, total_loss
from a2gen_rec.models.a2gen import A2GenRanker
from a2gen_rec.models.base import RankingModel
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.models.factory import RANKERS, build_model
from a2gen_rec.runs.next_window import append_candidates_now, empty_window
from tests.helpers.cards import make_card, make_columns, small_config
from tests.helpers.models import build_double, change_impressions, forward, make_batch

CARD = make_card()
SIZES = {feature.name: feature.cardinality for feature in CARD.features}
EVERYTHING = {"feedback_encoding": "dual_view_full", "session_features": True, "predict_objectives": True}
BASELINES = ["mmoe", "ple", "hstu"]
VARIANTS = [
    *({"name": name} for name in BASELINES),
    *({"name": name, **EVERYTHING} for name in BASELINES),
    {"name": "mmoe", "num_experts": 1, "recency_bias": False, "match_bias": False},
    {"name": "ple", "shared_experts": 0, "task_experts": 2},
    {"name": "ple", "task_experts": 0, "predict_objectives": True},
    {"name": "hstu", "num_layers": 1, "feedback_encoding": "tokens"},
    {"name": "hstu", "num_layers": 3, "recency_bias": False, "match_bias": False},
]


@torch.no_grad()
def predictions(model: RankingModel, batch: WindowBatch) -> Tensor:
    """Return all predictions, one row per target."""
    output = forward(model, batch)
    marginals = model.ranker.marginals(output, max_unexplored_mass=0.0)
    heads = [output.label_logits, output.objective_logits, output.context]
    return torch.cat([output.event_logits, torch.nan_to_num(marginals.time), *heads], 1)


@pytest.fixture(scope="module")
def columns() -> WindowColumns:
    return make_columns(CARD, 12, np.random.default_rng(3))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("switches", [{}, EVERYTHING])
def test_targets_see_only_ended_impressions_of_their_history(name: str, switches: dict, columns: WindowColumns) -> None:
    config = small_config(
        name=name, max_history=3, num_layers=1, **switches
    )  # further layers of hstu reach further back
    model, rng = build_double(CARD, config, randomize=True), np.random.default_rng(0)
    compared = changed = 0
    for row in range(len(columns)):
        start, n = columns.starts[row], columns.lengths[row]
        for position in range(columns.first_target[row], n):
            now, positions = columns.ts_ms[start + position], np.arange(n)
            hidden = (positions >= position) | (positions < position - 3)
            hidden |= (columns.end_ms[start : start + n] > now) | (columns.ts_ms[start : start + n] >= now)
            first = columns.first_target.copy()
            first[row] = position
            base, one = dataclasses.replace(columns, first_target=first), np.array([row])
            before = predictions(model, make_batch(CARD, base, config, one))[0]
            hidden_changed = change_impressions(CARD, base, start + positions[hidden], start + position, rng)
            torch.testing.assert_close(predictions(model, make_batch(CARD, hidden_changed, config, one))[0], before)
            compared += 1
            for other in positions[~hidden]:
                visible = change_impressions(CARD, base, start + np.array([other]), start + position, rng)
                after = predictions(model, make_batch(CARD, visible, config, one))[0]
                assert not torch.allclose(after, before, rtol=1e-9, atol=1e-9), (
                    "visible impressions must have an effect"
                )
                changed += 1
    assert compared > 30
    assert changed > 20


def test_hstu_layers_do_not_leak_unfinished_impressions(columns: WindowColumns) -> None:
    """Targets of a window share states, although some of them see impressions that others must not see."""
    config = small_config(name="hstu", num_layers=3, max_history=4, **EVERYTHING)
    model, rng = build_double(CARD, config, randomize=True), np.random.default_rng(0)
    before, first = predictions(model, make_batch(CARD, columns, config)), 0
    changed = 0
    for row in range(len(columns)):
        start, positions = columns.starts[row], np.arange(columns.lengths[row])
        for target, position in enumerate(positions[columns.first_target[row] :], start=first):
            now = columns.ts_ms[start + position]
            hidden = (positions >= position) | (columns.end_ms[start + positions] > now)
            hidden_changed = change_impressions(CARD, columns, start + positions[hidden], start + position, rng)
            after = predictions(model, make_batch(CARD, hidden_changed, config))
            assert torch.equal(after[target], before[target])
            changed += int((after != before).any(1).sum())
        first += len(positions) - columns.first_target[row]
    assert changed > 20, "other targets must see the hidden impressions"


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_composition_padding_and_dedup_have_no_effect(variant: dict, columns: WindowColumns) -> None:
    config = small_config(**variant)
    model = build_double(CARD, config, randomize=True)
    joint = predictions(model, make_batch(CARD, columns, config))
    backwards = predictions(model, make_batch(CARD, columns, config, np.arange(12)[::-1].copy(), dedup=False))
    padded = predictions(model, make_batch(CARD, columns, config, bucket_overhead=10**9))
    single = [predictions(model, make_batch(CARD, columns, config, np.array([row]))) for row in range(12)]
    torch.testing.assert_close(joint, torch.cat(single), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(backwards, torch.cat(single[::-1]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(padded, joint, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_equal_one_target_at_a_time(variant: dict, columns: WindowColumns) -> None:
    """A batch of windows has the loss and gradients of one window per target, cut to the impressions it can see.

    That is its history, and again that of the impressions in it for every further layer of hstu. Windows carry one
    impression more, for the gap of the first one seen.
    """
    config = small_config(max_history=3, **variant)
    reach = 3 * config.model.num_layers if config.model.name == "hstu" else 3

    def run(batches: list[WindowBatch]) -> list[Tensor]:
        model = build_double(CARD, config, randomize=True)
        counts = torch.stack([batch.counts for batch in batches]).sum(0)
        sums = torch.stack([loss_sums(forward(model, batch), batch, config.loss) for batch in batches]).sum(0)
        total_loss(term_means(sums, counts, is_generative=False), config.loss, model.ranker.objective_tasks).backward()
        return [sums.detach(), *(p.grad for p in model.parameters())]

    singles = []
    for row in range(len(columns)):
        for position in range(columns.first_target[row], columns.lengths[row]):
            cut = max(position - reach - 1, 0)
            first, starts, lengths = columns.first_target.copy(), columns.starts.copy(), columns.lengths.copy()
            first[row], starts[row], lengths[row] = position - cut, starts[row] + cut, position + 1 - cut
            target_starts = columns.target_starts + position - columns.first_target
            one = dataclasses.replace(
                columns, first_target=first, starts=starts, lengths=lengths, target_starts=target_starts
            )
            singles.append(make_batch(CARD, one, config, np.array([row])))
    for left, right in zip(run([make_batch(CARD, columns, config, bucket_overhead=20)]), run(singles), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [0, 9])
def test_candidates_in_one_window_equal_one_window_each(variant: dict, length: int) -> None:
    config = small_config(**variant)
    model, generated = build_double(CARD, config, randomize=True), make_columns(CARD, 40, np.random.default_rng(1))
    history = generated.take(np.flatnonzero(generated.lengths == length)[:1]) if length else empty_window(CARD)

    def ranked(rows: np.ndarray) -> Tensor:
        ids = {"item_id": rows, "author_id": rows * 7 % 9}
        statistics = np.random.default_rng(2).normal(size=(10, len(CARD.statistics))).astype(np.float16)[rows]
        items = CandidateItems([""] * len(rows), np.ones(len(rows), bool), ids, statistics, np.zeros((len(rows), 0)))
        return predictions(
            model, make_batch(CARD, append_candidates_now(history, items, CARD), config, request_gap_s=FULL_WINDOW)
        )

    joint = ranked(np.arange(1, 7))
    torch.testing.assert_close(joint, torch.cat([ranked(np.array([row])) for row in range(1, 7)]))
    assert joint[:, :3].std(0).min() > 1e-3, "candidates must differ"


@pytest.mark.parametrize("name", BASELINES)
def test_predictions_start_at_base_rates_and_median_times(name: str, columns: WindowColumns) -> None:
    rates = {"like": 0.2, "comment": 0.01, "follow": 0.003, "click": 0.6, "glance": 0.4, "effective": 0.5}
    card = dataclasses.replace(CARD, base_rate=rates, median_time_s={"like": 4.0, "exit": 20.0})
    config = small_config(name=name, **EVERYTHING)
    model = build_model(card, config, torch.device("cpu"))
    output = model(make_batch(CARD, columns, config))
    marginals = model.ranker.marginals(output, max_unexplored_mass=0.0)
    expected = torch.tensor([1.0, *list(rates.values())[:3], 1.0]).expand_as(marginals.probability)
    torch.testing.assert_close(marginals.probability, expected)
    torch.testing.assert_close(output.label_logits.sigmoid(), torch.full_like(output.label_logits, 0.6))
    torch.testing.assert_close(output.objective_logits.sigmoid()[0], torch.tensor([0.4, 0.5]))
    seconds = torch.tensor([0.0, 4.0, torch.nan, 0.0, 20.0])  # comments have no recorded times, follows no median
    torch.testing.assert_close(marginals.time, torch.log1p(seconds).expand_as(marginals.time), equal_nan=True)
    assert not marginals.unexplored_mass.any()


@pytest.mark.parametrize("name", BASELINES)
def test_training_reduces_every_loss_term(name: str, columns: WindowColumns) -> None:
    config = small_config(name=name, **EVERYTHING)
    torch.manual_seed(0)
    model = build_model(CARD, config, torch.device("cpu"))
    loss, batch = Loss(config.loss, tasks=model.ranker.objective_tasks), make_batch(CARD, columns, config)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    results = []
    for _ in range(40):
        optimizer.zero_grad()
        value, (sums, _) = loss(model(batch), batch)
        value.backward()
        optimizer.step()
        results.append(term_means(sums, batch.counts, is_generative=False))
    action, time, order, label, draft_action, draft_time, *occurrence, glance, effective = results[-1] / results[0]
    assert max(action, time, label, glance, effective) < 0.6
    assert torch.stack([order, draft_action, draft_time, *occurrence]).isnan().all(), "terms of the generator must be 0"


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_without_targets_has_zero_loss_and_all_gradients(variant: dict, columns: WindowColumns) -> None:
    config = small_config(**variant)
    model = build_double(CARD, config, randomize=True)
    batch = make_batch(CARD, columns, config, np.arange(3), include_targets=False)
    loss, _ = Loss(config.loss, tasks=model.ranker.objective_tasks)(forward(model, batch), batch)
    loss.backward()
    assert loss.item() == 0
    assert not [name for name, p in model.ranker.named_parameters() if p.grad is None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_equals_float32_up_to_rounding(variant: dict, columns: WindowColumns) -> None:
    config = small_config(**variant)
    model, batch = build_double(CARD, config, randomize=True).float(), make_batch(CARD, columns, config)
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = Loss(config.loss, tasks=model.ranker.objective_tasks)(forward(model, batch), batch)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.0)
    assert all(p.grad.isfinite().all() for p in model.ranker.parameters())


@pytest.mark.parametrize("name", BASELINES)
def test_match_bias_ignores_unknown_items(name: str, columns: WindowColumns) -> None:
    config = small_config(name=name)
    model = build_double(CARD, config, randomize=True)
    weights = [p for n, p in model.named_parameters() if n.endswith("match.weight")]
    assert weights
    for row, matters in ((0, False), (1, True)):
        same = dataclasses.replace(
            columns,
            impression_ids={n: np.full_like(ids, row) for n, ids in columns.impression_ids.items()},
        )
        before = predictions(model, make_batch(CARD, same, config))
        with torch.no_grad():
            for weight in weights:
                weight += 1.0
        after = predictions(model, make_batch(CARD, same, config))
        assert torch.equal(before, after) is not matters


@pytest.mark.parametrize("name", BASELINES)
def test_cached_actions_give_equal_predictions(name: str, columns: WindowColumns) -> None:
    config = small_config(name=name)
    torch.manual_seed(0)
    model, batch = build_model(CARD, config, torch.device("cpu")), make_batch(CARD, columns, config)
    rows = model.embeddings(batch.sparse)
    actions = model.ranker.encode_actions(rows, batch)
    assert actions.shape == (len(batch.history_index), 16)
    for position, key in enumerate(batch.history_index.tolist()):
        start = int(columns.action_starts[key])
        action = columns.action[start : start + columns.action_lengths[key]]
        embedded = model.embeddings.embeddings[module_key("action")].weight[torch.from_numpy(action)]
        torch.testing.assert_close(actions[position, 8:], embedded.mean(0))
    assert torch.equal(model.encode(batch, actions).context, model(batch).context)
    assert not torch.equal(model.encode(batch, actions + 1).context, model(batch).context)


def test_factory_builds_named_rankers_and_a2gen_by_default(columns: WindowColumns) -> None:
    results = {name: type(build_model(CARD, small_config(name=name)).ranker) for name in RANKERS}
    assert results == RANKERS
    assert [name for name, kind in RANKERS.items() if kind.is_generative] == ["a2gen"]
    config = small_config()
    torch.manual_seed(0)
    named = build_model(CARD, config)
    torch.manual_seed(0)
    expected = RankingModel(CARD, config, A2GenRanker)
    assert type(named.ranker) is A2GenRanker
    assert list(named.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), expected.parameters(), strict=True))
