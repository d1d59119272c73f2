"""Attention on a GPU: every kernel that the dispatcher may pick against the definition in float64, and whole models
compiled into one graph on the fused kernel."""

from __future__ import annotations

import random

import pytest
import torch

from luban.core.errors import UnsupportedError
from luban.data.batch import Batch
from luban.kernels import dispatch
from luban.kernels.attention_mask import AttentionMask
from luban.kernels.distance import alibi, alibi_slopes, dense, kerple_log, kerple_power, t5
from luban.kernels.flash.attention import flash_attention
from luban.kernels.intervals import intervals
from luban.kernels.layout import global_random
from luban.kernels.reference.attention import attention as reference
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.nn.attention.attend import attention
from luban.nn.attention.backend import AttentionBackend
from luban.nn.attention.prepared_mask import prepare
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.layout import GlobalRandom, Strided
from luban.nn.position.base import Position

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def draw(B, H, K, T, D, dtype):
    return [
        torch.randn(B, T, heads, D, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_() for heads in (H, K, K)
    ]


def error(got, want):
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def masked_as(kind, T):
    """The mask of that name, for two rows; documents are drawn."""
    options = {
        "causal": {},
        "documents": {"documents": torch.sort(torch.randint(0, 6, (2, T), device="cuda"), 1).values},
        "window": {"window": 300},
        "both ways": {"causal": False},
    }
    return intervals(T, T, device="cuda", **options[kind])


def naive(q, k, v, mask, bias, layout):
    """What plain PyTorch gets in the inputs' precision: the yardstick of the errors."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    s = s if bias is None else s + bias.to(s.dtype)
    seen = mask.dense(k.shape[2])
    seen = seen if layout is None else seen & layout.dense(q.shape[2], k.shape[2])
    return s.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def compare(call, qkv, mask, bias=None, parameters=(), layout=None):
    """Outputs and gradients: at most twice the naive computation's error against float64."""
    do = torch.randn_like(qkv[0])
    out = call()
    got = [out, *torch.autograd.grad(out, [*qkv, *parameters], do, retain_graph=True)]
    wide = [x.detach().double().requires_grad_() for x in qkv]

    def square():
        return None if bias is None else dense(bias, qkv[0].shape[2], qkv[1].shape[2]).double()

    seen = None if layout is None else layout.dense(qkv[0].shape[2], qkv[1].shape[2])
    want = reference(*wide, mask, bias_HTS=square(), seen_HTS=seen)
    want = [want, *torch.autograd.grad(want, [*wide, *parameters], do.double(), retain_graph=True)]
    plain = naive(*qkv, mask, square(), layout)
    plain = [plain, *torch.autograd.grad(plain, [*qkv, *parameters], do)]
    for name, a, b, c in zip(["out", "dq", "dk", "dv", *"12"], got, want, plain, strict=False):
        assert not a.isnan().any() and error(a, b) <= 2 * error(c, b) + 1e-5, (
            f"{name}: {error(a, b):.1e}, naive {error(c, b):.1e}"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128, 80])
@pytest.mark.parametrize("path", ["luban", "cudnn", "flash2", "flash4"])
def test_every_kernel_computes_causal_attention(path, width, dtype):
    T = random.choice([512, 777, 1024])
    qkv = draw(2, 8, 2, T, width, dtype)
    mask = AttentionMask(queries=T, keys=T, causal=True, device=qkv[0].device)
    try:
        made = prepare(mask, head_dim=width, dtype=dtype, kernel=path)
    except UnsupportedError as reason:
        pytest.skip(str(reason))
    assert made.kernel == path
    compare(lambda: attention(*qkv, made), qkv, intervals(T, T, device="cuda"))


def starts_of(documents):
    batch = Batch(
        **dict.fromkeys(("tokens", "targets", "loss_mask", "documents", "positions"), documents.cpu().numpy())
    )
    return torch.from_numpy(batch.document_starts()).to(documents.device)


