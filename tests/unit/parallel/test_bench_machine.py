"""The table that `luban bench machine` writes is one that `luban plan` reads."""

from __future__ import annotations

import pytest

from luban.cli.main import main
from luban.planner.machine import machine_table


def test_a_measured_table_is_read_back(tmp_path, capsys):
    out = tmp_path / "cpu.toml"
    words = ["bench", "machine", "--out", str(out), "--device", "cpu", "--dtype", "float32", "--largest", "256"]
    assert main(words) == 2 and "--gpu" in capsys.readouterr().err  # a CPU has no row
    assert main([*words, "--gpu", "v100-32gb"]) == 0
    table = machine_table(str(out))
    assert table.gpu == "v100-32gb" and table.copy > 0 and table.launch_us > 0
    rate = table.matmul_rate(256, 256, 256)
    assert 1e8 < rate < 1e14
    assert table.matmul_rate(128, 128, 128) <= rate
    forward, backward = table.attention_seconds(1e9, 1e6, 64)
    assert 0 < forward < backward


@pytest.mark.parametrize("text", ["gpu = 3", "gpu = 'h100-sxm'", "["])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "table.toml"
    path.write_text(text)
    with pytest.raises(Exception, match=r"table\.toml"):
        machine_table(str(path))
