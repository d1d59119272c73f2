"""The report: honest axes, a right family tree, and a page that needs nothing but itself."""

import html
import itertools
import json
import math
import random
import re

import pytest

from luban.cli.main import main
from luban.core.artifact import ArtifactWriter, as_parent, read_manifest
from luban.core.errors import DataError
from luban.core.log import Metrics
from luban.report.chart import Chart, Level, Series, draw, label, smooth, ticks
from luban.report.gather import find_artifacts, run_section
from luban.report.lineage_graph import Family
from luban.report.page import write_report


def test_ticks_are_round_and_inside():
    for _ in range(200):
        low = random.uniform(-1e3, 1e3)
        high = low + 10 ** random.uniform(-4, 5)
        found = ticks(low, high)
        assert all(low - 1e-9 <= t <= high + 1e-9 for t in found) and 2 <= len(found) <= 7
        step = found[1] - found[0]
        assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_labels():
    assert [label(v) for v in (0, 1500000, 2000, 0.5, 0.0003)] == ["0", "1.5M", "2k", "0.5", "3e-04"]


def test_smoothing_of_a_constant_is_the_constant_and_its_average_does_not_depend_on_how_often_it_is_logged():
    assert all(abs(y - 3.0) < 1e-12 for _, y in smooth([(i, 3.0) for i in range(50)], 20))
    noisy = [(step, 5 / step**0.5 + random.gauss(0, 0.001)) for step in range(1, 2001)]
    every = dict(smooth(noisy, 100))
    for log_every in (5, 10, 25):
        rows = [(step, loss) for step, loss in noisy if step == 1 or step % log_every == 0]
        assert all(abs(mean - every[step]) < 0.02 for step, mean in smooth(rows, 100) if step > 300)


def test_smoothing_is_the_mean_by_weights_that_fall_with_the_distance():
    x = sorted(random.sample(range(1000), 30))
    points = [(float(at), random.random()) for at in x]
    steps = [1.0, *(b - a for a, b in itertools.pairwise(x))]
    weights = [(1 - math.exp(-step / 50)) * math.exp(-(x[-1] - at) / 50) for at, step in zip(x, steps, strict=True)]
    expected = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / sum(weights)
    assert smooth(points, 50)[-1][1] == pytest.approx(expected, rel=1e-9)


def test_points_land_where_the_axes_say():
    svg = draw(Chart("t", "x", "y", [Series("s", [(0, 0), (10, 1)])], zero=True))
    x0, y0, x1, y1 = map(float, re.search(r'class="curve a" d="M([\d.]+),([\d.]+)L([\d.]+),([\d.]+)"', svg).groups())
    tick = {float(text): float(y) - 4 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    assert abs(tick[0.0] - y0) < 0.2 and y1 < y0 and x1 > x0
    per_unit = (tick[0.0] - tick[1.0]) / 1.0
    assert abs((y0 - y1) - per_unit) < 0.3


def test_infinite_values_are_left_out_and_levels_shown():
    svg = draw(Chart("t", "x", "y", [Series("s", [(0, 1.0), (1, float("nan")), (2, 2.0)])], [Level("xz", 1.5)]))
    assert "nan" not in svg and "xz 1.5" in svg
    assert draw(Chart("t", "x", "y", [Series("s", [])])) == ""


def build(tmp_path):
    def make(name, kind, *parents, **figures):
        with ArtifactWriter(tmp_path / name, kind=kind, parents=parents, volatile=("metrics.jsonl",)) as art:
            (art.path / "x").write_text(name)
            if kind == "run":
                metrics = Metrics(art.path / "metrics.jsonl")
                for step in range(1, 30):
                    metrics.write(
                        step=step, loss=8 / step, tokens=step * 10, lr=0.1, grad_norm=1.0, tokens_per_second=5.0
                    )
                metrics.write(step=29, heldout_loss=3.0, bits_per_byte=1.5)
                metrics.close()
            if kind == "evaluation":
                (art.path / "samples.jsonl").write_text('{"question": "<b>q</b>?", "answer": "a", "reference": "a"}\n')
            art.note(**figures)
        return tmp_path / name

    corpus = make("corpus", "corpus", train={"documents": 3}, heldout={"documents": 2})
    tokenizer = make("tok", "tokenizer", as_parent("corpus", corpus), vocab_size=512)
    run = make("base", "run", as_parent("tokenizer", tokenizer), tokens=290, tokens_per_second=5.0)
    make("eval", "evaluation", as_parent("model", run), bits_per_byte=1.5, xz_bits_per_byte=1.7, gzip_bits_per_byte=2.1)


def test_the_page_is_whole_and_self_contained(tmp_path):
    build(tmp_path)
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)\s*=\s*"?(?:https?:)?//', page) and "@import" not in page
    for words in ("5 documents", "512 tokens", "1.500", "xz -9e 1.7", "✓ word for word", "&lt;b&gt;q&lt;/b&gt;?"):
        assert words in page, words
    assert "<b>q</b>?" not in page
    assert page.count('class="chart"') == 4


def lineage(folder, gzip, **figures):
    """A corpus, a run on it and an evaluation on it, in a folder of their own."""

    def make(name, kind, *parents, **figures):
        with ArtifactWriter(folder / name, kind=kind, parents=parents, volatile=("metrics.jsonl",)) as art:
            (art.path / "x").write_text(f"{folder.name} {name}")
            if kind == "run":
                metrics = Metrics(art.path / "metrics.jsonl")
                for step in (1, 2):
                    metrics.write(step=step, loss=8 / step, tokens=step * 10)
                metrics.write(step=2, heldout_loss=3.0, bits_per_byte=1.5, heldout_seq_len=256, seconds=1.0)
                metrics.write(step=2, heldout_loss=math.nan, seconds=2.0)
                metrics.close()
            art.note(**figures)
        return folder / name

    corpus = make("corpus", "corpus")
    shards = make("shard-files", "thing", as_parent("corpus", corpus))
    run = make("base", "run", as_parent("shards", shards), seconds=3.0, **figures)
    parents = as_parent("model", run), as_parent("corpus", corpus)
    make("eval", "evaluation", *parents, bits_per_byte=gzip / 2, xz_bits_per_byte=gzip - 0.5, gzip_bits_per_byte=gzip)
    return run


