"""What the adapters have in common: a balancer for a model that a trainer has wrapped, and what its ranks need."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .. import recipe
from ..balancer import GradientBalancer
from ..onepass.balancer import OnePassDBMTL

# The shared parameters of a model: a function from it to them, or to a submodule, or the name of one; of a submodule
# all that require grad.
Shared = Callable[[Any], Iterable[Tensor] | nn.Module] | str


def make_balancer(
    module: nn.Module,
    wrapped: nn.Module,
    shared: Shared,
    num_tasks: int | Collection[str],
    method: Callable[..., GradientBalancer],
    options: Mapping[str, Any],
) -> GradientBalancer:
    """A balancer for what a trainer has made of a model.

    Args:
        module: the user's model, on its device.
        wrapped: the same, or what is around it.
        shared: a function from ``module`` to its shared parameters, or the name of a submodule that has them all; those
            that are frozen are left out then.
        num_tasks: K, or the names of the tasks.
        method: the class of the balancer.
        options: its other arguments. Without a ``process_group`` that of a DistributedDataParallel is taken. A
            ``weighting`` is copied, so that each balancer begins with one as it was given.

    Raises:
        AttributeError: there is no submodule of that name.
        RuntimeError: ``wrapped`` is something whose gradients cannot be balanced (DeepSpeed, DataParallel); replicas on
            several ranks without DistributedDataParallel, and no ``process_group``.
        ValueError, TypeError: as ``method``.
    """
    found = module.get_submodule(shared) if isinstance(shared, str) else shared(module)
    if not isinstance(found, (nn.Module, Mapping, Tensor)):
        found = list(found)  # it may be a generator
    parameters = recipe.Shared.of(found).parameters
    given = dict(options)
    if "weighting" in given:
        given["weighting"] = copy.deepcopy(given["weighting"])
    if given.get("process_group") is None and not any(isinstance(p, DTensor) for p in parameters):
        inner = _compiled(wrapped)
        if isinstance(inner, DistributedDataParallel):
            given["process_group"] = inner.process_group
        elif inner is not _compiled(module):
            raise RuntimeError(
                f"the gradients of a model inside {type(inner).__name__} cannot be balanced; those of "
                "DistributedDataParallel and of FSDP2 (fully_shard) can"
            )
    return method(found, num_tasks, **given)


def balancing(wrapped: nn.Module, balancer: GradientBalancer | None = None) -> AbstractContextManager[Any]:
    """A context for forward and backward of a model in which the balancer, not its wrapper, reduces gradients.

    Inside, a DistributedDataParallel is in its ``no_sync()``, unless the balancer is an `OnePassDBMTL`, or not enabled,
    and leaves that to it. A model of FSDP2's ``fully_shard`` reduces in every
    backward pass, also where a trainer that accumulates has told it not to. Any other model is left alone.

    Args:
        wrapped: what the trainer calls.
        balancer: whose backward it will be.
    """
    inner = _compiled(wrapped)
    if isinstance(inner, DistributedDataParallel):
        leaves_it = isinstance(balancer, OnePassDBMTL) or (balancer is not None and not balancer.enabled)
        return nullcontext() if leaves_it else inner.no_sync()
    return _reducing(inner) if hasattr(inner, "set_requires_gradient_sync") else nullcontext()


@contextmanager
def _reducing(sharded: Any) -> Iterator[None]:
    sharded.set_requires_gradient_sync(True)
    yield


def _compiled(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` has compiled; any other module itself."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module
