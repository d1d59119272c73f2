"""A batch of sequences that grow together, one token each a step; sequences may join and leave between steps.

Results don't depend on who shares the batch: every draw is a function of the request's seed, its continuation
and its step (rounding of the logits aside, which a batch of another shape may change in the last bits).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from luban.core.errors import LubanError
from luban.generate.cache import ContiguousCache
from luban.generate.logits import add_biases, forbid, penalise, subtract
from luban.generate.prompts import DecoderPrompts
from luban.generate.sampler import draw, uniform
from luban.generate.sampling import Sampling
from luban.generate.token_mask import Matcher, mask_logits
from luban.models.base import Model


class NotFiniteError(LubanError):
    """Logits from which no token can be chosen."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are NaN or infinite: its weights are damaged, or its precision is too low (try "
            "--dtype float32 or bfloat16)"
        )


@dataclass
class TokenLogprob:
    """Log-probabilities of a token, in nats."""

    token: int
    logprob: float  # under the model's own distribution, before penalties, biases, masks, temperature and filters
    top: list[tuple[int, float]]  # the model's likeliest tokens with theirs, likeliest first
    sampling_logprob: float | None = None  # under the distribution that it was drawn from; none: a prompt's token


NO_TOKEN = -1


@dataclass(eq=False)
class Sequence:
    """One continuation in the making."""

    prompt: list[int]  # token ids, at least one
    sampling: Sampling
    seed: int  # of its draws
    choice: int = 0  # which of the request's n continuations
    ends: tuple[int, ...] = ()  # tokens that end a text, which don't come before `min_tokens`
    matcher: Matcher | None = None  # of the request's structure
    tokens: list[int] = field(default_factory=list)  # generated so far
    cached_tokens: int = 0  # of the prompt, whose keys and values were there from earlier ones
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of each, where asked for
    prompt_logprobs: list[TokenLogprob] = field(
        default_factory=list
    )  # of the prompt's after the first, where asked for

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)


class Session:
    """Runs a decoder over sequences with a contiguous cache.

    Args:
        module: a causal decoder; it is called in inference mode. UnsupportedError for any other.
    """

    prompts_class: ClassVar[type[DecoderPrompts]] = DecoderPrompts

    def __init__(self, module: Model):
        self.module = module.eval()
        self.spec, self.prompts = module.spec, self.prompts_class(module.spec)
        self.sequences: list[Sequence] = []
        self.cache: ContiguousCache | None = None
        self.logits: Tensor | None = None  # (B, V) float32, of each sequence's next token

    @torch.inference_mode()
    def add(self, sequences: SequenceOf[Sequence]) -> None:
        """Read the prompts of new sequences; equal prompt objects are read once.

        Raises ContextError, before anything is read, when a prompt fills the context.
        """
        for sequence in sequences:
            self.prompts.check(sequence.prompt)
        if not sequences:
            return
        prompts = {id(s.prompt): s.prompt for s in sequences}
        cache, logits = self._prefill(list(prompts.values()))
        rows = [list(prompts).index(id(s.prompt)) for s in sequences]
        if rows != list(range(len(prompts))):
            cache.select(rows)
            logits = logits[rows]
        if self.cache is None or self.logits is None:
            self.cache, self.logits = cache, logits
        else:
            self.cache.join(cache)
            self.logits = torch.cat((self.logits, logits))
        self.sequences.extend(sequences)

    def _prefill(self, prompts: list[list[int]]) -> tuple[ContiguousCache, Tensor]:
        tokens, mask = self._padded(prompts)
        cache = ContiguousCache.of(self.module, len(prompts))
        return cache, self._next_logits(tokens, mask, cache)

    def _padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """(B, T) tokens padded on the left, and which are real (None: all)."""
        device, longest = next(self.module.parameters()).device, max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        if all(len(p) == longest for p in prompts):
            return tokens, None
        padding = torch.tensor([longest - len(p) for p in prompts], device=device)
        return tokens, torch.arange(longest, device=device) >= padding[:, None]

    def _next_logits(self, tokens: Tensor, mask: Tensor | None, cache: ContiguousCache) -> Tensor:
        hidden = self.module(tokens, mask, cache=cache, output="hidden")
        return self.module.read(hidden[:, -1]).float()

    @torch.inference_mode()
    def choose(self) -> list[Chosen]:
        """Append one token to every sequence; returns the tokens in the order of `sequences`, as the function `choose`."""
        assert self.logits is not None
        return choose(self.logits, self.sequences, self.prompts.seen)

    @torch.inference_mode()
    def keep(self, going_on: SequenceOf[Sequence]) -> None:
        """Drop the sequences that are not in `going_on`."""
        rows = [row for row, sequence in enumerate(self.sequences) if sequence in going_on]
        if not rows:
            self.sequences, self.cache, self.logits = [], None, None
        elif len(rows) != len(self.sequences):
            assert self.cache is not None and self.logits is not None
            self.sequences = [self.sequences[row] for row in rows]
            self.cache.select(rows)
            self.logits = self.logits[rows]

    @torch.inference_mode()
    def replace(self, rows: list[int], sequences: SequenceOf[Sequence]) -> None:
        """Go on with these sequences, which begin as those of the given rows do, a row for each."""
        assert self.cache is not None and self.logits is not None
        self.sequences = list(sequences)
        if rows != list(range(len(self.logits))):
            self.cache.select(rows)
            self.logits = self.logits[rows]

    @torch.inference_mode()
    def advance(self, going_on: SequenceOf[Sequence]) -> None:
        """Drop the sequences that are not in `going_on` and read the last token of those that are."""
        self.keep(going_on)
        if self.cache is None or self.logits is None:
            return
        tokens = torch.tensor([[s.tokens[-1]] for s in self.sequences], device=self.logits.device)
        self.logits = self._next_logits(tokens, None, self.cache)


