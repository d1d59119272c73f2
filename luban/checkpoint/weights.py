"""Hashes of tensors, and one that says whether two models hold the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256, in hex, of a tensor's little-endian bytes, row by row."""
    return hashlib.sha256(_bytes(tensor.detach().cpu().contiguous())).hexdigest()


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, over (name, dtype, shape, little-endian bytes) of each full tensor in name order.

    Sharding, device and memory layout leave it unchanged. Each tensor is asked for once.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{','.join(map(str, tensor.shape))}\0"
        digest.update(head.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
