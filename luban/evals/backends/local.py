"""A model in this process: likelihoods by forwards over padded batches, texts by the engine.

B rows in a batch, T tokens in a row, E model width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from luban.core.config import to_dict
from luban.core.errors import DataError
from luban.core.hashing import data_sha256, file_sha256
from luban.core.seeding import derive
from luban.evals.likelihood import Window, batches, negative_log_likelihood, rolling_windows
from luban.evals.requests import Prompt, Request, Response, Roll, Rolled, Score, Scored, Write, Written
from luban.generate.sampling import Sampling
from luban.load.model import LoadedModel
from luban.models.base import require_next_token
from luban.nn.invariant import use_invariant_matmuls
from luban.serve.engine import Engine
from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import Tokenizer

LOGIT_ROWS = 256  # positions whose logits are made at once


class LocalBackend:
    """A loaded model.

    Args:
        model: from `load_model`.
        precision: of the arithmetic, "float32" or "bfloat16" (autocast).
        batch_tokens: tokens of a batch, padding included.
        batch_invariant: numbers are bit for bit those of each request alone (slower).
        cache_bytes: for keys and values of texts that are written; None: as much as is free.
    """

    round_size = 256

    def __init__(
        self,
        model: LoadedModel,
        *,
        precision: str = "float32",
        batch_tokens: int = 8192,
        batch_invariant: bool = False,
        cache_bytes: int | None = None,
    ):
        self.model, self.precision, self.batch_tokens = model, precision, batch_tokens
        self.name, self.batch_invariant = model.name, batch_invariant
        self.counts: Counter[str] = Counter()
        self.cache_bytes = cache_bytes
        self._weights = weights_identity(model)
        vocabulary = model.tokenizer.content_hash if model.tokenizer else ""
        self.identity = data_sha256([self._weights, vocabulary, precision, batch_invariant])
        self._engine: Engine | None = None
        if batch_invariant:
            use_invariant_matmuls(model.module)

    def about(self) -> dict[str, Any]:
        """See `Backend`."""
        tokenizer = self.model.tokenizer
        template = tokenizer.chat_template if tokenizer else None
        return {
            "model": self.name,
            "weights": self._weights,
            "begins_with_bos": self.model.begins_with_bos,
            "bos": tokenizer.token(tokenizer.bos_id) if tokenizer and tokenizer.bos_id is not None else None,
            "chat_template": None if template is None else data_sha256(template)[:16],
            "context": self.model.spec.context,
            "precision": self.precision,
            "batch_invariant": self.batch_invariant,
        }

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's. DataError where it has none, UnsupportedError where it doesn't predict text."""
        require_next_token(self.model.spec, "an evaluation")
        return self.model.need_tokenizer()

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """A prompt as token ids, begun as the model's texts begin."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=self.model.begins_with_bos)
        return render(prompt, self.tokenizer, add_generation_prompt=True).token_ids

    def seen(self, prompt: Prompt) -> str:
        """See `Backend`."""
        return self.tokenizer.decode(self.tokens_of(prompt), skip_special=False)

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """See `Backend`."""
        scores = [request for request in requests if isinstance(request, Score)]
        rolls = [request for request in requests if isinstance(request, Roll)]
        writes = [request for request in requests if isinstance(request, Write)]
        answers = {
            Score: iter(self._score(scores) if scores else ()),
            Roll: iter(self._roll(rolls) if rolls else ()),
            Write: iter(self._write(writes) if writes else ()),
        }
        return [next(answers[type(request)]) for request in requests]

    # Likelihoods -------------------------------------------------------------------------------------------------

    def _first(self) -> int:
        """The token before a text without a context. DataError where the vocabulary has none."""
        first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        if first is None:
            raise DataError(
                f"{self.name} has neither a BOS nor an EOS token that could stand before a text without a prompt"
            )
        return first

    def pair(self, context: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it. Both are encoded as one text, so that no word is cut where they meet
        otherwise than in a text; spaces at the context's end count to the continuation."""
        if not isinstance(context, str):
            return self.tokens_of(context), self.tokenizer.encode(continuation)
        bare = context.rstrip()
        if not bare:
            return [self._first()], self.tokenizer.encode(context + continuation)
        whole, head = self.tokens_of(context + continuation), self.tokens_of(bare)
        return whole[: len(head)], whole[len(head) :]

    def _score(self, requests: Sequence[Score]) -> list[Response]:
        windows, cut = [], []
        most = self.model.spec.context
        for request in requests:
            head, tail = self.pair(request.context, request.continuation)
            if not tail:
                raise DataError(f"the continuation {request.continuation!r} has no token of its own")
            ids = [*head, *tail]
            over = max(0, len(ids) - 1 - most)
            if over >= len(head):
                raise DataError(f"a continuation of {len(tail)} tokens doesn't fit {self.name}'s context of {most}")
            ids = ids[over:]
            cut.append(over)
            scored = [i >= len(ids) - 1 - len(tail) for i in range(len(ids) - 1)]
            windows.append(Window(ids[:-1], ids[1:], scored))
        found: list[Response] = []
        for (logprob, greedy), window, over in zip(self._continuations(windows), windows, cut, strict=True):
            size = sum(window.scored)
            read = len(window.tokens) + 1 - size
            found.append(Scored(logprob=logprob, greedy=greedy, tokens=size, truncated=over, prompt_tokens=read))
        self.counts["truncated"] += sum(map(bool, cut))
        return found

    @torch.inference_mode()
    def _continuations(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether every token is the likeliest) of the scored targets of each window. Windows that read
        the same tokens, as answers of one token to one question do, share a row."""
        module, device = self.model.module, next(self.model.module.parameters()).device
        found = [(0.0, False)] * len(windows)
        shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, window in enumerate(windows):
            shared[tuple(window.tokens)].append(i)
        members = list(shared.values())
        autocast = torch.autocast(device.type, getattr(torch, self.precision), enabled=self.precision != "float32")
        budget = 1 if self.batch_invariant else self.batch_tokens
        for rows, tokens_BT, mask_BT in batches([windows[each[0]] for each in members], budget, device):
            places = [
                (b, t, i)
                for b, row in enumerate(rows)
                for i in members[row]
                for t, s in enumerate(windows[i].scored)
                if s
            ]
            with autocast:
                hidden_BTE = module(tokens_BT, mask_BT, output="hidden")
                logprobs, likeliest = self._targets(hidden_BTE, [(b, t, windows[i].targets[t]) for b, t, i in places])
            sums: dict[int, tuple[float, bool]] = {}
            for (_, _, i), logprob, greedy in zip(places, logprobs, likeliest, strict=True):
                total, every = sums.get(i, (0.0, True))
                sums[i] = total + logprob, every and greedy
            for i, each in sums.items():
                found[i] = each
        return found

    def _targets(
        self, hidden_BTE: torch.Tensor, places: Sequence[tuple[int, int, int]]
    ) -> tuple[list[float], list[bool]]:
        """Log-probability of a token at each (row, position, token), and whether it is the likeliest one there."""
        logprobs: list[float] = []
        likeliest: list[bool] = []
        for at in range(0, len(places), LOGIT_ROWS):
            b, t, wanted = torch.tensor(places[at : at + LOGIT_ROWS], device=hidden_BTE.device).T
            logits_NV = self.model.module.read(hidden_BTE[b, t][None])[0].float()
            logprobs += logits_NV.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double().tolist()
            likeliest += (logits_NV.argmax(-1) == wanted).tolist()
        return logprobs, likeliest

    def _roll(self, requests: Sequence[Roll]) -> list[Response]:
        cut: list[Window] = []
        owner: list[int] = []
        sizes = []
        for number, request in enumerate(requests):
            ids = self.tokenizer.encode(request.text)
            sizes.append(len(ids))
            parts = list(rolling_windows([self._first(), *ids], self.model.spec.context))
            cut += parts
            owner += [number] * len(parts)
        budget = 1 if self.batch_invariant else self.batch_tokens
        nats = negative_log_likelihood(
            self.model.module, cut, batch_tokens=budget, precision=getattr(torch, self.precision), title="texts"
        )
        sums = [0.0] * len(requests)
        for number, value in zip(owner, nats, strict=True):
            sums[number] += value
        return [Rolled(nats=total, tokens=size) for total, size in zip(sums, sizes, strict=True)]

    # Texts -------------------------------------------------------------------------------------------------------

    def _write(self, requests: Sequence[Write]) -> list[Response]:
        if self._engine is None:
            self._engine = Engine(self.model, cache_bytes=self.cache_bytes, batch_invariant=self.batch_invariant)
        engine, running = self._engine, []
        for request in requests:
            ids, over = self._fitting(request)
            seed = derive(request.seed, "sample", request.sample, data_sha256(request.prompt)) % 2**31
            sampling = Sampling(
                max_tokens=min(request.max_tokens, self.model.spec.context),
                temperature=request.temperature,
                top_p=request.top_p,
                stop=request.stop,
                seed=seed,
            )
            submitted = engine.request(ids, sampling)
            running.append((submitted, over))
            engine.submit(submitted)
        while not all(each.done for each, _ in running):
            engine.step()
        found: list[Response] = []
        for each, over in running:
            if each.error is not None:
                raise each.error
            result = each.result
            found.append(
                Written(
                    text=result.text,
                    finish_reason=cast(str, result.finish_reason),
                    tokens=len(result.token_ids),
                    prompt_tokens=len(each.prompt),
                    truncated=over,
                )
            )
        self.counts["truncated"] += sum(bool(over) for _, over in running)
        self.counts["cut_answers"] += sum(isinstance(r, Written) and r.finish_reason == "length" for r in found)
        return found

    def _fitting(self, request: Write) -> tuple[list[int], int]:
        """Prompt tokens that leave the context enough for the answer, and how many were cut off from the left."""
        ids = self.tokens_of(request.prompt)
        if not ids:
            ids = [self._first()]
        most = self.model.spec.context - request.max_tokens
        if most < 1:
            raise DataError(
                f"answers of {request.max_tokens} tokens leave no place for a prompt in {self.name}'s context of "
                f"{self.model.spec.context}: lower kind.max_tokens"
            )
        over = max(0, len(ids) - most)
        if over and self.model.begins_with_bos:
            return [ids[0], *ids[over + 1 :]], over
        return ids[over:], over


def weights_identity(model: LoadedModel) -> str:
    """A hash of the model's weights: its artifact's content hash, else that of its files; of an adapter's and its base's."""
    if model.adapter is not None:
        return data_sha256([model.adapter.base_weights, model.adapter.weights, to_dict(model.adapter.config)])
    if model.manifest is not None:
        return data_sha256([model.manifest.content_hash or "", str(model.path.name)])
    path = Path(model.path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.json"))
    return data_sha256([[file.name, file_sha256(file)] for file in files])