@pytest.mark.parametrize("K", [4, 1])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("share", [0.0, 0.008, 0.06])
def test_packed_documents_are_kept_apart(share, width, K):
    """Few documents, some and too many for a list, some of one token, a row of a single document, a padded tail; as
    models call it. Over 256 places in all FlashAttention-4 looks them up in another way."""
    if missing := dispatch.flash4_missing():
        pytest.skip(missing)
    B, H, T = 9, 4, 2048
    documents = (torch.rand(B, T, device="cuda") < share).cumsum(1).int()
    documents[0], documents[1, -random.randint(1, T // 2) :] = 0, -1
    documents[2, :9] += torch.arange(9, device="cuda", dtype=torch.int32)
    starts, qkv = starts_of(documents), draw(B, H, K, T, width, torch.bfloat16)
    mask = AttentionMask(
        queries=T, keys=T, causal=True, device=qkv[0].device, documents=documents, document_starts=starts
    )
    made = prepare(mask, head_dim=width, dtype=torch.bfloat16)
    assert made.kernel == ("flash4" if width == 128 and starts.shape[1] <= T // 64 else "luban")
    listed = prepare(mask, head_dim=width, dtype=torch.bfloat16, kernel="flash4")  # never the fastest for heads of 64
    assert listed.kernel == "flash4" and listed.cu_seqlens is not None
    compare(lambda: attention(*qkv, listed), qkv, intervals(T, T, documents=documents, device="cuda"))
    compare(lambda: attention(*qkv, made), qkv, intervals(T, T, documents=documents, device="cuda"))


@pytest.mark.parametrize("form", [None, "alibi", "power", "log", "t5"])
@pytest.mark.parametrize("masked", ["causal", "documents", "window", "both ways"])
@pytest.mark.parametrize(
    ("width", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float16)], ids=str
)
def test_masks_and_biases(form, masked, width, dtype):
    """Rows long enough that far distances are computed in another way than near ones."""
    T, H = random.randint(1500, 2500), 4
    qkv = draw(2, H, 2, T, width, dtype)
    mask = masked_as(masked, T)
    r = [torch.rand(H, device="cuda").add(0.2).requires_grad_() for _ in range(2)]
    weight = torch.randn(H, 32, device="cuda", requires_grad=True)
    bias, parameters = {
        None: lambda: (None, ()),
        "alibi": lambda: (alibi(alibi_slopes(H, "cuda"), T), ()),
        "power": lambda: (kerple_power(*r, T, width**-0.5), r),
        "log": lambda: (kerple_log(*r, T, width**-0.5), r),
        "t5": lambda: (t5(weight, T, causal=masked != "both ways"), [weight]),
    }[form]()
    compare(lambda: flash_attention(*qkv, mask=mask, bias=bias), qkv, mask, bias, parameters)


@pytest.mark.parametrize("masked", ["causal", "documents"])
@pytest.mark.parametrize("width", [8, 40, 96, 160, 256])
def test_other_widths_of_heads(width, masked):
    T = random.randint(300, 700)
    qkv, mask = draw(2, 4, 2, T, width, torch.bfloat16), masked_as(masked, T)
    compare(lambda: flash_attention(*qkv, mask=mask), qkv, mask)


@pytest.mark.parametrize("masked", ["causal", "documents"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("width", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float16)], ids=str
)
def test_layouts(width, dtype, block, masked):
    T, H = random.randint(600, 1200), 4
    qkv, mask = draw(2, H, 2, T, width, dtype), masked_as(masked, T)
    layout = global_random(T, block, first=1, random=2, seed=random.randrange(99), heads=H, block=block, device="cuda")
    compare(lambda: flash_attention(*qkv, mask=mask, layout=layout), qkv, mask, layout=layout)


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        *((method, None) for method in ("rope", "alibi", "kerple_power", "kerple_log", "t5")),
        ("rope", GlobalRandom(window=64)),
        ("kerple_log", Strided(window=0, stride=3)),
        ("alibi", GlobalRandom(block=128)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_models_compile_into_one_graph_and_agree_with_masks_written_out(method, layout, packed):
    spec = uniform(
        vocab_size=100,
        width=256,
        layers=2,
        context=600,
        position=Position.registry.get(method)(),
        mixer=Grouped(heads=4, kv_heads=2, layout=layout),
        feedforward=SwiGLU(width=256),
    )
    model = build_model(spec, device="cuda", dtype="bfloat16")
    tokens = torch.randint(0, 100, (2, 600), device="cuda")
    documents = torch.sort(torch.randint(0, 4, (2, 600), device="cuda"), 1).values if packed else None
    positions = starts = None
    if packed:
        starts = starts_of(documents)
        at = torch.arange(600, device="cuda").expand(2, -1)
        positions = at - (documents[:, None, :] < documents[:, :, None]).sum(-1)
    results = []
    for kernel in ("torch", None):
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True) if kernel is None else model
        logits = run(
            tokens, documents=documents, positions=positions, document_starts=starts, attention=AttentionBackend(kernel)
        ).float()
        loss = logits.log_softmax(-1)[..., 3].mean()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for (name, _), a, b in zip([("loss", None), *model.named_parameters()], *results, strict=True):
        assert error(b, a.double()) < 0.05, name
