"""Loss terms against loops over windows, targets and steps."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from support import make_card, make_columns, small_config, whole
from torch import Tensor

from a2gen_rec.config import LossConfig
from a2gen_rec.data.batch import COUNTS, WindowBatch, collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.models.a2gen import A2GenOutput
from a2gen_rec.nn.generator import StepEmbeddings, Steps
from a2gen_rec.training.losses import TERMS, Loss, loss_sums, means, total

CARD = make_card(labels=("click", "long_view"))
ACTIONS = len(CARD.actions)
WHOLE = whole(CARD, small_config())
CONFIGS = [
    LossConfig(),
    LossConfig(time_error="absolute", order_power=1.0),
    LossConfig(order_power=3.0, time=0.3, order=2.0, auxiliary=0.7, label=0.2, action=0.5),
]


@pytest.fixture(scope="module")
def columns() -> WindowColumns:
    """Windows with missing times and unknown labels."""
    rng = np.random.default_rng(2)
    made = make_columns(CARD, 9, rng)
    labels = np.where(rng.random(made.labels.shape) < 0.4, np.nan, made.labels).astype(np.float32)
    return dataclasses.replace(made, labels=labels)


def batch_of(columns: WindowColumns, rows: range = range(9)) -> WindowBatch:
    batch = collate(columns, np.array(rows), WHOLE)
    return dataclasses.replace(batch, offset_s=batch.offset_s.double())


def output_for(batch: WindowBatch, lognormal: bool = False, draft: bool = False, seed: int = 0) -> A2GenOutput:
    """Random float64 predictions with gradients; ``start`` is impossible, as generators have it."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    def steps() -> Steps:
        logits = random(len(batch.step), ACTIONS).detach()
        logits[:, 0] = -torch.inf
        scale = random(len(batch.step), ACTIONS) if lognormal else None
        return Steps(logits.requires_grad_(), random(len(batch.step), ACTIONS), scale)

    tables = StepEmbeddings(torch.zeros(ACTIONS, 2), torch.zeros(4, 2))
    return A2GenOutput(
        context=random(len(batch.target), 3),
        tables=tables,
        label_logits=random(len(batch.target), 2),
        objective_logits=random(len(batch.target), 0),
        watch_time=None,
        steps=steps(),
        draft=steps() if draft else None,
    )


def leaves(output: A2GenOutput) -> list[Tensor]:
    parts = [*output.steps, *(output.draft or ()), output.label_logits]
    return [part for part in parts if part is not None]


