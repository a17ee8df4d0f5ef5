"""The one look of charts: matplotlib figures as SVG for pages, light and dark.

Figures are drawn in stand-in colours; in the SVG each becomes a variable of ``THEME``, which a page sets for its
background. Text stays text. Use: ``new_figure``, ``style`` for each of its axes, then ``svg`` or ``standalone``.
"""

import hashlib
import io
import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Stand-ins are nearly black; black itself is left out of the SVG, as the default.
PAGE, TEXT_COLOR, MUTED, GRID_COLOR, PANEL = (f"#01010{n}" for n in range(1, 6))
SERIES = tuple(f"#01020{n}" for n in range(1, 9))
"""Colours of lines and marks, to be told apart by the colour-blind too; contrast of 3 : 1 or more on both pages."""
HEATMAP_COLORS = tuple(f"#01030{n}" for n in range(1, 7))
"""From little to much."""
_ON_TONES = ("#010401", "#010402")  # text on the first four tones, and on the others
STROKES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (2.5, 1.2)),
    (0, (8, 2)),
    (0, (4, 1.2, 1.2, 1.2, 1.2, 1.2)),
    (0, (1.2, 2.4)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_NAMES = ["page", "ink", "muted", "rule", "panel", *(f"s{n}" for n in range(8)), *(f"q{n}" for n in range(6))]
_NAMES += ["early", "late"]
_STAND_INS = dict(
    zip([PAGE, TEXT_COLOR, MUTED, GRID_COLOR, PANEL, *SERIES, *HEATMAP_COLORS, *_ON_TONES], _NAMES, strict=True)
)
_LIGHT = (
    "#ffffff #1c2128 #57606a #d5dae0 #f4f6f8 "
    "#0073c0 #ba7d00 #2f4c6b #9980ab #6e8373 #8c1f31 #563dd8 #814e00 "
    "#d0e1f2 #a9cae8 #7db0dc #5193cb #2a70b0 #0d4580 #1c2128 #ffffff"
)
_DARK = (
    "#14181d #e4e8ec #9ba5b0 #353c45 #1d232a "
    "#5495eb #bd7514 #5ee780 #e2c5ff #989fa2 #c7434c #8057ff #b6ee3f "
    "#22435f #24567e #2b70a3 #438dc4 #78b5e0 #c4e2f8 #e4e8ec #10151a"
)
_SVG, _XLINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def _variables(colours: str) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in zip(_NAMES, colours.split(), strict=True))


THEME = f"""\
:root {{ {_variables(_LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}
"""
"""CSS that sets the variables for light pages, and for dark ones where the reader prefers them."""


def new_figure(title: str, width: float = 8.0, height: float = 3.0) -> Figure:
    """An empty figure without background, laid out by itself; one inch is 72 pixels of the page.

    Args:
        title: what it shows, for those who do not see it; the page writes it above.
    """
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    figure.set_label(title)
    return figure


