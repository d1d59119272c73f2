"""Text from random BART, T5 and LongT5 models against transformers' generate: greedy tokens, rows that join and leave, drawn tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from t5_like import t5_like

import luban
from luban.core.errors import ConfigError, UnsupportedError
from luban.generate.cache import ContextError
from luban.generate.sampler import sample
from luban.generate.sampler import uniform as draw
from luban.generate.source import SourceSession, session_for
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head.hidden import Hidden
from luban.models.spec import changed, uniform
from luban.serve.engine import Request
from luban.serve.memory import slot_bytes
from luban.serve.paged import PagedBatch

transformers = pytest.importorskip("transformers")


def random_model(rng: random.Random, kind: str):
    """A small model of odd sizes whose greedy answers vary; T5's decoder is no deeper than its encoder, where their cache breaks."""
    heads, vocab = rng.choice([1, 2, 3]), rng.randrange(31, 301, 2)
    width, inner = heads * rng.choice([8, 10]), rng.randrange(20, 70)
    if kind == "bart":
        return transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=vocab,
                d_model=width,
                encoder_layers=rng.choice([1, 2]),
                decoder_layers=rng.choice([1, 3]),
                encoder_attention_heads=heads,
                decoder_attention_heads=heads,
                encoder_ffn_dim=inner,
                decoder_ffn_dim=inner,
                init_std=0.5,
                max_position_embeddings=40,
                decoder_start_token_id=rng.randrange(3, vocab),
                forced_eos_token_id=None,
            )
        )
    config, model, own = t5_like(kind, rng, 4)
    return model(
        config(
            **own,
            vocab_size=vocab,
            d_model=width,
            d_kv=8,
            d_ff=inner,
            num_layers=rng.choice([2, 3]),
            num_decoder_layers=rng.choice([1, 2]),
            num_heads=heads,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            initializer_factor=3.0,
            decoder_start_token_id=0,
            **({"feed_forward_proj": "gated-gelu"} if rng.random() < 0.5 else {}),
        )
    )


@pytest.fixture(params=["bart", "bart", "t5", "t5", "longt5"], ids=["bart-a", "bart-b", "t5-a", "t5-b", "longt5"])
def pair(request, tmp_path):
    """(theirs, ours) with the same random weights."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    rng = random.Random(seed)
    theirs = random_model(rng, request.param).eval()
    for name, parameter in theirs.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter.data, mean=0.0 if "bias" in name else 1.0, std=0.3)
    if request.node.callspec.id == "bart-b":  # as in multilingual models: the answer's language
        theirs.final_logits_bias.normal_()
        theirs.generation_config.forced_bos_token_id = rng.randrange(3, theirs.config.vocab_size)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, luban.load_model(tmp_path / "theirs")


def sources(ours, lengths=(11, 4, 1, 11)):
    """Token ids of several lengths."""
    return [torch.randint(3, ours.spec.vocab_size, (length,)).tolist() for length in lengths]


def expected(theirs, rows: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy answers up to and with the end token, of all rows at once, padded on the right."""
    longest, pad, end = max(map(len, rows)), theirs.config.pad_token_id, theirs.config.eos_token_id
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
    out = theirs.generate(ids, attention_mask=mask.long(), max_new_tokens=tokens, do_sample=False, num_beams=1)
    answers = [row[1:] for row in out.tolist()]  # without the start token
    return [row[: row.index(end) + 1] if end in row else row for row in answers]


def greedy(tokens: int) -> luban.Sampling:
    return luban.Sampling(max_tokens=tokens, temperature=0)


def test_greedy_answers_equal_theirs(pair):
    theirs, ours = pair
    rows = sources(ours)
    results = luban.Engine(ours).generate(rows, greedy(12))
    assert [r.token_ids for r in results] == expected(theirs, rows, 12)
    if theirs.generation_config.forced_bos_token_id is not None:
        assert {r.token_ids[0] for r in results} == {theirs.generation_config.forced_bos_token_id}


def test_rows_that_join_and_leave_answer_as_alone(pair):
    _, ours = pair
    rows = sources(ours, (5, 9, 2, 9))
    alone = [
        luban.Engine(ours).generate([row], greedy(n))[0].token_ids for row, n in zip(rows, (3, 10, 7, 10), strict=True)
    ]
    engine, requests = luban.Engine(ours, max_batch=3), []
    for row, tokens in zip(rows, (3, 10, 7, 10), strict=True):  # a new one joins after every step; the fourth waits
        requests.append(Request(row, greedy(tokens)))
        engine.submit(requests[-1])
        engine.step()
    while not all(request.done for request in requests):
        engine.step()
    assert [request.result.token_ids for request in requests] == alone


