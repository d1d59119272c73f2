"""Curves that lie on each other are all seen."""

import re

from luban.report.chart import STROKES, Chart, Mark, Series, draw

POINTS = [(float(i), float(i * i)) for i in range(20)]


def test_curves_on_each_other_differ_in_width_and_gaps_from_the_widest_up():
    series = [Series("raw", POINTS, "a", faint=True), *(Series(tone, POINTS, tone) for tone in "abcd")]
    paths = re.findall(r'<path class="curve [^>]*', draw(Chart("four", "x", "y", series)))
    assert "stroke-width" not in paths[0]  # raw data stay thin and pale
    widths = [float(re.search(r"stroke-width:([\d.]+)", path)[1]) for path in paths[1:]]
    gaps = [(found := re.search(r"dasharray:([\d ]+)", path)) and found[1] for path in paths[1:]]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == len(STROKES) == 4
    assert gaps[0] is None and len(set(gaps)) == 4


def test_one_curve_alone_is_a_plain_line():
    assert "stroke-width" not in draw(Chart("one", "x", "y", [Series("a", POINTS)]))


def test_charts_of_different_sizes_on_one_page_do_not_share_a_frame():
    frames = {
        re.search(r'clipPath id="([^"]+)"', draw(Chart("one", "x", "y", [Series("a", POINTS)], height=h)))[1]
        for h in (170, 320)
    }
    assert len(frames) == 2


def test_panels_side_by_side_can_have_one_scale():
    low = draw(Chart("low", "x", "y", [Series("a", [(0, 0), (1, 1)])], zero=True, top=100.0))
    assert re.search(r"&quot;y&quot;: \[0.0, 106.0\]", low)


def test_a_mark_stands_at_its_place_and_what_is_there_does_not_stretch_the_axis():
    points = [(x, 1000.0 if x == 5 else y) for x, y in POINTS]
    drawn = draw(Chart("one", "x", "y", [Series("a", points)], marks=[Mark("spike <1>", 5), Mark("before", -1)]))
    ((name, x),) = re.findall(r'class="mark"><title>(.*?)</title><line x1="([\d.]+)"', drawn)
    left, right = map(float, re.search(r"&quot;plot&quot;: \[(\d+), (\d+)", drawn).groups())
    assert name == "spike &lt;1&gt;" and abs(float(x) - (left + 5 / 19 * (right - left))) < 0.06
    assert float(re.search(r"&quot;y&quot;: \[[-\d.]+, ([\d.]+)\]", drawn)[1]) < 1.1 * 361
