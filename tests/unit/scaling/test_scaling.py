"""Scaling laws: published constants from published points, synthetic constants recovered, intervals that cover."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize_scalar

from luban.cli.main import main
from luban.core.errors import DataError
from luban.scaling.chinchilla import Chinchilla, ChinchillaForm
from luban.scaling.fitting import bootstrap, centres, fit, without_outliers
from luban.scaling.frontier import envelope, isoflop
from luban.scaling.kaplan import PUBLISHED, KaplanForm
from luban.scaling.observations import Observations, read_observations

# the 245 points read from Hoffmann's figure 4: data/svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla
# (SHA-256 193478df4e90f040016431996c45682659306840ecdadf83cfb9cd5ca0aa1b30), three of its columns to six digits
POINTS = Path(__file__).with_name("chinchilla_points.csv")
LAW = Chinchilla(1.8, 480.0, 2085.0, 0.348, 0.366)


def _isoflop_runs(rng, law, noise, budgets=6, sizes=9):
    """Runs around the best size of each budget."""
    rows = []
    for flops in np.geomspace(1e18, 1e21, budgets):
        best = law.optimum(flops).parameters
        for n in best * np.geomspace(0.2, 5.0, sizes):
            rows.append((n, flops / (6 * n)))
    n, d = np.array(rows).T
    loss = np.array([law.loss(*row) for row in rows]) * np.exp(noise * rng.standard_normal(len(rows)))
    return Observations(n, d, loss, np.arange(len(rows)) + 2)


def _fitted(form, runs):
    return form.constants(fit(form, runs), *centres(runs))


def test_the_published_points_give_the_replications_constants(capsys):
    """Besiroglu et al. 2024 fit 240 points, without the five highest losses: 1.8172, 482.01, 2085.43, .3478, .3658, a .5126,
    with standard errors of 125 and 1293 for A and B; the optimum of the same objective is E 1.8172, alpha .3473, beta .3672."""
    runs = read_observations(POINTS)
    assert len(runs) == 245
    law = _fitted(ChinchillaForm(), runs[runs.loss < np.sort(runs.loss)[-5]])
    assert (law.E, law.A, law.alpha, law.beta, law.a) == pytest.approx(
        (1.8172, 477.8, 0.3473, 0.3672, 0.5139), rel=1e-3
    )
    assert pytest.approx(2143, rel=5e-3) == law.B
    assert main(["scaling", str(POINTS), "--resamples", "20", "--budget", "5.76e23", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["E"], found["alpha"], found["beta"], found["a"]) == pytest.approx(
        (1.817, 0.347, 0.367, 0.513), abs=0.01
    )
    assert abs(found["A"] - 482) < 125 and abs(found["B"] - 2085) < 1293
    assert found["left_out_lines"][:5] == [2, 3, 4, 5, 6] and len(found["left_out_lines"]) < 8
    assert found["optimum"][0]["parameters"] == pytest.approx(70e9, rel=0.1)  # Chinchilla's budget and size
    assert found["approaches"]["envelope"]["a"] == pytest.approx(0.5, abs=0.03)  # Hoffmann's table 2: 0.50, 0.49
    assert found["approaches"]["isoflop"]["a"] == pytest.approx(0.49, abs=0.03)


def test_constants_of_synthetic_runs_are_recovered():
    rng = np.random.default_rng(11)
    for _ in range(2):
        law = Chinchilla(*(rng.uniform(*r) for r in ((1.2, 2.2), (200, 800), (500, 3000), (0.28, 0.4), (0.28, 0.4))))
        found = _fitted(ChinchillaForm(), _isoflop_runs(rng, law, 0.0))
        assert (found.E, found.alpha, found.beta) == pytest.approx((law.E, law.alpha, law.beta), rel=2e-3)
        assert pytest.approx((law.A, law.B), rel=0.05) == (found.A, found.B)
        assert _fitted(ChinchillaForm(), _isoflop_runs(rng, law, 0.003)).a == pytest.approx(law.a, abs=0.02)


def test_isoflop_and_envelope_recover_the_exponent():
    rng = np.random.default_rng(12)
    runs = _isoflop_runs(rng, LAW, 0.0005, budgets=10, sizes=15)
    assert isoflop(runs).a == pytest.approx(LAW.a, abs=0.02)
    assert isoflop(runs).size(1e20) == pytest.approx(LAW.optimum(1e20).parameters, rel=0.1)
    assert envelope(_isoflop_runs(rng, LAW, 0.0, budgets=10, sizes=15)).a == pytest.approx(LAW.a, abs=0.02)


def test_the_optimum_is_the_minimum():
    for flops in (1e18, 5.76e23):
        best = minimize_scalar(
            lambda n, c=flops: LAW.loss(np.exp(n), c / 6 / np.exp(n)), bounds=(14, 32), method="bounded"
        )
        found = LAW.optimum(flops)
        assert found.loss == pytest.approx(best.fun, rel=1e-9) and np.log(found.parameters) == pytest.approx(
            best.x, abs=1e-3
        )
        assert 6 * found.parameters * found.tokens == pytest.approx(flops)


def test_kaplans_constants_are_recovered():
    rng = np.random.default_rng(13)
    n, d = 10 ** rng.uniform(6, 10, 80), 10 ** rng.uniform(8, 11, 80)
    loss = np.array([PUBLISHED.loss(*row) for row in zip(n, d, strict=True)])
    found = _fitted(KaplanForm(), Observations(n, d, loss, np.arange(80)))
    assert (found.alpha_n, found.alpha_d) == pytest.approx((0.076, 0.095), rel=2e-3)
    assert (found.Nc, found.Dc) == pytest.approx((8.8e13, 5.4e13), rel=0.05)
    assert PUBLISHED.loss(1e9, 1e30) == pytest.approx((8.8e13 / 1e9) ** 0.076, rel=1e-6)


@pytest.mark.parametrize(
    ("form", "theta"), [(ChinchillaForm(), [0.4, -1, -0.5, 0.3, 0.4]), (KaplanForm(), [8, 0.8, 9, 0.1])]
)
def test_derivatives(form, theta):
    rng = np.random.default_rng(14)
    n, d = rng.standard_normal(5), rng.standard_normal(5)
    _, slopes = form.log_loss(np.array(theta), n, d)
    for run in range(5):
        numeric = approx_fprime(np.array(theta), lambda t, i=run: form.log_loss(t, n, d)[0][i], 1e-7)
        assert slopes[:, run] == pytest.approx(numeric, abs=1e-5)


def test_intervals_cover():
    """At 95%, fewer than 8 of 10 inside has a chance of about 1 in 100."""
    rng, form, inside = np.random.default_rng(15), ChinchillaForm(), {"E": 0, "a": 0}
    for seed in range(10):
        runs = _isoflop_runs(rng, LAW, 0.005, budgets=4, sizes=7)
        theta = fit(form, runs, start=np.array(form.starts[-1]))
        samples = bootstrap(form, runs, theta, resamples=30, seed=seed)
        laws = [form.constants(sample, *centres(runs)) for sample in samples]
        for name in inside:
            low, high = np.percentile([getattr(law, name) for law in laws], [2.5, 97.5])
            inside[name] += low <= getattr(LAW, name) <= high
    assert min(inside.values()) >= 8, inside


def test_outliers_are_left_out_and_exact_runs_are_not():
    rng, form = np.random.default_rng(16), ChinchillaForm()
    runs = _isoflop_runs(rng, LAW, 0.002)
    assert without_outliers(form, runs).all() and without_outliers(form, _isoflop_runs(rng, LAW, 0.0)).all()
    bad = rng.choice(len(runs), 3, replace=False)
    runs.loss[bad] *= 1.2
    assert set(np.flatnonzero(~without_outliers(form, runs))) == set(bad)


def test_columns_by_other_names_and_the_third_from_the_other_two(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("N,C,loss\n1e6,6e15,3.0\n2e6,6e15,2.9\n")
    runs = read_observations(path)
    assert runs.tokens == pytest.approx([1e9, 5e8]) and runs.flops == pytest.approx([6e15, 6e15])
    path.write_text("Tokens,Training FLOP,Loss\n1e9,6e15,3.0\n")
    assert read_observations(path).parameters == pytest.approx([1e6])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N,loss\n1,2\n", "needs a column loss and two of"),
        ("N,D,loss\n", "no runs below the header"),
        ("N,D,loss\n1e6,1e9,3\n1e6,x,3\n", "line 3: D is 'x'"),
        ("N,D,loss\n1e6,1e9,nan\n", "line 2: loss is 'nan'"),
        ("N,D,loss\n1e6,1e9\n", "line 2: loss is None"),
        ("N,D,loss\n" + "1e6,1e9,3\n" * 9, "3 different sizes"),
    ],
)
def test_bad_files_are_refused(text, message, tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert main(["scaling", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    with pytest.raises(DataError):
        fit(ChinchillaForm(), read_observations(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "1e9"], "give both"),
        (["--budget", "-1"], "--budget is a number above 0"),
        (["--resamples", "1"], "at least 20"),
        (["--drop-highest", "-1"], "from 0"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, message, capsys):
    assert main(["scaling", "missing.csv", *words]) == 2
    assert message in capsys.readouterr().err


def test_printed_fit(tmp_path, capsys):
    path, runs = tmp_path / "a.csv", _isoflop_runs(np.random.default_rng(17), LAW, 0.002)
    rows = (f"{n},{d},{loss}" for n, d, loss in zip(runs.parameters, runs.tokens, runs.loss, strict=True))
    path.write_text("parameters,tokens,loss\n" + "\n".join(rows))
    words = ["scaling", str(path), "--budget", "1e22", "--parameters", "1e9", "--tokens", "2e10", "--resamples", "20"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert (
        "fitted to 54 runs" in shown and "1e+22 FLOPs: best" in shown and "1B parameters, 20B tokens: loss 2." in shown
    )
