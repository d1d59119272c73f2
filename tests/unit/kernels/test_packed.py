"""Packed documents on FlashAttention-4's kernel for lists of rows, whose two functions a plain loop stands in for."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import drawn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from luban.data.batch import Batch
from luban.kernels import flash4 as kernel
from luban.kernels.attention_mask import AttentionMask
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.models.stack import blocks_of
from luban.nn.attention import prepared_mask
from luban.nn.attention.attend import attention
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.parallel.remat import remat_policy

CPU = torch.device("cpu")


def one_document(length):
    edges = torch.tensor([0, length], dtype=torch.int32)
    return {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": length, "max_seqlen_k": length}


class StandIn:
    """softmax(q·kᵀ·scale)·v document by document, on (B·T, H, D), with the package's arguments and results."""

    calls = 0

    def documents(self, q, k, edges_q, edges_k, longest_q, longest_k):
        """(begin, end) of every document that isn't empty."""
        self.calls += 1
        edges = edges_q.tolist()
        assert edges_q.dtype == edges_k.dtype == torch.int32 and edges_q.is_contiguous() and edges == edges_k.tolist()
        assert edges == sorted(edges) and edges[0] == 0 and edges[-1] == len(q) == len(k)
        pairs = [(a, b) for a, b in pairwise(edges) if a < b]
        assert longest_q == longest_k >= max(b - a for a, b in pairs)
        return pairs

    def forward(
        self, q, k, v, *, softmax_scale, causal, return_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    ):
        assert causal and return_lse
        if cu_seqlens_q is None:  # whole rows, (B, T, H, D)
            assert max_seqlen_q is max_seqlen_k is None
            found = [
                self.forward(
                    *row, softmax_scale=softmax_scale, causal=True, return_lse=True, **one_document(len(row[0]))
                )
                for row in zip(q, k, v, strict=True)
            ]
            return *map(torch.stack, list(zip(*found, strict=True))[:2]), None
        group = q.shape[1] // k.shape[1]
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        for a, b in self.documents(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
            s = self.scores(q[a:b], k[a:b], group, softmax_scale)
            lse[:, a:b] = s.logsumexp(-1)
            out[a:b] = (s.softmax(-1) @ v[a:b].repeat_interleave(group, 1).transpose(0, 1)).transpose(0, 1)
        return out, lse, None

    def backward(
        self, q, k, v, out, dout, lse, softmax_scale, causal, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    ):
        if cu_seqlens_q is None:
            assert max_seqlen_q is max_seqlen_k is None
            found = [
                self.backward(*row, softmax_scale, causal, **one_document(len(row[0])))
                for row in zip(q, k, v, out, dout, lse, strict=True)
            ]
            return tuple(map(torch.stack, zip(*found, strict=True)))
        assert causal and dout.is_contiguous() and lse.shape == (q.shape[1], q.shape[0])
        group = q.shape[1] // k.shape[1]
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for a, b in self.documents(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
            p = (self.scores(q[a:b], k[a:b], group, softmax_scale) - lse[:, a:b, None]).exp()
            do, wide_v, wide_k = (
                x.transpose(0, 1) for x in (dout[a:b], *(y[a:b].repeat_interleave(group, 1) for y in (v, k)))
            )
            delta = (out[a:b] * dout[a:b]).sum(-1).T[..., None]
            ds = p * (do @ wide_v.mT - delta) * softmax_scale
            dq[a:b] = (ds @ wide_k).transpose(0, 1)
            dk[a:b] = (ds.mT @ q[a:b].transpose(0, 1)).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
            dv[a:b] = (p.mT @ do).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
        return dq, dk, dv

    @staticmethod
    def scores(q, k, group, scale):
        s = q.transpose(0, 1) @ k.repeat_interleave(group, 1).permute(1, 2, 0) * scale
        return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))


