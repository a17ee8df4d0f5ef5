"""The ensemble against loops over requests and candidates, and its guarantees for random and trained models."""

import copy
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from a2gen_rec.ensemble.losses import combined_relevance, listwise, pointwise
from a2gen_rec.errors import ConfigError
from a2gen_rec.models.ensemble.model import Ensemble, EnsembleOutput, Objective
from tests.helpers.properties import examples

D_EVENT, D_CONTEXT = 6, 5
HIGHER_IS_BETTER = [True, False, True]
OBJECTIVES = [Objective(f"objective_{k}", flag) for k, flag in enumerate(HIGHER_IS_BETTER)]
K = len(OBJECTIVES)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make(seed: int = 0, scale: float = 1.0) -> Ensemble:
    torch.manual_seed(seed)
    model = Ensemble(OBJECTIVES, D_EVENT, D_CONTEXT, dim=4, hidden_dims=(6, 5))
    with torch.no_grad():
        for personal in (model.query, model.transform.context, model.offset):
            personal.weight.normal_(std=0.5)  # an untrained ensemble treats all users and candidates alike
        model.prior.normal_()
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if name == "log_gain" else scale)
        model.history.start.normal_()
    model.set_normalization(torch.tensor([-0.5, 0.3, 1.0]), torch.tensor([0.8, 1.5, 2.0]))
    return model


def inputs(seed: int = 0, n: int = 4, candidates: int = 5, max_length: int = 7, shared: bool = False) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    value = 2 * torch.randn(n, candidates, K, generator=rng)
    events = torch.randn(n, max_length, D_EVENT, generator=rng)
    length = torch.randint(0, max_length + 1, (n,), generator=rng)
    length[0] = 0
    return value, events, length, torch.randn(n, 1 if shared else candidates, D_CONTEXT, generator=rng)


def make_relevance(value: Tensor) -> Tensor:
    """Return labels [n, C] that increase with the first objective and decrease with the second."""
    return combined_relevance(torch.stack([value[..., 0] > 0, value[..., 1] < -1], dim=-1), torch.tensor([0.7, 0.3]))


