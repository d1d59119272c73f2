"""Paged attention whose result for a token doesn't depend on what else is read, bit for bit.

A token's scores are always computed in the same tile: of `TILE_TOKENS` positions and `TILE_KEYS` keys, both counted from
the beginning of its sequence, whatever part of it a forward reads; tiles of keys are folded into a running softmax in
their order. On a GPU the Triton kernel does the same with tiles of one size and undivided keys.

N packed tokens, T tokens of a tile, S its keys, H query heads, K key heads, G = H / K, R = G · T rows, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luban.core.protocols import KeysValues
from luban.nn.attention.packed import PackedTokens
from luban.nn.attention.paged import KernelMask, PagedAttention, PartMaker
from luban.nn.attention.paged_layer import PagedLayer

TILE_TOKENS = 16
TILE_KEYS = 64


@dataclass(frozen=True)
class Tile:
    """Tokens of one sequence at positions from a multiple of `TILE_TOKENS` on."""

    rows: Tensor  # (n,) of the N packed tokens
    at: Tensor  # (n,) where they stand in the tile
    keys: list[tuple[Tensor, Tensor]]  # slots (S,) and dense masks (1 or H, T, S), float32, of each tile of keys


class InvariantPagedAttention(PagedAttention):
    """See the module; arguments as in `PagedAttention`."""

    invariant = True

    def _parts(self, maker: PartMaker) -> Any:
        """The tiles of this forward for layers of one shape."""
        return _tiles(self.tokens, maker)

    def _read(
        self, q_BHTD: Tensor, mask: Any, cache: PagedLayer, scale: float | None, new: KeysValues | None = None
    ) -> Tensor:
        """(1, H, N, D), with everything in the pool, from which all is read, whichever chunk it came with."""
        if isinstance(mask, KernelMask):
            return super()._read(q_BHTD, mask, cache, scale)
        q_NHD = q_BHTD[0].transpose(0, 1)
        mixed_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
        for tile in mask:
            mixed_NHD[tile.rows] = _attend_tile(q_NHD[tile.rows], tile, cache, scale).to(mixed_NHD.dtype)
        return mixed_NHD.transpose(0, 1)[None]


def _tiles(tokens: PackedTokens, maker: PartMaker) -> list[Tile]:
    """Every sequence's new tokens, tile by tile."""
    tiles, device, row = [], tokens.positions_N.device, 0
    for index, (start, count) in enumerate(zip(tokens.starts, tokens.counts, strict=True)):
        end = start + count
        for first in range(start // TILE_TOKENS * TILE_TOKENS, end, TILE_TOKENS):
            positions = torch.arange(max(first, start), min(first + TILE_TOKENS, end), device=device)
            last, keys = int(positions[-1]), []
            # rows of the tile without a token repeat the last one: no bias reaches beyond it
            queries_1T = torch.arange(first, first + TILE_TOKENS, device=device)[None].clamp(max=last)
            for begin in range(0, last + 1, TILE_KEYS):
                keys_1S = torch.arange(begin, begin + TILE_KEYS, device=device)[None]
                slots = maker.slots(tokens.tables_CM[index : index + 1], keys_1S.clamp(max=last))[0]
                dense = maker.mask(queries_1T, keys_1S).dense
                assert dense is not None
                keys.append((slots, dense[0].float()))
            tiles.append(Tile(row + positions - start, positions - first, keys))
        row += count
    return tiles


def _attend_tile(q_nHD: Tensor, tile: Tile, cache: PagedLayer, scale: float | None) -> Tensor:
    """(n, H, D) float32."""
    (_, H, D), K = q_nHD.shape, cache.keys.shape[1]
    q_THD = q_nHD.new_zeros(TILE_TOKENS, H, D, dtype=torch.float32)
    q_THD[tile.at] = q_nHD.float() * (D**-0.5 if scale is None else scale)
    q_KRD = q_THD.view(TILE_TOKENS, K, H // K, D).permute(1, 2, 0, 3).reshape(K, -1, D)
    mixed_KRD = torch.zeros_like(q_KRD)
    largest_KR1 = q_KRD.new_full((*q_KRD.shape[:2], 1), float("-inf"))
    total_KR1 = torch.zeros_like(largest_KR1)
    for slots_S, mask_HTS in tile.keys:
        k_KSD, v_KSD = (x.transpose(0, 1).float() for x in cache.read(slots_S))
        mask_KRS = mask_HTS.expand(H, -1, -1).reshape(K, -1, TILE_KEYS)
        scores_KRS = torch.bmm(q_KRD, k_KSD.transpose(1, 2)) + mask_KRS
        now_KR1 = torch.maximum(largest_KR1, scores_KRS.amax(-1, keepdim=True))
        shift_KR1 = now_KR1.masked_fill(now_KR1 == float("-inf"), 0.0)  # of rows that have seen nothing yet
        weights_KRS, decay_KR1 = (scores_KRS - shift_KR1).exp(), (largest_KR1 - shift_KR1).exp()
        total_KR1 = total_KR1 * decay_KR1 + weights_KRS.sum(-1, keepdim=True)
        mixed_KRD = mixed_KRD * decay_KR1 + torch.bmm(weights_KRS, v_KSD)
        largest_KR1 = now_KR1
    mixed_KRD = mixed_KRD / total_KR1
    return mixed_KRD.view(K, H // K, TILE_TOKENS, D).permute(2, 0, 1, 3).reshape(TILE_TOKENS, H, D)[tile.at]
