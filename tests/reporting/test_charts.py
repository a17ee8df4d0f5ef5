"""SVG output of charts."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from a2gen_rec.reporting import charts


def example_figure(title: str = "A & B", shift: float = 0.0) -> Figure:
    figure = charts.new_figure(title, 6, 2)
    first, second = figure.subplots(1, 2)
    lines = [
        *first.plot([1, 2, 3], [1, 3 + shift, 2], color=charts.SERIES[0], marker="o"),
        *first.plot([1, 2], [2, 2], color=charts.SERIES[7]),
    ]
    charts.style_axes(first, "costs $ & <b>", "epochs", "AUC", grid="both")
    charts.legend(figure, lines, ["_hidden $x$", "b"])
    charts.style_axes(second)
    charts.heatmap(second, np.array([[0.0, np.nan], [1.0, 0.2]]), [["0", "–"], ["1", "x"]], ["r", "s"], ["t", "u"])
    return figure


def test_text_stays_text_and_names_are_not_parsed() -> None:
    text = [element.text for element in ElementTree.fromstring(charts.to_svg(example_figure())).iter("text")]
    assert {"_hidden $x$", "b", "costs $ & <b>", "epochs", "AUC", "–", "r", "u"} <= set(text)


def test_all_colors_are_theme_variables() -> None:
    for svg in (charts.to_svg(example_figure()), charts.to_standalone_svg(example_figure())):
        _, _, body = svg.rpartition("</style>")
        assert not re.search(r"#[0-9a-f]{6}\b", body)
        used = set(re.findall(r"var\(--(\w+)\)", body))
        assert {"s0", "s7", "ink", "muted", "rule", "q0", "q5", "panel", "early", "late"} <= used
        assert used <= set(re.findall(r"--(\w+):", charts.THEME))
    light, dark = (re.findall(r"--(\w+):", part) for part in charts.THEME.split("@media"))
    assert light == dark


def test_inline_figure_is_self_contained_and_labeled() -> None:
    svg = charts.to_svg(example_figure())
    assert "http" not in svg
    assert "<?xml" not in svg
    assert "<style" not in svg
    root = ElementTree.fromstring(svg)
    assert (root.tag, root.get("role"), root.get("aria-label")) == ("svg", "img", "A & B")
    assert root.get("viewBox") == "0 0 432 144"


def test_figures_of_a_page_have_unique_ids() -> None:
    figures = [
        charts.to_svg(example_figure()),
        charts.to_svg(example_figure("other")),
        charts.to_svg(example_figure(shift=1.0)),
    ]
    ids = [re.findall(r'id="([^"]+)"', svg) for svg in figures]
    assert all(ids)
    assert len({value for figure_ids in ids for value in figure_ids}) == sum(map(len, ids))
    for svg, figure_ids in zip(figures, ids, strict=True):
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', svg)) == set(figure_ids)


def test_output_is_deterministic() -> None:
    assert charts.to_standalone_svg(example_figure()) == charts.to_standalone_svg(example_figure())
    figure = example_figure()
    assert charts.to_svg(figure) == charts.to_svg(figure)
    assert charts.to_standalone_svg(figure).startswith("<svg ")
    ElementTree.fromstring(charts.to_standalone_svg(figure))


@pytest.mark.parametrize(("low", "high", "labels"), [(0.5, 4000, ["1", "10", "100", "1k"]), (20, 90, ["20", "50"])])
def test_log_axis_has_plain_numbers(low: float, high: float, labels: list[str]) -> None:
    figure = charts.new_figure("t")
    axes = figure.subplots()
    axes.set_xlim(low, high)
    charts.style_axes(axes)
    charts.log_axis(axes.xaxis)
    text = [element.text for element in ElementTree.fromstring(charts.to_svg(figure)).iter("text")]
    assert [label for label in text if label in labels] == labels
    assert not any("$" in (label or "") for label in text)


def luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_series_have_contrast_on_both_pages() -> None:
    """WCAG requires 3:1 for graphics and 4.5:1 for text."""
    for part in charts.THEME.split("@media"):
        colors = dict(re.findall(r"--(\w+): (#\w{6});", part))
        page = luminance(colors["page"])

        def contrast(name: str, colors: dict[str, str] = colors, page: float = page) -> float:
            other = luminance(colors[name])
            return (max(page, other) + 0.05) / (min(page, other) + 0.05)

        assert min(contrast(f"s{index}") for index in range(8)) >= 3
        assert min(contrast("ink"), contrast("muted")) >= 4.5
