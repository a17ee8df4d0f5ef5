"""The action-sequence generator: dependencies of each step, explicit and implicit."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from a2gen_rec.nn.attention import AttentionConfig
from a2gen_rec.nn.generator import ExplicitGenerator, Generator, ImplicitGenerator, StepEmbeddings, StepPredictions
from a2gen_rec.utils.jagged import LengthBuckets

DIM, D_CONTEXT, ACTIONS, EXIT, BUCKETS, TARGETS = 8, 5, 5, 4, 7, 12
HEADS = [
    {"time_head": head, "time_distribution": distribution, "time_per_action": per_action}
    for head, distribution, per_action in itertools.product(
        ("unconstrained", "monotonic"), ("point", "lognormal"), (True, False)
    )
]


def build(generator_class: type[Generator], **options: Any) -> Any:
    attention = {name: options.pop(name) for name in ("residual", "mlp_ratio") if name in options}
    generator = generator_class(
        D_CONTEXT, AttentionConfig(DIM, 2, **attention), ACTIONS, max_offset_s=100.0, **options
    ).double()
    torch.manual_seed(4)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.35)
    return generator


def tables_and_context() -> tuple[StepEmbeddings, Tensor]:
    rng = torch.Generator().manual_seed(4)
    action = torch.randn(ACTIONS, DIM, generator=rng, dtype=torch.float64)
    time = torch.randn(BUCKETS, DIM, generator=rng, dtype=torch.float64)
    return StepEmbeddings(action, time), torch.randn(TARGETS, D_CONTEXT, generator=rng, dtype=torch.float64)


def sequences() -> tuple[Tensor, Tensor, Tensor, LengthBuckets]:
    """Return emitted (action, offset_s), labels and length buckets, of all lengths in mixed order."""
    rng = torch.Generator().manual_seed(5)
    action, offset, label = [], [], []
    for t in range(TARGETS):
        events = (torch.randperm(ACTIONS - 2, generator=rng) + 1)[: t * 5 % (ACTIONS - 1)].tolist()
        action.append(torch.tensor([0, *events]))
        label.append(torch.tensor([*events, EXIT]))
        times = torch.rand(len(events) + 1, generator=rng, dtype=torch.float64).mul(120).sort().values
        times[0] = 0
        times[1:][torch.rand(len(events), generator=rng) < 0.3] = torch.nan
        offset.append(times)
    lengths = torch.tensor([len(part) for part in action])
    assert set(lengths.tolist()) == {1, 2, 3, 4}
    return torch.cat(action), torch.cat(offset), torch.cat(label), LengthBuckets.from_lengths(lengths)


def positions() -> tuple[Tensor, Tensor]:
    """Return (target, position) of every step."""
    action, *_ = sequences()
    target = (action == 0).cumsum(0) - 1
    first = torch.nonzero(action == 0).flatten()
    return target, torch.arange(len(action)) - first[target]


def other_times(offset: Tensor) -> Tensor:
    """Make known times unknown and unknown times known."""
    return torch.where(offset.isnan(), torch.ones_like(offset), torch.nan)


def assert_same(left: StepPredictions, right: StepPredictions, rows: Tensor | slice = slice(None)) -> None:
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a[rows], b[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", HEADS)
def test_steps_are_independent_of_later_steps(options: dict) -> None:
    generator = build(ExplicitGenerator, **options)
    tables, context = tables_and_context()
    action, offset, label, buckets = sequences()
    _, position = positions()
    before, draft = generator(action, offset, label, context, buckets, tables)
    assert draft is None
    for cut in range(3):
        later = position > cut
        other_action, other_offset, other_label = action.clone(), offset.clone(), label.clone()
        other_action[later] = action[later] % (ACTIONS - 2) + 1
        other_offset[later] = other_times(offset[later])
        # The label of a step is the next step's action: the step itself must not depend on it.
        other_label[position >= cut] = label[position >= cut] % (ACTIONS - 1) + 1
        after, _ = generator(other_action, other_offset, other_label, context, buckets, tables)
        assert_same(after, before, ~later)
        for row in later.nonzero().flatten():
            assert not torch.equal(after.time[row], before.time[row]), "later steps must depend on it"
        assert not torch.equal(after.logits[later], before.logits[later])


@pytest.mark.parametrize("changed_input", ["action", "offset", "label"])
@pytest.mark.parametrize("time_head", ["unconstrained", "monotonic"])
def test_steps_depend_on_all_earlier_steps(changed_input: str, time_head: str) -> None:
    generator = build(ExplicitGenerator, time_head=time_head)
    tables, context = tables_and_context()
    inputs = dict(zip(("action", "offset", "label"), sequences()[:3], strict=True))
    buckets = sequences()[3]
    _, position = positions()
    before, _ = generator(*inputs.values(), context, buckets, tables)
    for changed_index in range(3):
        changed = {name: values.clone() for name, values in inputs.items()}
        which = position == changed_index
        changed[changed_input][which] = {
            "action": changed["action"][which] % (ACTIONS - 2) + 1,
            "offset": other_times(changed["offset"][which]),
            "label": changed["label"][which] % (ACTIONS - 1) + 1,
        }[changed_input]
        after, _ = generator(*changed.values(), context, buckets, tables)
        # Only the monotonic head uses labels, and only those of earlier steps.
        reads = (
            position >= changed_index
            if changed_input != "label"
            else (position > changed_index) & (time_head == "monotonic")
        )
        different = ((after.time - before.time).abs() > 1e-9).any(1)
        assert torch.equal(different, reads)


@pytest.mark.parametrize("generator_class", [ExplicitGenerator, ImplicitGenerator])
def test_start_and_emitted_actions_have_zero_probability(generator_class: type[Generator]) -> None:
    tables, context = tables_and_context()
    action, offset, label, buckets = sequences()
    target, position = positions()
    outputs = build(generator_class)(action, offset, label, context, buckets, tables)
    for steps in outputs:
        if steps is None:
            continue
        p = torch.softmax(steps.logits, -1)
        assert steps.logits.shape == steps.time.shape == (len(action), ACTIONS)
        assert p.isfinite().all()
        for row in range(len(action)):
            emitted = {0}
            if generator_class is ExplicitGenerator:
                emitted |= set(action[(target == target[row]) & (position <= position[row])].tolist())
            for code in range(ACTIONS):
                assert (p[row, code] == 0) == (code in emitted)
        assert (p[:, EXIT] > 0).all()


@pytest.mark.parametrize("generator_class", [ExplicitGenerator, ImplicitGenerator])
@pytest.mark.parametrize("options", [h for h in HEADS if h["time_head"] == "monotonic"])
def test_monotonic_times_never_decrease(generator_class: type[Generator], options: dict) -> None:
    tables, context = tables_and_context()
    action, offset, label, buckets = sequences()
    target, _ = positions()
    taken = {}
    for head in ("monotonic", "unconstrained"):
        steps, draft = build(generator_class, **{**options, "time_head": head})(
            action, offset, label, context, buckets, tables
        )
        of_label = [part.time.gather(1, label[:, None]).squeeze(1) for part in (steps, draft) if part is not None]
        taken[head] = torch.stack([times[1:] - times[:-1] for times in of_label])[:, target[1:] == target[:-1]]
        if head == "monotonic":
            assert all((times > 0).all() for times in of_label)
    assert (taken["monotonic"] >= 0).all()
    assert (taken["unconstrained"] < 0).any(), "times of the unconstrained head must decrease somewhere"


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("mlp_ratio", [0.0, 1.5])
def test_stepwise_decoding_equals_teacher_forcing(options: dict, mlp_ratio: float) -> None:
    generator = build(ExplicitGenerator, mlp_ratio=mlp_ratio, residual="both", **options)
    tables, context = tables_and_context()
    action, offset, label, buckets = sequences()
    target, _ = positions()
    forced, _ = generator(action, offset, label, context, buckets, tables)
    assert (forced.log_scale is None) == (options["time_distribution"] == "point")
    for t in range(TARGETS):
        state = generator.init_state(context[t : t + 1])
        for row in (target == t).nonzero().flatten():
            one = slice(row, row + 1)
            tokens = generator.precompute_tokens(tables, offset[one].isfinite().expand(ACTIONS))
            steps, state = generator.step(action[one], torch.log1p(offset[one].nan_to_num(3.0)), state, tokens)
            assert_same(steps, StepPredictions(*(None if part is None else part[one] for part in forced)))
            state = state.advance_time(steps.time[0, label[one]])


@pytest.mark.parametrize("generator_class", [ExplicitGenerator, ImplicitGenerator])
def test_shared_or_per_action_times(generator_class: type[Generator]) -> None:
    tables, context = tables_and_context()
    for per_action in (True, False):
        steps, _ = build(generator_class, time_per_action=per_action)(*sequences()[:3], context, sequences()[3], tables)
        assert (steps.time == steps.time[:, :1]).all().item() is not per_action


def test_selected_states_are_independent() -> None:
    generator = build(ExplicitGenerator, time_head="monotonic")
    tables, context = tables_and_context()
    context, tokens = context[:3], generator.precompute_tokens(tables, torch.arange(ACTIONS) != 3)
    start = torch.zeros(3, dtype=torch.long)
    steps, state = generator.step(start, torch.zeros(3, dtype=torch.float64), generator.init_state(context), tokens)
    pick, follow = torch.tensor([2, 0, 2]), torch.tensor([1, 3, 2])
    offset = torch.tensor([1.0, math.nan, 7.0], dtype=torch.float64)
    state = state.select(pick).advance_time(steps.time[pick, follow])
    all_steps, _ = generator.step(follow, torch.log1p(offset.nan_to_num(5.0)), state, tokens)
    for position, origin in enumerate(pick.tolist()):
        action = torch.tensor([0, follow[position]])
        label = torch.tensor([follow[position], EXIT])
        buckets = LengthBuckets.from_lengths(torch.tensor([2]))
        offsets = torch.stack([offset.new_zeros(()), offset[position]])
        single, _ = generator(action, offsets, label, context[origin : origin + 1], buckets, tables)
        assert_same(
            StepPredictions(single.logits[1], single.time[1], None),
            StepPredictions(all_steps.logits[position], all_steps.time[position], None),
        )


def test_probability_before_integrates_density_of_loss() -> None:
    location = torch.tensor([[0.3, 1.7, 4.0]], dtype=torch.float64)
    log_scale = torch.tensor([[-1.0, 0.2, 0.7]], dtype=torch.float64)
    steps = StepPredictions(torch.zeros(1, 3), location, log_scale)
    grid = torch.linspace(-40, math.log1p(3600.0), 400_001, dtype=torch.float64)[:, None]
    density = torch.exp(-0.5 * ((grid - location) / log_scale.exp()) ** 2 - log_scale) / math.sqrt(2 * math.pi)
    cdf = torch.cumulative_trapezoid(density, grid, dim=0)
    previous = torch.zeros_like(location)
    for seconds in (0.0, 0.5, 3.0, 30.0, 600.0, 3599.0):
        actual = steps.probability_before(seconds)
        at = torch.searchsorted(grid[:, 0], math.log1p(seconds)).item() - 1
        torch.testing.assert_close(actual, cdf[at : at + 1], rtol=0, atol=2e-4)
        assert ((actual > previous) | (previous > 1 - 1e-9)).all()
        assert (actual <= 1).all()
        previous = actual
    torch.testing.assert_close(steps.probability_before(1e18), torch.ones_like(location))
    median = math.expm1(1.7)
    assert steps.probability_before(median)[0, 1].item() == pytest.approx(0.5, abs=1e-12)


def test_point_estimates_have_no_distribution() -> None:
    with pytest.raises(ValueError, match="lognormal"):
        StepPredictions(torch.zeros(1, 3), torch.zeros(1, 3), None).probability_before(3.0)


@pytest.mark.parametrize("options", HEADS)
def test_implicit_forward_equals_predict(options: dict) -> None:
    generator = build(ImplicitGenerator, **options)
    tables, context = tables_and_context()
    action, offset, label, buckets = sequences()
    target, _ = positions()
    final, draft = generator(action, offset, label, context, buckets, tables)
    for t in range(TARGETS):
        rows = target == t
        expected = generator.predict(context[t : t + 1], int(rows.sum()), label[rows][None])
        for actual, one in zip((final, draft), expected, strict=True):
            assert_same(
                StepPredictions(*(None if part is None else part[rows] for part in actual)),
                StepPredictions(*(None if part is None else part[0] for part in one)),
            )


def test_implicit_predictions_ignore_emitted_actions() -> None:
    generator = build(ImplicitGenerator, time_head="unconstrained")
    tables, context = tables_and_context()
    action, offset, label, buckets = sequences()
    before = generator(action, offset, label, context, buckets, tables)
    after = generator(action * 0, offset * 0 + 9, label * 0 + 1, context, buckets, tables)
    for left, right in zip(before, after, strict=True):
        assert_same(left, right)


def test_implicit_steps_differ_by_step_embeddings() -> None:
    generator = build(ImplicitGenerator)
    _, context = tables_and_context()
    for steps in generator.predict(context, generator.max_steps):
        logits = steps.logits[..., 1:]
        for i, j in itertools.combinations(range(generator.max_steps), 2):
            assert ((logits[:, i] - logits[:, j]).abs().amax(-1) > 1e-3).all()
    with torch.no_grad():
        generator.step_embedding.zero_()
    for steps in generator.predict(context, generator.max_steps):
        p = torch.softmax(steps.logits, -1)
        torch.testing.assert_close(p, p[:, :1].expand_as(p), rtol=1e-9, atol=1e-9)


def test_implicit_steps_differ_at_initialization() -> None:
    torch.manual_seed(0)
    generator = ImplicitGenerator(D_CONTEXT, AttentionConfig(DIM, 2), ACTIONS)
    assert generator.step_embedding.shape == (ACTIONS - 1, DIM)
    _, context = tables_and_context()
    steps, _ = generator.predict(context.float(), generator.max_steps)
    for i, j in itertools.combinations(range(generator.max_steps), 2):
        assert not torch.allclose(steps.logits[:, i, 1:], steps.logits[:, j, 1:], atol=1e-4)


@pytest.mark.parametrize("generator_class", [ExplicitGenerator, ImplicitGenerator])
@pytest.mark.parametrize("options", HEADS)
def test_init_from_statistics_sets_predictions(generator_class: type[Generator], options: dict) -> None:
    generator = build(generator_class, **options)
    tables, context = tables_and_context()
    action, offset, label, buckets = sequences()
    share = torch.tensor([0.0, 0.2, 0.1, 0.3, 0.4], dtype=torch.float64)
    time = torch.tensor([math.nan, 1.5, 0.7, math.nan, 3.0], dtype=torch.float64)
    for heads in generator._all_heads():
        for layer in (heads.action, heads.time):
            torch.nn.init.zeros_(layer.weight)
    generator.init_from_statistics(share, time)
    _, position = positions()
    first = position == 0
    for steps in generator(action, offset, label, context, buckets, tables):
        if steps is None:
            continue
        p = torch.softmax(steps.logits[first], -1)
        torch.testing.assert_close(p, share.expand_as(p), rtol=1e-5, atol=1e-5)
        known = time if options["time_per_action"] else torch.full_like(time, 3.0)
        known = torch.nan_to_num(known)
        torch.testing.assert_close(steps.time[first], known.expand_as(steps.time[first]), rtol=0, atol=0.011)
