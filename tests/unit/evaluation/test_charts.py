"""What the SVG charts draw: every value, gaps as gaps, and labels that stay apart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_megatron.evaluation.charts import MAX_BARS, MAX_TARGETS, format_value, line_chart, stacked_bars, text_width


def parse(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert not re.search(r"\b(nan|inf)\b", svg)
    return root


def circles(root: ElementTree.Element) -> list[ElementTree.Element]:
    return root.findall(".//circle")


def boxes(root: ElementTree.Element) -> Iterator[tuple[float, float, float, float]]:
    """(left, right, top, bottom) of every text, with the width the layout keeps free for it."""
    for text in root.findall(".//text"):
        x, y, label = float(text.get("x", "")), float(text.get("y", "")), text.text or ""
        size = float(text.get("font-size", "12"))
        width = text_width(label) * size / 12
        left = {"start": x, "middle": x - width / 2, "end": x - width}[text.get("text-anchor", "start")]
        yield left, left + width, y - 0.75 * size, y + 0.2 * size


def assert_labels_stay_apart(root: ElementTree.Element) -> None:
    _, _, width, height = (float(v) for v in root.get("viewBox", "").split())
    placed = list(boxes(root))
    for index, (left, right, top, bottom) in enumerate(placed):
        assert left >= -0.5 and right <= width + 0.5 and top >= 0 and bottom <= height
        for other in placed[:index]:
            assert right <= other[0] or left >= other[1] or bottom <= other[2] or top >= other[3]


def test_every_point_of_every_series_is_a_titled_circle() -> None:
    root = parse(line_chart({"a": [(1, 0.5), (2, 0.25)], "b": [(1, 3.0), (2, 4.0), (3, 5.0)]}, "Loss", "nats"))
    titles = [circle.findtext("title") for circle in circles(root)]
    assert sorted(map(str, titles)) == [
        "a, step 1: 0.5",
        "a, step 2: 0.25",
        "b, step 1: 3",
        "b, step 2: 4",
        "b, step 3: 5",
    ]


def test_heights_on_the_page_are_proportional_to_the_values() -> None:
    one, two, four = (
        float(c.get("cy", "")) for c in circles(parse(line_chart({"a": [(0, 1.0), (1, 2.0), (2, 4.0)]}, "", "")))
    )
    assert one > two > four
    assert (two - four) / (one - two) == pytest.approx(2, abs=0.02)
    one, two, four = (
        float(c.get("cy", ""))
        for c in circles(parse(line_chart({"a": [(0, 1.0), (1, 2.0), (2, 4.0)]}, "", "", log=True)))
    )
    assert (two - four) / (one - two) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_a_gap_breaks_the_line_and_a_lonely_point_stays_visible(gap: float | None) -> None:
    points = [(1, 1.0), (2, 2.0), (3, gap), (4, 3.0), (5, gap), (6, 1.0), (7, 1.0)]
    root = parse(line_chart({"a": points}, "Loss", ""))
    (path,) = [p.get("d", "") for p in root.findall(".//path[@fill='none']")]
    assert re.sub(r"[^ML]", "", path) == "MLMML"
    assert len(circles(root)) == 5


def test_a_lonely_point_of_a_long_series_is_a_visible_dot() -> None:
    points: list[tuple[float, float | None]] = [(x, None if x in (149, 151) else 1.0 + x) for x in range(300)]
    dots = [c for c in circles(parse(line_chart({"a": points}, "Loss", ""))) if c.get("class") == "dot"]
    assert [dot.findtext("title") for dot in dots] == ["a, step 150: 151"]


def test_values_that_have_no_logarithm_are_gaps() -> None:
    assert len(circles(parse(line_chart({"a": [(1, 0.0), (2, -1.0), (3, 0.1), (4, 1.0)]}, "Gap", "", log=True)))) == 2


def test_a_long_series_is_drawn_whole_with_fewer_places_to_hover() -> None:
    root = parse(line_chart({"a": [(x, math.sin(x)) for x in range(5000)]}, "Loss", ""))
    (path,) = [p.get("d", "") for p in root.findall(".//path[@fill='none']")]
    assert path.count("L") == 4999
    assert MAX_TARGETS / 2 <= len(circles(root)) <= MAX_TARGETS + 1
    assert circles(root)[-1].findtext("title", "").startswith("a, step 4,999")


@given(st.lists(st.floats(), max_size=5), st.booleans())
def test_no_float_breaks_a_chart(values: list[float], log: bool) -> None:
    parse(line_chart({"a": list(enumerate(values))}, "Loss", "", log))
    parse(stacked_bars({"a": list(enumerate(map(abs, values)))}, "Time", ""))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("points", [[(7, 3.0)], [(7, 1e-9)], [(1, 2.0), (2, 2.0)], [(1, 1.0), (2, 1.0 + 1e-13)]])
def test_one_point_and_a_constant_lie_inside_the_plot(points: list[tuple[float, float]], log: bool) -> None:
    root = parse(line_chart({"a": points}, "Loss", "nats", log=log))
    assert len(circles(root)) == len(points)
    assert all(40 <= float(c.get("cy", "")) <= 210 and 0 < float(c.get("cx", "")) < 400 for c in circles(root))
    assert_labels_stay_apart(root)


def test_a_constant_zero_is_drawn() -> None:
    assert len(circles(parse(line_chart({"a": [(1, 0.0), (2, 0.0)]}, "Loss", "")))) == 2


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, None)]}])
def test_a_chart_without_values_says_so(series: dict[str, list[tuple[float, float | None]]]) -> None:
    for svg in (line_chart(series, "Loss", "nats"), stacked_bars(series, "Time", "s")):
        assert "no values" in [text.text for text in parse(svg).findall(".//text")]


def test_an_empty_series_beside_a_full_one_costs_nothing() -> None:
    assert len(circles(parse(line_chart({"a": [], "b": [(1, 1.0)]}, "Loss", "")))) == 1


def test_a_level_is_drawn_and_widens_the_axis() -> None:
    root = parse(line_chart({"a": [(1, 0.1), (2, 0.2)]}, "FVE", "", references={"gold": 0.9}))
    (level,) = [group for group in root.findall(".//g") if group.findtext("title") == "gold: 0.9"]
    match = re.match(r"M[\d.]+ ([\d.]+)H", level.find("path").get("d", ""))  # type: ignore[union-attr]
    assert match and 40 <= float(match[1]) < min(float(c.get("cy", "")) for c in circles(root))


def test_the_chart_has_an_accessible_name_and_a_description() -> None:
    root = parse(line_chart({"a": [(1, 0.5), (9, 0.25)]}, "Loss & more", "nats"))
    assert (root.get("role"), root.get("aria-label")) == ("img", "Loss & more")
    assert root.findtext("desc") == "a: 0.5 at 1, 0.25 at 9"


def test_names_are_escaped() -> None:
    name = '<script>"&'
    for svg in (
        line_chart({name: [(1, 1.0)], "b": [(1, 1.0)]}, name, name),
        stacked_bars({name: [(1, 1.0)]}, name, name),
    ):
        assert name not in svg
        assert name in [text.text for text in parse(svg).findall(".//text")]


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6)), min_size=1, max_size=8, unique_by=lambda p: p[0]),
    st.booleans(),
)
def test_labels_never_overlap_and_never_leave_the_drawing(points: list[tuple[int, float]], log: bool) -> None:
    series = {"held out": sorted(points), "rollouts of this step": [(points[0][0], 1.0)]}
    root = parse(line_chart(series, "Fraction", "share of rollouts", log, references={"GOLD TEXT": 0.4, "SFT": 0.3}))
    assert_labels_stay_apart(root)


@given(st.floats(1e-12, 1e12), st.floats(0, 1e3))
def test_tick_labels_differ_from_each_other_at_every_scale(low: float, ratio: float) -> None:
    for log in (False, True):
        svg = line_chart({"a": [(0, low), (1, low * (1 + ratio))]}, "", "", log)
        labels = re.findall(r'text-anchor="end">([^<]+)<', svg)
        assert len(labels) == len(set(labels)) >= 2


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.12345, "0.1235"), (1500, "1,500"), (-2.5, "−2.5"), (1e-5, "1e−5")]
)
def test_numbers_read_in_their_shortest_form(value: float, text: str) -> None:
    assert format_value(value) == text


def test_bars_stack_from_the_bottom_in_the_order_of_the_series() -> None:
    root = parse(stacked_bars({"low": [(1, 1.0), (2, 2.0)], "high": [(1, 3.0)]}, "Time", "seconds"))
    bars = {bar.findtext("title"): bar for bar in root.findall(".//rect")}
    assert set(bars) == {"low, step 1: 1", "low, step 2: 2", "high, step 1: 3", "high, step 2: 0"}
    low, high = bars["low, step 1: 1"], bars["high, step 1: 3"]
    top_of_high = float(high.get("y", "")) + float(high.get("height", ""))
    assert top_of_high == pytest.approx(float(low.get("y", "")), abs=0.2)
    assert float(high.get("height", "")) == pytest.approx(3 * float(low.get("height", "")), abs=0.3)
    assert_labels_stay_apart(root)


def test_many_bars_become_means_of_neighbours() -> None:
    root = parse(stacked_bars({"a": [(step, float(step)) for step in range(1, 401)]}, "Time", "seconds"))
    titles = [str(bar.findtext("title")) for bar in root.findall(".//rect")]
    assert len(titles) == math.ceil(400 / 7) <= MAX_BARS
    assert titles[0] == "a, step 1 to 7, mean: 4"
    assert_labels_stay_apart(root)


def test_bars_do_not_overlap_each_other_or_leave_the_drawing() -> None:
    for xs in ([5], [1, 2, 3], list(range(0, 900, 3)), [1, 2, 50]):
        bars = parse(stacked_bars({"a": [(x, 1.0) for x in xs]}, "Time", "s")).findall(".//rect")
        edges = [(float(b.get("x", "")), float(b.get("x", "")) + float(b.get("width", ""))) for b in bars]
        assert all(right <= left + 0.2 for (_, right), (left, _) in pairwise(edges))
        assert edges[0][0] >= 0 and edges[-1][1] <= 400
