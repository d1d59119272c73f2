"""Blocks of a paged KV cache: who holds which, which can be read again, which is given out next.

Pure Python over ints: tensors belong to `luban.generate.paged_cache`. A block is one of `blocks` equal pieces of the
pool with `block_size` slots, a slot holds keys and values of one token over all layers. A sequence's *table* lists its
blocks in the order of its tokens. (Kwon et al. 2023, PagedAttention, sections 4.2 to 4.4; prefixes are shared by a hash
chain instead of the paper's list of known prompts.)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 16  # 128 bits: no two different beginnings have met in any number of requests that could be served


def prefix_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full block: a hash of its tokens and of all that stands before it.

    Args:
        parent: key of the block before, or `root_key` of the first one.
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=KEY_BYTES).digest()


def root_key(identity: str) -> bytes:
    """Parent of a first block.

    Args:
        identity: what keys and values depend on beside the tokens (adapter, template). Sequences share blocks only where it
            is the same.
    """
    return blake2b(identity.encode(), digest_size=KEY_BYTES).digest()


def source_identity(identity: str, source: Sequence[int]) -> str:
    """What the keys and values of an encoder–decoder's decoder depend on beside its tokens.

    Args:
        identity: as in `root_key`. source: tokens that the encoder reads.
    """
    return prefix_key(root_key(identity), source).hex()


def source_keys(identity: str, blocks: int) -> list[bytes]:
    """Keys of the blocks of a source, the last one's too. Every source token sees all others, so that a key stands for the
    whole source and the block's place in it.

    Args:
        identity: from `source_identity`.
    """
    root = root_key(f"source {identity}")
    return [prefix_key(root, [index]) for index in range(blocks)]


class BlockManager:
    """Reference counts of all blocks, and the prefix cache.

    A block is *held* by the sequences whose tables name it; without one it is *free*. A free block whose content has a
    key stays in the prefix cache until it is given out, the longest unused first; blocks without a key go before those.

    Args:
        blocks: in the pool.
        block_size: slots a block.
        prefix_cache: whether full blocks are kept for other sequences that begin alike.
    """

    def __init__(self, blocks: int, block_size: int, *, prefix_cache: bool = True):
        self.blocks, self.block_size, self.prefix_cache = blocks, block_size, prefix_cache
        self.references = [0] * blocks
        self._key_of: list[bytes | None] = [None] * blocks
        self._block_of: dict[bytes, int] = {}  # key → block
        self._blank = list(range(blocks - 1, -1, -1))  # free without a key; the last returned is given out first
        self._cached: dict[int, None] = {}  # free with a key, the longest unused first

    @property
    def free(self) -> int:
        """Blocks that can be given out."""
        return len(self._blank) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence need."""
        return -(-tokens // self.block_size)

    def match(self, tokens: Sequence[int], identity: str) -> list[int]:
        """Blocks that hold the longest known beginning of a sequence, without its last token, whose logits are wanted.
        They are not held by the call: see `allocate`."""
        found: list[int] = []
        key = root_key(identity)
        for end in range(self.block_size, len(tokens) if self.prefix_cache else 0, self.block_size):
            key = prefix_key(key, tokens[end - self.block_size : end])
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def key(self, shared: Sequence[int], identity: str) -> bytes:
        """Key of the last of the blocks that `match` found, the parent of what follows them."""
        return (self._key_of[shared[-1]] if shared else None) or root_key(identity)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks known under all of these keys; none where one is missing. They are not held by the call."""
        found = [self._block_of[key] for key in keys if key in self._block_of] if self.prefix_cache else []
        return found if len(found) == len(keys) else []

    def can_allocate(self, shared: Sequence[int], new: int) -> bool:
        """Whether the `shared` blocks (of `match`) can be held and `new` others given out."""
        return new + sum(self.references[block] == 0 for block in shared) <= self.free

    def allocate(self, shared: Sequence[int], new: int) -> list[int] | None:
        """A table of the `shared` blocks and `new` others, all of them or none: None where there are too few."""
        if not self.can_allocate(shared, new):
            return None
        for block in shared:
            if self.references[block] == 0:
                del self._cached[block]
            self.references[block] += 1
        return [*shared, *(self._take() for _ in range(new))]

    def _take(self) -> int:
        """Give out a free block with a count of 1."""
        if self._blank:
            block = self._blank.pop()
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            self._forget(block)
        self.references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        """Take a block out of the prefix cache."""
        key, self._key_of[block] = self._key_of[block], None
        if key is not None:
            del self._block_of[key]

    def fork(self, table: Sequence[int]) -> list[int]:
        """Another sequence's table with the same blocks."""
        for block in table:
            self.references[block] += 1
        return list(table)

    def write(self, table: list[int], index: int) -> tuple[int, int] | None:
        """Make sure that block `index` of a table belongs to its sequence alone before it is written into.

        Returns:
            (source, copy) where the content must be copied first (copy-on-write), None where it needn't. The caller sees
            that a block is free.
        """
        shared = table[index]
        if self.references[shared] == 1:
            return None
        self.references[shared] -= 1
        table[index] = self._take()
        return shared, table[index]

    def remember(self, block: int, key: bytes) -> None:
        """Enter a full block into the prefix cache; what is already known under its key stays."""
        if self.prefix_cache and self._key_of[block] is None and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, table: Sequence[int]) -> None:
        """Give back a sequence's blocks. Those of its end are given out again before those of its beginning, since more
        sequences share a beginning."""
        for block in reversed(table):
            self.references[block] -= 1
            if self.references[block] == 0:
                if self._key_of[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def clear_prefix_cache(self) -> None:
        """Forget all keys, when the same tokens would no longer have the same keys and values (other weights)."""
        for block in list(self._block_of.values()):
            self._forget(block)
        self._blank += reversed(self._cached)
        self._cached.clear()
