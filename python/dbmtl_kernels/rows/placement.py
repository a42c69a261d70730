"""Where the rows are kept and who works on a batch together, from the parameters and the process group given."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import dtensors
from .layout import ParameterLayout, check_parameters, grad_dtype
from .one_row import OneRowBuffer, ShardedOneRowBuffer, SplitOneRowBuffer
from .ranks import Ranks
from .rows import TaskGradientBuffer
from .sharded import ShardedTaskGradientBuffer
from .split import SplitTaskGradientBuffer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Buffer = TaskGradientBuffer | SplitTaskGradientBuffer
OneRow = OneRowBuffer | SplitOneRowBuffer

UNNAMED = (
    "a process group of {size} ranks is initialised and this balancer was given none: its replicas would train apart. "
    "Pass process_group=model, a DistributedDataParallel; without one process_group=torch.distributed.group.WORLD (or "
    "the group of the replicas). process_group=False leaves each rank alone; parameters of fully_shard need neither"
)


def refuse_unnamed_group() -> None:
    """Raise RuntimeError if there are other ranks, of which the balancer was told nothing."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(UNNAMED.format(size=dist.get_world_size()))


def is_distributed(parameters: list[Tensor]) -> bool:
    """Whether the parameters themselves tell which ranks work together."""
    return any(dtensors.is_dtensor(p) for p in parameters)


def widest(parameters: Iterable[Tensor]) -> torch.dtype:
    """A dtype that holds all of their gradients: float64 if any is of it, else float32."""
    dtypes = {grad_dtype(p) or p.dtype for p in parameters}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def place(
    parameters: Iterable[Tensor],
    num_tasks: int,
    state_dtype: torch.dtype | None,
    backend: str,
    process_group: ProcessGroup | DistributedDataParallel | bool | None,
    names: Sequence[str | None] | None = None,
    frozen_ok: bool = False,
    one_row: bool = False,
) -> tuple[Buffer, Ranks]:
    """The buffer for these parameters, and the ranks whose losses and gradients are averaged.

    Plain parameters of several ranks are replicas: their rows are sharded. DTensors keep the rows of their local
    shards. Parameters that differ in device or mesh get a part each.

    Args:
        parameters: leaf tensors, floating point.
        num_tasks: K.
        state_dtype: dtype of the rows; None for `widest`.
        backend: "auto" or a backend by name.
        process_group: the ranks that hold replicas, or the DistributedDataParallel that has made them so; False for
            none, None if nobody said.
        names: of each parameter, for messages; None where it has none.
        frozen_ok: parameters need not require grad.
        one_row: one for all tasks.

    Raises:
        ValueError, TypeError: parameters that cannot be balanced (see `ParameterLayout`).
        TypeError: ``process_group`` is neither a group of this rank nor None nor False; parameters of FSDP1.
        RuntimeError: there are several ranks, plain parameters, and no word about them; the ranks do not have the same.
    """
    given = check_parameters(parameters, frozen_ok)
    named = [None] * len(given) if names is None else list(names)
    if any(getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False) for p in given):
        raise TypeError(
            "shared_parameters are of FullyShardedDataParallel (FSDP1), which flattens them: use FSDP2's fully_shard"
        )
    state_dtype = widest(given) if state_dtype is None else state_dtype
    ranks = _ranks(given, process_group)
    devices = {str(p.device) for p in given}
    if len(devices) > 1 and "meta" in devices:
        raise ValueError(f"shared_parameters must hold data: they are on {', '.join(sorted(devices))}")
    members: dict[Any, list[int]] = {}
    for index, p in enumerate(given):
        members.setdefault(dtensors.placement_key(p), []).append(index)
    parts = [
        _part([given[i] for i in indices], [named[i] for i in indices], num_tasks, state_dtype, backend, ranks, one_row)
        for indices in members.values()
    ]
    if len(parts) == 1:
        return parts[0], ranks
    members_of = {i: (n, own) for n, indices in enumerate(members.values()) for own, i in enumerate(indices)}
    split = SplitOneRowBuffer if one_row else SplitTaskGradientBuffer
    return split(parts, [members_of[i] for i in range(len(given))]), ranks


