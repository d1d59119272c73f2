"""`luban bench collectives --fit`: predictions beside measured times."""

import pytest

from luban.cli import bench_collectives
from luban.cli.bench_collectives import FITTED, _bytes, _prediction_lines, _predictions, _progress
from luban.core.errors import UsageError
from luban.parallel.bench import Row
from luban.planner.collective_times import Links

LINKS = Links(4, 12e-6, 1 / 250e9)
SIZES = [1 << n for n in range(20, 28)]


def rows(slower=None):
    """Times as `LINKS` gives them, but for one size of an all-reduce."""
    found = []
    for size in SIZES:
        for name in ("all_reduce", "all_gather"):
            seconds = LINKS.closed_form(name, size) * (1.4 if (name, size) == ("all_reduce", slower) else 1.0)
            counted = {"sent": 0, "formula": 0, "sent_by_all": 0, "formula_of_all": 0}
            timed = {"seconds": 1.0, "bus_bandwidth": 1.0, "peer_bus_bandwidth": 1.0, "peer_seconds": seconds}
            found.append(Row(collective=name, bytes=size, peer="nccl", **counted, **timed))
    return found


def test_constants_are_fitted_to_every_second_size_and_predict_the_others():
    found = _predictions(rows(), 4)
    assert found["alpha_seconds"] == pytest.approx(12e-6) and found["beta_seconds_a_byte"] == pytest.approx(4e-12)
    assert [p["bytes"] for p in found["predictions"] if p["fitted"]] == SIZES[::2]
    for prediction in found["predictions"]:
        for way in ("closed form", "fluid", "packets"):
            assert prediction[way] == pytest.approx(prediction["measured"], rel=0.05)
    lines = _prediction_lines(found)
    assert "alpha 12.00 µs a message, 1/beta 250 GB/s" in lines[1] and "all_reduce*" in lines[3]
    assert "within 15%" in lines[-1] and "NOT" not in lines[-1]
    assert lines[-2] == (
        "all-reduces: fitted to 1.05 MB, 4.19 MB, 16.8 MB, 67.1 MB; checked at 2.1 MB, 8.39 MB, 33.6 MB, 134 MB"
    )


def test_an_error_above_the_limit_is_said():
    last = _prediction_lines(_predictions(rows(slower=SIZES[5]), 4))[-1]
    assert "closed form 28.6%" in last and last.endswith("NOT within 15%")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fit", "--sizes", "1M", "2M"), "four sizes"),
        (("--fit", "--collectives", "all_gather"), "--fit needs all_reduce"),
        (("--fit", "--collectives", "all_reduce", "broadcast"), "predicts all_reduce"),
        (("--sizes", "none"), "--sizes takes bytes"),
    ],
)
def test_what_can_not_be_fitted_is_refused_before_anything_starts(words, said, monkeypatch):
    monkeypatch.setattr(bench_collectives, "launch", lambda *_: pytest.fail("started processes"))
    with pytest.raises(UsageError, match=said):
        bench_collectives.run(list(words))


def test_every_size_is_said_as_it_is_done(capsys):
    done = _progress(2)
    done(rows()[:2])
    done(rows()[2:4])
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("size 1 of 2, 1.05 MB: all_reduce ") and "all_gather" in said[0]
    assert said[1].startswith("size 2 of 2, 2.1 MB: ")
    assert max(map(_bytes, FITTED["cpu"])) <= 8 << 20  # a CPU's are done in seconds
