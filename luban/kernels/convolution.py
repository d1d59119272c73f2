"""Causal convolutions along a row: long ones by FFT (Poli et al. 2023, section 3), short ones by shifts. Neither mixes tokens of
different documents.

B batch, C channels, T tokens, L length of a filter, N documents of similar length, S tokens of the longest of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def long_convolution(z_BCT: Tensor, filters_CT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
    """y_t = Σ_{s ≤ t} h_{t−s} z_s, (B, C, T) in the dtype of z, computed in float32 or wider.

    Only z and the filters are saved for the backward pass, which computes their spectra again.

    Args:
        filters_CT: h, at least T values a channel; those behind T are not read.
        documents_BT: (B, T) int; the sum goes over tokens of t's run of equal numbers only. None: one document a row.

    Raises:
        ValueError: a filter is shorter than the row.
    """
    if filters_CT.shape[-1] < z_BCT.shape[-1]:
        raise ValueError(f"filters of {filters_CT.shape[-1]} values can't convolve rows of {z_BCT.shape[-1]} tokens")
    filters_CT = filters_CT[:, : z_BCT.shape[-1]]
    return _convolve(z_BCT, filters_CT, documents_BT)


@torch.library.custom_op("luban::long_convolution", mutates_args=())
def _convolve(z: Tensor, filters: Tensor, documents: Tensor | None) -> Tensor:
    out = torch.zeros_like(z) if documents is not None else None
    for rows, taps, places in _pieces(z, filters, documents):
        size = rows.shape[-1]
        spectrum = torch.fft.rfft(rows, n=2 * size) * torch.fft.rfft(taps, n=2 * size)
        y = torch.fft.irfft(spectrum, n=2 * size)[..., :size].to(z.dtype)
        if out is None:
            return y.contiguous()
        _put(out, y, places)
    assert out is not None
    return out


@torch.library.custom_op("luban::long_convolution_backward", mutates_args=())
def _convolve_backward(dy: Tensor, z: Tensor, filters: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of z and of the filters: correlations with the filters and with z."""
    wide = _wide(z)
    dz, dh = torch.zeros_like(z), torch.zeros(filters.shape, dtype=wide, device=z.device)
    for (rows, taps, places), (dys, _, _) in zip(
        _pieces(z, filters, documents), _pieces(dy, filters, documents), strict=True
    ):
        size = rows.shape[-1]
        gradient, inputs = (torch.fft.rfft(x, n=2 * size) for x in (dys, rows))
        dh[:, :size] += torch.fft.irfft((gradient * inputs.conj()).sum(0), n=2 * size)[..., :size]
        back = torch.fft.irfft(gradient * torch.fft.rfft(taps, n=2 * size).conj(), n=2 * size)[..., :size]
        if documents is None:
            dz = back.to(z.dtype).contiguous()
        else:
            _put(dz, back.to(z.dtype), places)
    return dz, dh.to(filters.dtype)


@_convolve.register_fake
def _(z, filters, documents):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@_convolve_backward.register_fake
def _(dy, z, filters, documents):
    return torch.empty_like(z, memory_format=torch.contiguous_format), torch.empty_like(filters)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    z, filters, documents = ctx.saved_tensors
    return *_convolve_backward(dy.contiguous(), z, filters, documents), None


_convolve.register_autograd(_differentiate, setup_context=_save)


def convolution_flops(batch: int, channels: int, tokens: int) -> int:
    """FLOPs of `long_convolution` over rows of one document: two transforms of every row and one of every filter at length
    2T, at 2.5·n·log₂ n each (a real transform of n values), and the product of the spectra."""
    size = 2 * tokens
    transform = round(2.5 * size * math.log2(size))
    return (2 * batch + 1) * channels * transform + 6 * batch * channels * (tokens + 1)


@register_flop_formula(torch.ops.luban.long_convolution)
def _count(z_shape, filters_shape, documents_shape, *_args, out_shape=None, **_kwargs) -> int:
    return convolution_flops(*z_shape)


def _wide(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _pieces(
    z: Tensor, filters: Tensor, documents: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]]:
    """(rows (N, C, S), filters (C, S), their places): the whole batch, or documents of similar length together, so that
    padding at most doubles their tokens."""
    wide = _wide(z)
    if documents is None:
        yield z.to(wide), filters.to(wide), None
        return
    flat = z.transpose(1, 2).flatten(0, 1)
    for places, real in document_groups(documents):
        rows = (flat[places] * real[..., None]).transpose(1, 2).to(wide)
        yield rows, filters[:, : rows.shape[-1]].to(wide), (places, real)


def _put(out_BCT: Tensor, y_NCS: Tensor, places: tuple[Tensor, Tensor] | None) -> None:
    """Write documents back to where they stand in their rows."""
    assert places is not None
    index_NS, real_NS = places
    rows, slots = index_NS[real_NS] // out_BCT.shape[-1], index_NS[real_NS] % out_BCT.shape[-1]
    out_BCT[rows, :, slots] = y_NCS.transpose(1, 2)[real_NS]


def document_groups(documents_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices that take documents out of packed rows, those of lengths between two powers of two together.

    Args:
        documents_BT: (B, T) int; a document ends where the number changes.

    Yields:
        (indices, real): (N, S) int64 indices into the flattened (B, T) tokens, 0 at padding; (N, S) bool, false at padding.
    """
    rows, length = documents_BT.shape
    first = torch.ones_like(documents_BT, dtype=torch.bool)
    first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = first.flatten().nonzero().squeeze(-1)
    sizes = torch.diff(starts, append=starts.new_tensor([rows * length]))
    classes = torch.ceil(torch.log2(sizes.double()))
    for kind in classes.unique().tolist():
        chosen = classes == kind
        begins, counts = starts[chosen], sizes[chosen]
        steps = torch.arange(int(counts.max()), device=starts.device)
        real = steps < counts[:, None]
        yield torch.where(real, begins[:, None] + steps, 0), real


def short_convolution(x_BTC: Tensor, taps_CK: Tensor, documents_BT: Tensor | None = None) -> Tensor:
    """y_t = Σ_k w_k x_{t−k} by channel, (B, T, C), over tokens of t's document.

    Args:
        taps_CK: w, w_0 that of the token itself.
        documents_BT: as in `long_convolution`.
    """
    y = x_BTC * taps_CK[:, 0]
    for k in range(1, min(taps_CK.shape[1], x_BTC.shape[1])):
        earlier = x_BTC[:, :-k]
        if documents_BT is not None:
            earlier = earlier * (documents_BT[:, k:] == documents_BT[:, :-k])[..., None]
        y = y + torch.nn.functional.pad(earlier * taps_CK[:, k], (0, 0, k, 0))
    return y
