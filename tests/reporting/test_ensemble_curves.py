"""Transform curves against scores of the ensemble, and the content of the figure."""

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
    COLORS,
    TEXT_COLOR,
    TransformCurves,
    draw_transforms,
    sort_by_range,
    ticks,
    transform_curves,
)

OBJECTIVES = [Objective("like"), Objective("negative", False), Objective("watch_time")]
USERS = 3


def make_predictions(candidates: int = 500) -> np.ndarray:
    rng = np.random.default_rng(0)
    logits = rng.normal([-4.0, -6.0, 2.5], [1.5, 1.0, 0.4], (candidates, 3))
    return logits.astype(np.float32)


def make_model() -> tuple[Ensemble, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = Ensemble(OBJECTIVES, 6, 5, dim=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.set_normalization(torch.tensor([-4.0, -6.0, 2.5]), torch.tensor([1.5, 1.0, 0.4]))
    return model.double(), (torch.randn(USERS, 7, 6), torch.tensor([0, 3, 7]), torch.randn(USERS, 1, 5))


def make_curves() -> list[TransformCurves]:
    model, user = make_model()
    return transform_curves(model, OBJECTIVES, make_predictions(), *user)


def test_gain_is_the_score_minus_that_at_the_median() -> None:
    """It does not depend on the other objectives."""
    model, user = make_model()
    median = np.median(make_predictions().astype(np.float64), 0)
    for k, curve in enumerate(transform_curves(model, OBJECTIVES, make_predictions(), *user, num_points=9)):
        candidate = torch.tensor([-1.0, -3.0, 1.0], dtype=torch.float64).repeat(USERS, 10, 1)
        candidate[..., k] = torch.from_numpy(np.append(curve.values, median[k]))
        score = model(candidate, *user).score.detach().numpy()
        np.testing.assert_allclose(curve.gain, score[:, :-1] - score[:, -1:], atol=1e-9)


def test_contributions_sum_to_the_score() -> None:
    model, user = make_model()
    curves = transform_curves(model, OBJECTIVES, make_predictions(), *user, num_points=9)
    for point in (0, 4, 8):
        candidate = torch.tensor([[[curve.values[point] for curve in curves]]]).expand(USERS, 1, 3)
        score = model(candidate, *user).score[:, 0].detach().numpy()
        np.testing.assert_allclose(sum(curve.contribution[:, point] for curve in curves), score, atol=1e-9)
    np.testing.assert_allclose(sum(curve.weight for curve in curves), np.ones(USERS))


def test_curves_are_monotonic() -> None:
    for curve in make_curves():
        steps = np.diff(curve.gain, axis=1)
        assert (steps > 0).all() if curve.higher_is_better else (steps < 0).all()
    assert [curve.unit for curve in make_curves()] == ["probability", "probability", "s"]


def test_range_excludes_outliers() -> None:
    predictions = make_predictions(1000)
    predictions[0] = 30  # an outlier
    model, user = make_model()
    for k, curve in enumerate(transform_curves(model, OBJECTIVES, predictions, *user)):
        ordered = np.sort(predictions[:, k])
        assert ordered[9] <= curve.values[0] <= ordered[10]
        assert ordered[989] <= curve.values[-1] <= ordered[990]
        assert curve.histogram.sum() == 980


def test_constant_prediction_has_a_range() -> None:
    predictions = make_predictions()
    predictions[:, 1] = -6
    model, user = make_model()
    curve = transform_curves(model, OBJECTIVES, predictions, *user)[1]
    assert (curve.values[0], curve.values[-1], curve.histogram.sum()) == (-6.5, -5.5, len(predictions))


def test_rejects_empty_predictions() -> None:
    model, user = make_model()
    with pytest.raises(DataError, match="no training predictions"):
        transform_curves(model, OBJECTIVES, make_predictions(0), *user)


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


def test_ticks_match_their_texts_and_are_spaced() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        low = float(rng.uniform(-14, 5))
        high = low + float(rng.uniform(0.01, 9))
        marks = ticks(low, high, "probability")
        assert 2 <= len(marks) <= 7
        positions = [position for position, _ in marks]
        assert low <= positions[0]
        assert positions[-1] <= high
        assert len(marks) == 2 or np.diff(positions).min() >= (high - low) / 6 - 1e-9
        for position, text in marks:
            assert 1 / (1 + math.exp(-position)) == pytest.approx(float(text[:-1]) / 100, rel=2e-3)


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("page", ["#ffffff", "#14181d", "#0d1117"])
def test_colors_have_contrast_on_light_and_dark_pages(page: str) -> None:
    for color, min_contrast in [*((color, 3.5) for color in COLORS), (TEXT_COLOR, 4.0)]:
        light, dark = sorted([luminance(color), luminance(page)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= min_contrast


def test_figure_has_names_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SVG's comments are its texts. pyplot must not be imported, because it keeps figures in memory."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    curves = make_curves()
    file = tmp_path / "transforms.svg"
    draw_transforms(curves, ["_a", "$b$ <c>", "d"], str(file))
    texts = re.findall("<!-- (.*?) -->", file.read_text())
    for text in ("_a", "$b$ &lt;c&gt;", "d", "score gain over the median prediction"):
        assert text in texts
    assert "predicted probability (logit scale); predicted seconds (log scale)" in texts
    names = [text for text in texts if text in ("like", "negative", "watch_time")]
    assert names == [curve.objective for curve in sort_by_range(curves)]
    assert sum("lower is better" in text for text in texts) == 1


def test_panels_are_sorted_by_effect() -> None:
    ranges = [np.mean([max(user) - min(user) for user in curve.gain]) for curve in sort_by_range(make_curves())]
    assert ranges == sorted(ranges, reverse=True)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_png_is_transparent(tmp_path: Path, objectives: int) -> None:
    from matplotlib.image import imread

    file = tmp_path / "transforms.PNG"
    draw_transforms(make_curves()[:objectives], ["a", "b", "c"], str(file))
    pixels = imread(file, format="png")
    assert pixels[0, 0, 3] == 0
    for color in COLORS[:USERS]:
        rgb = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        assert ((np.abs(pixels[..., :3] - rgb) < 0.01).all(-1) & (pixels[..., 3] > 0.99)).any()


@pytest.mark.parametrize(
    ("name", "users", "reason"),
    [("a.jpg", 3, "extension must be .png or .svg"), ("a.png", 0, "from 1 to 5"), ("a.png", 6, "from 1 to 5")],
)
def test_rejects_invalid_arguments(tmp_path: Path, name: str, users: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        draw_transforms(make_curves(), ["a"] * users, str(tmp_path / name))


def test_names_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/a\.png: cannot be written"):
        draw_transforms(make_curves(), ["a", "b", "c"], str(tmp_path / "absent" / "a.png"))