def trained(loss: str, seed: int = 0) -> Ensemble:
    """Train for a few steps."""
    model = make(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(30):
        value, *rest = inputs(step, n=16)
        mask = torch.ones(value.shape[:2], dtype=torch.bool)
        objective = {"pointwise": pointwise, "listwise": listwise}[loss]
        optimizer.zero_grad()
        objective(model(value, *rest).score, make_relevance(value), mask).mean.backward()
        optimizer.step()
    return model.requires_grad_(False)


MODELS = ("random", "random, large weights", "pointwise", "listwise")


@cache
def float32(name: str) -> Ensemble:
    """Return a model of ``MODELS``, built on first use."""
    model = trained(name) if name in MODELS[2:] else make() if name == "random" else make(1, scale=2.5)
    return model.requires_grad_(False)


@cache
def float64(name: str) -> Ensemble:
    return copy.deepcopy(float32(name)).double()


def rounding(output: EnsembleOutput) -> Tensor:
    """Return the float32 rounding error of a score: a few units in the last place of its largest term."""
    return 8 * torch.finfo(torch.float32).eps * output.transform.abs().amax(-1)


def slow_user(model: Ensemble, events: Tensor) -> Tensor:
    """events [length, d_event] -> [dim], by one GRU cell per event."""
    gru, state = model.history.gru, model.history.start
    for event in events:
        x = F.linear(event, gru.weight_ih_l0, gru.bias_ih_l0).chunk(3)
        s = F.linear(state, gru.weight_hh_l0, gru.bias_hh_l0).chunk(3)
        reset, update = torch.sigmoid(x[0] + s[0]), torch.sigmoid(x[1] + s[1])
        state = (1 - update) * torch.tanh(x[2] + reset * s[2]) + update * state
    return state


@pytest.mark.parametrize("shared", [True, False])
def test_scores_equal_loops_over_unpadded_requests(shared: bool) -> None:
    model = make(scale=2.0).double()
    value, events, length, context = (
        part.double() if part.is_floating_point() else part for part in inputs(shared=shared)
    )
    out = model(value, events, length, context)
    scores = []
    for i in range(len(value)):
        user = slow_user(model, events[i, : length[i]])
        torch.testing.assert_close(out.user_embedding[i], user)
        for c in range(value.shape[1]):
            h = torch.cat([user, context[i, 0 if shared else c]]) / math.sqrt(4 + D_CONTEXT)
            query = F.linear(h, model.query.weight)
            shares = torch.stack(
                [torch.exp(model.prior[k] + query @ model.objective[k] / math.sqrt(4)) for k in range(K)]
            )
            p = [1 / (1 + math.exp((m - v) / s)) for v, m, s in zip(value[i, c], model.mean, model.scale, strict=True)]
            entering = torch.tensor([p[0], 1 - p[1], p[2]], dtype=torch.float64)
            transform = model.log_gain.exp() * model.transform(entering[None, None], h[None, None])[0, 0]
            transform = transform + model.offset(user)
            weight = shares / shares.sum()
            torch.testing.assert_close(out.transform[i, c], transform)
            torch.testing.assert_close(out.weight[i, c], weight)
            scores.append(weight @ transform)
    reference = torch.stack(scores).view(out.score.shape)
    torch.testing.assert_close(out.score, reference)
    parameters = list(model.parameters())
    slope = torch.linspace(-1, 2, reference.numel(), dtype=reference.dtype).view(reference.shape)
    for one, other in zip(
        torch.autograd.grad(out.score, parameters, slope),
        torch.autograd.grad(reference, parameters, slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


requests = {
    "name": st.sampled_from(sorted(MODELS)),
    "seed": st.integers(0, 9999),
    "candidates": st.integers(1, 6),
    "max_length": st.integers(0, 4),
    "shared": st.booleans(),
}
numbers = st.one_of(st.sampled_from([-1e4, -16.0, 0.0, 1e-6, 16.0, 1e4]), st.floats(-16, 16, width=32))


@examples(100)
@given(**requests, objective=st.integers(0, K - 1), low=numbers, high=numbers)
def test_raising_an_objective_never_lowers_its_score(
    name: str,
    seed: int,
    candidates: int,
    max_length: int,
    shared: bool,
    objective: int,
    low: float,
    high: float,
) -> None:
    """It lowers the score if lower is better; the other candidates' scores are bit-equal."""
    low, high = min(low, high), max(low, high)
    value, *rest = inputs(seed, 2, candidates, max_length, shared)
    position = (1, seed % candidates, objective)
    for model in (float32(name), float64(name)):
        outputs = []
        entering = []
        for number in (low, high):
            value[position] = number
            outputs.append(model(value, *rest))
            z = (number - model.mean[objective].double()) / model.scale[objective].double()
            entering.append(torch.sigmoid(z).item())
        before, after = outputs
        rise = after.score - before.score
        gain = rise[position[:2]] * (1 if HIGHER_IS_BETTER[objective] else -1)
        # The test of the transform covers smaller increases: here the other objectives' terms hide them.
        visible = before.score.dtype == torch.float64 and entering[1] - entering[0] > 1e-6
        assert gain > 0 if visible else gain >= -rounding(before)[position[:2]]
        rise[position[:2]] = 0
        assert (rise == 0).all()
        assert torch.equal(before.weight, after.weight)


@examples(50)
@given(**requests, objective=st.integers(0, K - 1))
def test_candidates_that_differ_in_one_objective_are_sorted_by_it(
    name: str,
    seed: int,
    candidates: int,
    max_length: int,
    shared: bool,
    objective: int,
) -> None:
    value, events, length, context = inputs(seed, 2, candidates, max_length, shared)
    others = value[:, :1].expand(-1, candidates, -1).clone()
    others[..., objective] = (value[..., objective] * 100).round() / 100  # with ties
    output = float64(name)(others, events, length, context[:, :1])
    key = others[..., objective] * (1 if HIGHER_IS_BETTER[objective] else -1)
    for row in range(2):
        ahead = key[row, :, None] > key[row]
        assert (output.score[row, :, None] > output.score[row])[ahead].all()
        tied = key[row, :, None] == key[row]
        assert torch.allclose(output.score[row, :, None].expand_as(tied)[tied], output.score[row].expand_as(tied)[tied])


@examples(50)
@given(**requests, extreme=st.sampled_from([-16.0, 0.0, 16.0, 1e30]))
def test_weights_sum_to_one_and_scores_are_means_of_transforms(
    name: str,
    seed: int,
    candidates: int,
    max_length: int,
    shared: bool,
    extreme: float,
) -> None:
    """Includes extreme and equal predictions, single candidates, and users without history."""
    value, events, length, context = inputs(seed, 3, candidates, max_length, shared)
    value[0] = extreme
    output = float32(name)(value, events, length, context)
    assert output.score.shape == (3, candidates)
    assert output.score.isfinite().all()
    assert output.weight.shape == output.transform.shape == value.shape
    assert (output.weight >= 0).all()
    torch.testing.assert_close(output.weight.sum(-1), torch.ones(3, candidates))
    slack = rounding(output)
    assert (output.score <= output.transform.amax(-1) + slack).all()
    assert (output.score >= output.transform.amin(-1) - slack).all()


@pytest.mark.parametrize("shared", [True, False])
def test_padding_does_not_affect_real_candidates(shared: bool) -> None:
    model = make(scale=2.0)
    value, events, length, context = inputs(shared=shared)
    base = model(value, events, length, context)
    garbage = events.clone()
    for row, end in enumerate(length):
        garbage[row, end:] = 1e3
    longer = torch.cat([garbage, torch.full((len(value), 2, D_EVENT), -1e3)], dim=1)
    more = torch.cat([value, torch.ones(len(value), 3, K)], dim=1)
    others = context if shared else torch.cat([context, torch.full((len(value), 3, D_CONTEXT), 1e3)], dim=1)
    padded = model(more, longer, length, others)
    torch.testing.assert_close(padded.score[:, :5], base.score)
    torch.testing.assert_close(padded.user_embedding, base.user_embedding)
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(base.score.sum(), parameters),
        torch.autograd.grad(padded.score[:, :5].sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_all_parameters_learn_and_user_and_context_matter() -> None:
    """Every parameter has a gradient, and user and context each move weights and transforms."""
    model = make()
    value, events, length, context = inputs()
    length[1] = 5
    base = model(value, events, length, context)
    base.score.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    events = events.clone()
    events[1, 0] += 2
    for other in (model(value, events, length, context), model(value, events, length, context + 1)):
        assert (other.weight[1] != base.weight[1]).any(-1).all()
        assert (other.transform[1] != base.transform[1]).any(-1).all()
    assert torch.equal(model(value, events, length, context).score[0], base.score[0])


def test_untrained_ensemble_treats_users_and_candidates_alike() -> None:
    """All weights are equal, and only predictions affect the score."""
    torch.manual_seed(1)
    model = Ensemble(OBJECTIVES, D_EVENT, D_CONTEXT)
    value, *rest = inputs()
    output = model(value[:1, :1].expand_as(value), *rest)
    torch.testing.assert_close(output.weight, torch.full_like(output.weight, 1 / K))
    torch.testing.assert_close(output.score, output.score[:1, :1].expand_as(output.score))


def test_all_transforms_have_the_same_range() -> None:
    """The range is the gain; only then are weights comparable between objectives."""
    for name in MODELS:
        model = float64(name)
        _, *rest = inputs(3)
        low, high = (model(torch.where(model.lower_is_better, -v, v).expand(4, 5, K), *rest) for v in (-1e4, 1e4))
        rise = (high.transform - low.transform).detach()
        torch.testing.assert_close(rise, model.log_gain.exp().expand_as(rise), msg=name)


def test_training_weights_relevant_objectives() -> None:
    value, *rest = inputs(500, n=50, candidates=20)
    relevance, mask = make_relevance(value), torch.ones(value.shape[:2], dtype=torch.bool)
    fitted, fresh = (
        pointwise(model(value, *rest).score, relevance, mask).mean for model in (float32("pointwise"), make())
    )
    assert fitted < 0.5 * relevance.var() < fresh


def test_trained_ensemble_is_monotonic() -> None:
    """On a fine grid, for users with and without history; the tolerance is that of float32, see :func:`rounding`."""
    _, events, length, context = inputs(7, n=20, candidates=400, shared=True)
    for name in ("pointwise", "listwise"):
        for k, higher_is_better in enumerate(HIGHER_IS_BETTER):
            value = inputs(8, n=20, candidates=1)[0].repeat(1, 400, 1)
            value[..., k] = torch.linspace(-8, 8, 400) * (1 if higher_is_better else -1)
            output = float32(name)(value, events, length, context)
            assert (output.score.diff(dim=1) >= -rounding(output)[:, 1:]).all()
            assert (output.score[:, -1] > output.score[:, 0]).all()


def test_max_monotonicity_violation_measures_the_quadrature() -> None:
    """Too few nodes for steep derivatives violate monotonicity; enough nodes do not."""
    _, events, length, context = inputs(2)
    model = make(1, scale=4.0)
    model.transform.degree = 2
    fall = model.max_monotonicity_violation(events, length, context, points=65)
    exact = copy.deepcopy(model).double()
    user = exact.history(events.double(), length)
    slow = torch.zeros(K, dtype=torch.float64)
    for i in range(len(events)):
        for c in range(context.shape[1]):
            h = torch.cat([user[i], context[i, c].double()])[None, None]
            h = h / math.sqrt(h.shape[-1])
            before = exact.log_gain.exp() * exact.transform(torch.zeros(1, 1, K), h)[0, 0]
            for step in range(1, 65):
                after = exact.log_gain.exp() * exact.transform(torch.full((1, 1, K), step / 64), h)[0, 0]
                slow, before = torch.maximum(slow, before - after), after
    assert fall.max() > 1e-3
    torch.testing.assert_close(fall, slow.detach())
    model.transform.degree = 256
    assert model.max_monotonicity_violation(events, length, context, points=65).max() == 0
    assert model.objective.dtype == torch.float32


def test_values_are_normalized_by_mean_and_scale() -> None:
    """Shifted and scaled values with equally shifted and scaled normalization have equal scores."""
    model, other = make(3), make(3)
    value, *rest = inputs()
    shift, stretch = torch.tensor([-6.0, 2.0, 0.5]), torch.tensor([0.1, 3.0, 1.0])
    other.set_normalization(model.mean * stretch + shift, model.scale * stretch)
    torch.testing.assert_close(other(value * stretch + shift, *rest).score, model(value, *rest).score)
    assert {"mean", "scale"} <= set(model.state_dict())


@pytest.mark.parametrize(("center", "scale"), [(0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_rejects_invalid_normalization(center: float, scale: float) -> None:
    with pytest.raises(ConfigError, match="must be finite, scales positive"):
        make().set_normalization(torch.full((K,), center), torch.tensor([1.0, 1.0, scale]))


def test_autocast_has_no_effect() -> None:
    model, data = make(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(*data)
    assert inside.score.dtype == torch.float32
    assert torch.equal(inside.score, model(*data).score)


@pytest.mark.parametrize(
    ("objectives", "reason"),
    [([], "one or more"), ([Objective("like"), Objective("like", False)], "distinct names")],
)
def test_rejects_invalid_objectives(objectives: list[Objective], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Ensemble(objectives, D_EVENT, D_CONTEXT)


def test_rejects_non_boolean_direction() -> None:
    with pytest.raises(ConfigError, match=r"'glance'.*higher_is_better.*'most'"):
        Objective("glance", "most")  # type: ignore[arg-type]
