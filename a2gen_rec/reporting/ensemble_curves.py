"""Learned transforms of an ensemble, as curves for a few users: METHODS §6.

A transform's offset depends on the user only, so it does not affect the order of candidates. Curves are therefore
relative to the median of the training lists: they show the gain of a prediction over a typical one.
"""

import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from iopath.common.file_io import g_pathmgr
from torch import Tensor

from a2gen_rec.data.schema import WATCH_TIME
from a2gen_rec.errors import DataError, UserError
from a2gen_rec.models.ensemble.model import Ensemble, Objective
from a2gen_rec.ranking.contributions import Unit

if TYPE_CHECKING:  # only drawing needs matplotlib
    from matplotlib.axes import Axes

# Contrast of at least 4:1 on white and dark pages; line styles distinguish users without color.
TEXT_COLOR = "#787878"
COLORS = ("#0a84c1", "#cf6a00", "#0f9068", "#c0559f", "#8c7d10")
_STROKES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1.2)))
_RANGE = (1, 99)  # percentiles of the training predictions
_BINS = 40


@dataclass(frozen=True)
class TransformCurves:
    """Contribution of one objective to the scores of some users.

    Attributes:
        objective: Name of the objective.
        higher_is_better: Direction of the objective.
        unit: Unit of the prediction.
        values: [points] ascending inputs of the ensemble: logits of probabilities, or log1p seconds.
        contribution: [users, points] weight · transform.
        gain: [users, points] contribution minus that at the median of the training predictions.
        weight: [users] weight of the objective.
        histogram: [bins] training predictions in equal bins over the range of ``values``.
    """

    objective: str
    higher_is_better: bool
    unit: Unit
    values: np.ndarray
    contribution: np.ndarray
    gain: np.ndarray
    weight: np.ndarray
    histogram: np.ndarray


@torch.no_grad()
def transform_curves(
    model: Ensemble,
    objectives: Sequence[Objective],
    predictions: np.ndarray,
    events: Tensor,
    length: Tensor,
    context: Tensor,
    time_objectives: Collection[str] = (WATCH_TIME,),
    num_points: int = 201,
) -> list[TransformCurves]:
    """Return the curves of each objective from the 1st to the 99th percentile of its predictions.

    Args:
        model: Ensemble.
        objectives: The K objectives of the model.
        predictions: [candidates, K] predictions of the training lists.
        events: [users, L, d_event] recent history, as the model reads it.
        length: [users] number of events.
        context: [users, 1, d_context] context.
        time_objectives: Names of objectives in log1p seconds; all others are logits of probabilities.
        num_points: Points per curve.

    Raises:
        DataError: There are no predictions.
    """
    if not len(predictions):
        raise DataError("no training predictions to draw transforms from")
    low, median, high = np.percentile(predictions.astype(np.float64), (_RANGE[0], 50, _RANGE[1]), axis=0)
    narrow = high - low < 1e-3  # a constant prediction still has a transform nearby
    low, high = np.where(narrow, median - 0.5, low), np.where(narrow, median + 0.5, high)
    grid = np.concatenate([np.linspace(low, high, num_points), median[None]])
    # A prediction affects neither weights nor other objectives' transforms: one pass covers all objectives.
    inputs = torch.from_numpy(grid).to(model.mean).expand(len(events), -1, -1)
    output = model(inputs, events, length, context)
    contribution = (output.weight * output.transform).double().cpu().numpy()
    weight = output.weight[:, 0].double().cpu().numpy()
    return [
        TransformCurves(
            objective=objective.name,
            higher_is_better=objective.higher_is_better,
            unit="s" if objective.name in time_objectives else "probability",
            values=grid[:-1, k],
            contribution=contribution[:, :-1, k],
            gain=contribution[:, :-1, k] - contribution[:, -1:, k],
            weight=weight[:, k],
            histogram=np.histogram(predictions[:, k], _BINS, (low[k], high[k]))[0],
        )
        for k, objective in enumerate(objectives)
    ]


