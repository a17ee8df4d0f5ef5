"""Charts by what their SVG says."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from a2gen_rec.reporting import charts


def drawn(title: str = "A & B", shift: float = 0.0) -> Figure:
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


def test_text_stays_text_and_names_are_taken_as_they_are() -> None:
    text = [each.text for each in ElementTree.fromstring(charts.to_svg(drawn())).iter("text")]
    assert {"_hidden $x$", "b", "costs $ & <b>", "epochs", "AUC", "–", "r", "u"} <= set(text)


def test_no_colour_is_left_that_a_page_does_not_set() -> None:
    for made in (charts.to_svg(drawn()), charts.to_standalone_svg(drawn())):
        _, _, body = made.rpartition("</style>")
        assert not re.search(r"#[0-9a-f]{6}\b", body)
        used = set(re.findall(r"var\(--(\w+)\)", body))
        assert {"s0", "s7", "ink", "muted", "rule", "q0", "q5", "panel", "early", "late"} <= used
        assert used <= set(re.findall(r"--(\w+):", charts.THEME))
    light, dark = (re.findall(r"--(\w+):", part) for part in charts.THEME.split("@media"))
    assert light == dark


def test_an_inline_figure_needs_nothing_and_is_labelled() -> None:
    made = charts.to_svg(drawn())
    assert "http" not in made
    assert "<?xml" not in made
    assert "<style" not in made
    root = ElementTree.fromstring(made)
    assert (root.tag, root.get("role"), root.get("aria-label")) == ("svg", "img", "A & B")
    assert root.get("viewBox") == "0 0 432 144"


def test_figures_of_a_page_share_no_ids_and_refer_to_their_own() -> None:
    figures = [charts.to_svg(drawn()), charts.to_svg(drawn("other")), charts.to_svg(drawn(shift=1.0))]
    ids = [re.findall(r'id="([^"]+)"', made) for made in figures]
    assert all(ids)
    assert len({each for of in ids for each in of}) == sum(len(of) for of in ids)
    for made, own in zip(figures, ids, strict=True):
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', made)) == set(own)


def test_the_same_figure_is_the_same_file() -> None:
    assert charts.to_standalone_svg(drawn()) == charts.to_standalone_svg(drawn())
    figure = drawn()
    assert charts.to_svg(figure) == charts.to_svg(figure)
    assert charts.to_standalone_svg(figure).startswith("<svg ")
    ElementTree.fromstring(charts.to_standalone_svg(figure))


@pytest.mark.parametrize(("low", "high", "labels"), [(0.5, 4000, ["1", "10", "100", "1k"]), (20, 90, ["20", "50"])])
def test_a_log_axis_has_plain_numbers(low: float, high: float, labels: list[str]) -> None:
    figure = charts.new_figure("t")
    axes = figure.subplots()
    axes.set_xlim(low, high)
    charts.style_axes(axes)
    charts.log_axis(axes.xaxis)
    text = [each.text for each in ElementTree.fromstring(charts.to_svg(figure)).iter("text")]
    assert [each for each in text if each in labels] == labels
    assert not any("$" in (each or "") for each in text)


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_series_stand_out_from_either_page() -> None:
    """WCAG: 3 : 1 for graphics, 4.5 : 1 for text."""
    for part in charts.THEME.split("@media"):
        colours = dict(re.findall(r"--(\w+): (#\w{6});", part))
        page = luminance(colours["page"])

        def contrast(name: str, colours: dict[str, str] = colours, page: float = page) -> float:
            other = luminance(colours[name])
            return (max(page, other) + 0.05) / (min(page, other) + 0.05)

        assert min(contrast(f"s{place}") for place in range(8)) >= 3
        assert min(contrast("ink"), contrast("muted")) >= 4.5
