"""What an ensemble has learned from each prediction, as curves of a few users: METHODS §6.

A transform's offset is the user's own and the same for all values of an objective, so it does not order them. Curves
are therefore drawn from the training lists' median on: what a prediction gains over a typical one.
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

if TYPE_CHECKING:  # drawing alone needs it
    from matplotlib.axes import Axes

# Contrast of 4 : 1 or more on white and on a dark page alike; the strokes tell users apart without colours.
INK = "#787878"
COLOURS = ("#0a84c1", "#cf6a00", "#0f9068", "#c0559f", "#8c7d10")
_STROKES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1.2)))
_RANGE = (1, 99)  # percentiles of the training values that are drawn
_BINS = 40


@dataclass(frozen=True)
class TransformCurves:
    """What one objective adds to the scores of some users.

    Attributes:
        objective: its name; higher_is_better: direction in which it is better; unit: of its prediction.
        value: [points] rising, as the ensemble takes it: logit of a probability, or log1p seconds.
        share: [users, points] weight · transform.
        gain: [users, points] share less that at the median of the training values.
        weight: [users]
        seen: [bins] number of training values in even bins over the range of ``value``.
    """

    objective: str
    higher_is_better: bool
    unit: Unit
    value: np.ndarray
    share: np.ndarray
    gain: np.ndarray
    weight: np.ndarray
    histogram: np.ndarray


@torch.no_grad()
def transform_curves(
    model: Ensemble,
    objectives: Sequence[Objective],
    values: np.ndarray,
    events: Tensor,
    length: Tensor,
    context: Tensor,
    seconds: Collection[str] = (WATCH_TIME,),
    points: int = 201,
) -> list[TransformCurves]:
    """Curves of every objective, from the 1st to the 99th percentile of its values.

    Args:
        objectives: the model's K.
        values: [candidates, K] of the training lists.
        events, length, context: [users, L, d_event], [users] and [users, 1, d_context], as the model takes them.
        seconds: names of objectives that are log1p seconds; all others are logits of probabilities.
        points: of each curve.

    Raises:
        DataError: there are no values.
    """
    if not len(values):
        raise DataError("no training values to draw transforms over")
    low, middle, high = np.percentile(values.astype(np.float64), (_RANGE[0], 50, _RANGE[1]), axis=0)
    narrow = high - low < 1e-3  # a constant prediction still has a transform around it
    low, high = np.where(narrow, middle - 0.5, low), np.where(narrow, middle + 0.5, high)
    grid = np.concatenate([np.linspace(low, high, points), middle[None]])
    # Neither weights nor other objectives' transforms see a value: one pass sweeps all objectives at once.
    swept = torch.from_numpy(grid).to(model.mean).expand(len(events), -1, -1)
    output = model(swept, events, length, context)
    share = (output.weight * output.transform).double().cpu().numpy()
    weight = output.weight[:, 0].double().cpu().numpy()
    return [
        TransformCurves(
            objective=objective.name,
            higher_is_better=objective.higher_is_better,
            unit="s" if objective.name in seconds else "probability",
            value=grid[:-1, k],
            share=share[:, :-1, k],
            gain=share[:, :-1, k] - share[:, -1:, k],
            weight=weight[:, k],
            histogram=np.histogram(values[:, k], _BINS, (low[k], high[k]))[0],
        )
        for k, objective in enumerate(objectives)
    ]


def draw_transforms(curves: Sequence[TransformCurves], users: Sequence[str], file: str) -> None:
    """Write a figure of one panel per objective, those that move scores most first; readable on light and dark pages.

    Args:
        curves: one or more objectives' of the same users; users: what the legend calls them.
        file: its ending, ``.png`` or ``.svg``, is its format.

    Raises:
        UserError: another ending, no or too many users, or the place is not writable.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may open windows

    form = file.rpartition(".")[2].lower()
    if form not in ("png", "svg"):
        raise UserError(f"{file}: a figure ends in .png or .svg")
    if not 1 <= len(users) <= len(COLOURS):
        raise UserError(f"transforms are drawn for 1 to {len(COLOURS)} users, not {len(users)}")
    across = min(3, len(curves))
    down = math.ceil(len(curves) / across)
    figure = Figure(figsize=(max(3.2 * across, 5.0), 2.3 * down + 1.1), layout="constrained", facecolor="none")
    # One scale for all: what hardly moves the score has to look like it.
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for panel, each in zip(panels, sort_by_range(curves), strict=False):
        _draw(panel, each)
    least, most = min(float(each.gain.min()) for each in curves), max(float(each.gain.max()) for each in curves)
    span = most - least or 1.0
    panels[0].set_ylim(least - 0.3 * span, most + 0.08 * span)  # the histograms stand below the curves
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    rows = math.ceil(len(users) / (across + 1))
    legend = figure.legend(
        panels[0].lines[-len(users) :],
        [str(place) for place in range(len(users))],  # the users' own below: a legend skips names that begin with "_"
        loc="outside upper center",
        ncols=math.ceil(len(users) / rows),
        frameon=False,
        title="Learned transforms: what each prediction adds to a user's scores",  # the figure's own would overlap
        title_fontproperties={"size": 10, "weight": "bold"},
    )
    legend.get_title().set_color(INK)
    for text, name in zip(legend.get_texts(), users, strict=True):
        text.set(text=name, color=INK, fontsize=8.5, parse_math=False)
    figure.supylabel("score gained over the median prediction", color=INK, fontsize=9)
    units = {"probability": "predicted probability, on a logit scale", "s": "predicted seconds, on a log scale"}
    figure.supxlabel("; ".join(dict.fromkeys(units[each.unit] for each in curves)), color=INK, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=form, dpi=160)
    try:
        with g_pathmgr.open(file, "wb") as stream:
            stream.write(drawn.getvalue())
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from error


