"""Loss terms against loops over windows, targets and steps."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from a2gen_rec.config import LossConfig
from a2gen_rec.data.batch import COUNT_NAMES, WindowBatch, count_names
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.errors import ConfigError
from a2gen_rec.losses.loss import (
    TERM_NAMES,
    Loss,
    loss_sums,
    term_means,
    term_names,
    total_loss,
    validate_objective_weights,
)
from a2gen_rec.models.a2gen import A2GenOutput, OccurrenceHeadOutput
from a2gen_rec.models.wide_towers import WidePredictions
from a2gen_rec.nn.generator import StepEmbeddings, StepPredictions
from tests.helpers.cards import full_tables, make_card, make_columns, small_config

CARD = make_card(labels=("click", "long_view"))
ACTIONS = len(CARD.actions)
TASKS = ("glance", "effective", "watch_time")
LEARNED = [0.3, -0.2, 0.7, -0.4]  # log variances of labels and objectives
ENTROPY = torch.linspace(0.1, 0.6, ACTIONS - 2, dtype=torch.float64)
FULL_TABLES = full_tables(CARD, small_config())
CONFIGS = [
    LossConfig(),
    LossConfig(time_loss="mae", order_power=1.0),
    LossConfig(
        order_power=3.0,
        time_weight=0.3,
        order_weight=2.0,
        draft_weight=0.7,
        label_weight=0.2,
        action_weight=0.5,
        occurrence_weight=0.9,
    ),
]


@pytest.fixture(scope="module")
def columns() -> WindowColumns:
    """Return windows with missing times and unknown labels."""
    rng = np.random.default_rng(2)
    generated = make_columns(CARD, 9, rng)
    labels = np.where(rng.random(generated.labels.shape) < 0.4, np.nan, generated.labels).astype(np.float32)
    return dataclasses.replace(generated, labels=labels)


def make_batch(columns: WindowColumns, rows: range = range(9)) -> WindowBatch:
    batch = collate(columns, np.array(rows), FULL_TABLES)
    return dataclasses.replace(batch, offset_s=batch.offset_s.double(), watch_s=batch.watch_s.double())


def output_for(
    batch: WindowBatch, lognormal: bool = False, draft: bool = False, seed: int = 0, tasks: tuple[str, ...] = ()
) -> A2GenOutput:
    """Return random float64 predictions with gradients; ``start`` is impossible, as in generators."""
    objectives = sum(task != "watch_time" for task in tasks)
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    def steps() -> StepPredictions:
        logits = random(len(batch.step_token), ACTIONS).detach()
        logits[:, 0] = -torch.inf
        scale = random(len(batch.step_token), ACTIONS) if lognormal else None
        return StepPredictions(logits.requires_grad_(), random(len(batch.step_token), ACTIONS), scale)

    tables = StepEmbeddings(torch.zeros(ACTIONS, 2), torch.zeros(4, 2))
    return A2GenOutput(
        context=random(len(batch.target), 3),
        tables=tables,
        label_logits=random(len(batch.target), 2),
        objective_logits=random(len(batch.target), objectives),
        watch_time=random(len(batch.target)) if "watch_time" in tasks else None,
        steps=steps(),
        draft=steps() if draft else None,
        occurrence=OccurrenceHeadOutput(random(len(batch.target), ACTIONS - 2), ENTROPY) if draft else None,
        wide=WidePredictions(*(random(len(batch.target), n) for n in (ACTIONS - 2, 2, objectives, ACTIONS)))
        if draft
        else None,
    )


def leaves(output: A2GenOutput) -> list[Tensor]:
    parts = [*output.steps, *(output.draft or ()), output.label_logits, output.objective_logits, output.watch_time]
    parts += [None if output.occurrence is None else output.occurrence.logits, *(output.wide or ())]
    return [part for part in parts if part is not None]


def slow_sums(output: A2GenOutput, columns: WindowColumns, config: LossConfig, rows: range = range(9)) -> list[Tensor]:
    """Return the terms, computed with one impression and one step at a time from the columns."""
    tasks = [*CARD.objectives[: output.objective_logits.shape[1]], *(["watch_time"] * (output.watch_time is not None))]
    sums = {name: torch.zeros((), dtype=torch.float64) for name in term_names(tasks)}
    step = target = 0
    for row in rows:
        for position in range(int(columns.first_target[row]), int(columns.lengths[row])):
            impression = int(columns.starts[row]) + position
            start = int(columns.action_starts[impression])
            previous = None
            for token in range(start + 1, start + int(columns.action_lengths[impression])):
                label, seconds = int(columns.action[token]), float(columns.offset_s[token])
                for prefix, steps in (("", output.steps), ("draft_", output.draft)):
                    if steps is None:
                        continue
                    chances = torch.exp(steps.logits[step])
                    sums[f"{prefix}action"] = sums[f"{prefix}action"] - torch.log(chances[label] / chances.sum())
                    if math.isnan(seconds):
                        continue
                    error = steps.time[step, label] - math.log(1 + seconds)
                    if steps.log_scale is not None:
                        log_scale = steps.log_scale[step, label]
                        time_loss = error**2 / (2 * torch.exp(log_scale) ** 2) + log_scale
                    else:
                        time_loss = error**2 if config.time_loss == "mse" else abs(error)
                    sums[f"{prefix}time"] = sums[f"{prefix}time"] + time_loss
                now = None if math.isnan(seconds) else output.steps.time[step, label]
                if previous is not None and now is not None and now < previous:
                    sums["order"] = sums["order"] + (previous - now) ** config.order_power
                previous, step = now, step + 1
            actions = columns.action[start : start + int(columns.action_lengths[impression])].tolist()
            for event in range(1, ACTIONS - 1) if output.occurrence is not None else ():
                p = 1 / (1 + torch.exp(-output.occurrence.logits[target, event - 1]))
                loss = -torch.log(p if event in actions else 1 - p)
                sums["occurrence"] = sums["occurrence"] + loss / ENTROPY[event - 1]
            for i, value in enumerate(columns.labels[impression].tolist()):
                if not math.isnan(value):
                    p = 1 / (1 + torch.exp(-output.label_logits[target, i]))
                    sums["label"] = sums["label"] - torch.log(p if value else 1 - p)
            for name in tasks:
                value = seconds if name == "watch_time" else columns.objectives[impression, tasks.index(name)]
                if math.isnan(value):
                    continue
                if name == "watch_time":  # the time of the last token, ``exit``
                    error = output.watch_time[target] - math.log(1 + value)
                    sums[name] = sums[name] + (error**2 if config.time_loss == "mse" else abs(error))
                else:
                    p = 1 / (1 + torch.exp(-output.objective_logits[target, tasks.index(name)]))
                    sums[name] = sums[name] - torch.log(p if value else 1 - p)
            if output.wide is not None:
                sums["wide"] = sums["wide"] + slow_wide_loss(output.wide, columns, impression, target, tasks, config)
            target += 1
    assert (step, target) == (len(output.steps.logits), len(output.label_logits)), (
        "the loops must cover all steps and targets"
    )
    return list(sums.values())


def slow_wide_loss(
    wide: WidePredictions, columns: WindowColumns, impression: int, target: int, tasks: list[str], config: LossConfig
) -> Tensor:
    """Return the wide part's loss of one target, outcome by outcome."""
    first = int(columns.action_starts[impression])
    tokens = range(first, first + int(columns.action_lengths[impression]))
    seconds = {int(columns.action[token]): float(columns.offset_s[token]) for token in tokens}
    binary = [(wide.event_logits[target, event - 1], float(event in seconds)) for event in range(1, ACTIONS - 1)]
    binary += list(zip(wide.label_logits[target], columns.labels[impression].tolist(), strict=True))
    objectives = columns.objectives[impression, : sum(task != "watch_time" for task in tasks)]
    binary += list(zip(wide.objective_logits[target], objectives.tolist(), strict=True))
    loss = torch.zeros((), dtype=torch.float64)
    for logit, value in binary:
        if not math.isnan(value):
            p = 1 / (1 + torch.exp(-logit))
            loss = loss - torch.log(p if value else 1 - p)
    for action, value in seconds.items():
        if action and not math.isnan(value):
            error = wide.time[target, action] - math.log(1 + value)
            loss = loss + (error**2 if config.time_loss == "mse" else abs(error))
    return loss


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("lognormal", [True, False])
@pytest.mark.parametrize("draft", [True, False])
@pytest.mark.parametrize("tasks", [(), TASKS, TASKS[:2], TASKS[2:]])
def test_terms_and_gradients_equal_loops(
    config: LossConfig, lognormal: bool, draft: bool, tasks: tuple[str, ...], columns: WindowColumns
) -> None:
    batch = make_batch(columns)
    output = output_for(batch, lognormal, draft, tasks=tasks)
    fast, reference = loss_sums(output, batch, config), torch.stack(slow_sums(output, columns, config))
    torch.testing.assert_close(fast, reference, rtol=1e-9, atol=1e-9)
    assert (fast != 0).tolist() == [True] * 4 + [draft] * 4 + [True] * len(tasks)
    weight = torch.arange(1.0, len(TERM_NAMES) + len(tasks) + 1, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(weight @ sums, leaves(output), materialize_grads=True, retain_graph=True)
        for sums in (fast, reference)
    ]
    for left, right in zip(*gradients, strict=True):
        assert left.isfinite().all()
        torch.testing.assert_close(left, right.nan_to_num(0), rtol=1e-9, atol=1e-9)


