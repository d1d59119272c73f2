"""Which attention runs where, as a table; the machine is made up."""

from __future__ import annotations

import sys

import pytest
import torch

from luban.core.errors import ConfigError, UnsupportedError
from luban.kernels import available, dispatch
from luban.kernels.dispatch import Case, check_kernel, explain, fastest, pick

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
TABLE = [  # what differs from plain causal training in bf16 with heads of 128 on an H100, and what then runs
    ({}, "cudnn"),
    ({"width": 64}, "cudnn"),
    ({"capability": AMPERE}, "cudnn"),
    ({"kind": "all"}, "cudnn"),
    ({"dtype": torch.float16}, "cudnn"),
    ({"width": 256}, "flash2"),
    ({"width": 100}, "luban"),
    ({"training": False}, "torch"),
    ({"training": False, "kind": "all"}, "torch"),
    ({"training": False, "kind": "intervals"}, "luban"),
    ({"training": False, "bias": "log", "square": False}, "luban"),
    ({"training": False, "bias": "log", "kind": "all", "square": False, "single": True}, "torch"),
    ({"kind": "causal", "square": False}, "luban"),
    ({"kind": "intervals"}, "luban"),
    ({"kind": "packed"}, "luban"),
    ({"kind": "packed", "training": False}, "luban"),
    ({"kind": "packed", "dtype": torch.float32}, "torch"),
    ({"kind": "packed", "device": "cpu", "capability": None}, "torch"),
    ({"kind": "irregular"}, "torch"),
    ({"bias": "alibi"}, "luban"),
    ({"bias": "power", "kind": "intervals"}, "luban"),
    ({"bias": "buckets", "kind": "all"}, "luban"),
    ({"bias": "any"}, "torch"),
    ({"width": 512}, "torch"),
    ({"dtype": torch.float32}, "torch"),
    ({"capability": TURING}, "torch"),
    ({"device": "cpu", "capability": None}, "torch"),
]


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No wishes, Triton installed, flash-attn-4 not installed, nothing said yet."""
    monkeypatch.delenv("LUBAN_ATTENTION", raising=False)
    monkeypatch.setattr(dispatch, "flash4_missing", lambda: "not installed: pip install 'luban[flash]'")
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "INSTALLED", True)


def case(**changes) -> Case:
    return Case(
        **({"device": "cuda", "dtype": torch.bfloat16, "width": 128, "kind": "causal", "capability": HOPPER} | changes)
    )


@pytest.mark.parametrize(("changes", "expected"), TABLE, ids=str)
def test_decisions(changes, expected):
    assert pick(case(**changes)) == expected
    assert dispatch.refusal(expected, case(**changes)) is None


def test_flash_attention_4_is_preferred_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(dispatch, "flash4_missing", lambda: None)
    assert pick(case()) == pick(case(width=64)) == "flash4"
    assert pick(case(capability=AMPERE)) == pick(case(capability=AMPERE, width=96)) == "cudnn"
    assert pick(case(kind="intervals")) == "luban"
    for width in (32, 72, 80, 96):  # its gradients of other widths were found wrong
        assert pick(case(width=width)) == "cudnn"


def test_packed_documents_run_on_flash_attention_4_where_it_can_serve_them(monkeypatch):
    monkeypatch.setattr(dispatch, "flash4_missing", lambda: None)
    monkeypatch.setattr(dispatch, "PACKED_RATES", dispatch.PACKED_RATES | {("flash4", 64): (1000, 1000)})
    for width in (64, 128):
        assert pick(case(kind="packed", width=width)) == "flash4"
        for changes in ({"capability": AMPERE}, {"bias": "alibi"}, {"width": 96}):
            assert pick(case(**({"kind": "packed", "width": width} | changes))) == "luban"
    assert pick(case(kind="packed", dtype=torch.float32)) == "torch"
    crowded = case(kind="packed", too_many_documents=True)
    assert pick(crowded) == "luban" and "(many packed documents, bf16" in explain(crowded)
    assert pick(crowded, "flash4") == "flash4"  # by name it is had all the same
    assert "not cuDNN: it serves plain causal rows and rows without" in explain(case(kind="packed"))
    refused = dispatch.refusal("flash4", case(kind="intervals"))
    assert refused == "it serves plain causal rows, lists of packed documents and rows without a mask alone"
    with pytest.raises(UnsupportedError, match=r"\(packed documents, bf16, heads of 128\)"):
        pick(case(kind="packed"), "flash2")


def test_block_sparse_layouts_are_for_our_kernel_and_whole_rows():
    for kind in ("all", "causal", "packed"):
        assert pick(case(kind=kind, block=64)) == pick(case(block=128)) == "luban"
    assert pick(case(block=64, square=False)) == pick(case(block=64, device="cpu")) == "torch"
    assert pick(case(block=128, width=256)) == "torch" and pick(case(block=64, width=256)) == "luban"
    assert "(causal, in blocks of 64, bf16" in explain(case(block=64)) and "knows no block" in explain(case(block=64))


def test_packed_documents_have_rates_of_their_own(monkeypatch):  # those measured
    monkeypatch.setattr(dispatch, "flash4_missing", lambda: None)
    assert pick(case(kind="packed", width=64)) == "luban" and pick(case(width=64)) == "flash4"
    assert pick(case(kind="packed")) == pick(case()) == "flash4"


LISTS = "cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None"
FORWARD = f"def _flash_attn_fwd(q, k, v, {LISTS}, softmax_scale=None, causal=False, return_lse=False): ..."
BACKWARD = f"def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, {LISTS}): ..."


@pytest.mark.parametrize(
    ("interface", "reason"),
    [
        ("raise RuntimeError('No CTK flavor installed')", "No CTK flavor installed"),
        (FORWARD, "_flash_attn_bwd"),
        (f"{FORWARD.replace('max_seqlen_q', 'longest_q')}\n{BACKWARD}", "max_seqlen_q"),
        (f"{FORWARD}\n{BACKWARD.replace('cu_seqlens_k', 'edges_k')}", "cu_seqlens_k"),
        (f"{FORWARD}\n{BACKWARD}", None),
    ],
)
def test_a_flash_attention_4_that_does_not_load_is_done_without(monkeypatch, tmp_path, interface, reason):
    monkeypatch.undo()
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    for folder in (tmp_path / "flash_attn", tmp_path / "flash_attn" / "cute"):
        (folder / "__init__.py").touch()  # or an installed one would come first
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text(interface)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    said = []
    monkeypatch.setattr(available, "warn", said.append)
    dispatch.flash4_missing.cache_clear()
    try:
        assert pick(case(kind="causal")) == pick(case(kind="causal")) == ("cudnn" if reason else "flash4")
        assert len(said) == (reason is not None)
        assert not reason or ("can't be used" in said[0] and reason in said[0])
    finally:
        dispatch.flash4_missing.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            del sys.modules[name]


def test_the_fastest_of_those_that_can_is_the_fastest_by_the_table(monkeypatch):
    monkeypatch.setattr(dispatch, "RATES", dispatch.RATES | {("luban", 128): (10_000, 10_000)})
    assert fastest(case()) == "luban" and fastest(case(width=64)) == "cudnn"


def test_wishes_are_granted_or_refused_with_the_reason(monkeypatch):
    assert pick(case(), "flash2") == "flash2" and pick(case(bias="alibi"), "torch") == "torch"
    with pytest.raises(
        UnsupportedError,
        match=r"FlashAttention-2 can't compute this attention \(causal, alibi bias, bf16, "
        r"heads of 128\): it adds no bias",
    ):
        pick(case(bias="alibi"), "flash2")
    monkeypatch.setenv("LUBAN_ATTENTION", "cudnn")
    assert pick(case()) == "cudnn"
    with pytest.raises(UnsupportedError, match="bf16 and fp16 alone"):
        pick(case(dtype=torch.float32))
    assert pick(case(), "flash2") == "flash2"  # a name in the code comes before the environment's
    with pytest.raises(ConfigError, match="did you mean 'cudnn'"):
        check_kernel("cudn")
    with pytest.raises(UnsupportedError, match=r"luban\[flash\]"):
        pick(case(), "flash4")


def test_a_fallback_warns_once_and_names_the_reason(monkeypatch):
    said = []
    monkeypatch.setattr(dispatch, "warn", said.append)
    for _ in range(3):
        pick(case(dtype=torch.float32, kind="intervals"))
        pick(case(width=512))
    assert len(said) == 2 and "bf16 and fp16 alone" in said[0] and "up to 256" in said[1]
    pick(case(device="cpu", capability=None, kind="intervals"))
    pick(case(kind="all", square=False, training=False, dtype=torch.float32))
    assert len(said) == 2


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float32}, {"width": 512}, {"capability": (7, 5)}, {"width": 300, "square": False}]
)
def test_training_without_a_mask_warns_too(changes, monkeypatch):
    said = []
    monkeypatch.setattr(dispatch, "warn", said.append)
    monkeypatch.setattr(dispatch, "flash4_missing", lambda: "it is not installed")
    assert pick(case(kind="all", **changes)) == "torch" and len(said) == 1


def test_a_wrong_name_says_where_it_stands(monkeypatch):
    monkeypatch.setenv("LUBAN_ATTENTION", "cudn")
    with pytest.raises(ConfigError, match=r"'cudn' in the environment's LUBAN_ATTENTION.*cudnn"):
        pick(case())
    monkeypatch.setenv("LUBAN_ATTENTION", "flash2")
    with pytest.raises(UnsupportedError, match=r"by name in the environment's LUBAN_ATTENTION.*--train.attention auto"):
        pick(case(device="cpu", capability=None))


def test_it_says_what_it_picked():
    line = explain(case(kind="intervals", bias="log"))
    assert line.startswith("attention: Luban's Triton kernel (intervals of keys, log bias, bf16, heads of 128); not ")
    assert "cuDNN: it adds no bias" in line


def test_it_remembers_what_it_picked(monkeypatch):
    monkeypatch.setattr(dispatch, "chosen", {})
    assert dispatch.choice("cpu", torch.bfloat16, 64, "intervals", None, True, False, True, False, 0) == "torch"
    assert dispatch.report() == [
        "attention: torch's scaled_dot_product_attention (intervals of keys, bf16, heads of 64)"
    ]
