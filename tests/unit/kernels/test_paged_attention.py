"""Attention over blocks of keys against its definition, sequence by sequence: in plain torch, and by the Triton kernel."""

from __future__ import annotations

import random

import pytest
import torch
from drawn import drawn
from interpreter import DEVICE, HERE, ON_GPU, here, run_interpreted

from luban.generate.paged_cache import PagedCache
from luban.kernels import distance
from luban.kernels.attention_mask import AttentionMask
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.nn.attention.packed import PackedTokens
from luban.nn.attention.paged import PagedAttention
from luban.nn.attention.paged_layer import PagedLayer
from luban.nn.attention.prepared_mask import Bias
from luban.nn.init import NormalInit
from luban.nn.mixer.base import AttentionShape
from luban.nn.mixer.grouped import Grouped
from luban.nn.position.alibi import Alibi
from luban.nn.position.base import PositionEncoding
from luban.nn.position.rope import Rope
from luban.serve.model_runner import ModelRunner
from luban.serve.prompt_graph import PromptGraphs, chunk_step, recorded_tokens
from luban.serve.scheduler import Chunk, SequenceState

NAN_OF_8_BITS = 0x7F
BIASES = (None, "alibi", "power", "log", "buckets")


def drawn_bias(form: str | None, heads: int, keys: int) -> distance.DistanceBias | None:
    r1, r2 = torch.rand(heads, device=DEVICE), torch.rand(heads, device=DEVICE) + 0.3
    made = {
        "alibi": lambda: distance.alibi(r1, keys),
        "power": lambda: distance.kerple_power(r1, r2, keys, 0.5),
        "log": lambda: distance.kerple_log(r1, r2, keys, 0.5),
        "buckets": lambda: distance.t5(torch.randn(heads, 8, device=DEVICE), keys, max_distance=20),
    }
    return None if form is None else made[form]()