def test_data_covers_all_cases(columns: WindowColumns) -> None:
    batch = make_batch(columns)
    assert all(values.isnan().any() for values in (batch.step_time, batch.labels, batch.watch_s))
    assert batch.objectives.isnan().any(0).all()
    both_timed = batch.step_time[1:].isfinite() & batch.step_time[:-1].isfinite()
    assert both_timed.sum() > batch.counts[COUNT_NAMES.index("ordered_pairs")] > 0, (
        "known times of two targets must be adjacent"
    )


@pytest.mark.parametrize("lognormal", [True, False])
def test_unknown_values_have_no_effect(lognormal: bool, columns: WindowColumns) -> None:
    batch = make_batch(columns)
    output = output_for(batch, lognormal, draft=True, tasks=TASKS)
    before = loss_sums(output, batch, LossConfig())
    unknown = batch.step_time.isnan()
    labels_unknown, objectives_unknown = batch.labels.isnan(), batch.objectives.isnan()
    watch_unknown = batch.watch_s.isnan()

    def elsewhere(steps: StepPredictions) -> StepPredictions:
        return steps._replace(time=torch.where(unknown[:, None], 1e6, steps.time))

    changed = dataclasses.replace(
        output,
        steps=elsewhere(output.steps),
        draft=elsewhere(output.draft),
        label_logits=torch.where(labels_unknown, -1e6, output.label_logits),
        objective_logits=torch.where(objectives_unknown, -1e6, output.objective_logits),
        watch_time=torch.where(watch_unknown, 1e6, output.watch_time),
    )
    torch.testing.assert_close(loss_sums(changed, batch, LossConfig()), before, rtol=1e-12, atol=1e-12)
    time, labels, objectives, watch = torch.autograd.grad(
        before.sum(), [output.steps.time, output.label_logits, output.objective_logits, output.watch_time]
    )
    assert not time[unknown].any()
    assert time[~unknown].any(1).all()
    assert torch.equal(labels == 0, labels_unknown)
    assert torch.equal(objectives == 0, objectives_unknown)
    assert torch.equal(watch == 0, watch_unknown)


