"""The table of accelerators: sane rows, found by the names that torch gives."""

from __future__ import annotations

import pytest

from luban.core.errors import ConfigError
from luban.planner.accelerators import accelerator, accelerator_of, accelerators


def test_every_row_is_complete_and_in_the_units_it_says():
    assert {"a100-40gb", "a100-80gb", "h100-sxm", "h100-pcie", "h200", "b200", "l40s", "rtx-4090", "mi300x"} <= set(
        accelerators()
    )
    for name, row in accelerators().items():
        assert row.names and row.source, name
        assert 50 < row.peak["bf16"] < 5000 and 10 <= row.memory <= 500 and 0.1 < row.bandwidth < 20, name
        assert 100 <= row.power <= 1500 and 0 <= row.link <= 2000, name
        # a V100 has no tf32: its fp32 matmuls run on the cores for single precision, at an eighth of its tensor cores
        share = 15.7 / 125 if name == "v100-32gb" else 1 / 2
        assert row.peak["tf32"] == pytest.approx(row.peak["bf16"] * share, rel=0.02), name
        assert "fp8" not in row.peak or row.peak["fp8"] == pytest.approx(2 * row.peak["bf16"], rel=0.02), name
        assert row.matmul_flops("bf16") < row.peak_flops("bf16") and row.copy_rate < 1e12 * row.bandwidth, name
    names = [n for row in accelerators().values() for n in row.names]
    assert len(names) == len(set(names))


def test_a_device_is_found_by_its_whole_name():
    assert accelerator_of("NVIDIA H100 80GB HBM3") is accelerator("h100-sxm")
    assert accelerator_of("nvidia h100 pcie") is accelerator("h100-pcie")
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100", "NVIDIA H100 NVL", "Tesla T4", ""):
        assert accelerator_of(other) is None


def test_precisions():
    h100 = accelerator("h100-sxm")
    assert h100.peak_flops("bf16") == h100.peak_flops("fp16") == 989.4e12
    assert h100.peak_flops("fp32") == 494.7e12 and h100.peak_flops("fp8") == 1978.9e12
    with pytest.raises(ConfigError, match="A100-SXM4-40GB has no fp8"):
        accelerator("a100-40gb").peak_flops("fp8")
    with pytest.raises(ConfigError, match="did you mean 'h100-sxm'"):
        accelerator("h100-smx")
