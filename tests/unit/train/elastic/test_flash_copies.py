"""Copies of the state in memory: what comes back equals what was written; what is torn or not complete does not count."""

from __future__ import annotations

import pytest
import torch

from luban.checkpoint.checkpoint import Checkpoint
from luban.core.errors import ConfigError
from luban.nn.init import Region
from luban.train.elastic import flash
from luban.train.elastic.flash import FlashMemory, Owner, flash_at, newest_flash
from luban.train.elastic.shared_memory import flash_base, neighbour, remove_flash

SIZE = 3


def whole(step: int) -> dict[str, torch.Tensor]:
    """The model after a step."""
    draw = torch.Generator().manual_seed(step)
    return {"w": torch.randn(6, 4, generator=draw), "b": torch.randn(5, generator=draw).bfloat16()}


def part(step: int, rank: int) -> Checkpoint:
    """What a rank holds: two rows of the matrix, and the vector as all others."""
    tensors = whole(step)
    rows = slice(2 * rank, 2 * rank + 2)
    return Checkpoint(
        spec={},
        model={"w": Region((6, 4), [(tensors["w"][rows], (2 * rank, 0))]), "b": tensors["b"]},
        optimizer={"w/step": torch.tensor(float(step))},
        random={f"cpu@{rank}" if rank else "cpu": torch.full((7,), 10 * step + rank, dtype=torch.uint8)},
        state={"progress": {"step": step}},
        figures={"seconds": 0.5 * step, "step": step},
    )


def memories(base, generation=1, nodes=("a", "a", "a")) -> list[FlashMemory]:
    owners = [Owner(generation, rank, SIZE) for rank in range(SIZE)]
    folders = [list(dict.fromkeys((base / nodes[r], base / neighbour(r, nodes)))) for r in range(SIZE)]
    return [FlashMemory(folder, owner) for folder, owner in zip(folders, owners, strict=True)]


def check(reader, step: int) -> None:
    assert reader is not None and reader.step == step and reader.state == {"progress": {"step": step}}
    assert reader.manifest.figures == {"seconds": 0.5 * step}
    for name, tensor in whole(step).items():
        assert reader.whole("model", name).equal(tensor)
    assert reader.read("model", "w", (1, 1), (4, 2)).equal(whole(step)["w"][1:5, 1:3])  # as another plan asks for it
    assert reader.whole("optimizer", "w/step").item() == step
    for rank in range(SIZE):
        assert reader.whole("random", f"cpu@{rank}" if rank else "cpu").tolist() == [10 * step + rank] * 7


def test_the_newest_step_that_all_have_is_found(tmp_path):
    ranks = memories(tmp_path)
    assert newest_flash(tmp_path) is None
    for step in (1, 2, 3):
        for rank, memory in enumerate(ranks):
            if (step, rank) != (3, 1):  # killed before its third copy
                memory.write(part(step, rank), step)
    check(newest_flash(tmp_path), 2)
    check(flash_at(tmp_path, 2, 1), 2)


def test_a_copy_that_was_being_written_does_not_count(tmp_path, monkeypatch):
    ranks = memories(tmp_path)
    for step in (1, 2):
        for rank, memory in enumerate(ranks):
            memory.write(part(step, rank), step)
    monkeypatch.setattr(flash.zlib, "crc32", lambda text: 1 / 0)  # dies when the data is written and its header isn't
    with pytest.raises(ZeroDivisionError):
        ranks[2].write(part(3, 2), 3)
    monkeypatch.undo()
    check(newest_flash(tmp_path), 2)


def test_a_lost_node_is_rebuilt_from_the_copies_of_its_neighbours(tmp_path):
    ranks = memories(tmp_path, nodes=("a", "b", "b"))
    for step in (1, 2):
        for rank, memory in enumerate(ranks):
            memory.write(part(step, rank), step)
    remove_flash(tmp_path / "b")
    check(newest_flash(tmp_path), 2)
    assert neighbour(0, ("a", "b", "b")) == "b" and neighbour(2, ("a", "b", "b")) == "a" and neighbour(0, ("a",)) == "a"


def test_copies_of_an_earlier_generation_go_when_all_have_new_ones(tmp_path):
    for rank, memory in enumerate(memories(tmp_path)):
        memory.write(part(5, rank), 5)
    later = memories(tmp_path, generation=2)
    later[0].write(part(6, 0), 6)
    check(newest_flash(tmp_path), 5)  # the new generation has no whole step yet
    for rank in (1, 2):
        later[rank].write(part(6, rank), 6)
    later[0].write(part(7, 0), 7)
    check(newest_flash(tmp_path), 6)
    assert not list(tmp_path.glob("*/g1-*"))


def test_copies_of_an_earlier_generation_go_where_memory_is_short(tmp_path, monkeypatch, capsys):
    """A file system with memory for the files of one generation."""
    allocate = flash.os.posix_fallocate

    def limited(number: int, offset: int, size: int) -> None:
        if len(list(tmp_path.glob(f"*/*{flash.SUFFIX}"))) > SIZE:
            raise OSError(28, "No space left on device")
        allocate(number, offset, size)

    monkeypatch.setattr(flash.os, "posix_fallocate", limited)
    for generation in (1, 2):
        ranks = memories(tmp_path, generation)
        for step in (2 * generation, 2 * generation + 1):
            for rank, memory in enumerate(ranks):
                memory.write(part(step, rank), step)
        check(newest_flash(tmp_path), 2 * generation + 1)
    assert not list(tmp_path.glob("*/g1-*")) and not capsys.readouterr().err


def test_too_little_memory_is_said_and_nothing_is_kept(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(flash.os, "posix_fallocate", full, raising=False)
    memory = memories(tmp_path)[0]
    memory.write(part(1, 0), 1)
    memory.write(part(2, 0), 2)
    assert newest_flash(tmp_path) is None and not memory.enough_memory
    assert not list(tmp_path.glob("*/*"))
    assert "not enough memory for copies of the state" in capsys.readouterr().err


def test_the_folder_is_private(tmp_path, monkeypatch):
    base = flash_base(str(tmp_path), tmp_path / "run")
    assert base == flash_base(str(tmp_path), tmp_path / "run") and base.stat().st_mode & 0o777 == 0o700
    assert base != flash_base(str(tmp_path), tmp_path / "other")
    owner = base.stat().st_uid
    base.rename(
        base.with_name(base.name.replace(f"luban-{owner}", f"luban-{owner + 1}"))
    )  # as if made by somebody else
    monkeypatch.setattr("luban.train.elastic.shared_memory.os.getuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        flash_base(str(tmp_path), tmp_path / "run")


def test_only_the_default_folder_may_be_missing(tmp_path, monkeypatch):
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError, match=f"elastic.flash_folder {missing} is not a folder"):
        flash_base(str(missing), tmp_path / "run")
    monkeypatch.setattr("luban.train.elastic.shared_memory.FLASH_FOLDER", str(missing))  # a system without it
    monkeypatch.setattr("luban.train.elastic.shared_memory.tempfile.gettempdir", lambda: str(tmp_path))
    assert flash_base(str(missing), tmp_path / "run").parent == tmp_path
