"""Pieces of tensors: shared out, put together, read by any rectangle, refused where one is damaged or missing."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from luban.checkpoint.checkpoint import Checkpoint
from luban.checkpoint.index import INDEX, Entry, Held, Piece, assign, merged
from luban.checkpoint.manager import CheckpointManager
from luban.checkpoint.reader import CheckpointReader
from luban.checkpoint.saver import CheckpointSaver, save_checkpoint
from luban.core.errors import ArtifactError, DataError
from luban.nn.init import Region

RNG = np.random.default_rng()


def rectangles(shape: tuple[int, ...], parts: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(begin, shape) of rectangles that divide a tensor."""
    found = [((0,) * len(shape), shape)]
    for _ in range(parts):
        i = int(RNG.integers(len(found)))
        begin, size = found[i]
        dim = int(RNG.integers(len(shape)))
        if size[dim] < 2:
            continue
        cut = int(RNG.integers(1, size[dim]))
        low = tuple(cut if d == dim else n for d, n in enumerate(size))
        high = tuple(n - cut if d == dim else n for d, n in enumerate(size))
        past = tuple(at + cut if d == dim else at for d, at in enumerate(begin))
        found[i : i + 1] = [(begin, low), (past, high)]
    return found


def region(whole: torch.Tensor, parts: int) -> Region:
    cuts = [
        (begin, tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True)))
        for begin, size in rectangles(tuple(whole.shape), parts)
    ]
    return Region(tuple(whole.shape), [(whole[where], begin) for begin, where in cuts])


def test_any_rectangle_is_read_from_any_pieces(tmp_path):
    tensors = {f"t{i}": torch.randn(*(int(n) for n in RNG.integers(1, 9, RNG.integers(1, 4)))) for i in range(6)}
    tensors |= {"scalar": torch.randn(()), "empty": torch.randn(0, 3), "half": torch.randn(5).bfloat16()}
    parts = {name: region(t, int(RNG.integers(0, 5))) if t.dim() else t for name, t in tensors.items()}
    save_checkpoint(tmp_path / "c", Checkpoint(spec={}, model=parts))
    reader = CheckpointReader.open(tmp_path / "c")
    reader.verify()
    for name, tensor in tensors.items():
        assert torch.equal(reader.whole("model", name), tensor)
        for begin, size in rectangles(tuple(tensor.shape), 4 if tensor.dim() else 0):
            where = tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
            assert torch.equal(reader.read("model", name, begin, size), tensor[where])


def test_coverage_is_that_of_counting_every_number():
    for _ in range(60):
        shape = tuple(int(n) for n in RNG.integers(1, 5, 2))
        chosen = [r for _ in range(2) for r in rectangles(shape, 3) if RNG.random() < 0.7]
        seen = np.zeros(shape, bool)
        for begin, size in chosen:
            seen[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))] = True
        entry = Entry("float32", shape, tuple(Piece("f", "k", begin, size) for begin, size in chosen))
        assert entry.covered() == bool(seen.all())
    for shape in ((), (0, 3), (3, 0)):
        assert Entry("float32", shape, (Piece("f", "k", (0,) * len(shape), shape),)).covered()
        assert Entry("float32", shape, ()).covered() == (0 in shape)
    with pytest.raises(ArtifactError, match="no process holds some part of w"):
        merged([{"model": {"w": Entry("float32", (4,), (Piece("f", "w", (0,), (3,)),))}}])


def test_every_piece_is_written_once_by_a_holder_and_work_is_even():
    for _ in range(20):
        ranks = int(RNG.integers(1, 6))
        pieces = {Held("model", f"t{i}", (0,), (1,)): int(RNG.integers(1, 50)) for i in range(int(RNG.integers(1, 40)))}
        holders = {p: {int(r) for r in RNG.integers(0, ranks, ranks)} for p in pieces}
        found = assign([{p: n for p, n in pieces.items() if rank in holders[p]} for rank in range(ranks)])
        assert sorted(p.name for mine in found for p in mine) == sorted(p.name for p in pieces)
        assert all(rank in holders[p] for rank, mine in enumerate(found) for p in mine)
    everywhere = assign([pieces] * 4)
    loads = [sum(pieces[p] for p in mine) for mine in everywhere]
    assert max(loads) - min(loads) <= max(pieces.values())


def test_training_may_go_on_while_a_copy_is_written_and_files_are_equal(tmp_path):
    saver, weight = CheckpointSaver(), torch.randn(300, 40)
    right = weight.clone()
    for number in range(2):
        saved = saver.save(tmp_path / f"c{number}", Checkpoint(spec={}, model={"w": weight}))
        weight.fill_(float("nan"))
        saved.result()
        assert torch.equal(CheckpointReader.open(tmp_path / f"c{number}").whole("model", "w"), right)
        weight.copy_(right)
    saver.close()
    one, two = (tmp_path / f"c{n}" / "model.safetensors" for n in range(2))
    assert one.read_bytes() == two.read_bytes() and saver.time.saves == 2 and saver.time.blocked < saver.time.total


def harm_tensor(data: dict) -> None:
    data["model"]["a"]["pieces"][0]["sha256"] = "0" * 64


def harm_shape(data: dict) -> None:
    data["model"]["a"]["pieces"][0]["shape"] = [3, 3]


def harm_place(data: dict) -> None:
    data["model"]["a"]["pieces"][0]["file"] = "../model.safetensors"


@pytest.mark.parametrize("harm", [harm_tensor, harm_shape, harm_place])
def test_an_edited_index_is_refused(tmp_path, harm: Callable[[dict], None]):
    save_checkpoint(tmp_path / "c", Checkpoint(spec={}, model={"a": torch.randn(3, 4)}))
    file = tmp_path / "c" / INDEX
    data = json.loads(file.read_text())
    harm(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"c is damaged: .*index.json"):
        CheckpointReader.open(tmp_path / "c")


def test_a_save_that_fails_leaves_the_one_before_and_says_why(tmp_path, monkeypatch):
    manager, saver = CheckpointManager(tmp_path), CheckpointSaver()
    saver.save(manager.path(1), Checkpoint(spec={}, model={"a": torch.ones(3)})).result()

    def full(*_, **__):
        raise DataError("no space left")

    monkeypatch.setattr("luban.checkpoint.saver.write_safetensors", full)
    with pytest.raises(DataError, match="no space left"):
        saver.save(manager.path(2), Checkpoint(spec={}, model={"a": torch.ones(3)})).result()
    saver.close()
    assert [p.name for p in manager.folder.iterdir()] == ["step_000001"]
    assert manager.resume()[0] == 1


def test_what_reached_the_disk_wrong_is_never_finished(tmp_path, monkeypatch):
    from luban.checkpoint import saver as module

    whole = module.write_safetensors

    def wrong(tensors, path, *words):
        whole({name: tensor + (path.name == "optimizer.safetensors") for name, tensor in tensors.items()}, path, *words)

    monkeypatch.setattr(module, "write_safetensors", wrong)
    with pytest.raises(DataError, match=r"a/m in optimizer\.safetensors is not what was saved"):
        save_checkpoint(
            tmp_path / "c", Checkpoint(spec={}, model={"a": torch.ones(3)}, optimizer={"a/m": torch.ones(3)})
        )
    assert not list(tmp_path.iterdir())