def sort_by_range(curves: Sequence[TransformCurves]) -> list[TransformCurves]:
    """Those that move the score most first: by the users' mean of the largest gain less the smallest."""
    return sorted(curves, key=lambda each: -float(np.ptp(each.gain, axis=1).mean()))


def ticks(low: float, high: float, unit: Unit, most: int = 6) -> list[tuple[float, str]]:
    """Round predictions between two values (logits or log1p seconds), well apart: where they are, and their text."""
    apart = (high - low) / most
    chosen: dict[float, str] = {}
    for places in ((1,), (1, 3), (1, 2, 5), range(1, 10), np.arange(10, 100) / 10):
        for position, text in _round(low, high, unit, places):
            if all(abs(position - other) >= apart for other in chosen):
                chosen[position] = text
        if len(chosen) >= 3:
            break
    if len(chosen) < 2:
        chosen = {end: _text(_prediction(end, unit), unit, digits=4) for end in (low, high)}
    return sorted(chosen.items())


def _draw(panel: "Axes", curves: TransformCurves) -> None:
    low, high = curves.value[0], curves.value[-1]
    edges = np.linspace(low, high, len(curves.histogram) + 1)
    heights = 0.2 * curves.histogram / max(curves.histogram.max(), 1)
    panel.bar(
        edges[:-1], heights, np.diff(edges), align="edge", color=INK, alpha=0.3, transform=panel.get_xaxis_transform()
    )
    panel.axhline(0, color=INK, linewidth=0.6, alpha=0.6)
    for gain, colour, stroke in zip(curves.gain, COLOURS, _STROKES, strict=False):
        panel.plot(curves.value, gain, color=colour, linestyle=stroke, linewidth=1.6)
    panel.set_xlim(low, high)
    marks = ticks(low, high, curves.unit)
    panel.set_xticks([position for position, _ in marks], [text for _, text in marks])
    panel.locator_params(axis="y", nbins=5)
    panel.set_facecolor("none")
    panel.tick_params(colors=INK, labelsize=7.5, width=0.6, length=2.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["bottom", "left"]].set(color=INK, linewidth=0.6)
    panel.set_title(curves.objective, loc="left", pad=15, color=INK, fontsize=9, weight="bold", parse_math=False)
    lightest, heaviest = (f"{weight:.2f}" for weight in (curves.weight.min(), curves.weight.max()))
    about = f"weight {lightest}" if lightest == heaviest else f"weight {lightest}–{heaviest}"
    about += "  ·  ↓ less is better" if not curves.higher_is_better else ""
    panel.annotate(about, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", color=INK, fontsize=7.5)


def _round(low: float, high: float, unit: Unit, places: Collection[float]) -> list[tuple[float, str]]:
    """All of a · 10^b for leading digits ``places`` (of a probability, also 1 less that) between two values."""
    numbers = [place * 10.0**power for power in range(-9, 7) for place in places]
    if unit == "s":
        found = [(math.log1p(number), number) for number in [0.0, *numbers] if number == 0 or number >= 1]
    else:
        chances = {round(p, 12) for number in [*numbers, 0.5] if number < 1 for p in (number, 1 - number)}
        found = [(math.log(p / (1 - p)), p) for p in sorted(chances) if 0 < p < 1]
    return [(position, _text(number, unit)) for position, number in found if low <= position <= high]


def _prediction(value: float, unit: Unit) -> float:
    return math.expm1(value) if unit == "s" else 1 / (1 + math.exp(-value))


def _text(prediction: float, unit: Unit, digits: int = 7) -> str:
    return f"{prediction:.{digits}g} s" if unit == "s" else f"{100 * prediction:.{digits}g}%"
