"""Common style of charts: matplotlib figures as SVG for light and dark pages.

Figures are drawn in placeholder colors. In the SVG each placeholder becomes a CSS variable of ``THEME``, which a page
sets for its background. Text stays text. Call ``new_figure``, then ``style_axes`` for each of its axes, then ``to_svg``
or ``to_standalone_svg``.
"""

import copy
import io
import math
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary
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

from a2gen_rec.reporting.formatting import format_axis_value
from a2gen_rec.utils.digest import hex_digest

# Placeholders are nearly black; black itself is the default and absent from the SVG.
PAGE, TEXT_COLOR, MUTED, GRID_COLOR, PANEL = (f"#01010{n}" for n in range(1, 6))
SERIES = tuple(f"#01020{n}" for n in range(1, 9))
"""Colors of lines and markers: distinguishable with color blindness, contrast of at least 3:1 on both pages."""
HEATMAP_COLORS = tuple(f"#01030{n}" for n in range(1, 7))
"""From low to high values."""
_HEATMAP_TEXT_COLORS = ("#010401", "#010402")  # text on the first four heat map colors, and on the others
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
_PLACEHOLDERS = dict(
    zip(
        [PAGE, TEXT_COLOR, MUTED, GRID_COLOR, PANEL, *SERIES, *HEATMAP_COLORS, *_HEATMAP_TEXT_COLORS],
        _NAMES,
        strict=True,
    )
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


def _variables(colors: str) -> str:
    return " ".join(f"--{name}: {color};" for name, color in zip(_NAMES, colors.split(), strict=True))


THEME = f"""\
:root {{ {_variables(_LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}
"""
"""CSS that sets the variables for light pages, and for dark pages if the reader prefers them."""


def new_figure(title: str, width: float = 8.0, height: float = 3.0) -> Figure:
    """Return an empty figure with automatic layout and without background; one inch is 72 pixels of the page.

    Args:
        title: Description for screen readers; the page shows it above the figure.
        width: Width in inches.
        height: Height in inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    figure.set_label(title)
    return figure


def new_panels(
    title: str, count: int, max_columns: int, width: float, panel_height: float, margin: float
) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` small multiples in rows of at most ``max_columns``, and their axes.

    Args:
        title: Description for screen readers; the page shows it above the figure.
        count: Number of panels.
        max_columns: Panels per row.
        width: Width of a full row in inches.
        panel_height: Height of a row in inches.
        margin: Height of the legend and axis labels in inches.
    """
    num_columns, num_rows = min(count, max_columns), math.ceil(count / max_columns)
    figure = new_figure(title, width * max(num_columns, 2) / max_columns, margin + panel_height * num_rows)
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def style_axes(axes: Axes, title: str = "", x: str = "", y: str = "", grid: str = "") -> None:
    """Set the style, title, labels (with units) and grid lines (``x``, ``y`` or ``both``) of axes."""
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


def legend(parent: Figure | Axes, marks: Sequence[Artist], names: Sequence[str], **options: Any) -> None:
    """Add a legend, in a figure above all axes. ``options`` are matplotlib's, such as ``ncols``."""
    if isinstance(parent, Figure):
        options = {"loc": "outside upper left", "ncols": min(len(names), 4)} | options
    # Names are set afterwards, because matplotlib skips names that start with "_".
    drawn = parent.legend(
        list(marks), [str(index) for index in range(len(names))], frameon=False, fontsize=11, **options
    )
    for text, name in zip(drawn.get_texts(), names, strict=True):
        text.set(text=name, color=TEXT_COLOR)


def log_axis(axis: Axis) -> None:
    """Make an axis logarithmic, with plain numbers at powers of 10 and, if these are few, between them."""
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")  # type: ignore[attr-defined]
    low, high = axis.get_view_interval()
    decades = np.log10(high / low) if low > 0 else math.inf
    multiples = (1.0, 2.0, 5.0) if decades < 1 else (1.0, 3.0) if decades < 2 else (1.0,)
    axis.set_major_locator(LogLocator(subs=multiples, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_axis_value(value)))
    axis.set_minor_formatter(NullFormatter())


def heatmap(
    axes: Axes, values: np.ndarray, texts: Sequence[Sequence[str]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Draw cells colored by ``values`` [rows, columns] with ``texts``, first row on top, on styled axes.

    NaN cells have no color.
    """
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    for (row, column), value in np.ndenumerate(values):
        color_index = (
            int(min((value - low) / ((high - low) or 1.0) * len(HEATMAP_COLORS), len(HEATMAP_COLORS) - 1))
            if value == value
            else -1
        )
        text_color = MUTED if color_index < 0 else _HEATMAP_TEXT_COLORS[color_index > 3]
        axes.add_patch(
            Rectangle(
                (column - 0.5, row - 0.5),
                1,
                1,
                facecolor=PANEL if color_index < 0 else HEATMAP_COLORS[color_index],
                edgecolor=PAGE,
            )
        )
        axes.text(column, row, texts[row][column], ha="center", va="center_baseline", color=text_color, fontsize=11)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def to_svg(figure: Figure) -> str:
    """Return the figure as an element of an HTML page with ``THEME``: unique ids, and the title as its label."""
    return _serialize(_render(figure))


def to_standalone_svg(figure: Figure) -> str:
    """Return the figure as an SVG file for Markdown; it follows the reader's light or dark preference too."""
    root = _render(figure)
    root.set("xmlns", _SVG)
    theme = ElementTree.Element("style")
    theme.text = THEME
    root.insert(0, theme)
    return _serialize(root) + "\n"


def _render(figure: Figure) -> ElementTree.Element:
    """Return the drawing of a figure. It is drawn once, although a report has it in the page and as a file."""
    if figure not in _drawings:
        _drawings[figure] = _draw(figure)
    return copy.deepcopy(_drawings[figure])


_drawings: WeakKeyDictionary[Figure, ElementTree.Element] = WeakKeyDictionary()


def _draw(figure: Figure) -> ElementTree.Element:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name with "$" is not a formula
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "a2gen", "path.simplify": True}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    source = ElementTree.fromstring(stream.getvalue())
    root = ElementTree.Element("svg", {"class": "chart", "role": "img", "aria-label": str(figure.get_label())})
    width, height = (f"{72 * inches:.0f}" for inches in figure.get_size_inches())
    root.attrib |= {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    # matplotlib writes them as style rules, which on a page would apply to all its elements.
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt", "font-family": _FONT}
    root.extend(child for child in source if not child.tag.endswith("metadata"))
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith("}style")]:
            parent.remove(child)
    _isolate(root)
    return root


def _isolate(root: ElementTree.Element) -> None:
    """Replace placeholder colors by variables, strip tag namespaces, and make ids unique within the page."""
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', ElementTree.tostring(root, encoding="unicode")))
    prefix = "c" + hex_digest(ElementTree.tostring(root), 8) + "-"
    placeholders = re.compile("|".join(_PLACEHOLDERS))
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
                value = placeholders.sub(lambda match: f"var(--{_PLACEHOLDERS[match[0]]})", value)
                value = re.sub(r"(font(?:-family)?:[^;']*)'[^;]*", rf"\1{_FONT}", value)
            if name != "id" and name != "aria-label":
                value = re.sub(r"(^|url\()#", rf"\1#{prefix}", value)
            element.set(name, value)


def _serialize(root: ElementTree.Element) -> str:
    return ElementTree.tostring(root, encoding="unicode")
