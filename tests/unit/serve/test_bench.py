"""`luban bench serve`: plans against arithmetic, percentiles against numpy, a real server and one that misbehaves."""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from luban.cli.main import main
from luban.core.errors import DataError, UsageError
from luban.report.serving import serving_page
from luban.serve.bench.client import Server, Timed
from luban.serve.bench.measure import percentiles, send, summary, table
from luban.serve.bench.workload import Lengths, Planned, plan, text_of


def test_lengths_have_the_distributions_that_they_name():
    rng = random.Random(3)
    assert {Lengths.parse("64").draw(rng) for _ in range(9)} == {64}
    drawn = [Lengths.parse("uniform:3:5").draw(rng) for _ in range(3000)]
    assert set(drawn) == {3, 4, 5} and abs(sum(drawn) / 3000 - 4) < 0.1
    logs = [math.log(Lengths.parse("lognormal:100:0.5").draw(rng)) for _ in range(3000)]
    assert abs(np.mean(logs) - math.log(100)) < 0.05 and abs(np.std(logs) - 0.5) < 0.05
    for wrong in ("0", "x", "uniform:5:3", "uniform:5", "normal:3:4", "lognormal:3:-1", ""):
        with pytest.raises(UsageError, match="no distribution of lengths"):
            Lengths.parse(wrong)


def test_a_plan_is_a_poisson_process_of_the_lengths_and_repeats():
    fixed = Lengths.parse("30")
    planned = list(plan(2000, 4.0, fixed, Lengths.parse("7"), tokens_a_word=3.0, shared_tokens=12, seed=5))
    gaps = np.diff([each.at for each in planned])
    assert planned[0].at == 0 and abs(gaps.mean() - 0.25) < 0.03 and abs(gaps.std() - 0.25) < 0.03
    assert {len(each.prompt.split()) for each in planned} == {4 + 10} and {each.max_tokens for each in planned} == {7}
    assert len({" ".join(each.prompt.split()[:4]) for each in planned}) == 1
    assert planned == list(plan(2000, 4.0, fixed, Lengths.parse("7"), tokens_a_word=3.0, shared_tokens=12, seed=5))
    assert {each.at for each in plan(9, math.inf, fixed, fixed, tokens_a_word=1.0)} == {0.0}


def test_percentiles_are_the_nearest_ranks():
    values = [random.random() for _ in range(random.randrange(1, 300))]
    want = np.percentile(values, (50, 95, 99), method="inverted_cdf") * 1000
    assert list(percentiles(values).values()) == pytest.approx(want.tolist())
    assert all(map(math.isnan, percentiles([]).values()))


def test_a_row_is_arithmetic():
    timed = [
        Timed(10.0, [10.5, 10.6, 10.8], 10.9, prompt_tokens=5, output_tokens=3),
        Timed(11.0, [12.0], 12.0, prompt_tokens=7, output_tokens=1),
        Timed(11.0, [], 11.5, error="status 429"),
    ]
    row = summary(2.0, timed)
    assert row.requests == 2 and row.failed == 1 and row.seconds == pytest.approx(2.0)
    assert row.output_tokens_per_s == pytest.approx(2.0) and row.prompt_tokens_per_s == pytest.approx(6.0)
    assert row.first_token == pytest.approx({50: 500, 95: 1000, 99: 1000})
    assert row.between_tokens == pytest.approx({50: 100, 95: 200, 99: 200}) and row.served_rate == pytest.approx(1.0)
    head, line = table([row]).splitlines()
    assert len(head) == len(line) and "500.0" in line and "1,000.0" in line
    page = serving_page("a <b>", [row, summary(math.inf, timed)], "on <this>")
    assert "a &lt;b&gt;" in page and page.count("<svg") == 2 and "http" not in page.replace("http://www.w3.org", "")


@contextmanager
def fake(lines: list[bytes], status: int = 200) -> Iterator[str]:
    """A server that answers every POST with these lines."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, [json.dumps({"data": [{"id": "m"}]}).encode()])

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(status, lines)

        def answer(self, status, lines):
            self.send_response(status)
            self.end_headers()
            for line in lines:
                self.wfile.write(line + b"\n")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("lines", "status", "words"),
    [
        ([b"busy"], 429, "status 429: busy"),
        ([b'data: {"choices": [{"text": "a"}]}'], 200, "broke off"),
        ([b'data: {"error": {"message": "no"}}'], 200, "no"),
    ],
)
def test_what_goes_wrong_is_counted_and_said(lines, status, words):
    with fake(lines, status) as url:
        server = Server(url)
        timed = send(server, [Planned(0.0, "a b", 3)] * 3, concurrency=2)
        assert len(timed) == 3 and all(words in each.error for each in timed)
        with pytest.raises(DataError, match="doesn't answer"):
            server.tokens_a_word("a b")


def test_an_address_where_nothing_is_says_so():
    with fake([]) as url:
        pass
    with pytest.raises(DataError, match="nothing answers"):
        Server(url)
    with pytest.raises(UsageError, match="no address"):
        Server("ftp://x")


def test_a_model_of_this_machine_is_served_and_measured(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--rates", "50", "inf", "--requests", "6", "--prompt-tokens", "uniform:20:40", "--answer-tokens", "5"]
    files = ["--out", tmp_path / "page.html", "--json", tmp_path / "rows.json"]
    assert main(["bench", "serve", str(tiny_checkpoint), *words, *map(str, files)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "all at once" in printed[2]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["rate"] for row in rows] == [50, "inf"] and all(row["requests"] == 6 for row in rows)
    for row in rows:
        assert row["output_tokens_per_s"] * row["seconds"] == pytest.approx(30)
        assert 6 * 15 < row["prompt_tokens_per_s"] * row["seconds"] < 6 * 50
        assert row["first_token"]["50"] <= row["first_token"]["99"] <= row["whole"]["99"]
    assert "Serving" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes a MODEL"),
        (["m", "--url", "http://x"], "takes a MODEL"),
        (["m", "--rates", "0"], "--rates"),
        (["m", "--requests", "0"], "--requests"),
        (["--url", "http://127.0.0.1:9", "--prompt-tokens", "x"], "no distribution"),
    ],
)
def test_command_lines_that_cannot_be_are_one_line(words, message, capsys):
    assert main(["bench", "serve", *words]) == 2
    assert message in capsys.readouterr().err


def test_texts_are_words():
    assert len(text_of(random.Random(1), 30).split()) == 30
