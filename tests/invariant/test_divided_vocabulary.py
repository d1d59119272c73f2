"""An embedding and an output layer divided among three processes give what whole ones do, gradients included."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm
from torch import Tensor

from luban.core.plan import even_runs
from luban.kernels import limits
from luban.nn.embedding import Embedding
from luban.nn.lm_head import LMHead
from luban.parallel import vocabulary
from luban.parallel.collectives import Peers
from luban.parallel.vocabulary import DividedEmbedding, DividedVocabulary, enter_head

PROCESSES, WORDS, WIDTH, ROWS = 3, 41, 8, 23


def outputs(head: LMHead, table: Embedding, ids: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Losses, log-probabilities, entropies and logits of looked-up rows."""
    hidden = table(ids)
    logprobs, entropies = head(hidden, wanted, reduce="none")
    found = {"logits": head(hidden), "logprobs": logprobs, "entropies": entropies}
    for smoothing, z_loss in ((0.0, 0.0), (0.1, 0.0), (0.2, 1e-2)):
        found[f"loss {smoothing} {z_loss}"] = head(hidden, wanted, smoothing=smoothing, z_loss=z_loss)
    return found


def divided(whole: LMHead, table: Embedding, rank: int) -> tuple[LMHead, Embedding, slice]:
    """This process's rows of both."""
    begin, end = list(even_runs(WORDS, PROCESSES))[rank]
    rows, peers = slice(begin, end), Peers.of(dist.group.WORLD)
    part = Embedding(end - begin, WIDTH, dtype=torch.float64)
    head = LMHead(WIDTH, WORDS, bias=True).double()
    with torch.no_grad():
        part.weight.copy_(table.weight[rows])
        head.weight, head.bias = (torch.nn.Parameter(p.detach()[rows].clone()) for p in (whole.weight, whole.bias))
    lookup = DividedEmbedding(peers, begin, end - begin)
    part.register_forward_pre_hook(lookup.enter)
    part.register_forward_hook(lookup.leave)
    head.use_vocabulary(DividedVocabulary(peers, begin, WORDS))
    head.register_forward_pre_hook(enter_head(peers))
    return head, part, rows


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.norm().clamp_min(1e-9))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE=str(PROCESSES), RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    vocabulary.LOGIT_BYTES = 5 * WORDS * 8  # several chunks of rows
    torch.manual_seed(0)  # the same in all processes
    whole, table = LMHead(WIDTH, WORDS, bias=True).double(), Embedding(WORDS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (whole.weight, whole.bias):
            parameter.normal_()
    ids, wanted = torch.randint(WORDS, (2, ROWS))
    wanted[torch.rand(ROWS) < 0.3] = limits.IGNORED
    head, part, rows = divided(whole, table, rank)
    right, found, errors = outputs(whole, table, ids, wanted), outputs(head, part, ids, wanted), {}
    torch.manual_seed(1)  # parts of other sizes have drawn other numbers
    for name in right:
        errors[name] = error(found[name], right[name])
        weights = torch.randn(right[name].shape, dtype=torch.float64)
        pairs = zip(((head, part), (whole, table)), (found, right), strict=True)
        gradients = [
            torch.autograd.grad(given[name], [*h.parameters(), *t.parameters()], weights, retain_graph=True)
            for (h, t), given in pairs
        ]
        for mine, theirs in zip(*gradients, strict=True):
            errors[f"{name}, gradient"] = max(errors.get(f"{name}, gradient", 0.0), error(mine, theirs[rows]))
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("vocabulary")
    warm.processes(worker, PROCESSES, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def test_every_output_and_gradient_is_that_of_the_whole(ranks):
    for errors in ranks:
        assert len(errors) == 12 and max(errors.values()) < 1e-12, max(errors.items(), key=lambda item: item[1])
