"""Losses of objectives against loops over known values; uncertainty weights against hand-computed values."""

import math

import pytest
import torch
from torch import Tensor

from a2gen_rec.losses.objectives import UncertaintyWeighting, objective_losses

NAN = math.nan
LABELS = torch.tensor([[1.0, 0.0, NAN], [NAN, 1.0, NAN], [0.0, 0.0, NAN], [1.0, NAN, NAN]])
WATCH_S = torch.tensor([3.5, NAN, 0.0, 120.0])


def predictions() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits, time = torch.randn(4, 3, generator=rng), torch.randn(4, generator=rng)
    return logits.double().requires_grad_(), time.double().requires_grad_()


def reference(
    logits: Tensor, time: Tensor, labels: Tensor, watch_s: Tensor, error: str
) -> tuple[list[Tensor], list[int]]:
    sums, counts = [logits.sum() * 0 for _ in range(4)], [0] * 4
    for row in range(len(labels)):
        for k, label in enumerate(labels[row].tolist()):
            if not math.isnan(label):
                p = 1 / (1 + torch.exp(-logits[row, k]))
                sums[k] = sums[k] - torch.log(p if label else 1 - p)
                counts[k] += 1
        if not math.isnan(watch_s[row]):
            off = time[row] - math.log(1 + watch_s[row].item())
            sums[3] = sums[3] + (off**2 if error == "mse" else abs(off))
            counts[3] += 1
    return sums, counts


@pytest.mark.parametrize("error", ["mse", "mae"])
def test_sums_counts_and_gradients_equal_loops(error: str) -> None:
    logits, time = predictions()
    sums, counts = objective_losses(logits, time, LABELS, WATCH_S.double(), error)
    expected, expected_counts = reference(logits, time, LABELS, WATCH_S.double(), error)
    assert counts.tolist() == expected_counts == [3, 3, 0, 3]
    torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-9, atol=1e-9)
    weight = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    for fast, right in zip(
        torch.autograd.grad(weight @ sums, [logits, time], retain_graph=True),
        torch.autograd.grad(weight @ torch.stack(expected), [logits, time]),
        strict=True,
    ):
        assert fast.isfinite().all()
        torch.testing.assert_close(fast, right, rtol=1e-9, atol=1e-9)


def test_watch_time_loss_keeps_float32_under_autocast() -> None:
    """Autocast's 8 bits would round both the seconds and the sum over a batch."""
    watch_s = torch.linspace(0, 100, 1000)
    predicted = torch.log1p(watch_s + 1).bfloat16()
    nothing = torch.zeros(1000, 0)
    sums, _ = objective_losses(nothing, predicted, nothing, watch_s, "mae")
    exact = (predicted.double() - torch.log1p(watch_s.double())).abs().sum()
    torch.testing.assert_close(sums.double(), exact[None], rtol=1e-5, atol=0)


def test_objectives_without_watch_time() -> None:
    logits, time = predictions()
    sums, counts = objective_losses(logits, None, LABELS, WATCH_S)
    total, full_counts = objective_losses(logits, time, LABELS, WATCH_S.double())
    assert torch.equal(sums, total[:3])
    assert torch.equal(counts, full_counts[:3])


def test_sums_add_up_and_are_zero_without_targets() -> None:
    logits, time = predictions()
    parts = [objective_losses(logits[a:b], time[a:b], LABELS[a:b], WATCH_S[a:b]) for a, b in ((0, 1), (1, 1), (1, 4))]
    total = objective_losses(logits, time, LABELS, WATCH_S)
    torch.testing.assert_close(sum(part[0] for part in parts), total[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(sum(part[1] for part in parts), total[1])
    assert not parts[1][0].any()


def weights(world_size: int = 1) -> UncertaintyWeighting:
    module = UncertaintyWeighting([False, True, False], world_size).double()
    with torch.no_grad():
        module.log_variance.copy_(torch.tensor([0.0, math.log(2.0), math.log(0.5)]))
    return module


def test_uncertainty_weights_hand_computed() -> None:
    """L = (3, 8, 5) at variances (1, 2, ½): weights 1, ½·½ and 2, penalties 0, ½ log 2 and −½ log 2."""
    module = weights()
    terms = torch.tensor([3.0, 8.0, 5.0], dtype=torch.float64, requires_grad=True)
    loss = module(terms, torch.ones(3))
    assert loss.item() == pytest.approx(3.0 + 2.0 + 10.0)
    of_terms, of_s = torch.autograd.grad(loss, [terms, module.log_variance])
    assert of_terms.tolist() == pytest.approx([1.0, 0.25, 2.0])
    assert of_s.tolist() == pytest.approx([0.5 - 3.0, 0.5 - 2.0, 0.5 - 10.0])


def test_uncertainty_converges_to_error_variance() -> None:
    """For a squared error the learned e^s is its mean; for a likelihood term twice its mean."""
    module = UncertaintyWeighting([True, False]).double()
    terms = torch.tensor([0.3, 0.7], dtype=torch.float64)
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module(terms, torch.ones(2))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert module.log_variance.exp().tolist() == pytest.approx([0.3, 1.4], rel=1e-6)


def test_term_without_known_values_has_no_effect() -> None:
    module = weights()
    loss = module(torch.tensor([3.0, 0.0, 5.0], dtype=torch.float64), torch.tensor([4.0, 0.0, 2.0]))
    (gradient,) = torch.autograd.grad(loss, module.log_variance)
    assert gradient.ne(0).tolist() == [True, False, True]


def test_ranks_sum_to_the_loss_of_one_rank() -> None:
    """Each rank has its sums divided by the global counts; the penalty is divided by the number of ranks."""
    counts = torch.tensor([7.0, 5.0, 2.0])
    parts = torch.tensor([[1.0, 5.0, 2.0], [2.0, 3.0, 3.0]], dtype=torch.float64)
    one, two = weights(), weights(world_size=2)
    total = one(parts.sum(0), counts)
    shared = sum(two(part, counts) for part in parts)
    torch.testing.assert_close(shared, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(shared, two.log_variance), torch.autograd.grad(total, one.log_variance)
    )
