"""Baselines of the ensemble: hand-computed cases, monotonicity and independence."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from a2gen_rec.errors import ConfigError
from a2gen_rec.models.ensemble.baselines import (
    LogisticRegression,
    MLPFusion,
    PowerFormula,
    SessionWeightedFusion,
    SingleScore,
    Standardize,
)

D_EVENT, D_CONTEXT = 4, 3
LOWER_IS_BETTER = [False, True, False]
K = len(LOWER_IS_BETTER)
MEAN, SCALE = torch.tensor([-2.0, -4.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def standardize() -> Standardize:
    return Standardize(LOWER_IS_BETTER, MEAN, SCALE)


def formula(alpha: list[float], beta: list[float]) -> PowerFormula:
    return PowerFormula(torch.tensor(alpha), torch.tensor(beta), LOWER_IS_BETTER, MEAN, SCALE)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "single": lambda: SingleScore(1, False),
    "formula": lambda: formula([0.5, 20, 3], [1, 0.5, 2]),
    "logistic": lambda: LogisticRegression(standardize()),
    "mlp": lambda: MLPFusion(standardize(), D_EVENT, D_CONTEXT, dim=6, hidden_dims=(8,)),
    "session": lambda: SessionWeightedFusion(standardize(), D_EVENT, D_CONTEXT, dim=6),
}
every_baseline = pytest.mark.parametrize("name", list(MAKERS))


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = MAKERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(seed: int = 0, n: int = 5, candidates: int = 4, max_length: int = 3, shared: bool = False) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    value = MEAN + SCALE * torch.randn(n, candidates, K, generator=rng)
    events = torch.randn(n, max_length, D_EVENT, generator=rng)
    length = torch.randint(0, max_length + 1, (n,), generator=rng)
    length[0] = 0
    return value, events, length, torch.randn(n, 1 if shared else candidates, D_CONTEXT, generator=rng)


def call(model: nn.Module, data: Inputs, valid: Tensor | None = None) -> Tensor:
    return model(*data, valid) if isinstance(model, SessionWeightedFusion) else model(*data)


@pytest.mark.parametrize(("higher_is_better", "sign"), [(True, 1), (False, -1)])
def test_single_score_is_the_objective(higher_is_better: bool, sign: int) -> None:
    data = inputs()
    assert torch.equal(SingleScore(2, higher_is_better)(*data), sign * data[0][..., 2])


def test_formula_hand_computed() -> None:
    """p = 1/2, 1/4 and 4/5; the second divides: 3² · 3^-1 · 9^½ = 9."""
    value = MEAN + SCALE * torch.tensor([0.0, -math.log(3), math.log(4)])
    model = formula([4.0, 8.0, 10.0], [2.0, 1.0, 0.5])
    assert model.score(value).item() == pytest.approx(math.log(9), rel=1e-6)
    assert model(value[None, None], *inputs(n=1)[1:]).item() == pytest.approx(math.log(9), rel=1e-6)


def test_formula_uses_probability_of_logits() -> None:
    model = PowerFormula(torch.tensor([1.0]), torch.tensor([1.0]), [False], torch.zeros(1), torch.ones(1))
    value = torch.tensor([[-16.0], [-3.0], [0.0], [16.0]])
    expected = [math.log1p(1 / (1 + math.exp(-x))) for x in value.flatten().tolist()]
    assert model.score(value).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["single", "formula", "session"])
def test_raising_an_objective_moves_only_its_candidate_in_its_direction(name: str) -> None:
    """All else equal; within a list, as session weights depend on the full list's values."""
    model = make(name).requires_grad_(False)
    value, *rest = inputs(candidates=2)
    value[:, 1] = value[:, 0]
    for k in range(K):
        raised = value.clone()
        raised[:, 1, k] += 1
        score = call(model, (raised, *rest))
        ahead = (score[:, 1] - score[:, 0]) * (-1 if LOWER_IS_BETTER[k] else 1)
        assert (ahead > 0).all() if name != "single" or k == 1 else (ahead == 0).all()


def test_logistic_regression_is_linear_in_standardized_values() -> None:
    model = LogisticRegression(standardize())
    value = MEAN + SCALE * torch.tensor([1.0, 2.0, -3.0])
    assert model(value[None, None], *inputs(n=1)[1:]).item() == pytest.approx(
        (1 - 2 - 3) / 3
    )  # initial weights are equal
    with torch.no_grad():
        model.weight.copy_(torch.tensor([2.0, 0.5, -1.0]))
        model.bias.fill_(0.25)
    assert model(value[None, None], *inputs(n=1)[1:]).item() == pytest.approx(2 - 1 + 3 + 0.25)


