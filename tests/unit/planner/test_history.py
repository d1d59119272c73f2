"""Training compute since 1950: the shipped table, doubling times, the picture, bad files."""

from __future__ import annotations

import json
import random
import xml.etree.ElementTree as ElementTree
from datetime import date, timedelta
from itertools import pairwise

import pytest

from luban.cli.main import main
from luban.core.errors import ConfigError, DataError
from luban.planner.accounting.history import TrainedSystem, read_history, trends


def _grown(rng, months, count=60, noise=0.0, since=date(2000, 1, 1)):
    systems = []
    for _ in range(count):
        when = since + timedelta(days=rng.randrange(3650))
        years = (when - since).days / 365.25
        systems.append(TrainedSystem("x", when, 1e15 * 2 ** (12 * years / months + rng.gauss(0, noise))))
    return systems


def test_the_shipped_table_ascends_and_names_its_sources():
    systems = read_history()
    assert len(systems) >= 36 and systems[0].date.year == 1950 and systems[-1].date.year >= 2025
    assert all(a.flops <= b.flops for a, b in pairwise(systems))
    assert all(s.source.startswith("http") and s.name for s in systems)
    gpt3 = next(s for s in systems if s.name.startswith("GPT-3"))
    assert gpt3.flops == pytest.approx(6 * 175e9 * 300e9, rel=0.13)  # a tenth of a decade
    before, _, since = trends(systems)
    assert 12 < before.doubling_months < 27  # Sevilla et al. 2022: 21.3 over all systems
    assert 4 < since.doubling_months < 10


def test_a_known_doubling_time_is_found():
    rng = random.Random(3)
    for months in (3.4, 6.0, 24.0):
        (trend,) = trends(_grown(rng, months), ())
        assert trend.doubling_months == pytest.approx(months, rel=2e-3)  # leap years
    (trend,) = trends(_grown(rng, 6.0, noise=1.0), ())
    assert trend.doubling_interval[0] < 6.0 < trend.doubling_interval[1]


def test_intervals_cover():
    rng, inside = random.Random(5), 0
    for seed in range(100):
        (trend,) = trends(_grown(rng, 12.0, count=30, noise=2.0), (), resamples=200, seed=seed)
        inside += trend.doubling_interval[0] <= 12.0 <= trend.doubling_interval[1]
    assert inside >= 86  # of 100 at 95%: fewer has a chance below 1 in 2,000


def test_eras_are_fitted_apart_and_small_ones_left_out():
    rng = random.Random(9)
    systems = _grown(rng, 24.0) + _grown(rng, 6.0, since=date(2011, 1, 1))[:2]
    assert [t.systems for t in trends(systems, (2011.0,))] == [60]
    with pytest.raises(DataError, match="at least 3 systems"):
        trends(systems[:2], ())
    with pytest.raises(ConfigError, match="ascending"):
        trends(systems, (2016.0, 2010.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("when,what\n", "needs the columns"),
        ("date,system,flop\n2020-13-01,a,1e9\n", "line 2"),
        ("date,system,flop\n2020-01-01,a,many\n", "line 2"),
        ("date,system,flop\n2020-01-01,a,-3\n", "above 0"),
        ("date,system,log10_flop\n2020-01-01,a,999\n", "line 2"),
    ],
)
def test_bad_files_are_refused_with_their_line(text, message, tmp_path, capsys):
    path = tmp_path / "own.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_history(path)
    assert main(["account", "--history", "--data", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_command_line_and_picture(tmp_path, capsys):
    picture = tmp_path / "c.svg"
    assert main(["account", "--history", "--picture", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["trends"]) == 3 and found["systems"][0]["system"] == "Theseus"
    root = ElementTree.fromstring(picture.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(".//{*}circle")) == len(found["systems"])
    assert main(["account", "--history"]) == 0
    assert "1950 to 2007: doubles every" in capsys.readouterr().out
