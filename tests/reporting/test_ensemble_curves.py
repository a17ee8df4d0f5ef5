"""The curves against scores of the ensemble itself; the figure by what can be read off it."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from a2gen_rec.errors import DataError, UserError
from a2gen_rec.models.ensemble.model import Ensemble, Objective
from a2gen_rec.reporting.ensemble_curves import (
    COLOURS,
    INK,
    TransformCurves,
    draw_transforms,
    sort_by_range,
    ticks,
    transform_curves,
)

OBJECTIVES = [Objective("like"), Objective("negative", False), Objective("watch_time")]
USERS = 3


def values(candidates: int = 500) -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = rng.normal([-4.0, -6.0, 2.5], [1.5, 1.0, 0.4], (candidates, 3))
    return drawn.astype(np.float32)


def make() -> tuple[Ensemble, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = Ensemble(OBJECTIVES, 6, 5, dim=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.set_normalization(torch.tensor([-4.0, -6.0, 2.5]), torch.tensor([1.5, 1.0, 0.4]))
    return model.double(), (torch.randn(USERS, 7, 6), torch.tensor([0, 3, 7]), torch.randn(USERS, 1, 5))


def curves() -> list[TransformCurves]:
    model, user = make()
    return transform_curves(model, OBJECTIVES, values(), *user)


def test_a_gain_is_what_the_score_gains_over_that_of_the_median() -> None:
    """Whatever the other objectives are."""
    model, user = make()
    middle = np.median(values().astype(np.float64), 0)
    for k, each in enumerate(transform_curves(model, OBJECTIVES, values(), *user, points=9)):
        candidate = torch.tensor([-1.0, -3.0, 1.0], dtype=torch.float64).repeat(USERS, 10, 1)
        candidate[..., k] = torch.from_numpy(np.append(each.value, middle[k]))
        score = model(candidate, *user).score.detach().numpy()
        np.testing.assert_allclose(each.gain, score[:, :-1] - score[:, -1:], atol=1e-9)


def test_shares_add_up_to_the_score() -> None:
    model, user = make()
    found = transform_curves(model, OBJECTIVES, values(), *user, points=9)
    for point in (0, 4, 8):
        candidate = torch.tensor([[[each.value[point] for each in found]]]).expand(USERS, 1, 3)
        score = model(candidate, *user).score[:, 0].detach().numpy()
        np.testing.assert_allclose(sum(each.share[:, point] for each in found), score, atol=1e-9)
    np.testing.assert_allclose(sum(each.weight for each in found), np.ones(USERS))


def test_curves_go_where_better_is() -> None:
    for each in curves():
        steps = np.diff(each.gain, axis=1)
        assert (steps > 0).all() if each.higher_is_better else (steps < 0).all()
    assert [each.unit for each in curves()] == ["probability", "probability", "s"]


def test_the_range_leaves_out_the_outermost_values() -> None:
    drawn = values(1000)
    drawn[0] = 30  # an outlier
    model, user = make()
    for k, each in enumerate(transform_curves(model, OBJECTIVES, drawn, *user)):
        ordered = np.sort(drawn[:, k])
        assert ordered[9] <= each.value[0] <= ordered[10]
        assert ordered[989] <= each.value[-1] <= ordered[990]
        assert each.histogram.sum() == 980


def test_a_constant_prediction_has_a_range_too() -> None:
    drawn = values()
    drawn[:, 1] = -6
    model, user = make()
    each = transform_curves(model, OBJECTIVES, drawn, *user)[1]
    assert (each.value[0], each.value[-1], each.histogram.sum()) == (-6.5, -5.5, len(drawn))


def test_no_values_are_refused() -> None:
    model, user = make()
    with pytest.raises(DataError, match="no training values"):
        transform_curves(model, OBJECTIVES, values(0), *user)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize(
    ("low", "high", "unit", "expected"),
    [
        (logit(5e-5), logit(0.02), "probability", "0.01% 0.1% 1%"),
        (logit(0.002), logit(0.998), "probability", "1% 10% 50% 90% 99%"),
        (logit(0.12), logit(0.85), "probability", "30% 50% 70%"),
        (math.log1p(0.0), math.log1p(110.0), "s", "0 s 10 s 100 s"),
        (math.log1p(3.0), math.log1p(40.0), "s", "3 s 10 s 30 s"),
        (math.log1p(12.01), math.log1p(12.02), "s", "12.01 s 12.02 s"),
    ],
)
def test_ticks_are_round(low: float, high: float, unit: str, expected: str) -> None:
    assert " ".join(f"{text}" for _, text in ticks(low, high, unit)) == expected  # type: ignore[arg-type]


def test_ticks_stand_where_their_text_says_and_apart() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        low = float(rng.uniform(-14, 5))
        high = low + float(rng.uniform(0.01, 9))
        found = ticks(low, high, "probability")
        assert 2 <= len(found) <= 7
        places = [position for position, _ in found]
        assert low <= places[0]
        assert places[-1] <= high
        assert len(found) == 2 or np.diff(places).min() >= (high - low) / 6 - 1e-9
        for position, text in found:
            assert 1 / (1 + math.exp(-position)) == pytest.approx(float(text[:-1]) / 100, rel=2e-3)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("page", ["#ffffff", "#14181d", "#0d1117"])
def test_colours_stand_out_from_light_and_dark_pages(page: str) -> None:
    for colour, least in [*((each, 3.5) for each in COLOURS), (INK, 4.0)]:
        light, dark = sorted([luminance(colour), luminance(page)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least


def test_a_figure_names_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SVG's comments are its texts. Figures kept open by pyplot would pile up, so it must not be needed."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    found = curves()
    file = tmp_path / "transforms.svg"
    draw_transforms(found, ["_a", "$b$ <c>", "d"], str(file))
    texts = re.findall("<!-- (.*?) -->", file.read_text())
    for text in ("_a", "$b$ &lt;c&gt;", "d", "score gained over the median prediction"):
        assert text in texts
    assert "predicted probability, on a logit scale; predicted seconds, on a log scale" in texts
    names = [text for text in texts if text in ("like", "negative", "watch_time")]
    assert names == [each.objective for each in sort_by_range(found)]
    assert sum("less is better" in text for text in texts) == 1


def test_panels_begin_with_what_moves_scores_most() -> None:
    swings = [np.mean([max(user) - min(user) for user in each.gain]) for each in sort_by_range(curves())]
    assert swings == sorted(swings, reverse=True)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_a_png_is_transparent(tmp_path: Path, objectives: int) -> None:
    from matplotlib.image import imread

    file = tmp_path / "transforms.PNG"
    draw_transforms(curves()[:objectives], ["a", "b", "c"], str(file))
    pixels = imread(file, format="png")
    assert pixels[0, 0, 3] == 0
    for colour in COLOURS[:USERS]:
        rgb = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert ((np.abs(pixels[..., :3] - rgb) < 0.01).all(-1) & (pixels[..., 3] > 0.99)).any()


@pytest.mark.parametrize(
    ("name", "users", "reason"),
    [("a.jpg", 3, "ends in .png or .svg"), ("a.png", 0, "1 to 5 users"), ("a.png", 6, "1 to 5 users")],
)
def test_unusable_wishes_are_refused(tmp_path: Path, name: str, users: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        draw_transforms(curves(), ["a"] * users, str(tmp_path / name))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/a\.png: cannot be written"):
        draw_transforms(curves(), ["a", "b", "c"], str(tmp_path / "absent" / "a.png"))