@pytest.fixture
def flash4(monkeypatch):
    """The stand-in in the package's place, picked by every choice that is about packed documents."""
    stand_in, names = StandIn(), ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[2]]._flash_attn_fwd, sys.modules[names[2]]._flash_attn_bwd = stand_in.forward, stand_in.backward

    def choice(device, dtype, width, kind, *_):
        return "flash4" if kind == "packed" else "torch"

    monkeypatch.setattr(prepared_mask, "choice", torch.compiler.assume_constant_result(choice))
    return stand_in


def rows_of(rows: int, slots: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(documents, starts) of random rows: one of a single document, one of documents of one token, padded tails."""
    documents = (np.random.rand(rows, slots) < share).cumsum(1).astype(np.int32)
    documents[0] = 0
    documents[1] = np.minimum(np.arange(slots), 9)
    documents[2, random.randint(1, slots - 1) :] = -1
    batch = Batch(
        tokens=documents, targets=documents, loss_mask=documents >= 0, documents=documents, positions=documents
    )
    return torch.from_numpy(documents), torch.from_numpy(batch.document_starts())


def seen(documents: torch.Tensor, **options) -> AttentionMask:
    T = documents.shape[1]
    return AttentionMask(queries=T, keys=T, causal=True, device=documents.device, documents=documents, **options)


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize(("H", "K"), [(1, 1), (4, 4), (6, 2), (4, 1)])
def test_outputs_and_gradients_are_those_of_a_mask_written_out(flash4, H, K, pieces):
    B, T, D = 5, random.randint(20, 90), random.choice([4, 8])
    documents, starts = rows_of(B, T, random.choice([0.02, 0.1]))
    joined = torch.randn(
        B, T, H + 2 * K, D, dtype=torch.float64, requires_grad=True
    )  # as one projection gives the three
    scale, do = random.uniform(0.1, 1), torch.randn(B, H, T, D, dtype=torch.float64)

    def run(listed):
        out = []
        parts = zip(joined.chunk(pieces), documents.chunk(pieces), starts.chunk(pieces), strict=True)
        for x, numbers, begins in parts:
            made = prepared_mask.prepare(
                seen(numbers, document_starts=begins if listed else None), head_dim=D, dtype=x.dtype
            )
            assert made.kernel == ("flash4" if listed else "torch")
            out.append(attention(*(y.transpose(1, 2) for y in x.split([H, K, K], 2)), made, scale))
        out = torch.cat(out)
        return out, torch.autograd.grad(out, joined, do)[0]

    for got, wanted in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert flash4.calls == 2 * pieces


def test_the_operators_are_what_they_say_they_are(flash4):
    """Shapes, dtypes and gradients as a compiler is told, for rows one after another and for (B, T, H, D)."""
    documents, starts = rows_of(3, 24, 0.1)
    q, k, v = (torch.randn(3, 24, heads, 4, requires_grad=True) for heads in (4, 2, 2))
    edges = seen(documents, document_starts=starts).cu_seqlens()
    for operands, options in (((q, k, v), (None, None)), ([x.flatten(0, 1) for x in (q, k, v)], (edges, 24))):
        leaves = [x.detach().requires_grad_() for x in operands]
        opcheck(kernel.flash4_forward, (*leaves, *options, True, 0.3))
        with torch.no_grad():
            out, lse = kernel.flash4_forward(*leaves, *options, True, 0.3)
            opcheck(
                kernel.flash4_backward,
                (torch.randn_like(out), *operands, out, lse, *options, True, 0.3),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_whole_rows_go_through_the_same_operators(flash4):
    q, k, v = (torch.randn(2, heads, 30, 8, requires_grad=True) for heads in (6, 2, 2))
    do = torch.randn(2, 6, 30, 8)
    results = []
    for out in (
        kernel.attention(q, k, v, True, 0.3),
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True),
    ):
        results.append([out, *torch.autograd.grad(out, (q, k, v), do)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_edges_are_the_starts_of_all_rows_and_the_end():
    documents, starts = rows_of(3, 40, 0.1)
    edges, flat = seen(documents, document_starts=starts).cu_seqlens(), documents.flatten()
    assert edges.dtype == torch.int32 and len(edges) == starts.numel() + 1 and edges[-1] == 120
    begins = [t for t in range(120) if t % 40 == 0 or flat[t] != flat[t - 1]]
    assert sorted(set(edges.tolist())) == [*begins, 120] and edges.tolist() == sorted(edges.tolist())


def test_what_counts_as_packed():
    documents, starts = torch.zeros(2, 4096, dtype=torch.int32), torch.full((2, 64), 4096, dtype=torch.int32)
    some = torch.zeros(2, 4096, dtype=torch.bool)
    assert seen(documents, document_starts=starts).kind == "packed"
    for options in (
        {"document_starts": None},
        {"window": 5},
        {"token_mask": ~some},
        {"prefix": some},
    ):
        assert seen(documents, **({"document_starts": starts} | options)).kind == "intervals"
    assert not seen(documents, document_starts=starts).too_many_documents
    assert seen(documents, document_starts=starts.repeat(1, 2)).too_many_documents
    few, many = (seen(documents[:, :100], document_starts=starts[:, :places]) for places in (16, 32))
    assert few.kind == many.kind == "packed" and not few.too_many_documents  # few places are always worth walking
    assert many.too_many_documents and not seen(documents).too_many_documents
    assert AttentionMask(queries=9, keys=9, causal=True, device=CPU, document_starts=starts).kind == "causal"
    both_ways = AttentionMask(
        queries=4096, keys=4096, causal=False, device=CPU, documents=documents, document_starts=starts
    )
    assert both_ways.kind == "intervals"


def tiny(windowed: bool = False) -> torch.nn.Module:
    spec = uniform(
        vocab_size=41, width=32, layers=2, context=64, mixer=Grouped(heads=4, kv_heads=2), feedforward=SwiGLU(width=40)
    )
    if windowed:
        first, second = spec.layers
        spec = replace(spec, layers=(first, replace(second, mixer=replace(second.mixer, window=7))))
    return build_model(spec, seed=random.randrange(1000))


@pytest.mark.parametrize("windowed", [False, True])
def test_a_decoder_gives_the_same_with_and_without_starts(flash4, windowed):
    """Layers with a window keep to the mask; the others take the list."""
    model, (documents, starts) = tiny(windowed), rows_of(4, 60, 0.05)
    tokens, real = torch.randint(0, 41, (4, 60)), documents >= 0
    results = []
    for listed in (starts, None):
        loss = model(tokens, documents=documents, document_starts=listed).log_softmax(-1)[..., 3][real].sum()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert flash4.calls == 2 * (1 if windowed else 2)


def test_one_graph_serves_all_documents(flash4):
    torch._dynamo.reset()
    model, counter = tiny(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for share in (0.0, 0.03, 0.06):
        documents, starts = rows_of(3, 64, share)
        starts = F.pad(starts, (0, 16 - starts.shape[1]), value=64)
        tokens = torch.randint(0, 41, documents.shape)
        found = [run(tokens, documents=documents, document_starts=starts) for run in (compiled, model)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in found]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 1 and flash4.calls


@pytest.mark.parametrize("remat", drawn(["none", "selective", "full"], 1))
def test_compiled_blocks_serve_any_number_of_documents(flash4, remat):
    torch._dynamo.reset()
    model, counter = tiny(), CompileCounterWithBackend("aot_eager")
    plain = copy.deepcopy(model)
    for block in blocks_of(model):
        block.use_remat(remat_policy(remat, block))
        block.compile(dynamic=False, fullgraph=True, backend=counter)
    tokens = torch.randint(0, 41, (2, 2048))
    for places in (16, 32):
        starts = torch.arange(0, 2048, 2048 // places, dtype=torch.int32).expand(2, -1)
        documents = torch.arange(places).repeat_interleave(2048 // places).expand(2, -1)
        gradients, calls = [], []
        for each in (model, plain):
            flash4.calls = 0
            loss = each(tokens, documents=documents, document_starts=starts, output="hidden").square().mean()
            gradients.append(torch.autograd.grad(loss, list(each.parameters()), allow_unused=True))
            calls.append(flash4.calls)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
        assert calls == [6 if remat == "full" else 4, 4]
    assert counter.frame_count == 1
