"""The end of `make test` names what was missing."""

from __future__ import annotations

from skip_reasons import lines


def test_wants_are_grouped_and_counted_the_most_wanted_first():
    skipped = [
        ("a.py::one", "Skipped: could not import 'ray': No module named 'ray'"),
        ("b.py::two[3]", "Skipped: needs a CUDA GPU"),
        ("b.py::three", "Skipped: needs a CUDA GPU"),
        ("c.py::four", "needs a CUDA GPU"),
        ("d.py", "Skipped: chromium and chromedriver are not installed"),
        ("e.py::five", "Skipped: could not import 'transformers.models.t5': No module named 'transformers'"),
        ("e.py", "Skipped: could not import 'transformers': No module named 'transformers'"),
        ("f.py::six", "Skipped: runs directly"),
        ("f.py::seven", "Skipped: run under TRITON_INTERPRET=1 by test_under_the_interpreter"),
        (
            "a.py::nine",
            "Skipped: NOT TESTED: the model comes with the package ray, which isn't installed: pip install ray",
        ),
        ("g.py::eight", "Skipped: root reads everything"),
    ]
    assert lines(skipped) == [
        "a CUDA GPU: 3 tests (b.py, c.py)",
        "the package ray: 2 tests (a.py)",
        "the package transformers: 1 test and 1 whole file (e.py)",
        "chromium and chromedriver: 1 whole file (d.py)",
        "root reads everything: 1 test (g.py)",
    ]
    assert lines([]) == lines([("f.py::six", "Skipped: runs directly; on a GPU tests/gpu stands for it")]) == []