def _ranks(parameters: list[Tensor], process_group: ProcessGroup | DistributedDataParallel | bool | None) -> Ranks:
    if process_group is False:
        if is_distributed(parameters):
            raise ValueError(
                "process_group=False would take the log of each rank's own loss, while fully_shard averages their "
                "gradients: leave process_group away"
            )
        return Ranks()
    if process_group is None:
        if not is_distributed(parameters):
            refuse_unnamed_group()
            return Ranks()
        meshes = [p.device_mesh for p in parameters if dtensors.is_dtensor(p)]
        largest = max(meshes, key=lambda mesh: mesh.size())
        return Ranks([largest.get_group(dim) for dim in range(largest.ndim)])
    if isinstance(process_group, DistributedDataParallel):
        held = {id(p) for p in process_group.parameters()}
        ours = any(id(p) in held for p in parameters)  # not those of a deep copy
        return Ranks([process_group.process_group], process_group if ours else None)
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            "process_group must be a process group that this rank is in, a DistributedDataParallel, None or False, got "
            f"{process_group!r}"
        )
    return Ranks([process_group])


def _part(
    parameters: list[Tensor],
    names: list[str | None],
    num_tasks: int,
    state_dtype: torch.dtype,
    backend: str,
    ranks: Ranks,
    one_row: bool,
) -> TaskGradientBuffer:
    if dtensors.is_dtensor(parameters[0]) or ranks.size == 1:
        spread = Ranks(dtensors.sharded_groups(parameters[0]))
        plain = OneRowBuffer if one_row else TaskGradientBuffer
        return plain(ParameterLayout(parameters, state_dtype, names=names), num_tasks, backend, spread)
    if len(ranks.groups) > 1:
        raise ValueError(
            f"shared_parameters has {len(parameters)} plain tensors among DTensors of a mesh of several dimensions; "
            "give them to fully_shard too, or name the group of their replicas with process_group"
        )
    layout = ParameterLayout(parameters, state_dtype, ranks.size, names)
    mine = f"{num_tasks} tasks, a state of {state_dtype}, parameters {layout.signature()}"
    ranks.check_same(mine, layout.device, f"the ranks make different balancers (this one: {mine})")
    sharded = ShardedOneRowBuffer if one_row else ShardedTaskGradientBuffer
    return sharded(layout, num_tasks, backend, ranks.groups[0])


class Wrappers:
    """The DistributedDataParallel modules that hold shared parameters: that which the user named, or any.

    Args:
        shared: ids of the shared parameters.
        ranks: who may have a wrapper that was named.
    """

    def __init__(self, shared: Collection[int], ranks: Ranks) -> None:
        self._shared, self._ranks = shared, ranks
        self._known: list[weakref.ref[DistributedDataParallel]] = []
        self._asked = 0  # how often for them in vain

    @property
    def named(self) -> DistributedDataParallel | None:
        """The one that the user named."""
        return None if self._ranks.size == 1 or self._ranks.wrapper is None else self._ranks.wrapper()

    def find(self, again: bool = False) -> list[DistributedDataParallel]:
        """All of them.

        While none is found they are looked for ever more rarely, as that takes 0.1 s, or ``again``: one may have been
        made since.
        """
        if (named := self.named) is not None:
            return [named]
        found = [module for ref in self._known if (module := ref()) is not None]
        if not found:
            self._asked += 1
            again = again or self._asked & (self._asked - 1) == 0
        if again:
            modules = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
            found = [module for module in modules if any(id(p) in self._shared for p in module.parameters())]
            self._known = [weakref.ref(module) for module in found]
        return found


def synchronises(wrapper: DistributedDataParallel) -> bool:
    """Whether its forward pass was, or is, outside of ``no_sync()``: it averages gradients in the backward pass."""
    # Within its forward pass (Lightning runs the training step there) what the last one said does not count.
    within = wrapper is DistributedDataParallel._get_active_ddp_module()
    return bool(wrapper.require_backward_grad_sync if within else wrapper.require_forward_param_sync)
