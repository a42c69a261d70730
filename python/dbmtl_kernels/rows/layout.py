"""ParameterLayout: a list of parameters laid out as segments of one padded flat row, and what has that layout."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.arguments import GRAD_DTYPES, STATE_DTYPES
from . import dtensors

SEGMENT_BYTES = 128


class Group(NamedTuple):
    """Parameters of one dtype: columns [start, stop) of the row, a multiple of ``unit``.

    The first ``columns`` of them are there however many shards the row has; the rest makes the shards equal.
    ``flat`` is the dtype of their balanced gradients: ``dtype``, unless a ``grad_dtype`` was set.
    """

    dtype: torch.dtype
    flat: torch.dtype
    start: int
    stop: int
    columns: int
    unit: int


def describe(index: int, parameter: Tensor, name: str | None) -> str:
    """What a message calls a parameter."""
    named = "" if name is None else f" ({name!r})"
    return f"shared parameter {index}{named} of shape {tuple(parameter.shape)}"


# The dtype of a parameter's gradient; None: that of the first to come. An attribute of tensors from torch 2.10 on.
grad_dtype = attrgetter("grad_dtype" if hasattr(Tensor, "grad_dtype") else "dtype")


def check_parameters(parameters: Iterable[Tensor], frozen_ok: bool = False) -> list[Tensor]:
    """The parameters as a list; raises as `ParameterLayout` does, but for their devices.

    If ``frozen_ok``, those that do not require grad pass.
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("shared_parameters is empty (a generator that was already used up?)")
    seen: dict[int, int] = {}
    for index, p in enumerate(parameters):
        if not isinstance(p, Tensor):
            raise TypeError(f"shared_parameters[{index}] must be a tensor, got {type(p).__name__}")
        if id(p) in seen:
            raise ValueError(f"shared_parameters[{index}] repeats shared_parameters[{seen[id(p)]}]")
        seen[id(p)] = index
        if not p.is_floating_point():
            raise TypeError(f"shared_parameters[{index}] must be floating point, got {p.dtype}")
        if not p.is_leaf:
            raise ValueError(
                f"shared_parameters[{index}] of shape {tuple(p.shape)} is not a leaf: gradients do not collect in it"
            )
        if not (p.requires_grad or frozen_ok):
            raise ValueError(
                f"shared_parameters[{index}] of shape {tuple(p.shape)} does not require grad; pass "
                "[p for p in ... if p.requires_grad]"
            )
    return parameters


