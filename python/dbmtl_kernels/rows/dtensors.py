"""DTensors (what FSDP2's ``fully_shard`` makes of parameters) without importing them: who has none pays nothing."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    """Whether ``x`` is a DTensor; if nobody imported them there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The local shard of a DTensor; any other tensor itself. Not differentiable."""
    if not is_dtensor(x):
        return x
    with torch.no_grad():  # else what comes back has a graph
        out: Tensor = x.to_local()
    return out


def like(parameter: Tensor, shard: Tensor) -> Tensor:
    """``shard`` as a DTensor placed as ``parameter`` is, sharing memory; itself if that is none."""
    if not is_dtensor(parameter):
        return shard
    return _from_local(shard, parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride())


def local_gradient(parameter: Tensor, grad: Tensor) -> Tensor:
    """The local shard of a gradient, placed as its parameter is."""
    if not is_dtensor(grad) or not is_dtensor(parameter):
        return grad
    if grad.placements != parameter.placements:
        grad = grad.redistribute(placements=parameter.placements)
    return local(grad)


def gathered_parameters() -> list[tuple[Tensor, Tensor]]:
    """All parameters of ``fully_shard``, and what takes the place of each in a graph. Takes 0.1 s."""
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param")
    kind = () if module is None else module.FSDPParam
    found: list[Any] = [x for x in gc.get_objects() if type(x) is kind]
    return [(x.sharded_param, x._unsharded_param) for x in found if hasattr(x, "_unsharded_param")]


def sharded_groups(parameter: Tensor) -> list[ProcessGroup]:
    """The groups over which the elements of a DTensor are spread (not those over which they are replicated).

    Raises:
        ValueError: the parameter is a pending sum, which has no elements of its own.
    """
    if not is_dtensor(parameter):
        return []
    if any(placement.is_partial() for placement in parameter.placements):
        raise ValueError(f"a shared parameter of shape {tuple(parameter.shape)} is placed {parameter.placements}")
    mesh = parameter.device_mesh
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    ]


def replicated_groups(parameter: Tensor) -> list[ProcessGroup]:
    """The groups over which a DTensor is replicated."""
    if not is_dtensor(parameter):
        return []
    mesh = parameter.device_mesh
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if placement.is_replicate() and mesh.size(dim) > 1
    ]


def placement_key(parameter: Tensor) -> tuple[Any, ...]:
    """Equal for parameters whose elements are spread over the same ranks, on the same kind of device."""
    if not is_dtensor(parameter):
        return (parameter.device,)
    spread = tuple(not placement.is_replicate() for placement in parameter.placements)
    return (parameter.device, parameter.device_mesh, spread)


def stacked(parameter: Tensor, rows: Tensor) -> Tensor:
    """``rows``, (K, *local shape), as K tensors placed as ``parameter`` is: a DTensor of shape (K, *shape)."""
    if not is_dtensor(parameter):
        return rows
    from torch.distributed.tensor import Replicate, Shard

    def shifted(placement: Any) -> Any:
        if placement.is_replicate():
            return Replicate()
        if type(placement) is Shard:
            return Shard(placement.dim + 1)
        return type(placement)(placement.dim + 1, split_factor=placement.split_factor)  # of FSDP2 with TP

    placements = [shifted(placement) for placement in parameter.placements]
    return _from_local(rows, parameter.device_mesh, placements, (rows.shape[0], *parameter.shape))


def sharded_columns(rows: Tensor, mesh: Any, num_columns: int) -> Tensor:
    """``rows``, this rank's (K, n, ...) of (K, num_columns, ...), as a DTensor sharded over a mesh of one dimension."""
    from torch.distributed.tensor import Shard

    return _from_local(rows, mesh, [Shard(1)], (rows.shape[0], num_columns, *rows.shape[2:]))


def owner(mesh: Any) -> Tensor:
    """What tells one rank's part of a checkpoint from another's: its part of 0, 1, ... 1023; all without a mesh."""
    numbers = torch.arange(1024, dtype=torch.int64, device="cpu")
    if mesh is None:
        return numbers
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(numbers.to(mesh.device_type), mesh, [Shard(0)] * mesh.ndim, src_data_rank=None)


def check_owner(mine: Tensor, theirs: Tensor) -> None:
    """Raise ValueError if a checkpoint, cut as ours is, holds the part of another rank."""
    if is_dtensor(mine) and is_dtensor(theirs) and not torch.equal(local(mine).cpu(), local(theirs).cpu()):
        raise ValueError(
            "the state holds the rows of another rank: every rank must save and load a file of its own, or use "
            "torch.distributed.checkpoint"
        )


def _from_local(
    shard: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int], stride: Sequence[int] | None = None
) -> Tensor:
    from torch.distributed.tensor import DTensor

    if stride is None:
        stride = torch.empty(shape, dtype=shard.dtype, device="meta").stride()
    # Made from a view that begins where its memory does, for torch.save takes a DTensor with an offset for a tensor
    # that holds data itself, and fails.
    first = shard.as_strided(shard.shape, shard.stride(), 0)
    out = DTensor.from_local(first, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))
    out._local_tensor = shard
    return out


def whole_rows(x: DTensor) -> Iterator[Tensor]:
    """Each ``x[i]``, gathered from all ranks; every rank must go through all of them."""
    for index in range(x.shape[0]):
        row: Any = x[index]
        yield row.full_tensor()


def copy_(mine: Tensor, theirs: Tensor) -> None:
    """``mine`` from ``theirs``: a tensor of the same global shape, cut among other ranks or not at all."""
    if is_dtensor(theirs):
        same = is_dtensor(mine) and (mine.device_mesh, mine.placements) == (theirs.device_mesh, theirs.placements)
        theirs = local(theirs) if same else theirs.full_tensor()
        if same:
            local(mine).copy_(theirs)
            return
    if is_dtensor(mine):
        from torch.distributed.tensor import distribute_tensor

        theirs = theirs.to(mine.device, mine.dtype)
        theirs = local(distribute_tensor(theirs, mine.device_mesh, mine.placements, src_data_rank=None))
    local(mine).copy_(theirs)


def as_integers(grad: Tensor) -> Tensor:
    """The bits of a tensor's elements here: as whole numbers times 0 they are 0, where NaN times 0 is NaN."""
    values = local(grad)
    values = values._values() if values.layout != torch.strided else values
    values = torch.view_as_real(values) if values.is_complex() else values
    return values.view(INTEGERS[values.element_size()])