Chosen = int | None | Exception  # a token; None: no token can be chosen; an error: the request's structure broke


def choose(logits_BV: Tensor, sequences: SequenceOf[Sequence], seen: Callable[[Sequence], list[int]]) -> list[Chosen]:
    """Append one token to every sequence; returns the tokens in the same order, None where a sequence's logits are such
    that none can be chosen (NaN, +∞, or all −∞), an error where its structure can't be followed further.

    Args:
        logits_BV: float32, of each sequence's next token.
        seen: the tokens that a penalty on repetition counts.
    """
    logits = processed(logits_BV, sequences, seen)
    chosen, logprobs_B = draw(logits, [s.sampling for s in sequences], quantiles(sequences))
    valid = logits_BV.amax(-1).isfinite()  # the maximum is NaN where any logit is
    if logits is not logits_BV:
        valid &= logits.amax(-1).isfinite()
    tokens: list[int] = torch.where(valid, chosen, NO_TOKEN).tolist()
    _keep_logprobs(logits_BV, sequences, [max(token, 0) for token in tokens], logprobs_B)
    found: list[Chosen] = []
    for sequence, token in zip(sequences, tokens, strict=True):
        sequence.tokens.append(token)
        found.append(None if token == NO_TOKEN else token)
        if sequence.matcher is not None and token != NO_TOKEN:
            sequence.matcher.consume(token)
            found[-1] = sequence.matcher.error or token
    return found


def quantiles(sequences: SequenceOf[Sequence], ahead: int = 0) -> list[float]:
    """Of each sequence's distribution, where its next token is drawn, or the one `ahead` tokens later."""
    return [0.0 if s.sampling.greedy else uniform(s.seed, s.choice, len(s.tokens) + ahead) for s in sequences]