class Case:
    """Random chunks of random sequences in a pool whose other slots hold NaN."""

    def __init__(
        self,
        rng: random.Random,
        form: str | None,
        dtype: torch.dtype,
        window: int | None,
        long: int = 1,
        kept: torch.dtype | None = None,
    ):
        self.group, self.K, self.D = (
            rng.choice([1, 2, 3, 8]),
            rng.choice([1, 2]),
            rng.choice([8, 16, 20, *([64, 128, 256] if ON_GPU else [])]),
        )
        self.H, self.block = self.group * self.K, rng.choice([4, 16])
        counts = [rng.choice([1, 1, 1, rng.randrange(2, 50)]) for _ in range(rng.randrange(1, 6))]
        starts = [rng.choice([0, rng.randrange(70 * long)]) for _ in counts]
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        self.starts, self.counts, self.window = starts, counts, window
        needed = [-(-length // self.block) for length in lengths]
        order = rng.sample(range(sum(needed) + 3), sum(needed))
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        shape = AttentionShape(self.H, self.K, self.D, window)
        self.shape, self.dtype = shape, dtype
        self.layer = PagedLayer((sum(needed) + 3) * self.block, shape, torch.device(DEVICE), dtype, kept)
        for pool in self.layer.pools():
            pool.fill_(NAN_OF_8_BITS if pool.dtype == torch.uint8 else torch.nan)
        self.k, self.v = ([torch.randn(n, self.K, self.D, device=DEVICE).to(dtype) for n in lengths] for _ in range(2))
        self.q = torch.randn(sum(counts), self.H, self.D, device=DEVICE).to(dtype)
        self.slots = [  # of every sequence's tokens
            torch.tensor(
                [table[at // self.block] * self.block + at % self.block for at in range(length)], device=DEVICE
            )
            for table, length in zip(self.tables, lengths, strict=True)
        ]
        for slots, start, keys, values in zip(self.slots, starts, self.k, self.v, strict=True):
            self.layer.write(keys[:start], values[:start], slots[:start])
        self.bias = drawn_bias(form, self.H, max(lengths))

    def packed(self) -> PackedTokens:
        """What a model runner would say."""
        positions = [s + i for s, c in zip(self.starts, self.counts, strict=True) for i in range(c)]
        slots = [
            table[at // self.block] * self.block + at % self.block
            for table, s, c in zip(self.tables, self.starts, self.counts, strict=True)
            for at in range(s, s + c)
        ]
        longest = max(map(len, self.tables))
        tables = [table + [0] * (longest - len(table)) for table in self.tables]
        return PackedTokens(
            torch.tensor(positions, device=DEVICE),
            torch.tensor(slots, device=DEVICE),
            torch.tensor(tables, dtype=torch.int32, device=DEVICE),
            tuple(self.starts),
            tuple(self.counts),
            self.block,
        )

    def run(self, kernel: str) -> torch.Tensor:
        """(N, H, D)."""
        backend = PagedAttention([self.layer], self.packed(), kernel)
        bias = None
        if self.bias is not None:
            bias = Bias(self.bias.form, PositionEncoding(distance_bias=self.bias))
        N = len(self.q)
        whole = AttentionMask(queries=N, keys=N, causal=True, device=torch.device(DEVICE))
        mask = backend.prepare(whole, self.shape, bias, self.dtype)
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, *self.new()))
        return backend.attend(q, k, v, mask, self.layer, 0.3)[0].transpose(0, 1)

    def new(self) -> list[torch.Tensor]:
        """Keys and values of the new tokens, (N, K, D)."""
        chunks = zip(self.starts, self.k, self.v, strict=True)
        return [torch.cat(x) for x in zip(*((k[s:], v[s:]) for s, k, v in chunks), strict=True)]

    def expected(self) -> torch.Tensor:
        """(N, H, D) float64."""
        found, row = [], 0
        for start, count, k, v in zip(self.starts, self.counts, self.k, self.v, strict=True):
            q, keys = self.q[row : row + count].double(), start + count
            k, v = (x.double().repeat_interleave(self.group, 1) for x in (k, v))
            scores = torch.einsum("thd,shd->hts", q, k) * 0.3
            if self.bias is not None:
                scores = scores + distance.dense(self.bias, self.bias.keys, self.bias.keys)[:, start:keys, :keys]
            away = torch.arange(start, keys, device=DEVICE)[:, None] - torch.arange(keys, device=DEVICE)
            unseen = away < 0 if self.window is None else (away < 0) | (away >= self.window)
            found.append(torch.einsum("hts,shd->thd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v))
            row += count
        return torch.cat(found)


def check(seed: int, form: str | None, kernel: str, dtype: torch.dtype = torch.float32, long: int = 1) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for window in (None, rng.randrange(1, 60)):
        case = Case(rng, form, dtype, window, long)
        error = (case.run(kernel).double() - case.expected()).abs().max()
        assert error < (2e-5 if dtype == torch.float32 and not ON_GPU else 3e-2), (seed, error)


@pytest.mark.parametrize("form", BIASES)
def test_plain_torch(form):
    for _ in range(5):
        check(random.randrange(2**32), form, "torch")


def test_plain_torch_in_bf16():
    check(random.randrange(2**32), "log", "torch", torch.bfloat16)


@here
@pytest.mark.parametrize("form", BIASES)
@pytest.mark.parametrize("dtype", drawn([torch.float32, torch.bfloat16], 1))
def test_kernel(form, dtype):
    check(random.randrange(2**32), form, "luban", dtype)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest of the 8-bit numbers, scaled so that the last axis's largest is the largest of them; float64."""
    numbers = torch.arange(256, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()].unique()
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    below = torch.searchsorted(numbers, (x.double() / scale).contiguous(), right=True).clamp(1, len(numbers) - 1)
    nearest = torch.stack([numbers[below - 1], numbers[below]], -1)
    which = (nearest - (x.double() / scale)[..., None]).abs().argmin(-1, keepdim=True)
    return nearest.gather(-1, which)[..., 0] * scale


def test_keys_and_values_in_8_bits():
    """Each head of each token by its own scale; new tokens are read as they are kept, too."""
    for _ in range(4):
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        torch.manual_seed(seed)
        case = Case(rng, rng.choice(BIASES), torch.float32, rng.choice([None, 20]), kept=torch.float8_e4m3fn)
        found = case.run("torch").double()
        kept = [case.layer.read(slots) for slots in case.slots]
        for (keys, values), k, v in zip(kept, case.k, case.v, strict=True):
            for ours, given in ((keys, k), (values, v)):
                away, least = (ours.double() - given).abs(), (rounded(given) - given).abs()
                assert (away <= least + 1e-6 * given.abs()).all(), seed  # halfway between two, either is right
        case.k, case.v = [k for k, _ in kept], [v for _, v in kept]
        assert (found - case.expected()).abs().max() < 2e-5, seed


@here
@pytest.mark.parametrize("long", [1, 8])
def test_kernel_reads_8_bits(long):
    """What the pool holds in the end; the kernel keeps what it is given within a step of the format, within a half under Triton's
    interpreter, whose rounding loses the carry out of the mantissa."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    case = Case(rng, rng.choice(BIASES), torch.float32, rng.choice([None, 20]), long, kept=torch.float8_e4m3fn)
    found, given = case.run("luban").double(), (case.k, case.v)
    kept = [case.layer.read(slots) for slots in case.slots]
    for index, (k, v) in enumerate(kept):
        for ours, theirs in ((k, given[0][index]), (v, given[1][index])):
            step = theirs.abs().amax(-1, keepdim=True) / 448 * 2**-9  # of the smallest numbers
            assert ((ours - theirs).abs() <= theirs.abs() / (8 if ON_GPU else 2) + step).all()
    case.k, case.v = [k for k, _ in kept], [v for _, v in kept]
    assert (found - case.expected()).abs().max() < (3e-2 if ON_GPU else 2e-5), seed


@here
def test_what_is_read_beside_a_chunk_is_not_seen():
    """Another sequence's keys and values may be NaN: a chunk's last tile reaches into them."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    case = Case(rng, None, torch.float32, None)
    while len(case.counts) < 2 or max(case.counts[:-1]) == 1:
        case = Case(rng, None, torch.float32, None)
    case.k[-1][:], case.v[-1][:], first = torch.nan, torch.nan, -case.counts[-1]
    found, expected = case.run("luban")[:first].double(), case.expected()[:first]
    assert (found - expected).abs().max() < (3e-2 if ON_GPU else 2e-5), seed


@here
def test_a_chunks_own_keys_are_read_where_they_were_computed():
    """The pool's copy of them may be anything; without them it may not."""
    from luban.kernels.paged_launch import PagedBias, paged_attention, paged_work

    rng = random.Random(random.randrange(2**32))
    case = Case(rng, "alibi", torch.float32, None)
    while max(case.counts) < 2:
        case = Case(rng, "alibi", torch.float32, None)
    tokens, new = case.packed(), case.new()
    work = paged_work(case.starts, case.counts, case.H, case.K, 64, torch.device(DEVICE))
    of_chunks = torch.tensor([count > 1 for count in case.counts for _ in range(count)], device=DEVICE)

    def read(own: list[torch.Tensor] | None, added: float | torch.Tensor) -> torch.Tensor:
        case.layer.keys[tokens.slots_N], case.layer.values[tokens.slots_N] = new[0] + added, new[1]
        options = {"block_size": case.block, "window": None, "scale": 0.3, "new": own}
        pools, bias = (case.layer.keys, case.layer.values, None), PagedBias.of(case.bias)
        return paged_attention(case.q.transpose(0, 1), *pools, tokens.tables_CM, work, bias, **options)[of_chunks]

    right = read(None, 0.0)
    assert torch.allclose(read(new, 0.0), right, atol=3e-2 if ON_GPU else 1e-4)
    assert torch.equal(read(new, 1.0), read(new, 0.0))
    assert not torch.allclose(read(None, 1.0 + torch.rand_like(new[0])), right, atol=1e-2)


@here
@pytest.mark.parametrize("form", [None, "log"])
def test_kernel_with_shares_of_long_rows(form):
    check(random.randrange(2**32), form, "luban", long=8)


@here
@pytest.mark.parametrize("position", drawn([Rope(), Alibi()], 1))
def test_forwards_over_prompts_of_a_recorded_size(position):
    """Equal to forwards over as many tokens as there are, whatever is read beside them and was read before."""
    spec = uniform(
        vocab_size=50,
        width=32,
        layers=1,
        context=160,  # so long that keys are shared out
        mixer=Grouped(heads=4, kv_heads=2),
        position=position,
        init=NormalInit(std=0.3),
    )
    model, rng = build_model(spec, seed=1, device=DEVICE), random.Random(4)
    pools = [PagedCache.of(model, blocks=13, block_size=8) for _ in range(2)]
    step = chunk_step(pools[0])
    assert step is not None
    recorded = PromptGraphs(model, pools[0], step, max_sequences=3, max_tokens=40, kernel="luban")
    plain, blocks = ModelRunner(model, pools[1], "torch"), rng.sample(range(12), 12)
    states = [SequenceState([rng.randrange(50) for _ in range(32)], (i, 0)) for i in range(3)]
    for state in states:
        state.table = [blocks.pop() for _ in range(4)]
    for place in pools[0].layers:
        place.keys.zero_()
    recorded.start()  # over padding alone, which goes into the last block
    assert not recorded._broken and not any(place.keys[: 12 * 8].any() for place in pools[0].layers)
    read = [0, 0, 0]
    with torch.inference_mode():
        while min(read) < 24:
            counts = [min(24 - r, rng.choice([0, 1, 5, 17])) for r in read]
            chunks = [Chunk(s, r, c) for s, r, c in zip(states, read, counts, strict=True) if c]
            if not chunks:
                continue
            found = recorded.run(chunks)
            if found is None:  # not asked for often enough yet; read again, which changes nothing
                found = recorded.run(chunks)
            assert found is not None and not recorded._broken
            found = found.clone()
            tokens_N, packed = plain._packed(chunks)
            hidden = model(tokens_N[None], attention=PagedAttention(pools[1].layers, packed, "torch"), output="hidden")
            assert found.shape == hidden.shape
            assert (found - hidden).abs().max() < (1e-4 if not ON_GPU else 3e-2), (counts, read)
            read = [r + c for r, c in zip(read, counts, strict=True)]
    slots = torch.tensor([b * 8 + i for state in states for b in state.table[:3] for i in range(8)], device=DEVICE)
    for ours, theirs in zip(pools[0].layers, pools[1].layers, strict=True):
        assert torch.allclose(ours.keys[slots], theirs.keys[slots], atol=1e-4 if not ON_GPU else 3e-2)


def test_sizes_of_recorded_forwards():
    """Every number of tokens fits, at most a quarter is read in vain where there are many, and sizes are few."""
    sizes = [recorded_tokens(count) for count in range(1, 8193)]
    assert all(count <= size for count, size in enumerate(sizes, start=1))
    assert all(size < 1.25 * count + 1 for count, size in enumerate(sizes, start=1) if count > 1024)
    assert len(set(sizes)) == 7 + 12 and sizes[-1] == 8192


@pytest.mark.skipif(HERE, reason="the kernels are tested in this process")
@pytest.mark.skipif(not pytest.importorskip("luban.kernels.available").INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(chosen):
    run_interpreted(__file__, "-m", chosen)