def draw_transforms(curves: Sequence[TransformCurves], users: Sequence[str], file: str) -> None:
    """Write a figure with one panel per objective, sorted by effect on scores; readable on light and dark pages.

    Args:
        curves: Curves of one or more objectives for the same users.
        users: Names of the users in the legend.
        file: Output file; its extension, ``.png`` or ``.svg``, is the format.

    Raises:
        UserError: Another extension, no or too many users, or the file cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures in memory and may open windows

    extension = file.rpartition(".")[2].lower()
    if extension not in ("png", "svg"):
        raise UserError(f"{file}: file extension must be .png or .svg")
    if not 1 <= len(users) <= len(COLORS):
        raise UserError(f"number of users must be from 1 to {len(COLORS)}, not {len(users)}")
    num_columns = min(3, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    figure = Figure(figsize=(max(3.2 * num_columns, 5.0), 2.3 * num_rows + 1.1), layout="constrained", facecolor="none")
    # One scale for all panels, so that objectives with little effect on the score look flat.
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flat)
    for panel, sorted_curves in zip(panels, sort_by_range(curves), strict=False):
        _draw(panel, sorted_curves)
    low, high = min(float(curve.gain.min()) for curve in curves), max(float(curve.gain.max()) for curve in curves)
    span = high - low or 1.0
    panels[0].set_ylim(low - 0.3 * span, high + 0.08 * span)  # the histograms are below the curves
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    legend_rows = math.ceil(len(users) / (num_columns + 1))
    legend = figure.legend(
        panels[0].lines[-len(users) :],
        [str(index) for index in range(len(users))],  # names are set below: a legend skips those that start with "_"
        loc="outside upper center",
        ncols=math.ceil(len(users) / legend_rows),
        frameon=False,
        title="Learned transforms: contribution of each prediction to a user's scores",  # a figure title would overlap
        title_fontproperties={"size": 10, "weight": "bold"},
    )
    legend.get_title().set_color(TEXT_COLOR)
    for text, name in zip(legend.get_texts(), users, strict=True):
        text.set(text=name, color=TEXT_COLOR, fontsize=8.5, parse_math=False)
    figure.supylabel("score gain over the median prediction", color=TEXT_COLOR, fontsize=9)
    units = {"probability": "predicted probability (logit scale)", "s": "predicted seconds (log scale)"}
    figure.supxlabel("; ".join(dict.fromkeys(units[curve.unit] for curve in curves)), color=TEXT_COLOR, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=extension, dpi=160)
    try:
        with g_pathmgr.open(file, "wb") as stream:
            stream.write(buffer.getvalue())
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from error


def sort_by_range(curves: Sequence[TransformCurves]) -> list[TransformCurves]:
    """Sort curves by their effect on the score: the mean over users of the range of gains, in descending order."""
    return sorted(curves, key=lambda curve: -float(np.ptp(curve.gain, axis=1).mean()))


def ticks(low: float, high: float, unit: Unit, max_ticks: int = 6) -> list[tuple[float, str]]:
    """Return well-spaced ticks at round predictions between two values (logits or log1p seconds), with their texts."""
    min_distance = (high - low) / max_ticks
    chosen: dict[float, str] = {}
    for leading in ((1,), (1, 3), (1, 2, 5), range(1, 10), np.arange(10, 100) / 10):
        for position, text in _round_values(low, high, unit, leading):
            if all(abs(position - other) >= min_distance for other in chosen):
                chosen[position] = text
        if len(chosen) >= 3:
            break
    if len(chosen) < 2:
        chosen = {end: _text(_prediction(end, unit), unit, digits=4) for end in (low, high)}
    return sorted(chosen.items())


def _draw(panel: "Axes", curves: TransformCurves) -> None:
    low, high = curves.values[0], curves.values[-1]
    edges = np.linspace(low, high, len(curves.histogram) + 1)
    heights = 0.2 * curves.histogram / max(curves.histogram.max(), 1)
    panel.bar(
        edges[:-1],
        heights,
        np.diff(edges),
        align="edge",
        color=TEXT_COLOR,
        alpha=0.3,
        transform=panel.get_xaxis_transform(),
    )
    panel.axhline(0, color=TEXT_COLOR, linewidth=0.6, alpha=0.6)
    for gain, color, line_style in zip(curves.gain, COLORS, _STROKES, strict=False):
        panel.plot(curves.values, gain, color=color, linestyle=line_style, linewidth=1.6)
    panel.set_xlim(low, high)
    x_ticks = ticks(low, high, curves.unit)
    panel.set_xticks([position for position, _ in x_ticks], [text for _, text in x_ticks])
    panel.locator_params(axis="y", nbins=5)
    panel.set_facecolor("none")
    panel.tick_params(colors=TEXT_COLOR, labelsize=7.5, width=0.6, length=2.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["bottom", "left"]].set(color=TEXT_COLOR, linewidth=0.6)
    panel.set_title(curves.objective, loc="left", pad=15, color=TEXT_COLOR, fontsize=9, weight="bold", parse_math=False)
    min_weight, max_weight = (f"{weight:.2f}" for weight in (curves.weight.min(), curves.weight.max()))
    caption = f"weight {min_weight}" if min_weight == max_weight else f"weight {min_weight}–{max_weight}"
    caption += "  ·  ↓ lower is better" if not curves.higher_is_better else ""
    panel.annotate(
        caption, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", color=TEXT_COLOR, fontsize=7.5
    )


def _round_values(low: float, high: float, unit: Unit, leading: Collection[float]) -> list[tuple[float, str]]:
    """Return all a · 10^b with a in ``leading`` (and 1 minus these for probabilities) between two values."""
    numbers = [digit * 10.0**power for power in range(-9, 7) for digit in leading]
    if unit == "s":
        values = [(math.log1p(number), number) for number in [0.0, *numbers] if number == 0 or number >= 1]
    else:
        probabilities = {round(p, 12) for number in [*numbers, 0.5] if number < 1 for p in (number, 1 - number)}
        values = [(math.log(p / (1 - p)), p) for p in sorted(probabilities) if 0 < p < 1]
    return [(position, _text(number, unit)) for position, number in values if low <= position <= high]


def _prediction(value: float, unit: Unit) -> float:
    return math.expm1(value) if unit == "s" else 1 / (1 + math.exp(-value))


def _text(prediction: float, unit: Unit, digits: int = 7) -> str:
    return f"{prediction:.{digits}g} s" if unit == "s" else f"{100 * prediction:.{digits}g}%"
