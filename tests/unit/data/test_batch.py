"""Where the documents of rows begin, against a loop over every slot."""

from __future__ import annotations

import random

import numpy as np
import pytest

from luban.data.batch import STARTS_MULTIPLE, Batch


def batch_of(documents: np.ndarray) -> Batch:
    return Batch(
        tokens=documents.astype(np.int64),
        targets=documents.astype(np.int64),
        loss_mask=documents >= 0,
        documents=documents,
        positions=np.zeros_like(documents),
    )


def drawn(rows: int, slots: int, share: float) -> np.ndarray:
    """(rows, slots) int32: every slot begins a document with probability `share`; some rows end in padding."""
    documents = (np.random.rand(rows, slots) < share).cumsum(1).astype(np.int32)
    for row in documents:
        if random.random() < 0.5:
            row[random.randint(0, slots) :] = -1
    return documents


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_starts_are_those_of_a_loop(share):
    documents = drawn(random.randint(1, 6), random.randint(1, 300), share)
    rows, slots = documents.shape
    found = [[t for t in range(slots) if t == 0 or row[t] != row[t - 1]] for row in documents.tolist()]
    starts = batch_of(documents).document_starts()
    assert starts.dtype == np.int32 and starts.shape[0] == rows
    for row, wanted in zip(starts.tolist(), found, strict=True):
        assert row == wanted + [slots] * (len(row) - len(wanted))
    places, most = starts.shape[1], max(map(len, found))
    assert most <= places < most + STARTS_MULTIPLE and places % STARTS_MULTIPLE == 0  # the smallest that will do


def test_padding_behind_a_document_is_a_run_of_its_own():
    documents = np.array([[0, 0, 1, -1, -1], [0, 0, 0, 0, 0], [-1] * 5], dtype=np.int32)
    assert [sorted(set(row)) for row in batch_of(documents).document_starts().tolist()] == [
        [0, 2, 3, 5],
        [0, 5],
        [0, 5],
    ]


def test_a_loss_gets_every_array_by_name_rows_first():
    batch = batch_of(drawn(4, 50, 0.1))
    arrays = batch.arrays()
    assert all(arrays[name] is value for name, value in vars(batch).items())
    assert set(arrays) == {*vars(batch), "document_starts"} and all(len(array) == 4 for array in arrays.values())
    assert np.array_equal(arrays["document_starts"], batch.document_starts())
