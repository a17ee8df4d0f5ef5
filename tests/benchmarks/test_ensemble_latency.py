"""The ensemble benchmark measures small requests and rejects variants that differ."""

import copy

import ensemble_variants
import pytest
import torch
from ensemble_latency import Settings, draw_inputs, make_ensemble, measure, measure_accuracy, weight_variants
from ensemble_variants import InGraphTransform, in_graph
from torch import Tensor

from a2gen_rec.errors import ConfigError
from a2gen_rec.utils.distributed import DistributedContext

pytestmark = pytest.mark.training

CPU = torch.device("cpu")
SINGLE = DistributedContext(0, 1, 1, CPU)
SIZES = {"objectives": [2, 3], "d_context": 6, "history_length": 3, "d_history_item": 4, "dim": 4, "hidden": [5, 3]}
TINY = Settings(
    **SIZES,  # type: ignore[arg-type]
    candidates=[3, 1000],
    degrees=[2, 8],
    threads=[1],
    requests=10,
    lists=8,
    list_candidates=50,
    repeats=1,
    steepness=[3.0],
    monotonicity_candidates=3,
)


def test_measures_all_tables() -> None:
    num_threads = torch.get_num_threads()
    report = measure(TINY, SINGLE)
    requests, by_degree, errors, steps = report.tables
    assert [row[:3] for row in requests.rows] == [[k, count, 1] for k in (2, 3) for count in (3, 1000)]
    assert all(row[4] > 0 and row[7] == 10 for row in requests.rows)  # type: ignore[operator]
    assert [row[:2] for row in by_degree.rows] == [row[:2] for row in requests.rows]
    names = ["initial", "× 3", "× 3, steepness 3"]
    assert [row[:2] for row in errors.rows] == [[name, degree] for name in names for degree in (2, 8)]
    assert [row[:2] for row in steps.rows] == [[k, degree] for k in (2, 3) for degree in (2, 8)]
    for table in report.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert report.metrics["peak_growth_leibniz"] < 1.05 < 1.5 < report.metrics["peak_growth_in-graph"]
    assert [goal.claim.rpartition(": ")[2] for goal in report.goals[:2]] == ["p50", "p50"]
    assert report.goals[-1].met
    assert torch.get_num_threads() == num_threads


def test_variants_share_parameters() -> None:
    model = make_ensemble(3, TINY)
    reference = in_graph(model)
    assert isinstance(reference.transform, InGraphTransform)
    assert not isinstance(model.transform, InGraphTransform)
    assert all(left is right for left, right in zip(model.parameters(), reference.parameters(), strict=True))


class WrongTransform(InGraphTransform):
    """Transform with wrong scores, or with correct scores and wrong gradients."""

    def forward(self, p: Tensor, h: Tensor) -> Tensor:
        out = super().forward(p, h)
        return out * 1.001 if WRONG_RESULT == "scores" else out.detach() + 0.9 * (out - out.detach())


WRONG_RESULT = ""


@pytest.mark.parametrize(
    ("result", "message"), [("scores", "scores of degree 2"), ("gradients", "gradients .* degree")]
)
def test_rejects_different_variants(result: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.WRONG_RESULT", result)
    monkeypatch.setattr(ensemble_variants, "InGraphTransform", WrongTransform)
    with pytest.raises(RuntimeError, match=f"{message}.* differ by"):
        measure(TINY, SINGLE)


def test_quadrature_errors_grow_with_steepness() -> None:
    """Compare with loops over candidates and pairs. More nodes or less steepness reduce the error."""
    models = weight_variants(make_ensemble(3, TINY), TINY)
    results = {name: measure_accuracy(model, 2, TINY, CPU) for name, model in models.items()}
    assert results["initial"].max_error < results["× 3"].max_error < results["× 3, steepness 3"].max_error
    steep = copy.deepcopy(models["× 3, steepness 3"])
    assert measure_accuracy(steep, 8, TINY, CPU).max_error < results["× 3, steepness 3"].max_error

    torch.manual_seed(TINY.seed)
    request = draw_inputs(1, 1000, 3, TINY, CPU).double()
    scores = []
    for degree in (TINY.reference_degree, 2):
        steep.transform.degree = degree
        scores.append(request.score(steep)[0].tolist())
    reference, score = scores
    differences = [abs(left - right) for left, right in zip(reference, score, strict=True)]
    assert results["× 3, steepness 3"].max_error == pytest.approx(max(differences))
    pairs = [(i, j) for i in range(1000) for j in range(1000)]
    swapped = sum((reference[i] > reference[j]) != (score[i] > score[j]) for i, j in pairs)
    assert results["× 3, steepness 3"].swapped_fraction == pytest.approx(swapped / len(pairs))
    assert swapped > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"degrees": []}, r"degrees \[\]"),
        ({"threads": [1, 0]}, r"threads \[1, 0\]"),
        ({"requests": 0}, "requests 0"),
        ({"reference_degree": 32}, "reference_degree 32 must be above"),
    ],
)
def test_rejects_invalid_settings(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**wrong)  # type: ignore[arg-type]