@pytest.mark.parametrize("shared", [False, True])
def test_mlp_and_session_weights_equal_loops(shared: bool) -> None:
    value, events, length, context = data = inputs(shared=shared)
    valid = torch.arange(4) < torch.tensor([[4], [1], [2], [3], [4]])
    mlp, session = (make(name).double() for name in ("mlp", "session"))
    doubled = (value.double(), events.double(), length, context.double())
    scores, weighed, weights = mlp(*doubled), session(*doubled, valid), []
    sign = torch.tensor([-1.0 if lower_is_better else 1.0 for lower_is_better in LOWER_IS_BETTER])
    z = (sign * (value - MEAN) / SCALE).double()
    for i in range(len(value)):
        inside = [c for c in range(4) if valid[i, c]]
        of = [context[i, 0 if shared else c].double() for c in range(4)]
        user = mlp.history(doubled[1][i : i + 1, : length[i]], length[i : i + 1])[0]
        for c in range(4):
            torch.testing.assert_close(scores[i, c], mlp.mlp(torch.cat([z[i, c], of[c], user]))[0])
        user = session.history(doubled[1][i : i + 1, : length[i]], length[i : i + 1])[0]
        mean_z, mean_context = (sum(rows[c] for c in inside) / len(inside) for rows in (z[i], of))
        logits = session.query(torch.cat([user, mean_z, mean_context]))
        weights.append(torch.exp(logits) / torch.exp(logits).sum())
        for c in range(4):
            expected = torch.exp(session.log_gain) * (weights[i] @ z[i, c]) + session.bias
            torch.testing.assert_close(weighed[i, c], expected)
    torch.testing.assert_close(session.weights(session.standardize(data[0]), *doubled[1:], valid), torch.stack(weights))


@every_baseline
@pytest.mark.parametrize("shared", [False, True])
def test_padding_does_not_affect_real_candidates(name: str, shared: bool) -> None:
    model = make(name)
    value, events, length, context = data = inputs(shared=shared)
    base = call(model, data)
    garbage = events.clone()
    for row, end in enumerate(length):
        garbage[row, end:] = 1e3
    longer = torch.cat([garbage, torch.full((len(value), 2, D_EVENT), -1e3)], dim=1)
    more = torch.cat([value, torch.full((len(value), 3, K), 16.0)], dim=1)
    others = context if shared else torch.cat([context, torch.full((len(value), 3, D_CONTEXT), 1e3)], dim=1)
    valid = (torch.arange(7) < 4).expand(len(value), -1)
    torch.testing.assert_close(call(model, (more, longer, length, others), valid)[:, :4], base)
    if isinstance(model, SessionWeightedFusion):
        assert not torch.allclose(
            model(more, longer, length, others)[:, :4], base
        )  # without the mask padding has an effect


@every_baseline
def test_lists_of_one_candidate_and_users_without_history(name: str) -> None:
    model = make(name)
    for data in (inputs(candidates=1), inputs(max_length=0), inputs(candidates=1, max_length=0, shared=True)):
        score = call(model, data)
        assert score.shape == data[0].shape[:2]
        assert score.dtype == torch.float32
        assert score.isfinite().all()
    value, events, length, context = inputs()
    nobody = torch.zeros(len(value), 4, dtype=torch.bool)
    assert call(model, (value, events, length, context), nobody).isfinite().all()


@every_baseline
def test_autocast_and_half_precision_inputs_keep_float32(name: str) -> None:
    model, (value, events, length, context) = make(name), inputs()
    halves = value, events.half(), length, context.half()
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(model, halves)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, call(model, (value, events.half().float(), length, context.half().float())))


@pytest.mark.parametrize("name", ["mlp", "session"])
def test_user_and_context_affect_only_their_list(name: str) -> None:
    model, (value, events, length, context) = make(name), inputs()
    length[1] = 3
    base = call(model, (value, events, length, context))
    changed = events.clone(), context.clone()
    changed[0][1, 0] += 2
    changed[1][1] += 1
    for score in (call(model, (value, changed[0], length, context)), call(model, (value, events, length, changed[1]))):
        assert (score[1] != base[1]).all()
        assert torch.equal(score[[0, 2, 3, 4]], base[[0, 2, 3, 4]])


def test_session_weights_adapt_to_users() -> None:
    """One group of users prefers the first objective, the other the last: no fixed weights fit both."""
    torch.manual_seed(0)
    value, events, length, context = inputs(1, n=400, candidates=6)
    length[:] = 3
    first = events[:, :, 0].mean(1) > 0
    z = (value - MEAN) / SCALE
    best = torch.where(first[:, None], z[..., 0], z[..., 2]).argmax(-1)

    def fit(model: nn.Module) -> float:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(80):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(value, events, length, context), best).backward()
            optimizer.step()
        return (model(value, events, length, context).argmax(-1) == best).float().mean().item()

    assert fit(LogisticRegression(standardize())) < 0.7
    assert fit(SessionWeightedFusion(standardize(), D_EVENT, D_CONTEXT, dim=8)) > 0.85


@every_baseline
def test_state_dict_is_complete_and_not_shared(name: str) -> None:
    model, other = make(name), make(name, seed=1)
    data = inputs()
    other.load_state_dict(model.state_dict())
    assert torch.equal(call(other, data), call(model, data))
    with torch.no_grad():
        for state in other.state_dict().values():
            state.add_(1)
    assert torch.equal(MEAN, torch.tensor([-2.0, -4.0, 3.0]))
    ones = torch.ones(K)
    PowerFormula(ones, ones, LOWER_IS_BETTER, MEAN, SCALE).alpha.add_(1)
    assert torch.equal(ones, torch.ones(K))


def test_rejects_invalid_settings() -> None:
    one = torch.ones(K)
    with pytest.raises(ConfigError, match="scales positive"):
        Standardize(LOWER_IS_BETTER, one, 0 * one)
    with pytest.raises(ConfigError, match="3 objectives need as many"):
        Standardize(LOWER_IS_BETTER, one[:2], one)
    with pytest.raises(ConfigError, match="α and β ≥ 0"):
        PowerFormula(one, -one, LOWER_IS_BETTER, one, one)
