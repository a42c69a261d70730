"""Stochastic rounding to bfloat16: which random number rounds which element. Every backend gives these very bits.

An fp32 number lies between two bfloat16 neighbours; it goes to the farther from zero with the probability of its place
between them, so that the mean of many roundings is the number itself. The random number of an element depends on a
seed, its row and its column alone: not on threads, tiles or the device.

    key(seed, row)  = mix64(mix64(seed) + row)                       the finaliser of SplitMix64, 64 bits
    x  = (c ^ (c >> 16)) * 0x7FEB352D                                c = column mod 2**32, xor the key's low word
    x ^= the key's high word + (column >> 32) * 0x9E3779B1           so that columns beyond 2**32 differ
    random = ((x ^ (x >> 15)) * 0x846CA68B) >> 16                    16 bits; all of this in 32-bit integers
    rounded = (bits of the fp32 number + random) >> 16               NaN stays NaN

Sources: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014) for mix64 and its constants; the
32-bit constants are those of a published two-round integer hash (C. Wellons, "lowbias32").
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW32, _LOW64 = 2**32 - 1, 2**64 - 1


def mix64(z: int) -> int:
    """The finaliser of SplitMix64 on integers modulo 2**64."""
    z = (z + 0x9E3779B97F4A7C15) & _LOW64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LOW64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LOW64
    return z ^ (z >> 31)


def row_key(seed: int, row: int) -> int:
    """The 64-bit key of a row; seeds are taken modulo 2**64."""
    return mix64((mix64(seed & _LOW64) + row) & _LOW64)


def row_key_of(seed: Tensor, row: int) -> Tensor:
    """`row_key` of an int64 seed that lies on a device: the int64 of the same bits, without a sync."""

    def shifted(z: Tensor, by: int) -> Tensor:
        return (z >> by) & ((1 << (64 - by)) - 1)  # an int64 is shifted with its sign

    def mixed(z: Tensor) -> Tensor:  # `mix64`, its constants as int64
        z = z + (0x9E3779B97F4A7C15 - 2**64)
        z = (z ^ shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
        z = (z ^ shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
        return z ^ shifted(z, 31)

    return mixed(mixed(seed) + row)


def update_seed(seed: int, count: int) -> int:
    """The seed of the ``count``-th update made with ``seed``: an int64, not negative."""
    return (mix64(seed & _LOW64) + count) & (2**63 - 1)


def random_bits(key: int | Tensor, column: int, count: int, device: torch.device) -> Tensor:
    """(count,) int64 random numbers in [0, 2**16) of the columns from ``column`` on."""
    columns = torch.arange(column, column + count, device=device)
    x = (columns & _LOW32) ^ (key & _LOW32)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW32
    x ^= ((key >> 32) + (columns >> 32) * 0x9E3779B1) & _LOW32
    return (((x ^ (x >> 15)) * 0x846CA68B) & _LOW32) >> 16


def to_bfloat16(x: Tensor, key: int | Tensor, column: int = 0) -> Tensor:
    """``x`` (n,) float32, rounded stochastically to bfloat16 as columns ``column`` to ``column + n`` of a row."""
    bits = x.contiguous().view(torch.int32).to(torch.int64) & _LOW32
    rounded = (bits + random_bits(key, column, x.numel(), x.device)) >> 16
    rounded = torch.where(x.isnan(), (bits >> 16) | 0x40, rounded)
    return (rounded - ((rounded & 0x8000) << 1)).to(torch.int16).view(torch.bfloat16)
