"""Dropout from random bytes: rates, means, gradients, independence and reproducibility."""

import pytest
import torch

from a2gen_rec.nn.dropout import Dropout, random_bytes


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.3, 0.5, 0.999])
def test_drops_the_rate_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.full((1000, 301), 2.0, dtype=torch.float64, requires_grad=True)
    y = Dropout(rate)(x)
    dropped = (y == 0).double().mean().item()
    rounded = min(max(round(256 * rate), 1), 255) / 256
    assert dropped == pytest.approx(rounded, abs=4 * (rounded * (1 - rounded) / x.numel()) ** 0.5)
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 2 / (1 - rounded)))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / 2)


def test_bytes_are_uniform_and_independent() -> None:
    torch.manual_seed(1)
    values = random_bytes(torch.empty(800_003)).long()
    counts = torch.bincount(values, minlength=256).double()
    expected = len(values) / 256
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 255 + 5 * (2 * 255) ** 0.5
    centered = values.double() - values.double().mean()
    for lag in (1, 2, 7, 8):
        correlation = float((centered[lag:] * centered[:-lag]).mean() / centered.square().mean())
        assert abs(correlation) < 5 / len(values) ** 0.5, lag


def test_is_reproducible_and_off_in_evaluation() -> None:
    module, x = Dropout(0.4), torch.randn(50, 7)
    torch.manual_seed(3)
    first, second = module(x), module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(module.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert module.train()(x[:0]).shape == (0, 7)
