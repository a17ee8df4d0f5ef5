"""The ensemble's benchmark on small requests, and that it refuses forms that differ."""

import copy

import ensemble_latency
import pytest
import torch
from ensemble_latency import InGraph, Settings, accuracy, draw, in_graph, make, measure, varied
from torch import Tensor

from a2gen_rec.errors import ConfigError
from a2gen_rec.utils.distributed import DistributedContext

CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, 1, CPU)
SIZES = {"objectives": [2, 3], "d_context": 6, "events": 3, "d_event": 4, "dim": 4, "hidden": [5, 3]}
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
    fall_candidates=3,
)


def test_everything_is_measured() -> None:
    threads = torch.get_num_threads()
    report = measure(TINY, ALONE)
    requests, by_degree, errors, steps = report.tables
    assert [row[:3] for row in requests.rows] == [[k, count, 1] for k in (2, 3) for count in (3, 1000)]
    assert all(row[4] > 0 and row[7] == 10 for row in requests.rows)  # type: ignore[operator]
    assert [row[:2] for row in by_degree.rows] == [row[:2] for row in requests.rows]
    names = ["initial", "× 3", "× 3, steepness 3"]
    assert [row[:2] for row in errors.rows] == [[name, degree] for name in names for degree in (2, 8)]
    assert [row[:2] for row in steps.rows] == [[k, degree] for k in (2, 3) for degree in (2, 8)]
    for table in report.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert report.figures["peak_growth_leibniz"] < 1.05 < 1.5 < report.figures["peak_growth_in-graph"]
    assert [target.claim.rpartition(": ")[2] for target in report.targets[:2]] == ["p50", "p50"]
    assert report.targets[-1].met
    assert torch.get_num_threads() == threads


def test_forms_of_one_model_share_their_parameters() -> None:
    model = make(3, TINY)
    other = in_graph(model)
    assert isinstance(other.transform, InGraph)
    assert not isinstance(model.transform, InGraph)
    assert all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))


class Wrong(InGraph):
    """Right but for the scores, or for the gradients alone."""

    def forward(self, p: Tensor, h: Tensor) -> Tensor:
        out = super().forward(p, h)
        return out * 1.001 if WRONG == "scores" else out.detach() + 0.9 * (out - out.detach())


WRONG = ""


@pytest.mark.parametrize(("what", "message"), [("scores", "scores of degree 2"), ("gradients", "gradients .* degree")])
def test_forms_that_differ_are_not_timed(what: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.WRONG", what)
    monkeypatch.setattr(ensemble_latency, "InGraph", Wrong)
    with pytest.raises(RuntimeError, match=f"{message}.* differ by"):
        measure(TINY, ALONE)


def test_errors_of_the_quadrature_are_those_of_steep_weights() -> None:
    """By hand: loops over candidates and pairs; more nodes or less steepness leave less."""
    models = varied(make(3, TINY), TINY)
    found = {name: accuracy(model, 2, TINY, CPU) for name, model in models.items()}
    assert found["initial"].difference < found["× 3"].difference < found["× 3, steepness 3"].difference
    steep = copy.deepcopy(models["× 3, steepness 3"])
    assert accuracy(steep, 8, TINY, CPU).difference < found["× 3, steepness 3"].difference

    torch.manual_seed(TINY.seed)
    request = draw(1, 1000, 3, TINY, CPU).double()
    scores = []
    for degree in (TINY.exact_degree, 2):
        steep.transform.degree = degree
        scores.append(request.score(steep)[0].tolist())
    exact, score = scores
    differences = [abs(one - two) for one, two in zip(exact, score, strict=True)]
    assert found["× 3, steepness 3"].difference == pytest.approx(max(differences))
    pairs = [(i, j) for i in range(1000) for j in range(1000)]
    swapped = sum((exact[i] > exact[j]) != (score[i] > score[j]) for i, j in pairs)
    assert found["× 3, steepness 3"].swapped == pytest.approx(swapped / len(pairs))
    assert swapped > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"degrees": []}, r"degrees \[\]"),
        ({"threads": [1, 0]}, r"threads \[1, 0\]"),
        ({"requests": 0}, "requests 0"),
        ({"exact_degree": 32}, "exact_degree 32 must be above"),
    ],
)
def test_unusable_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**wrong)  # type: ignore[arg-type]
