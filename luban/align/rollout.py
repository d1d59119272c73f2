"""Answers of the policy in training, written by the engine over its live weights; token ids end to end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from luban.core.errors import TrainingError
from luban.data.collate.rollout import PER_TOKEN, RolloutBatch
from luban.generate.sampling import Sampling
from luban.load.model import LoadedModel
from luban.models.base import Model
from luban.objectives.policy import TokenLogprobs
from luban.parallel.engine import to_device
from luban.serve.engine import Engine
from luban.serve.memory import slot_bytes

MULTIPLE = 64  # of a row's length in tokens
HEADROOM = 1.1  # of the cache over what a round's tokens take


class Answers:
    """Answers to prompts, one a row; those of one prompt next to each other.

    Args:
        prompts: token ids.
        answers: token ids as generated; `sampling`: their log-probabilities under the distribution they were drawn from.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        answers: list[list[int]],
        sampling: list[list[float]],
        texts: list[str],
        finished: list[bool],
    ):
        self.prompts, self.answers, self.sampling = prompts, answers, sampling
        self.texts, self.finished = texts, finished

    def batch(self, pad_id: int, rows: np.ndarray | None = None) -> RolloutBatch:
        """The rows as a batch whose values are zeros; the length is that of all rows."""
        rows = np.arange(len(self.prompts)) if rows is None else rows
        shape = (len(rows), self.length)
        tokens, targets = (np.full(shape, pad_id, dtype=np.int64) for _ in range(2))
        mask, documents = np.zeros(shape, dtype=bool), np.full(shape, -1, dtype=np.int32)
        positions = np.zeros(shape, dtype=np.int32)
        for at, row in enumerate(rows.tolist()):
            text, begin = [*self.prompts[row], *self.answers[row]], len(self.prompts[row]) - 1
            size = len(text) - 1
            tokens[at, :size], targets[at, :size] = text[:-1], text[1:]
            mask[at, begin:size], documents[at, :size], positions[at, :size] = True, 0, np.arange(size)
        values = {name: np.zeros(shape, dtype=np.float32) for name in PER_TOKEN}
        return RolloutBatch(
            tokens=tokens,
            targets=targets,
            loss_mask=mask,
            documents=documents,
            positions=positions,
            values=values,
            count=1.0,
        )

    @property
    def length(self) -> int:
        """T: input tokens of the longest row, rounded up."""
        longest = max(len(p) + len(a) - 1 for p, a in zip(self.prompts, self.answers, strict=True))
        return -(-longest // MULTIPLE) * MULTIPLE

    def sampled(self) -> np.ndarray:
        """(N, T) log-probabilities of the distributions that the tokens were drawn from, 0 elsewhere."""
        found = np.zeros((len(self.prompts), self.length))
        for row, (prompt, logprobs) in enumerate(zip(self.prompts, self.sampling, strict=True)):
            found[row, len(prompt) - 1 : len(prompt) - 1 + len(logprobs)] = logprobs
        return found


class Sampler:
    """The engine over a model in training, whose weights it reads where they are.

    Args:
        policy: what the model was loaded as; `module`: the one in training.
        answers, seq_len: of a round, which the cache holds.
    """

    def __init__(self, policy: LoadedModel, module: Model, answers: int, seq_len: int):
        needed = int(HEADROOM * slot_bytes(module) * (answers + 1) * (seq_len + MULTIPLE))
        self.engine = Engine(replace(policy, module=module), cache_bytes=needed)

    def write(self, prompts: list[list[int]], sampling: Sampling) -> Answers:
        """`sampling.n` answers to each prompt, whose draws depend on the seed and the prompt's number (`Sampling.for_prompt`). Raises
        TrainingError where the model's logits are NaN or infinite."""
        self.engine.weights_changed()
        requests = []
        for number, prompt in enumerate(prompts):
            requests.append(self.engine.request(prompt, replace(sampling.for_prompt(number), logprobs=0)))
            self.engine.submit(requests[-1])
        while not all(request.done for request in requests):
            self.engine.step()
        if error := next((request.error for request in requests if request.error is not None), None):
            raise TrainingError(f"the policy can't be sampled from: {error}. Lower --optim.lr") from error
        choices = [choice for request in requests for choice in request.result.choices]
        return Answers(
            prompts=[prompt for prompt in prompts for _ in range(sampling.n)],
            answers=[list(choice.token_ids) for choice in choices],
            sampling=[[each.sampling_logprob for each in choice.logprobs or ()] for choice in choices],
            texts=[choice.text for choice in choices],
            finished=[choice.finish_reason == "stop" for choice in choices],
        )


@torch.no_grad()
def token_logprobs(
    loss: TokenLogprobs, batch: RolloutBatch, rows: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """(N, T) float64 log-probabilities of the answers' tokens, 0 elsewhere, and entropies; so many `rows` at once."""
    found = [loss.logprobs(piece) for piece in _pieces(batch, rows, device)]
    logprobs, entropies = (torch.cat(parts).double().cpu().numpy() for parts in zip(*found, strict=True))
    return logprobs, np.where(batch.loss_mask, entropies, 0.0)


def _pieces(batch: RolloutBatch, rows: int, device: torch.device):
    tensors = to_device(batch, device)
    for start in range(0, len(batch.tokens), rows):
        yield {name: tensor[start : start + rows] for name, tensor in tensors.items()}


@torch.no_grad()
def token_values(loss, batch: RolloutBatch, rows: int, device: torch.device) -> np.ndarray:
    """(N, T) float64 values of a critic's `ValueLoss`, 0 outside of the answers."""
    found = torch.cat([loss.values(piece) for piece in _pieces(batch, rows, device)]).double().cpu().numpy()
    return np.where(batch.loss_mask, found, 0.0)
