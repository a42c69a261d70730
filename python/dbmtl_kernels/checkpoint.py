"""Whether a state_dict fits a balancer, found out before anything is copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layout import ParameterLayout


def check(state: dict[str, Any], own: dict[str, Any], layout: ParameterLayout) -> None:
    """Raise ValueError unless ``state`` is of the kind of ``own``, the balancer's own state_dict.

    Compared are the version, the entries, the shared parameters, and the dtypes and shapes of all tensors.
    """
    if state.get("version") != own["version"]:
        raise ValueError(f"state_dict has version {state.get('version')!r}, this is version {own['version']}")
    missing = sorted(set(own) - set(state))
    if missing:
        raise ValueError(f"state_dict lacks {', '.join(missing)}")
    layout.check_signature(state["parameters"])
    for name, mine in own.items():
        theirs = state[name]
        if isinstance(mine, Tensor) and name != "loss_scale":
            if theirs.dtype != mine.dtype:
                raise ValueError(f"state_dict has {name} in {theirs.dtype}, this balancer in {mine.dtype}")
            if theirs.shape != mine.shape:
                raise ValueError(
                    f"state_dict has {name} of shape {tuple(theirs.shape)}, this balancer of {tuple(mine.shape)} "
                    "(other num_tasks?)"
                )
        elif name in ("seen", "touched") and len(theirs) != len(mine):
            raise ValueError(
                f"state_dict has {len(theirs)} entries of {name}, this balancer {len(mine)} (other num_tasks?)"
            )