def draw_on_device(logits_BV: Tensor, sequences: SequenceOf[Sequence], ahead: int = 0) -> tuple[Tensor, Tensor]:
    """(B,) tokens as `choose` would append, which stay on the device, of sequences whose settings alter no logits; and the
    same with NO_TOKEN where none can be chosen. The host doesn't wait.

    Args:
        ahead: tokens of each sequence before this one that aren't in its list yet.
    """
    best_B, chosen_B = logits_BV.max(-1)  # NaN where any logit is
    if not all(s.sampling.greedy for s in sequences):
        chosen_B = draw(logits_BV, [s.sampling for s in sequences], quantiles(sequences, ahead)).tokens_B
    return chosen_B, torch.where(best_B.abs() < float("inf"), chosen_B, NO_TOKEN)


def processed(logits_BV: Tensor, sequences: SequenceOf[Sequence], seen: Callable[[Sequence], list[int]]) -> Tensor:
    """Logits after penalties, biases and masks; the argument itself where no sequence asks for any."""
    if not any(s.sampling.alters_logits for s in sequences):
        return logits_BV
    settings = [s.sampling for s in sequences]
    penalties = [setting.repetition_penalty for setting in settings]
    counted = [seen(s) if penalty != 1 else [] for s, penalty in zip(sequences, penalties, strict=True)]
    logits_BV = subtract(
        penalise(logits_BV, counted, penalties),
        [s.tokens for s in sequences],
        [setting.presence_penalty for setting in settings],
        [setting.frequency_penalty for setting in settings],
    )
    logits_BV = add_biases(logits_BV, [setting.logit_bias for setting in settings])
    logits_BV = forbid(logits_BV, [s.ends if len(s.tokens) < s.sampling.min_tokens else () for s in sequences])
    return mask_logits(logits_BV, [s.matcher for s in sequences])


def beam_candidates(
    logits_BV: Tensor, sequences: SequenceOf[Sequence], seen: Callable[[Sequence], list[int]], wanted: int
) -> list[list[tuple[int, float]] | None]:
    """Of each sequence the `wanted` likeliest tokens with their log-probabilities, penalties, biases and masks applied;
    None for one whose logits are NaN, +∞ or all −∞."""
    logprobs_BV = processed(logits_BV, sequences, seen).log_softmax(-1)
    values, ids = logprobs_BV.topk(min(wanted, logprobs_BV.shape[-1]))
    valid: list[bool] = (logits_BV.amax(-1).isfinite() & values[:, 0].isfinite()).tolist()
    found: list[list[tuple[int, float]] | None] = []
    for fine, tokens, logprobs, sequence in zip(valid, ids.tolist(), values.tolist(), sequences, strict=True):
        following = list(zip(tokens, logprobs, strict=True))
        whole = sequence.matcher is not None and sequence.matcher.finished  # then any end token ends the same text
        found.append(following[: 1 if whole else None] if fine else None)
    return found


def _keep_logprobs(
    logits_BV: Tensor, sequences: SequenceOf[Sequence], tokens: list[int], sampling_logprobs_B: Tensor
) -> None:
    """Of the chosen tokens, for the sequences that ask."""
    asked = [row for row, s in enumerate(sequences) if s.sampling.logprobs is not None]
    if not asked:
        return
    most = max(sequences[row].sampling.logprobs or 0 for row in asked)
    found = token_logprobs(logits_BV[asked], [tokens[row] for row in asked], most)
    drawn = sampling_logprobs_B[asked].tolist()
    for row, logprob, own in zip(asked, found, drawn, strict=True):
        sequence = sequences[row]
        sequence.logprobs.append(replace(logprob, top=logprob.top[: sequence.sampling.logprobs], sampling_logprob=own))


def token_logprobs(logits_BV: Tensor, tokens: SequenceOf[int], alternatives: int) -> list[TokenLogprob]:
    """The log-probability of each row's token, and of the row's likeliest `alternatives`."""
    logprobs_BV = logits_BV.float().log_softmax(-1)
    values, ids = logprobs_BV.topk(min(alternatives, logprobs_BV.shape[-1]))
    own = logprobs_BV.gather(-1, torch.tensor(tokens, device=logits_BV.device)[:, None]).squeeze(-1)
    rows = zip(tokens, own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [TokenLogprob(token, logprob, list(zip(top, best, strict=True))) for token, logprob, top, best in rows]