@pytest.mark.parametrize("swap_bytes", [0, 1 << 24], ids=["recompute", "swap"])
def test_answers_under_load_and_preemption_equal_theirs(pair, swap_bytes):
    """More requests than memory for them, in two waves: sources are preempted, found again, and shared."""
    theirs, ours = pair
    rows = sources(ours, (11, 4, 1, 11, 7, 19))
    rows += rows[:3]
    wanted = [expected(theirs, [row], 14)[0] for row in rows]
    batch = PagedBatch(
        ours.module,
        max_batch=6,
        block_size=4,
        cache_bytes=(10 + 8) * 4 * slot_bytes(ours.module),
        swap_bytes=swap_bytes,
    )
    engine = luban.Engine(ours, paged=True)
    engine.batch = batch
    requests = [
        Request(row, replace(greedy(14), n=1 + index % 2), ends=ours.stop_ids) for index, row in enumerate(rows)
    ]
    for request in requests[:6]:
        engine.submit(request)
    for _ in range(3):
        engine.step()
    for request in requests[6:]:
        engine.submit(request)
    while engine.step():
        pass
    for request, answer in zip(requests, wanted, strict=True):
        assert [choice.token_ids for choice in request.result.choices] == [answer] * request.sampling.n
    scheduler = batch.scheduler
    assert scheduler.manager.free == scheduler.manager.blocks and scheduler.preemptions
    assert scheduler.swaps == (scheduler.preemptions if swap_bytes else 0)
    first, before = engine.generate(rows[:1], greedy(14))[0].token_ids, scheduler.prefix_hits
    assert engine.generate(rows[:1], greedy(14))[0].token_ids == first == wanted[0]
    assert scheduler.prefix_hits >= before + len(rows[0])  # the source isn't encoded again


def test_drawn_tokens_are_those_of_the_full_pass(pair):
    _, ours = pair
    (row,), sampling = sources(ours, (6,)), luban.Sampling(max_tokens=6, temperature=1.5, top_k=20, seed=5, n=2)
    request = Request(row, sampling)
    body = ours.spec.body
    for growing, choice in zip(request.growing, luban.Engine(ours).generate([row], sampling)[0].choices, strict=True):
        assert 1 <= len(choice.token_ids) <= 6
        for step, token in enumerate(choice.token_ids):
            target = torch.tensor([[body.decoder_start, *choice.token_ids[:step]]])
            with torch.inference_mode():
                logits = ours.module(torch.tensor([row]), target)[0, -1]
            forced = body.decoder_second if step == 0 else None
            at = draw(growing.seed, growing.choice, step)
            want = sample(logits[None], [sampling], [at]).item() if forced is None else forced
            assert token == want


def test_int8_weights_answer_too(pair, tmp_path):
    _, ours = pair
    packed = luban.load_model(ours.path, dtype="int8")
    row = sources(ours, (7,))
    assert (
        len(
            luban.Engine(packed)
            .generate(row, luban.Sampling(max_tokens=5, temperature=0, ignore_eos=True))[0]
            .token_ids
        )
        == 5
    )


def test_what_begins_the_answer_survives_a_round_trip(pair, tmp_path):
    theirs, ours = pair
    luban.export_model(ours, tmp_path / "out")
    assert luban.load_model(tmp_path / "out").spec == ours.spec
    rows = sources(ours)
    back = type(theirs).from_pretrained(tmp_path / "out").eval()
    assert expected(back, rows, 9) == expected(theirs, rows, 9)


def test_the_context_bounds_source_and_answer_each(tmp_path):
    theirs = random_model(random.Random(4), "bart")
    theirs.save_pretrained(tmp_path)
    ours = luban.load_model(tmp_path)
    assert ours.spec.context == 40
    result = luban.Engine(ours).generate(
        sources(ours, (40,)), luban.Sampling(max_tokens=99, temperature=0, ignore_eos=True)
    )
    assert len(result[0].token_ids) == 39 and result[0].finish_reason == "length"
    with pytest.raises(ContextError, match="the source has 41 tokens, and the model reads 40"):
        luban.Engine(ours).generate(sources(ours, (41,)))


def test_models_that_write_no_text_are_refused():
    spec = uniform(vocab_size=20, width=16, layers=1, body=EncoderDecoderBody(decoder_start=1))
    assert isinstance(session_for(luban.build_model(spec)), SourceSession)
    with pytest.raises(UnsupportedError, match="doesn't say which token its decoder begins with"):
        session_for(luban.build_model(changed(spec, body=EncoderDecoderBody())))
    with pytest.raises(UnsupportedError, match="this encoder–decoder has head hidden"):
        session_for(luban.build_model(changed(spec, head=Hidden())))
    with pytest.raises(ConfigError, match="decoder_start must be a token id below 20, 20 given"):
        changed(spec, body=EncoderDecoderBody(decoder_start=20))