class ParameterLayout:
    """Where each parameter's gradient lies in a row of the task-gradient buffer.

    Each parameter gets a segment that begins on a 128-byte boundary, in the state as in the balanced gradient.
    Parameters are grouped by dtype, so that one flat tensor per dtype holds a row's worth of gradients; within a
    group they keep the order in which they were given. Elements lie in the parameter's own memory order where it
    is dense (so channels-last weights need no copy), else in logical order.

    Of a DTensor only the local shard is laid out.

    Args:
        parameters: leaf tensors on one device, each once, floating point. (Whether they require grad is not checked.)
        state_dtype: dtype of the rows.
        shards: into how many equal parts every group of columns can be cut, at multiples of 128 bytes.
        names: of each parameter, for messages; None where it has none.

    Attributes:
        parameters: the tensors, as given.
        names: of each, or None.
        segments: (n, 2) int64 on the CPU: offset and numel of each parameter, in the order given.
        groups: one `Group` per parameter dtype.
        row_numel: elements of a row, padding included.
        numel: elements of all parameters.
        wide: float64 if the state or a parameter is, else float32.
        permuted: whether any lies in another memory order than the logical one.
        distributed: whether any is a DTensor.

    Raises:
        ValueError: empty, repeated, not a leaf, several devices.
        TypeError: not a tensor, not floating point, or a state dtype other than float32, bfloat16, float64.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        state_dtype: torch.dtype = torch.float32,
        shards: int = 1,
        names: Sequence[str | None] | None = None,
    ) -> None:
        self.parameters = check_parameters(parameters, frozen_ok=True)
        self.names = [None] * len(self.parameters) if names is None else list(names)
        for index, p in enumerate(self.parameters):
            if p.device != self.parameters[0].device:
                raise ValueError(
                    f"the parameters of a layout must be on one device: [0] is on {self.parameters[0].device}, "
                    f"[{index}] on {p.device}"
                )
        if state_dtype not in STATE_DTYPES:
            raise TypeError(f"state_dtype must be float32, bfloat16 or float64, got {state_dtype}")
        self.state_dtype = state_dtype
        self.device = self.parameters[0].device
        local = [dtensors.local(p) for p in self.parameters]
        self.numel = sum(p.numel() for p in local)
        self.permuted = any(not p.is_contiguous() for p in local)
        self.distributed = any(dtensors.is_dtensor(p) for p in self.parameters)
        self._known = [(p.shape, p.stride(), p.dtype) for p in local]
        self._grad_dtypes = list(map(grad_dtype, self.parameters))
        self.dense = [p.is_contiguous() or _is_permuted(p) for p in local]

        by_dtype: dict[torch.dtype, list[int]] = {}
        for index, p in enumerate(local):
            by_dtype.setdefault(p.dtype, []).append(index)
        offsets = [0] * len(self.parameters)
        self.groups: list[Group] = []
        end = 0
        for dtype, members in by_dtype.items():
            pad = SEGMENT_BYTES // min(state_dtype.itemsize, dtype.itemsize)
            start = end = _round_up(end, pad)
            for index in members:
                offsets[index] = end
                end = _round_up(end + local[index].numel(), pad)
            columns = end - start
            end = start + _round_up(columns, pad * shards)
            flat = self._flat_dtype(dtype, members)
            self.groups.append(Group(dtype, flat, start, end, columns, pad))
        self.row_numel = end
        flats = (group.flat for group in self.groups)
        self.wide = torch.float64 if torch.float64 in (state_dtype, *by_dtype, *flats) else torch.float32
        segments = [[o, p.numel()] for o, p in zip(offsets, local, strict=True)]
        self.segments = torch.tensor(segments, dtype=torch.int64, device="cpu")
        self._subsets: dict[tuple[int, ...], Tensor] = {tuple(range(len(self.parameters))): self.segments}

    def _flat_dtype(self, dtype: torch.dtype, members: Sequence[int]) -> torch.dtype:
        """The narrowest that holds gradients of all these; of any dtype they may be float32."""
        found = {self._grad_dtypes[index] or torch.promote_types(dtype, torch.float32) for index in members}
        flat = functools.reduce(torch.promote_types, found)
        if flat not in GRAD_DTYPES:
            raise TypeError(f"gradients can be balanced in {', '.join(map(str, GRAD_DTYPES))}, got grad_dtype {flat}")
        return flat

    def segments_of(self, indices: Sequence[int]) -> Tensor:
        """The rows of `segments` of some parameters; remembered, as every step asks for the same ones."""
        key = tuple(indices)
        found = self._subsets.get(key)
        if found is None:
            if len(self._subsets) >= 1024:  # a model whose graph never repeats
                self._subsets.clear()
            found = self._subsets[key] = self.segments[list(indices)]
        return found

    def check_unchanged(self, indices: Sequence[int] | None = None) -> None:
        """Raise RuntimeError if a parameter has another dtype, device, shape or strides than when this was made.

        Args:
            indices: what the message calls the parameters; by default their places here.
        """
        device = self.device
        for index, (p, (shape, strides, dtype)) in enumerate(zip(self.parameters, self._known, strict=True)):
            if self.distributed:
                p = dtensors.local(p)
            if p.shape != shape or p.stride() != strides or p.dtype is not dtype or p.device != device:
                what = describe(index if indices is None else indices[index], self.parameters[index], self.names[index])
                raise RuntimeError(
                    f"{what} was {dtype} of shape {tuple(shape)} with strides {strides} on {device} when the balancer "
                    f"was made, and is {p.dtype} of shape {tuple(p.shape)} with strides {p.stride()} on {p.device}; "
                    "make the balancer after model.to(...), or call balancer.rebind(parameters)"
                )
        if list(map(grad_dtype, self.parameters)) != self._grad_dtypes:
            raise RuntimeError("the grad_dtype of a shared parameter was changed: call balancer.rebind(parameters)")

    def signature(self) -> list[list[Any]]:
        """Dtype, shape and memory order of each parameter: what must agree for a state to fit."""
        return [
            [str(p.dtype), list(p.shape), _memory_order(dtensors.local(p)) if dense else list(range(p.dim()))]
            for p, dense in zip(self.parameters, self.dense, strict=True)
        ]

    def in_row_order(self, index: int, grad: Tensor) -> Tensor:
        """``grad`` of parameter ``index`` as a tensor whose logical order is the row's; a view where it can be."""
        p = dtensors.local(self.parameters[index])
        if p.is_contiguous() or not self.dense[index]:
            return grad
        if grad.stride() != p.stride():
            grad = torch.empty_strided(p.shape, p.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
        return grad.as_strided((grad.numel(),), (1,))

    def parts(self, row: Tensor) -> list[Tensor]:
        """Each parameter's part of a whole row, in the (local) shape that it had when this was made."""
        return [
            part.as_strided(shape, strides) if dense else part.view(shape)
            for (shape, strides, _), dense, part in zip(
                self._known, self.dense, (row[o : o + n] for o, n in self.segments.tolist()), strict=True
            )
        ]

    def fill(self, row: Tensor, numbers: Sequence[Tensor | None]) -> None:
        """Set what `parts` gives; None, or what is of another shape, counts as zeros."""
        for part, new in zip(self.parts(row), numbers, strict=True):
            if new is None or new.shape != part.shape:
                part.zero_()
            else:
                part.copy_(new)

    def views(self, flats: dict[torch.dtype, Tensor]) -> list[Tensor]:
        """Each parameter's part of the flat tensors (one per group), in the parameter's shape and strides."""
        starts = {group.dtype: group.start for group in self.groups}
        out = []
        for whole, dense, (offset, numel) in zip(self.parameters, self.dense, self.segments.tolist(), strict=True):
            p = dtensors.local(whole)
            begin = offset - starts[p.dtype]
            part = flats[p.dtype][begin : begin + numel]
            out.append(dtensors.like(whole, part.as_strided(p.shape, p.stride()) if dense else part.view(p.shape)))
        return out


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _is_permuted(p: Tensor) -> bool:
    """Whether ``p`` fills its memory without gaps or overlaps, in another order than the logical one."""
    return p.permute(_memory_order(p)).is_contiguous()


def _memory_order(p: Tensor) -> list[int]:
    """Its dimensions, from the outermost in memory to the innermost."""
    if p.is_contiguous():
        return list(range(p.dim()))
    strides = p.stride()
    return sorted(range(p.dim()), key=lambda d: (-strides[d], -p.shape[d]))


def _apart(view: Tensor) -> Tensor:
    """The same memory as a tensor with a storage and a version counter of its own.

    Saving or copying it takes no more than its elements, and changing it marks no other as changed. Where addresses
    are no numbers (MPS, XLA, meta) it stays a view.
    """
    own = dtensors.local(view)
    if own.device.type not in ("cpu", "cuda"):
        return view
    begin = own.storage_offset() * own.element_size()
    storage = own.untyped_storage()[begin : begin + own.nbytes]
    alone = torch.empty(0, dtype=own.dtype, device=own.device).set_(storage, 0, own.shape, own.stride())
    return dtensors.like(view, alone)


def _untraced() -> Callable[[Tensor], Tensor]:
    """`_apart`, where Dynamo does not look: it knows storages of no size."""
    return _apart if "torch._dynamo" not in sys.modules else torch.compiler.disable(_apart)


class FlatGradient:
    """A flat tensor for each dtype and device, and the parts of it that become the ``.grad`` of the parameters.

    Each part, called a view, shares that memory, with a storage of its own over it (see `_apart`). It is an object that
    anybody may give other memory or another shape (``.grad.data = ...``, ``model.half()``, ``.grad.t_()``); it is no
    view then, and another takes its place.

    Args:
        rows: a buffer, which knows the layout.

    Attributes:
        flats: see `views`; empty before.
        locals: the views; of DTensors what is here.
        dtypes: of gradients in another dtype than their parameter, by index. A view of another dtype is converted.
        of_any_dtype: those of them whose dtype is that of the first to come in a step.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        wanted = [(p.dtype, grad_dtype(p)) for p in rows.parameters]
        usual = all(dtype is own for own, dtype in wanted)
        self.dtypes = {} if usual else {index: dtype or own for index, (own, dtype) in enumerate(wanted)}
        self.of_any_dtype = {index for index, (_, dtype) in enumerate(wanted) if dtype is None}
        self._views: list[Tensor] = []
        self.locals: list[Tensor] = []
        self._addresses: list[int] = []
        self._strides: list[Any] = []
        self._sizes: list[Any] = []
        self._memory: list[tuple[int, int]] = []  # addresses, from and to
        self._references: list[int] = []
        self.flats: dict[Any, Tensor] = {}

    def views(self) -> list[Tensor]:
        """Each parameter's part; allocated when first asked for."""
        if not self._addresses:
            self.flats = self._rows.new_flats()
            storages = [flat.untyped_storage() for flat in self.flats.values()]
            self._memory = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
            self._take(list(map(_untraced(), self._rows.views(self.flats))))
            self._addresses = list(map(Tensor.data_ptr, self.locals))
            self._strides, self._sizes = list(map(Tensor.stride, self.locals)), list(map(Tensor.size, self.locals))
        elif (
            list(map(Tensor.data_ptr, self.locals)) != self._addresses
            or list(map(Tensor.stride, self.locals)) != self._strides  # p.grad.t_(), say
            or list(map(Tensor.size, self.locals)) != self._sizes
        ):
            known = zip(self._addresses, self._strides, self._sizes, strict=True)
            here = zip(self._views, self.locals, known, self._rows.views(self.flats), strict=True)
            self._take(
                [v if (x.data_ptr(), x.stride(), x.size()) == at else _untraced()(new) for v, x, at, new in here]
            )
        return self._views

    def _take(self, views: list[Tensor]) -> None:
        self._views, self.locals = views, list(map(dtensors.local, views))
        self._references = self._count()

    def _count(self) -> list[int]:
        """How many references there are to each view; one more than ours where somebody keeps a former ``.grad``."""
        return [sys.getrefcount(view) for view in self._views]

    def holds(self, grad: Tensor) -> bool:
        """Whether a tensor lies in this memory, as one of the views or as another object."""
        grad = dtensors.local(grad)
        if grad.layout is not torch.strided:
            return False
        address = grad.untyped_storage().data_ptr()
        return any(begin <= address < end for begin, end in self._memory)

    def free(self, grads: Iterable[Tensor | None]) -> dict[Any, Tensor] | None:
        """`flats`, allocated if need be; None if any of ``grads`` lies there, or somebody keeps a view."""
        self.views()
        if any(grad is not None and self.holds(grad) for grad in grads) or self._count() != self._references:
            return None
        return self.flats

    def kept(self, grad: Tensor | None) -> Tensor | None:
        """The same numbers where the next balance does not overwrite them."""
        return grad.clone() if grad is not None and self.holds(grad) else grad
