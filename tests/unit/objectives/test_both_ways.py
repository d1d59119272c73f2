"""The bidirectional objective and the auxiliary loss against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_data import cut, tensors

from luban import build_model
from luban.core.errors import DataError
from luban.data.batch import Batch
from luban.data.collate.auxiliary import WeightedBatch, add_language_targets
from luban.data.collate.bidirectional import BEGIN, END, SPECIAL, word_bytes
from luban.data.shards import Shards
from luban.models.elmo import ElmoBody
from luban.models.spec import uniform
from luban.nn.mixer.grouped import Grouped
from luban.nn.recurrent.plain import LSTM
from luban.objectives.auxiliary import Auxiliary
from luban.objectives.bidirectional import Bidirectional
from luban.tokenizer.tokenizer import load_tokenizer


def test_every_token_is_predicted_from_either_side_inside_its_document(shards_path):
    shards = Shards.open(shards_path)
    objective = Bidirectional()
    batch = objective.examples(shards, seq_len=50, seed=0, packing="fit").gather(np.arange(3))
    for i in range(3):
        for t in range(50):
            here = batch.documents[i, t]
            before = t > 0 and here >= 0 and batch.documents[i, t - 1] == here
            assert bool(batch.loss_mask[i, t, 1]) == before
            if before:
                assert batch.targets[i, t, 1] == batch.tokens[i, t - 1]
    model = build_model(uniform(vocab_size=shards.vocab_size, width=8, body=ElmoBody(layers=1, cell=LSTM()))).double()
    tokens, targets, trained, documents = (tensors(batch)[n] for n in ("tokens", "targets", "loss_mask", "documents"))
    total = objective.loss(model)(tensors(batch)).sum
    logits = model(tokens, documents=documents)
    want = sum(
        F.cross_entropy(logits[:, :, d][trained[:, :, d]], targets[:, :, d][trained[:, :, d]], reduction="sum")
        for d in range(2)
    )
    torch.testing.assert_close(total, want, rtol=1e-6, atol=1e-6)
    assert batch.target_count == trained.sum()


def test_words_of_bytes(shards_path):
    tokenizer = load_tokenizer(shards_path / "tokenizer")
    table = word_bytes(tokenizer, 8)
    assert table[tokenizer.bos_id].tolist() == [BEGIN, SPECIAL, END, 0, 0, 0, 0, 0]
    word = tokenizer.encode("cat")[0]
    spelled = [byte + 1 for byte in tokenizer.decode([word]).encode()][:6]
    assert table[word].tolist() == [BEGIN, *spelled, END, *[0] * (6 - len(spelled))]
    batch = (
        Bidirectional(characters=8)
        .examples(Shards.open(shards_path), seq_len=20, seed=0, packing="fit")
        .gather(np.arange(2))
    )
    plain = Bidirectional().examples(Shards.open(shards_path), seq_len=20, seed=0, packing="fit").gather(np.arange(2))
    assert (batch.tokens == table[plain.tokens]).all()


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_auxiliary_loss_is_the_sum_of_two_means_however_it_is_cut(pieces):
    rng = np.random.default_rng()
    tokens = rng.integers(0, 30, (4, 12))
    task = rng.random((4, 12)) < 0.3
    task[0, 0] = True
    documents = np.zeros((4, 12), dtype=np.int32)
    documents[2, 9:] = -1
    task &= documents >= 0
    follows = np.pad(documents[:, 1:] == documents[:, :-1], ((0, 0), (0, 1))) & (documents >= 0)
    plain = Batch(
        tokens=tokens,
        targets=rng.integers(0, 30, (4, 12)),
        loss_mask=task,
        documents=documents,
        positions=np.broadcast_to(np.arange(12), (4, 12)).astype(np.int32),
    )

    objective = Auxiliary(weight=0.5)
    batch = add_language_targets(plain, 0.5)
    assert isinstance(batch, WeightedBatch) and (batch.others == (follows | task)).all()
    model = build_model(uniform(vocab_size=30, width=16, layers=1, mixer=Grouped(heads=2))).double()
    loss = objective.loss(model)
    found = [loss(part) for part in cut(tensors(batch), pieces)]
    total = sum(each.sum for each in found)
    arrays = tensors(plain)
    logits = model(arrays["tokens"], documents=arrays["documents"], positions=arrays["positions"])
    want = task_loss = F.cross_entropy(logits[arrays["loss_mask"]], arrays["targets"][arrays["loss_mask"]])
    others = torch.from_numpy(batch.others)
    want = want + 0.5 * F.cross_entropy(logits[others], arrays["targets"][others])
    sums = [sum(each.metrics["task_loss"][i] for each in found) for i in range(2)]
    torch.testing.assert_close(sums[0] / sums[1], task_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total / int(task.sum()), want, rtol=1e-5, atol=1e-6)


def test_plain_text_has_no_task(shards_path):
    with pytest.raises(DataError, match="needs conversations"):
        Auxiliary().examples(Shards.open(shards_path), seq_len=20, seed=0, packing="fit")