def test_two_runs_have_each_the_figures_of_their_own_corpus_and_are_told_apart(tmp_path):
    for name, gzip in (("one", 2.25), ("two", 3.75)):
        lineage(tmp_path / name, gzip)
    folders = [tmp_path / "one", tmp_path / "two"]
    write_report([*folders, tmp_path / "one" / "base"], tmp_path / "report.html")  # one of them twice
    page = (tmp_path / "report.html").read_text()
    sections = page.split("<h2>Learning: ")[1:]
    assert [section.partition("</h2>")[0] for section in sections] == [str(folder / "base") for folder in folders]
    for section, own, other in zip(sections, ("2.25", "3.75"), ("3.75", "2.25"), strict=True):
        section = section.partition("<h2>Every figure")[0]
        assert f"gzip -9 {own}" in section and f"gzip -9 {other}" not in section
        assert "windows of 256 tokens" in section
    assert f"The runs {folders[0] / 'base'} and {folders[1] / 'base'}" in page
    assert page.count('<rect class="box') == 8
    for folder, gzip in zip(folders, ("2.2500", "3.7500"), strict=True):
        assert f'<td>gzip_bits_per_byte, {folder / "eval"}</td><td class="n">{gzip}</td>' in page


def test_a_long_caveat_is_below_the_table_of_predictions(tmp_path):
    caveat = "rates were measured on a busy machine " * 9
    lineage(tmp_path / "one", 2.0, prediction_caveats=[caveat], predicted_step_seconds=0.5, step_seconds=0.25)
    write_report([tmp_path / "one"], tmp_path / "report.html")
    table, _, below = (
        (tmp_path / "report.html").read_text().partition('<table class="predicted">')[2].partition("</table>")
    )
    assert "500 ms" in table and "busy machine" not in table and caveat in below


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(DataError, match="no artifact"):
        write_report([tmp_path], tmp_path / "report.html")


def test_parents_stand_left_of_their_children(tmp_path):
    build(tmp_path)
    family = Family()
    family.add("eval", read_manifest(tmp_path / "eval"))  # knows all its ancestors by itself
    columns = family.layers()
    column = {node: i for i, nodes in enumerate(columns) for node in nodes}
    assert len(family.names) == 4 and all(column[a] < column[b] for a, b in family.edges)
    assert [family.names[c[0]][1] for c in columns] == ["corpus", "tokenizer", "run", "evaluation"]


def test_an_evaluation_of_whole_texts_alone_has_a_page(tmp_path):
    with ArtifactWriter(tmp_path / "rolled", kind="evaluation") as art:
        art.note(bits_per_byte=2.25, byte_perplexity=4.757)
    write_report([tmp_path / "rolled"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "2.250" in page and "xz -9e" not in page and "held-out bits per byte" not in page


def test_a_folder_that_is_not_there_or_holds_nothing_is_named(tmp_path, capsys):
    build(tmp_path)
    (tmp_path / "empty").mkdir()
    for wrong, said in (("nosuch", "does not exist"), ("empty", "holds no artifact"), ("tok/x", "is not a folder")):
        assert (
            main(["report", str(tmp_path / "eval"), str(tmp_path / wrong), "--out", str(tmp_path / "page.html")]) == 1
        )
        printed = capsys.readouterr().err
        assert wrong in printed and said in printed and printed.count("\n") == 1
        assert not (tmp_path / "page.html").exists()
    assert main(["report", "--out", str(tmp_path / "page.html")]) == 2
    assert "one folder" in capsys.readouterr().err


def test_spikes_are_marked_on_a_run_s_curves_and_what_was_undone_is_not_averaged(tmp_path):
    with ArtifactWriter(tmp_path / "run", kind="run", parents=(), volatile=("metrics.jsonl",)) as art:
        metrics = Metrics(art.path / "metrics.jsonl")
        for step in (*range(1, 31), *range(21, 41)):
            spike = step == 30 and not art.figures
            metrics.write(step=step, loss=900.0 if spike else 2.0, tokens=step, grad_norm=1.0)
            if spike:
                metrics.write(step=30, spike=900.0, spike_sigmas=9.0)
                metrics.write(step=30, back_to=20, left_out=10)
                art.note(spikes=[{"step": 30, "what": "loss", "value": 900.0}])
        metrics.close()
        art.note(spikes=[*art.figures["spikes"], {"step": 35, "what": "gradient norm", "value": 7.0}])
    section = run_section(find_artifacts([tmp_path])[0], {})
    said = ("spike of the loss at step 30, 900, back to step 20", "spike of the gradient norm at step 35, 7")
    assert section["about"].endswith(f"Marked: {said[0]}; {said[1]}.")
    for chart in (section["main"], next(c for c in section["small"] if c["title"].startswith("gradient"))):
        assert re.findall(r"<title>(.*?)</title>", chart["svg"]) == list(said)
    (curve,) = json.loads(html.unescape(re.search("data-chart='(.*?)'>", section["main"]["svg"])[1]))["series"]
    assert [x for x, _ in curve["points"]] == list(range(1, 41)) and {y for _, y in curve["points"]} == {2.0}