def slow_sums(output: A2GenOutput, columns: WindowColumns, config: LossConfig, rows: range = range(9)) -> list[Tensor]:
    """The six terms, one impression and one step at a time, from the columns themselves."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in TERMS}
    step = target = 0
    for row in rows:
        for place in range(int(columns.first_target[row]), int(columns.lengths[row])):
            impression = int(columns.starts[row]) + place
            begin = int(columns.action_starts[impression])
            previous = None
            for token in range(begin + 1, begin + int(columns.action_lengths[impression])):
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
                        each = error**2 / (2 * torch.exp(log_scale) ** 2) + log_scale
                    else:
                        each = error**2 if config.time_error == "squared" else abs(error)
                    sums[f"{prefix}time"] = sums[f"{prefix}time"] + each
                now = None if math.isnan(seconds) else output.steps.time[step, label]
                if previous is not None and now is not None and now < previous:
                    sums["order"] = sums["order"] + (previous - now) ** config.order_power
                previous, step = now, step + 1
            for i, value in enumerate(columns.labels[impression].tolist()):
                if not math.isnan(value):
                    p = 1 / (1 + torch.exp(-output.label_logits[target, i]))
                    sums["label"] = sums["label"] - torch.log(p if value else 1 - p)
            target += 1
    assert (step, target) == (len(output.steps.logits), len(output.label_logits)), "the world was walked as it was made"
    return [sums[name] for name in TERMS]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("lognormal", [True, False])
@pytest.mark.parametrize("draft", [True, False])
def test_terms_and_gradients_equal_loops(
    config: LossConfig, lognormal: bool, draft: bool, columns: WindowColumns
) -> None:
    batch = batch_of(columns)
    output = output_for(batch, lognormal, draft)
    fast, slow = loss_sums(output, batch, config), torch.stack(slow_sums(output, columns, config))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    assert (fast != 0).tolist() == [True] * 4 + [draft] * 2
    weight = torch.arange(1.0, 7.0, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(weight @ sums, leaves(output), materialize_grads=True, retain_graph=True)
        for sums in (fast, slow)
    ]
    for left, right in zip(*gradients, strict=True):
        assert left.isfinite().all()
        torch.testing.assert_close(left, right.nan_to_num(0), rtol=1e-9, atol=1e-9)


def test_the_world_has_what_the_loops_must_show(columns: WindowColumns) -> None:
    batch = batch_of(columns)
    assert batch.step_time.isnan().any()
    assert batch.labels.isnan().any()
    both = batch.step_time[1:].isfinite() & batch.step_time[:-1].isfinite()
    assert both.sum() > batch.counts[COUNTS.index("ordered_pairs")] > 0, "known times of two targets touch"


@pytest.mark.parametrize("lognormal", [True, False])
def test_what_is_unknown_has_no_say(lognormal: bool, columns: WindowColumns) -> None:
    batch = batch_of(columns)
    output = output_for(batch, lognormal, draft=True)
    before = loss_sums(output, batch, LossConfig())
    unknown = batch.step_time.isnan()
    labels_unknown = batch.labels.isnan()

    def elsewhere(steps: Steps) -> Steps:
        time = torch.where(unknown[:, None], 1e6, steps.time)
        return steps._replace(time=time)

    changed = dataclasses.replace(
        output,
        steps=elsewhere(output.steps),
        draft=elsewhere(output.draft),
        label_logits=torch.where(labels_unknown, -1e6, output.label_logits),
    )
    torch.testing.assert_close(loss_sums(changed, batch, LossConfig()), before, rtol=1e-12, atol=1e-12)
    time, labels = torch.autograd.grad(before.sum(), [output.steps.time, output.label_logits])
    assert not time[unknown].any()
    assert time[~unknown].any(1).all()
    assert torch.equal(labels == 0, labels_unknown)


def test_nothing_known_is_no_loss(columns: WindowColumns) -> None:
    unknown = dataclasses.replace(
        columns,
        offset_s=np.full_like(columns.offset_s, np.nan),
        labels=np.full_like(columns.labels, np.nan),
    )
    batch = batch_of(unknown)
    output = output_for(batch)
    terms = means(loss_sums(output, batch, LossConfig()), batch.counts)
    assert terms[0] > 0
    assert not terms[1:].any()
    gradients = torch.autograd.grad(terms.sum(), leaves(output), materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_order_punishes_only_what_runs_backwards(power: float, columns: WindowColumns) -> None:
    batch = batch_of(columns)
    output = output_for(batch)
    config = LossConfig(order_power=power)
    order = TERMS.index("order")
    for sign, punished in ((1, False), (0, False), (-1, True)):
        rising = sign * torch.arange(len(batch.step), dtype=torch.float64)[:, None].expand(-1, ACTIONS)
        rising = rising.clone().requires_grad_()
        sums = loss_sums(dataclasses.replace(output, steps=output.steps._replace(time=rising)), batch, config)
        pairs = batch.counts[COUNTS.index("ordered_pairs")]
        assert sums[order] == (pairs if punished else 0), "each pair runs back by one"
        (gradient,) = torch.autograd.grad(sums[order], rising)
        assert gradient.isfinite().all()
        assert gradient.any().item() is punished


def test_lognormal_error_is_the_likelihood_of_the_distribution(columns: WindowColumns) -> None:
    batch = batch_of(columns)
    output = output_for(batch, lognormal=True)
    known = batch.step_time.isfinite()
    row, label = known.nonzero().squeeze(1), batch.step_label[known]
    location, scale = output.steps.time[row, label], output.steps.log_scale[row, label].exp()
    seconds = torch.expm1(batch.step_time[known])
    # The density of 1 + seconds, without the Jacobian and the constant, which no parameter changes.
    likelihood = torch.distributions.LogNormal(location, scale).log_prob(1 + seconds) + torch.log1p(seconds)
    expected = -(likelihood + 0.5 * math.log(2 * math.pi)).sum()
    got = loss_sums(output, batch, LossConfig())[TERMS.index("time")]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    normal = torch.distributions.Normal(location, scale).log_prob(batch.step_time[known])
    torch.testing.assert_close(got, -(normal + 0.5 * math.log(2 * math.pi)).sum(), rtol=1e-9, atol=1e-9)


def test_means_are_over_each_terms_own_count() -> None:
    sums = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0], dtype=torch.float64)
    counts = torch.tensor([17.0, 19.0, 23.0, 29.0, 31.0], dtype=torch.float64)
    assert COUNTS == ("targets", "steps", "timed_steps", "ordered_pairs", "labels")
    assert TERMS == ("action", "time", "order", "label", "draft_action", "draft_time")
    expected = [2 / 19, 3 / 23, 5 / 29, 7 / 31, 11 / 19, 13 / 23]
    assert means(sums, counts).tolist() == pytest.approx(expected, rel=1e-12)
    assert not means(torch.zeros(6), torch.zeros(5)).any(), "nothing to count is no loss, not NaN"


def test_means_of_parts_make_the_mean_of_the_whole(columns: WindowColumns) -> None:
    """Sums and counts add up over batches and ranks."""
    config, parts = LossConfig(), (range(4), range(4, 9))
    sums, counts = torch.zeros(6, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    outputs = []
    for seed, rows in enumerate(parts):
        batch = batch_of(columns, rows)
        outputs.append(output_for(batch, draft=True, seed=seed))
        sums, counts = sums + loss_sums(outputs[-1], batch, config), counts + batch.counts
    whole_batch = batch_of(columns)
    assert torch.equal(whole_batch.counts, counts)
    slow = [slow_sums(output, columns, config, rows) for output, rows in zip(outputs, parts, strict=True)]
    expected = torch.stack([torch.stack(part) for part in slow]).sum(0)
    torch.testing.assert_close(means(sums, counts), means(expected, whole_batch.counts), rtol=1e-9, atol=1e-9)


def test_total_weighs_every_term() -> None:
    config = LossConfig(action=2.0, time=3.0, order=5.0, label=7.0, auxiliary=0.5)
    weights = [2.0, 3.0, 5.0, 7.0, 0.5, 1.5]
    for place, weight in enumerate(weights):
        terms = torch.zeros(6, dtype=torch.float64)
        terms[place] = 10.0
        assert total(terms, config).item() == pytest.approx(10 * weight)
    assert total(torch.ones(6), LossConfig()).item() == pytest.approx(1 + 1 + 0.1 + 1 + 0.1 + 0.1)


@pytest.mark.parametrize("world", [1, 3])
def test_the_loss_module_differentiates_the_weighted_means(world: int, columns: WindowColumns) -> None:
    config = CONFIGS[2]
    batch = batch_of(columns)
    counts = batch.counts * 2  # as if other ranks had as much
    batch = dataclasses.replace(batch, counts=counts)
    output = output_for(batch, draft=True)
    loss, (sums, same) = Loss(config, world)(output, batch)
    expected = total(means(torch.stack(slow_sums(output, columns, config)), counts), config) * world
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert same is output
    assert not sums.requires_grad
    torch.testing.assert_close(sums, loss_sums(output, batch, config).detach())
    assert loss.requires_grad


def test_float32_stays_float32(columns: WindowColumns) -> None:
    batch = collate(columns, np.arange(9), WHOLE)
    made = output_for(batch)
    steps = Steps(*(None if part is None else part.detach().float() for part in made.steps))
    output = dataclasses.replace(
        made, steps=steps, label_logits=made.label_logits.float(), context=made.context.float()
    )
    sums = loss_sums(output, batch, LossConfig())
    assert sums.dtype == means(sums, batch.counts).dtype == torch.float32
    torch.testing.assert_close(
        sums.double(), loss_sums(made, batch_of(columns), LossConfig()).detach(), rtol=1e-5, atol=1e-4
    )
