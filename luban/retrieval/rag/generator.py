"""A model that writes answers from a question with one passage: a decoder, or an encoder–decoder such as the paper's BART.

N rows, T tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luban.core.errors import DataError
from luban.generate.prompts import prompts_of
from luban.kernels.limits import IGNORED
from luban.load.model import LoadedModel
from luban.models.encoder_decoder import EncoderDecoder
from luban.tokenizer.chat import render


class Generator:
    """Turns questions, passages and answers into tokens, and gives the log-probabilities of answers.

    Args:
        model: one that writes text, with a tokenizer.

    Raises:
        UnsupportedError: a model that writes no text.
        DataError: it has no tokenizer, or names no token that ends a text.
    """

    def __init__(self, model: LoadedModel):
        self.model, self.prompts = model, prompts_of(model.spec)
        self.tokenizer = model.need_tokenizer()
        if not model.stop_ids:
            raise DataError(f"{model.name} names no token that ends a text: answers would have no end to learn")

    def prompt(self, question: str, passage: str, answer_tokens: int) -> list[int]:
        """Token ids of a question behind one passage, whose last words are left out where the context would not hold both and
        an answer of `answer_tokens`. Raises DataError where it holds not even the question."""
        longest = self.model.spec.context - (0 if self.model.spec.body.two_sided else answer_tokens)
        words = passage.split(" ") if passage else []
        while True:
            ids = self._tokens(f"{' '.join(words)}\n\n{question}" if words else question)
            if len(ids) <= longest:
                return ids
            if not words:
                raise DataError(
                    f"a question has {len(ids)} tokens, and the context of {self.model.name} leaves {longest} for it"
                )
            words = words[: len(words) * longest // (len(ids) + 1)]

    def _tokens(self, text: str) -> list[int]:
        if self.tokenizer.chat_template is not None:
            message = {"role": "user", "content": text}
            return render([message], self.tokenizer, add_generation_prompt=True).token_ids
        source = self.model.spec.body.two_sided
        return self.tokenizer.encode(
            text if source else f"{text}\nAnswer:",
            bos=self.model.begins_with_bos,
            eos=source and self.model.ends_with_eos,
        )

    def answer(self, text: str, longest: int) -> list[int]:
        """Token ids of an answer as the model generates it, cut to `longest`: what always follows the decoder's first token,
        the text, and the token that ends it."""
        spaced = text if self.tokenizer.chat_template is not None or self.model.spec.body.two_sided else f" {text}"
        ids = [*self._forced, *self.tokenizer.encode(spaced)]
        return [*ids[: longest - 1], self.model.stop_ids[0]]

    def text(self, answer: Sequence[int]) -> str:
        """The words of generated tokens."""
        ends = (*self.model.stop_ids, *self._forced)
        return self.tokenizer.decode([token for token in answer if token not in ends]).strip()

    @property
    def _forced(self) -> tuple[int, ...]:
        """Tokens that an encoder–decoder always generates first."""
        ids = self.model.spec.body.decoder_start_ids() if self.model.spec.body.two_sided else None
        return (ids or ())[1:]

    def logprobs(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Tensor:
        """(N, T) log-probabilities of the tokens of each answer behind its prompt, with gradients where they are enabled; 0
        for tokens that are forced and behind an answer's end."""
        module = self.model.module
        device = next(module.parameters()).device
        length = max(map(len, answers))
        targets_NT = _padded(answers, IGNORED, device)
        targets_NT[:, : len(self._forced)] = IGNORED
        firsts = [self.prompts.first_tokens(prompt) for prompt in prompts]
        rows = [[*first, *answer[:-1]] for first, answer in zip(firsts, answers, strict=True)]
        tokens, real = _padded(rows, 0, device), _real(rows, device)
        if isinstance(module, EncoderDecoder):
            hidden = module(
                _padded(prompts, 0, device), tokens, _real(prompts, device), decoder_mask=real, output="hidden"
            )
        else:
            hidden = module(tokens, None if bool(real.all()) else real, output="hidden")
        starts = torch.tensor([len(first) - 1 for first in firsts], device=device)
        places_NT = (starts[:, None] + torch.arange(length, device=device)).clamp_max(hidden.shape[1] - 1)
        found = hidden.gather(1, places_NT[:, :, None].expand(-1, -1, hidden.shape[-1]))
        return module.head(torch.where((targets_NT != IGNORED)[:, :, None], found, 0.0), targets_NT, reduce="none")[0]


def _padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> Tensor:
    """(N, longest) int64, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], device=device)


def _real(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(N, longest) bool, true at tokens."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return torch.arange(int(lengths.max()), device=device) < lengths[:, None]
