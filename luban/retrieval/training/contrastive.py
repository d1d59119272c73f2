"""DPR's loss (Karpukhin et al. 2020, equation 2), and gradients of batches larger than memory (Gao et al. 2021, GradCache), over
several processes as well.

B questions, P passages (first the B right ones in the questions' order, then wrong ones), E width of the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from luban.parallel.world import World


def in_batch_loss(questions_BE: Tensor, passages_PE: Tensor, temperature: float) -> Tensor:
    """The mean negative log-likelihood of each question's own passage among all P of the batch; ln P at chance."""
    scores_BP = questions_BE @ passages_PE.T / temperature
    return torch.nn.functional.cross_entropy(scores_BP, torch.arange(len(questions_BE), device=scores_BP.device))


Encode = Callable[[Sequence[list[int]]], Tensor]


def backward(
    encode_questions: Encode,
    encode_passages: Encode,
    questions: Sequence[list[int]],
    passages: Sequence[list[int]],
    *,
    temperature: float,
    chunk: int,
    world: World | None = None,
) -> float:
    """Add the gradient of `in_batch_loss` to the encoders' parameters, and return the loss.

    Only `chunk` texts at a time keep their activations: all are encoded without gradients, the loss gives the gradient of
    each vector, and every chunk is encoded again and carries its vectors' gradients back. The result is that of one pass
    with all activations, for an encoder that draws nothing at random.

    Args:
        encode_questions, encode_passages: token ids of some texts → (texts, E) with gradients.
        world: processes that are given the same texts and divide the chunks. All vectors meet in the loss of each, so that every
            process's passages are negatives of the others' questions; gradients are those of its own chunks, and their sum
            over the processes is that of one.
    """
    world = world or World()
    chunks = [  # (encoder, texts, their places in the loss); texts of similar length are padded together
        (encode, [texts[place] for place in places], [begin + place for place in places])
        for encode, texts, begin in ((encode_questions, questions, 0), (encode_passages, passages, len(questions)))
        for order in [sorted(range(len(texts)), key=lambda place, texts=texts: len(texts[place]))]
        for places in (order[first : first + chunk] for first in range(0, len(order), chunk))
    ]
    own = range(world.rank, len(chunks), world.size)
    with torch.no_grad():
        found = {number: chunks[number][0](chunks[number][1]) for number in own or [0]}
        like = next(iter(found.values()))
        vectors = like.new_zeros(len(questions) + len(passages), like.shape[1])
        for number in own:
            vectors[chunks[number][2]] = found[number]
        vectors = world.sum(vectors)
    vectors.requires_grad_()
    loss = in_batch_loss(vectors[: len(questions)], vectors[len(questions) :], temperature)
    (gradient,) = torch.autograd.grad(loss, vectors)
    for number in own:
        encode, part, places = chunks[number]
        (encode(part) * gradient[places]).sum().backward()
    return float(loss.detach())