def test_unknown_values_give_zero_loss(columns: WindowColumns) -> None:
    unknown = dataclasses.replace(
        columns,
        offset_s=np.full_like(columns.offset_s, np.nan),
        labels=np.full_like(columns.labels, np.nan),
        objectives=np.full_like(columns.objectives, np.nan),
    )
    batch = make_batch(unknown)
    output = output_for(batch, tasks=TASKS)
    terms = term_means(loss_sums(output, batch, LossConfig()), batch.counts)
    assert terms[0] > 0
    assert not terms[1:].any()
    gradients = torch.autograd.grad(terms.sum(), leaves(output), materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_order_term_penalizes_only_decreasing_times(power: float, columns: WindowColumns) -> None:
    batch = make_batch(columns)
    output = output_for(batch)
    config = LossConfig(order_power=power)
    order = TERM_NAMES.index("order")
    for sign, punished in ((1, False), (0, False), (-1, True)):
        rising = sign * torch.arange(len(batch.step_token), dtype=torch.float64)[:, None].expand(-1, ACTIONS)
        rising = rising.clone().requires_grad_()
        sums = loss_sums(dataclasses.replace(output, steps=output.steps._replace(time=rising)), batch, config)
        pairs = batch.counts[COUNT_NAMES.index("ordered_pairs")]
        assert sums[order] == (pairs if punished else 0), "each pair decreases by one"
        (gradient,) = torch.autograd.grad(sums[order], rising)
        assert gradient.isfinite().all()
        assert gradient.any().item() is punished


def test_lognormal_loss_is_negative_log_likelihood(columns: WindowColumns) -> None:
    batch = make_batch(columns)
    output = output_for(batch, lognormal=True)
    known = batch.step_time.isfinite()
    row, label = known.nonzero().squeeze(1), batch.step_label[known]
    location, scale = output.steps.time[row, label], output.steps.log_scale[row, label].exp()
    seconds = torch.expm1(batch.step_time[known])
    # The density of 1 + seconds, without the Jacobian and the constant, which depend on no parameter.
    likelihood = torch.distributions.LogNormal(location, scale).log_prob(1 + seconds) + torch.log1p(seconds)
    expected = -(likelihood + 0.5 * math.log(2 * math.pi)).sum()
    actual = loss_sums(output, batch, LossConfig())[TERM_NAMES.index("time")]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    normal = torch.distributions.Normal(location, scale).log_prob(batch.step_time[known])
    torch.testing.assert_close(actual, -(normal + 0.5 * math.log(2 * math.pi)).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tasks", [(), TASKS, TASKS[:2]])
def test_each_term_is_divided_by_its_count(tasks: tuple[str, ...]) -> None:
    terms = len(TERM_NAMES) + len(tasks)
    sums = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 61.0, 67.0, 47.0, 53.0, 59.0], dtype=torch.float64)
    counts = torch.tensor([17.0, 19.0, 23.0, 29.0, 31.0, 37.0, 41.0, 43.0], dtype=torch.float64)
    assert count_names(CARD) == ("targets", "steps", "timed_steps", "ordered_pairs", "labels", *TASKS)
    assert term_names(tasks) == (
        "action",
        "time",
        "order",
        "label",
        "draft_action",
        "draft_time",
        "occurrence",
        "wide",
        *tasks,
    )
    expected = [2 / 19, 3 / 23, 5 / 29, 7 / 31, 11 / 19, 13 / 23, 61 / 17, 67 / 17, 47 / 37, 53 / 41, 59 / 43]
    assert term_means(sums[:terms], counts).tolist() == pytest.approx(expected[:terms], rel=1e-12)
    assert not term_means(torch.zeros(terms), torch.zeros(8)).any(), "a count of 0 must give a loss of 0, not NaN"