def style_axes(axes: Axes, title: str = "", x: str = "", y: str = "", grid: str = "") -> None:
    """Give axes their look, title and labels (with units), and grid lines across ``x``, ``y`` or ``both``."""
    axes.set_facecolor("none")
    axes.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=11, width=0.8, length=3)
    axes.tick_params(which="minor", color=GRID_COLOR, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set(color=MUTED, linewidth=0.8)
    axes.set_title(title, loc="left", color=TEXT_COLOR, fontsize=12, weight="bold")
    axes.set_xlabel(x, color=MUTED, fontsize=11)
    axes.set_ylabel(y, color=MUTED, fontsize=11)
    if grid:
        axes.grid(axis=grid, color=GRID_COLOR, linewidth=0.8)  # type: ignore[arg-type]
        axes.set_axisbelow(True)


def legend(place: Figure | Axes, marks: Sequence[Artist], names: Sequence[str], **options: Any) -> None:
    """A legend; in a figure, above all its axes. ``options``: as matplotlib takes them, such as ``ncols``."""
    if isinstance(place, Figure):
        options = {"loc": "outside upper left", "ncols": min(len(names), 4)} | options
    # Names of one's own choice come after: a legend leaves out those that begin with "_".
    made = place.legend(list(marks), [str(n) for n in range(len(names))], frameon=False, fontsize=11, **options)
    for text, name in zip(made.get_texts(), names, strict=True):
        text.set(text=name, color=TEXT_COLOR)


def log_axis(axis: Axis) -> None:
    """A logarithmic axis with plain numbers at powers of 10, and between them where there are few."""
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")  # type: ignore[attr-defined]
    low, high = axis.get_view_interval()
    decades = np.log10(high / low) if low > 0 else math.inf
    between = (1.0, 2.0, 5.0) if decades < 1 else (1.0, 3.0) if decades < 2 else (1.0,)
    axis.set_major_locator(LogLocator(subs=between, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axis.set_minor_formatter(NullFormatter())


def format_number(value: float) -> str:
    """A number of an axis, in few characters: 0.001, 20, 3k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"


def heatmap(
    axes: Axes, values: np.ndarray, texts: Sequence[Sequence[str]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Cells toned by ``values`` [rows, columns], NaN for none, ``texts`` in them, on styled axes; first row on top."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    for (row, column), value in np.ndenumerate(values):
        tone = (
            int(min((value - low) / ((high - low) or 1.0) * len(HEATMAP_COLORS), len(HEATMAP_COLORS) - 1))
            if value == value
            else -1
        )
        ink = MUTED if tone < 0 else _ON_TONES[tone > 3]
        axes.add_patch(
            Rectangle(
                (column - 0.5, row - 0.5), 1, 1, facecolor=PANEL if tone < 0 else HEATMAP_COLORS[tone], edgecolor=PAGE
            )
        )
        axes.text(column, row, texts[row][column], ha="center", va="center_baseline", color=ink, fontsize=11)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def to_svg(figure: Figure) -> str:
    """The figure as an element of an HTML page that has ``THEME``: ids of its own, its title as its label."""
    return _text(_drawn(figure))


def to_standalone_svg(figure: Figure) -> str:
    """The figure as an SVG file, such as Markdown refers to; as an image it follows the reader's preference too."""
    root = _drawn(figure)
    root.set("xmlns", _SVG)
    theme = ElementTree.Element("style")
    theme.text = THEME
    root.insert(0, theme)
    return _text(root) + "\n"


def _drawn(figure: Figure) -> ElementTree.Element:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name with "$" is no formula
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "a2gen", "path.simplify": True}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # drawn again, it would be laid out a little otherwise
    source = ElementTree.fromstring(drawn.getvalue())
    root = ElementTree.Element("svg", {"class": "chart", "role": "img", "aria-label": str(figure.get_label())})
    width, height = (f"{72 * inches:.0f}" for inches in figure.get_size_inches())
    root.attrib |= {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    # In matplotlib's file they are rules for all elements, which on a page would be the whole page's.
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt", "font-family": _FONT}
    root.extend(child for child in source if not child.tag.endswith("metadata"))
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith("}style")]:
            parent.remove(child)
    _own(root)
    return root


def _own(root: ElementTree.Element) -> None:
    """Themed colours, plain tags, and ids that no other figure of the page has."""
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', ElementTree.tostring(root, encoding="unicode")))
    prefix = "c" + hashlib.sha256(ElementTree.tostring(root)).hexdigest()[:8] + "-"
    colours = re.compile("|".join(_STAND_INS))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            if name == "id" and value not in used:
                continue
            name = "href" if name == f"{_XLINK}href" else name
            if name == "id":
                value = prefix + value
            elif name == "style":
                value = colours.sub(lambda found: f"var(--{_STAND_INS[found[0]]})", value)
                value = re.sub(r"(font(?:-family)?:[^;']*)'[^;]*", rf"\1{_FONT}", value)
            if name != "id" and name != "aria-label":
                value = re.sub(r"(^|url\()#", rf"\1#{prefix}", value)
            element.set(name, value)


def _text(root: ElementTree.Element) -> str:
    return ElementTree.tostring(root, encoding="unicode")
