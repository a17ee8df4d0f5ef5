"""The full A2Gen model on one process, without sharding, in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from torchrec import JaggedTensor

from a2gen_rec.data.batch import FULL_WINDOW, WindowBatch
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.losses.loss import Loss, loss_sums, term_means, total_loss
from a2gen_rec.models.a2gen import loss_units
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.models.factory import build_model
from a2gen_rec.models.padding import pad_queries, pad_targets
from tests.helpers.cards import full_tables, make_card, make_columns, small_config
from tests.helpers.models import all_predictions, build_double, change_impressions, forward, make_batch

CARD = make_card()
VARIANTS = [
    {},
    {"generator": "implicit"},
    {"attention_impl": "reference"},
    {"residual": "both", "mlp_ratio": 0.0, "recency_bias": False},
    {"match_bias": False},
    {"time_head": "monotonic", "time_distribution": "lognormal"},
    {"generator": "implicit", "time_head": "monotonic", "time_per_action": False},
    {"time_per_action": False},
    {"feedback_encoding": "tokens", "session_features": True},
    {"feedback_encoding": "dual_view", "predict_objectives": True, "shared_experts": 0},
    {
        "feedback_encoding": "dual_view_full",
        "session_features": True,
        "predict_objectives": True,
        "task_experts": 0,
        "generator": "implicit",
    },
    {"use_action_times": False},
    {"use_action_order": False},
    {"use_action_order": False, "generator": "implicit", "action_pooling": "mean"},
    {"action_pooling": "none", "context_in_query": False},
    {"item_pooling": "mean", "feedback_encoding": "dual_view", "use_head_gate": False},
    {"feedback_encoding": "dual_view_full", "context_in_query": False, "use_head_gate": False},
]


@pytest.fixture
def columns() -> WindowColumns:
    return make_columns(CARD, 12, np.random.default_rng(3))


def test_token_table_has_no_effect_and_is_dropped_by_training(columns: WindowColumns) -> None:
    model, config = build_double(CARD, small_config()), small_config()
    batch = make_batch(CARD, columns, config, np.arange(4))
    ranker = model.ranker.eval()
    output = forward(model, batch)
    expected = all_predictions(model, output)
    small = {
        name: JaggedTensor(model.embeddings.embeddings[module_key(name)].weight, lengths=torch.tensor([rows]))
        for name, rows in full_tables(CARD, config).items()
    }
    ranker.cache_token_table(small)
    assert ranker.token_table is not None
    torch.testing.assert_close(all_predictions(model, output), expected, rtol=0, atol=0)
    with torch.no_grad():
        ranker.token_table.projected.mul_(2)
    assert not torch.allclose(all_predictions(model, output), expected), "the token table must be used"
    ranker.train()
    torch.testing.assert_close(all_predictions(model, output), expected, rtol=0, atol=0)


def test_pad_queries_pads_once_per_request(columns: WindowColumns) -> None:
    none = dataclasses.replace(columns, first_target=columns.first_target.copy())
    none.first_target[2] = columns.lengths[2]  # this window has no target
    for case in (columns, none):
        batch = make_batch(CARD, case, small_config(), np.arange(5), request_gap_s=FULL_WINDOW)
        values = 1 + batch.query_index.float()
        expected = torch.zeros(5, 1)
        for window in range(5):
            window_values = values[batch.target_window == window]
            expected[window] = window_values[0] if len(window_values) else 0.0
        assert torch.equal(pad_queries(batch, values), expected)
        per_target = dataclasses.replace(batch, single_query_time=False)
        assert torch.equal(pad_queries(per_target, values), pad_targets(batch, values))


def test_occurrence_head_is_blended_in_log_odds() -> None:
    config, columns = small_config(wide_dim=0), make_columns(CARD, 6, np.random.default_rng(3))
    model = build_double(CARD, config).eval()
    output = forward(model, make_batch(CARD, columns, config, np.arange(6)))
    generated = model.ranker.marginals(dataclasses.replace(output, occurrence=None), max_unexplored_mass=0.0)
    blended = model.ranker.marginals(output, max_unexplored_mass=0.0)
    predicted = torch.sigmoid(model.ranker.occurrence_head(output.context))
    torch.testing.assert_close(output.occurrence.logits.sigmoid(), predicted)
    odds = (generated.probability / (1 - generated.probability))[:, 1:-1] * predicted / (1 - predicted)
    torch.testing.assert_close(
        (blended.probability / (1 - blended.probability))[:, 1:-1], odds.sqrt(), rtol=1e-6, atol=0
    )
    assert torch.equal(blended.probability[:, [0, -1]], generated.probability[:, [0, -1]]), (
        "start and exit must be unchanged"
    )
    assert torch.equal(blended.time, generated.time)
    plain = small_config(occurrence_head=False)
    assert forward(build_double(CARD, plain), make_batch(CARD, columns, plain, np.arange(6))).occurrence is None


def test_occurrence_head_starts_at_base_rates() -> None:
    splits = {name: dataclasses.replace(split, targets=100_000) for name, split in CARD.splits.items()}
    model = build_model(dataclasses.replace(CARD, splits=splits), small_config(), torch.device("cpu"))
    context = torch.randn(3, model.ranker.d_context)
    rates = torch.tensor([CARD.base_rate[name] for name in CARD.predicted_actions])
    torch.testing.assert_close(model.ranker.occurrence_head(context).sigmoid(), rates.expand(3, -1))
    entropy = torch.distributions.Bernoulli(rates).entropy()
    torch.testing.assert_close(model.ranker.event_entropy, entropy)


@pytest.mark.parametrize("count", [1, 3, 30])
def test_units_of_rare_actions_are_bounded(count: int) -> None:
    targets = 2_400
    rates = torch.tensor([count / targets, 100 / targets, 0.3, 1 - count / targets], dtype=torch.float64)
    entropy = -(rates * rates.log() + (1 - rates) * (1 - rates).log())
    units = loss_units(rates, targets)
    assert units[0] == units[1] == pytest.approx(float(units[3]))
    torch.testing.assert_close(units[1:3], entropy[1:3], rtol=0, atol=0, msg="units of other actions must not change")
    # A head that predicts the training rate, on 300 targets with 8 positives.
    share = torch.tensor(8 / 300, dtype=torch.float64)
    error = -(share * rates[0].log() + (1 - share) * (1 - rates[0]).log())
    assert error / units[0] < 2
    if count < 30:
        assert error / entropy[0] > 10, "without a bound, the action would outweigh all others"


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_composition_padding_and_dedup_have_no_effect(variant: dict, columns: WindowColumns) -> None:
    config = small_config(**variant)
    model = build_double(CARD, config)
    joint = all_predictions(model, forward(model, make_batch(CARD, columns, config, np.arange(12))))
    backwards = all_predictions(
        model, forward(model, make_batch(CARD, columns, config, np.arange(12)[::-1].copy(), dedup=False))
    )
    padded = all_predictions(
        model, forward(model, make_batch(CARD, columns, config, np.arange(12), bucket_overhead=10**9))
    )
    single = [
        all_predictions(model, forward(model, make_batch(CARD, columns, config, np.array([row])))) for row in range(12)
    ]
    torch.testing.assert_close(joint, torch.cat(single), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(backwards, torch.cat(single[::-1]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(padded, joint, rtol=1e-9, atol=1e-11)


def test_factorized_equals_reference_model_with_gradients(columns: WindowColumns) -> None:
    results = []
    for impl in ("factorized", "reference"):
        config = small_config(attention_impl=impl)
        model = build_double(CARD, config)
        batch = make_batch(CARD, columns, config, np.arange(12))
        loss, _ = Loss(config.loss)(forward(model, batch), batch)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_equal_one_target_at_a_time(variant: dict, columns: WindowColumns) -> None:
    """A target has the same loss and gradient in a batch of windows as alone in its window.

    Its action sequences share padded groups, those of the single targets do not.
    """
    config = small_config(**variant)
    rows = np.arange(len(columns))

    def run(batches: list[WindowBatch]) -> list[torch.Tensor]:
        model = build_double(CARD, config)
        counts = sum(batch.counts for batch in batches)
        sums = sum(loss_sums(forward(model, batch), batch, config.loss) for batch in batches)
        total_loss(term_means(sums, counts), config.loss, model.ranker.objective_tasks).backward()
        return [sums.detach(), *(p.grad for p in model.parameters())]

    singles = []
    for row in rows:
        for position in range(columns.first_target[row], columns.lengths[row]):
            first = columns.first_target.copy()
            lengths = columns.lengths.copy()
            first[row], lengths[row] = position, position + 1
            target_starts = columns.target_starts + first - columns.first_target
            one = dataclasses.replace(columns, first_target=first, lengths=lengths, target_starts=target_starts)
            singles.append(make_batch(CARD, one, config, np.array([row])))
    for left, right in zip(
        run([make_batch(CARD, columns, config, rows, bucket_overhead=20)]), run(singles), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("impl", ["factorized", "reference"])
def test_targets_see_only_ended_impressions(impl: str, columns: WindowColumns) -> None:
    """Changing actions and ids of impressions that a target must not see has no effect on its predictions."""
    config = small_config(attention_impl=impl, max_history=3)
    model = build_double(CARD, config)
    rng = np.random.default_rng(0)
    compared = changed = 0
    for row in range(len(columns)):
        start, n = columns.starts[row], columns.lengths[row]
        for position in range(columns.first_target[row], n):
            now = columns.ts_ms[start + position]
            positions = np.arange(n)
            hidden = (positions >= position) | (positions < position - 3)
            hidden |= (columns.end_ms[start : start + n] > now) | (columns.ts_ms[start : start + n] >= now)
            first = columns.first_target.copy()
            first[row] = position
            base = dataclasses.replace(columns, first_target=first)

            def predict_first(columns: WindowColumns, row: int = row) -> torch.Tensor:
                return all_predictions(model, forward(model, make_batch(CARD, columns, config, np.array([row]))))[0]

            before = predict_first(base)
            torch.testing.assert_close(
                before, predict_first(change_impressions(CARD, base, start + positions[hidden], start + position, rng))
            )
            compared += 1
            if not hidden.all():
                visible = change_impressions(CARD, base, start + positions[~hidden], start + position, rng)
                changed += int(not torch.allclose(before, predict_first(visible)))
    assert compared > 30
    assert changed > 10, "visible impressions must have an effect"


@pytest.mark.parametrize(
    "variant", [{}, {"generator": "implicit"}, {"attention_impl": "reference", "recency_bias": False}]
)
def test_unused_session_outcome_and_objectives_have_no_effect(variant: dict, columns: WindowColumns) -> None:
    """A dataset with them has the same parameters, predictions, loss and gradients as without."""
    inputs = [feature for feature in CARD.features if feature.level not in ("session", "outcome")]
    bare = dataclasses.replace(CARD, features=inputs, objectives=[], feedback=None)
    plain = dataclasses.replace(columns, session={}, outcome={}, objectives=columns.objectives[:, :0])
    config = small_config(**variant)
    runs = []
    for card, case in ((CARD, columns), (bare, plain)):
        torch.manual_seed(0)
        model = build_model(card, config, torch.device("cpu"))
        batch = collate(case, np.arange(12), full_tables(card, config))
        loss, (_, output) = Loss(config.loss, tasks=model.ranker.objective_tasks)(model(batch), batch)
        loss.backward()
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        runs.append(
            {"loss": loss.detach(), "output": all_predictions(model, output), **model.state_dict(), **gradients}
        )
    assert list(runs[0]) == list(runs[1])
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_batch_without_targets_has_zero_loss_and_all_gradients(columns: WindowColumns) -> None:
    for variant in VARIANTS:
        config = small_config(**variant)
        model = build_double(CARD, config)
        batch = collate(columns, np.arange(3), full_tables(CARD, config), include_targets=False)
        loss, _ = Loss(config.loss, tasks=model.ranker.objective_tasks)(forward(model, batch), batch)
        loss.backward()
        assert loss.item() == 0
        missing = [name for name, p in model.ranker.named_parameters() if p.grad is None]
        assert not missing


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_equals_float32_up_to_rounding(variant: dict, columns: WindowColumns) -> None:
    config = small_config(**variant)
    model = build_double(CARD, config).float()
    batch = make_batch(CARD, columns, config, np.arange(12))
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = Loss(config.loss, tasks=model.ranker.objective_tasks)(forward(model, batch), batch)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.0)
    assert all(p.grad.isfinite().all() for p in model.ranker.parameters())