def test_sums_and_counts_add_up(columns: WindowColumns) -> None:
    """Sums and counts add up over batches and ranks."""
    config, parts = LossConfig(), (range(4), range(4, 9))
    sums, counts = torch.zeros(11, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    outputs = []
    for seed, rows in enumerate(parts):
        batch = make_batch(columns, rows)
        outputs.append(output_for(batch, draft=True, seed=seed, tasks=TASKS))
        sums, counts = sums + loss_sums(outputs[-1], batch, config), counts + batch.counts
    full_batch = make_batch(columns)
    assert torch.equal(full_batch.counts, counts)
    reference = [slow_sums(output, columns, config, rows) for output, rows in zip(outputs, parts, strict=True)]
    expected = torch.stack([torch.stack(part) for part in reference]).sum(0)
    torch.testing.assert_close(term_means(sums, counts), term_means(expected, full_batch.counts), rtol=1e-9, atol=1e-9)


def test_total_loss_weights_every_term() -> None:
    config = LossConfig(
        action_weight=2.0,
        time_weight=3.0,
        order_weight=5.0,
        label_weight=7.0,
        draft_weight=0.5,
        occurrence_weight=11.0,
        wide_weight=13.0,
    )
    weights = [2.0, 3.0, 5.0, 7.0, 0.5, 1.5, 11.0, 13.0]
    for position, weight in enumerate(weights):
        terms = torch.zeros(len(TERM_NAMES), dtype=torch.float64)
        terms[position] = 10.0
        assert total_loss(terms, config).item() == pytest.approx(10 * weight)
    assert total_loss(torch.ones(8), LossConfig()).item() == pytest.approx(1 + 1 + 0.1 + 1 + 3 * 0.1 + 1)


def test_total_loss_uses_objective_weights() -> None:
    config = LossConfig(default_objective_weight=3.0, objective_weights={"effective": 0.5, "watch_time": 0.0})
    for position, weight in enumerate([3.0, 0.5, 0.0]):
        terms = torch.zeros(len(TERM_NAMES) + len(TASKS), dtype=torch.float64)
        terms[len(TERM_NAMES) + position] = 10.0
        assert total_loss(terms, config, TASKS).item() == pytest.approx(10 * weight)
    assert total_loss(torch.ones(11), LossConfig(), TASKS).item() == pytest.approx(4.4 + 3)


def test_rejects_weight_of_unknown_objective() -> None:
    validate_objective_weights(LossConfig(objective_weights={"glance": 0.5, "watch_time": 2.0}), TASKS)
    validate_objective_weights(LossConfig(), ())
    with pytest.raises(ConfigError) as caught:
        validate_objective_weights(LossConfig(objective_weights={"glance": 0.5, "skip": 1.0}), TASKS)
    assert str(caught.value) == f"loss.objective_weights.skip: unknown objective; this run predicts {', '.join(TASKS)}"
    with pytest.raises(
        ConfigError, match=r"loss\.objective_weights\.glance: unknown objective; this run predicts none"
    ):
        validate_objective_weights(LossConfig(objective_weights={"glance": 0.5}), ())


def uncertain(config: LossConfig, world_size: int = 1, tasks: tuple[str, ...] = TASKS) -> Loss:
    """Return a loss with learned weights."""
    loss = Loss(dataclasses.replace(config, uncertainty_weighting=True), world_size, tasks).double()
    with torch.no_grad():
        loss.uncertainty_weighting.log_variance.copy_(torch.tensor(LEARNED[: 1 + len(tasks)], dtype=torch.float64))
    return loss


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tasks", [(), TASKS, TASKS[:2]])
def test_uncertainty_weights_only_labels_and_objectives(
    config: LossConfig, tasks: tuple[str, ...], columns: WindowColumns
) -> None:
    batch = make_batch(columns)
    output = output_for(batch, draft=True, tasks=tasks)
    loss = uncertain(config, tasks=tasks)
    value, (sums, _) = loss(output, batch)
    action, time, order, label, draft_action, draft_time, happens, wide, *objectives = term_means(
        torch.stack(slow_sums(output, columns, config)), batch.counts
    )
    expected = config.action_weight * action + config.time_weight * time + config.order_weight * order
    expected = expected + config.draft_weight * (draft_action + config.time_weight * draft_time)
    expected = expected + config.occurrence_weight * happens + config.wide_weight * wide
    for name, term, s in zip(("label", *tasks), [label, *objectives], LEARNED, strict=False):
        halved = name == "watch_time" and config.time_loss == "mse"
        expected = expected + (0.5 if halved else 1.0) * math.exp(-s) * term + s / 2
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    assert {name: len(p) for name, p in loss.named_parameters()} == {
        "uncertainty_weighting.log_variance": 1 + len(tasks)
    }
    # Validation uses the sums and the configured weights.
    plain_value, (plain_sums, _) = Loss(config, tasks=tasks)(output, batch)
    assert torch.equal(sums, plain_sums)
    torch.testing.assert_close(
        total_loss(term_means(sums, batch.counts), loss.config, tasks), plain_value, rtol=1e-12, atol=0
    )


def joint(outputs: list[A2GenOutput]) -> A2GenOutput:
    """Concatenate the outputs of batches to that of one batch of all windows."""

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.detach() for part in parts]).requires_grad_()

    def steps(of: list[StepPredictions]) -> StepPredictions:
        return StepPredictions(*(None if parts[0] is None else joined(list(parts)) for parts in zip(*of, strict=True)))

    flat = ("context", "label_logits", "objective_logits", "watch_time")
    return A2GenOutput(
        **{name: joined([getattr(output, name) for output in outputs]) for name in flat},
        tables=outputs[0].tables,
        steps=steps([output.steps for output in outputs]),
        draft=steps([output.draft for output in outputs]),
        occurrence=OccurrenceHeadOutput(joined([output.occurrence.logits for output in outputs]), ENTROPY),
        wide=WidePredictions(*map(joined, zip(*(output.wide for output in outputs), strict=True))),
    )


