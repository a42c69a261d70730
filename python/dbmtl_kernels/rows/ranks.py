"""Ranks: those that work on one batch together, and the few numbers they tell each other."""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel


# Into one tensor, and out of one. The second names are those before torch 2.13, where they warn.
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say which collective it was that failed."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"DBMTL: {what} failed on rank {dist.get_rank()} of {dist.get_world_size()} (has another rank stopped, or "
            f"taken another path through the step?): {error}"
        ) from error


class Ranks:
    """Ranks that exchange numbers, along one process group or along several (the dimensions of a mesh).

    Args:
        groups: process groups that this rank is in; reducing over one after the other reaches every rank.
        wrapper: the DistributedDataParallel that holds the parameters, where the user named it. It is not kept alive.

    Attributes:
        groups: those of more than one rank.
        size: how many ranks there are in all; 1 without a group.
        wrapper: a weak reference to that, or None.
    """

    def __init__(self, groups: Sequence[ProcessGroup] = (), wrapper: DistributedDataParallel | None = None) -> None:
        self.wrapper = None if wrapper is None else weakref.ref(wrapper)
        self.groups = [group for group in groups if dist.get_world_size(group) > 1]
        self.size = math.prod(dist.get_world_size(group) for group in self.groups)

    def sum(self, x: Tensor, what: str) -> Tensor:
        """The sum of ``x`` over all ranks, the same bits on each; ``x`` itself if there is only this one.

        Raises:
            RuntimeError: the collective failed; ``what`` is in the message.
        """
        if self.size == 1:
            return x
        total = x.clone(memory_format=torch.contiguous_format)
        for group in self.groups:
            with naming(f"all-reduce of {what}"):
                dist.all_reduce(total, group=group)
        return total

    def of_first(self, x: Tensor, what: str) -> Tensor:
        """``x`` of the first rank; ``x`` itself if there is only this one."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        for group in self.groups:
            with naming(f"broadcast of {what}"):
                dist.broadcast(out, group=group, group_src=0)
        return out

    def mean_losses(
        self, values: Sequence[Tensor], tasks: Sequence[int], num_tasks: int, device: torch.device
    ) -> list[Tensor]:
        """The losses averaged over the ranks, without a sync (on a CPU none is needed).

        Args:
            values: scalars without a graph.
            tasks: which tasks' losses they are; must be the same on every rank.
            num_tasks: K.
            device: where to reduce; the backend of the groups may know no other.

        Raises:
            RuntimeError: the ranks do not have the same tasks. On a CPU it is raised on every rank; on another device
                it stops the device's program (an assertion), as looking would take a sync.
        """
        if self.size == 1:
            return list(values)
        entries = [torch.zeros((), dtype=torch.float64, device=device)] * num_tasks
        for task, value in zip(tasks, values, strict=True):
            entries[task] = value.to(device, torch.float64)
        message = torch.cat([torch.stack(entries), _checksum(repr(list(tasks)), device)])
        total = self.sum(message, "the losses")
        self._same(total[num_tasks:], f"the ranks give different tasks (this one {list(tasks)})")
        mean = total / self.size
        return [mean[task].to(value.device, value.dtype) for task, value in zip(tasks, values, strict=True)]

    def check_same(self, what: str, device: torch.device, complaint: str) -> None:
        """Raise RuntimeError, on every rank, unless all say the same; off a CPU see `mean_losses`."""
        self.any_rank(what, [], device, complaint)

    def any_rank(self, what: str, flags: Sequence[bool], device: torch.device, complaint: str) -> list[bool]:
        """Flags that are set on any rank; read, with a sync, only where one is not set here.

        Raises:
            RuntimeError: the ranks do not all say ``what``; see `check_same`.
        """
        if self.size == 1:
            return list(flags)
        message = torch.cat([_checksum(what, device), ops.upload(tuple(map(float, flags)), torch.float64, device)])
        total = self.sum(message, "a check that all ranks do the same")
        self._same(total[:2], complaint)
        return list(flags) if all(flags) else [x > 0 for x in total[2:].tolist()]

    def _same(self, sums: Tensor, complaint: str) -> None:
        """``sums``: of a number and of its square; all numbers are equal just if size * sum(x**2) = sum(x)**2."""
        equal = sums[1] * self.size == sums[0].square()
        if sums.device.type == "cpu":
            if not bool(equal):
                raise RuntimeError(f"DBMTL: {complaint}")
        else:
            torch._assert_async(equal, f"DBMTL: {complaint}")


def _checksum(text: str, device: torch.device) -> Tensor:
    """16 bits that stand for a text, and their square; sums of up to 1,000 of them are exact."""
    number = zlib.crc32(text.encode()) & 0xFFFF
    return ops.upload((float(number), float(number**2)), torch.float64, device)
