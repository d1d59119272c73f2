"""Encoder–decoders over a paged cache: sources are encoded when their sequences begin, and their keys and values stay in
blocks beside those of the decoder's tokens.

N packed tokens of the decoder, S source tokens, M blocks of a table, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from luban.generate.cache import float_parameter
from luban.generate.paged_cache import PagedCache
from luban.models.encoder_decoder import EncoderDecoder
from luban.nn.attention.packed import PackedSources, PackedTokens
from luban.nn.attention.paged import PagedAttention
from luban.nn.attention.prepared_mask import compute_dtype
from luban.nn.context import EncoderStates
from luban.serve.scheduler import Chunk, SequenceState

PADDED = 1.25  # sources that are encoded together are at most so many times as long as the shortest of them
MAX_TOKENS = 8192  # of sources that are encoded together, padding included


class SourceRunner:
    """Runs an encoder–decoder over chunks of its decoder's tokens, as a part of `luban.serve.model_runner.ModelRunner`.

    Args:
        module: the model. cache: its pool. kernel: of attention. attention: the backend.
    """

    def __init__(self, module: EncoderDecoder, cache: PagedCache, kernel: str | None, attention: type[PagedAttention]):
        self.module, self.cache, self.kernel, self.attention = module, cache, kernel, attention

    def forward(self, tokens_N: Tensor, packed: PackedTokens, chunks: Sequence[Chunk]) -> Tensor:
        """Hidden states (1, N, E) of the decoder's packed tokens; sources that are unread are encoded first."""
        new = [chunk.state for chunk in chunks if chunk.state.unread_source]
        states_1SE, slots = self._encode(new) if new else (None, None)
        sources = PackedSources(self._tables(chunks), tuple(_of_tokens(chunks)), slots)
        attention = self.attention(self.cache.layers, packed, self.kernel, sources)
        encoded = EncoderStates(states_1SE, None, compute_dtype(float_parameter(self.module)))
        return self.module(None, tokens_N[None], encoder_states=encoded, attention=attention, output="hidden")

    def _tables(self, chunks: Sequence[Chunk]) -> Tensor:
        """(N, M) blocks of every token's source."""
        longest = max(len(chunk.state.source_table) for chunk in chunks)
        rows = [
            chunk.state.source_table + [0] * (longest - len(chunk.state.source_table))
            for chunk in chunks
            for _ in range(chunk.count)
        ]
        return torch.tensor(rows, dtype=torch.int32).to(self.cache.device, non_blocking=True)

    def _encode(self, states: Sequence[SequenceState]) -> tuple[Tensor, Tensor]:
        """(1, S, E) encoder states of all tokens of these sequences' sources, and their slots."""
        found, slots = [], []
        for group in [[state] for state in states] if self.attention.invariant else _groups(states):
            longest = max(len(state.source) for state in group)
            tokens = torch.tensor([state.source + [0] * (longest - len(state.source)) for state in group])
            lengths = torch.tensor([len(state.source) for state in group])
            mask = None if int(lengths.min()) == longest else torch.arange(longest) < lengths[:, None]
            tokens, device_mask = (None if x is None else x.to(self.cache.device) for x in (tokens, mask))
            assert tokens is not None
            states_RSE = self.module.encode(tokens, device_mask).states
            assert states_RSE is not None
            found.append(states_RSE.flatten(0, 1) if device_mask is None else states_RSE[device_mask])
            slots += [self._slots(state) for state in group]
        return torch.cat(found)[None], torch.from_numpy(np.concatenate(slots)).to(self.cache.device)

    def _slots(self, state: SequenceState) -> np.ndarray:
        """Of every token of a source."""
        size, at = self.cache.block_size, np.arange(len(state.source))
        return np.asarray(state.source_table, dtype=np.int64)[at // size] * size + at % size


def _of_tokens(chunks: Sequence[Chunk]) -> list[int]:
    """Length of every packed token's source."""
    return [len(chunk.state.source) for chunk in chunks for _ in range(chunk.count)]


def _groups(states: Sequence[SequenceState]) -> list[list[SequenceState]]:
    """Sequences whose sources are encoded together, padded little."""
    groups: list[list[SequenceState]] = []
    for state in sorted(states, key=lambda state: len(state.source)):
        longest = len(state.source)
        if groups and longest <= PADDED * len(groups[-1][0].source) and longest * (len(groups[-1]) + 1) <= MAX_TOKENS:
            groups[-1].append(state)
        else:
            groups.append([state])
    return groups