@pytest.mark.parametrize("uncertainty", [False, True])
def test_gradients_averaged_over_ranks_equal_one_rank(uncertainty: bool, columns: WindowColumns) -> None:
    """Each rank has its windows and the global counts; data parallelism averages the gradients."""
    make = uncertain if uncertainty else Loss
    batches = [make_batch(columns, rows) for rows in (range(4), range(4, 9))]
    counts = sum(batch.counts for batch in batches)
    outputs = [output_for(batch, draft=True, seed=seed, tasks=TASKS) for seed, batch in enumerate(batches)]
    of_one, full_output = make(CONFIGS[2], 1, tasks=TASKS), joint(outputs)
    of_ranks = [make(CONFIGS[2], 2, tasks=TASKS) for _ in batches]
    one, _ = of_one(full_output, make_batch(columns))
    values = [
        loss(output, dataclasses.replace(batch, counts=counts))[0]
        for loss, output, batch in zip(of_ranks, outputs, batches, strict=True)
    ]
    (sum(values) / 2).backward()
    one.backward()
    torch.testing.assert_close(sum(values) / 2, one, rtol=1e-9, atol=1e-9)
    for at, leaf in enumerate(leaves(full_output)):
        torch.testing.assert_close(
            torch.cat([leaves(output)[at].grad for output in outputs]), leaf.grad, rtol=1e-9, atol=1e-9
        )
    for single, *parts in zip(of_one.parameters(), *(loss.parameters() for loss in of_ranks), strict=True):
        torch.testing.assert_close(sum(part.grad for part in parts), single.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("world_size", [1, 3])
def test_loss_module_returns_weighted_means(world_size: int, columns: WindowColumns) -> None:
    config = CONFIGS[2]
    batch = make_batch(columns)
    counts = batch.counts * 2  # as if another rank had the same counts
    batch = dataclasses.replace(batch, counts=counts)
    output = output_for(batch, draft=True)
    loss, (sums, same) = Loss(config, world_size)(output, batch)
    expected = total_loss(term_means(torch.stack(slow_sums(output, columns, config)), counts), config) * world_size
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert same is output
    assert not sums.requires_grad
    torch.testing.assert_close(sums, loss_sums(output, batch, config).detach())
    assert loss.requires_grad


def test_float32_stays_float32(columns: WindowColumns) -> None:
    batch = collate(columns, np.arange(9), FULL_TABLES)
    generated = output_for(batch, tasks=TASKS)
    steps = StepPredictions(*(None if part is None else part.detach().float() for part in generated.steps))
    heads = ("label_logits", "objective_logits", "watch_time", "context")
    output = dataclasses.replace(generated, steps=steps, **{name: getattr(generated, name).float() for name in heads})
    sums = loss_sums(output, batch, LossConfig())
    assert sums.dtype == term_means(sums, batch.counts).dtype == torch.float32
    torch.testing.assert_close(
        sums.double(), loss_sums(generated, make_batch(columns), LossConfig()).detach(), rtol=1e-5, atol=1e-4
    )
