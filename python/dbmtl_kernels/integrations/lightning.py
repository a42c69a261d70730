"""GradientBalancing: a callback of Lightning's Trainer that makes, attaches, saves and logs a balancer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..balancer import GradientBalancer
from ..checkpoint import gathered
from ..dbmtl import DBMTL
from ..ops.entries import Entry
from .wrappers import Shared, balancing, make_balancer

if TYPE_CHECKING:
    from torch import Tensor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    try:  # the same under its other name; each refuses the other's callbacks
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    except ModuleNotFoundError as error:
        message = "this needs Lightning: pip install 'dbmtl-kernels[lightning]'"
        raise ModuleNotFoundError(message, name="lightning") from error


class GradientBalancing(Callback):
    """Balances the gradients of a LightningModule whose ``training_step`` returns ``self.balancer(losses)``.

    For automatic optimization, with any precision, accumulation and clipping. When fitting starts, and the module is on
    its device, the callback makes a balancer, attaches it to the optimizer, and puts it on the module as ``balancer``
    until fitting ends. Its state is in the Trainer's checkpoints. Of several ranks (``ddp``, or ``fully_shard`` with
    ModelParallelStrategy) the training step runs inside `wrappers.balancing`. Outside of fitting (``trainer.validate``)
    the module has no ``balancer``.

    It is a Callback of `lightning` where that is installed, else of `pytorch_lightning`.

    Args:
        shared: a function from the LightningModule to its shared parameters or to a submodule, or the name of a
            submodule that has them all; those of it that are frozen when fitting starts are left out.
        num_tasks: K, or the names of the tasks.
        method: the class of the balancer: `DBMTL`, or `GradientBalancer` with a ``weighting`` among the options.
        log: log what `Monitor.as_dict` gives, as ``balancer/...``, every ``log_every_n_steps`` steps, through the
            module's loggers. Nothing is fetched from the device but by them.
        gramian: log conflicts and cosines besides, for which the K P elements of the state are read.
        names: of the tasks, in the log; by default those that the balancer knows, or indices.
        options: other arguments of ``method``.

    Attributes:
        balancer: that of the last fit, or None.
    """

    def __init__(
        self,
        shared: Shared,
        num_tasks: int | Collection[str],
        *,
        method: Callable[..., GradientBalancer] = DBMTL,
        log: bool = True,
        gramian: bool = False,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self.balancer: GradientBalancer | None = None
        self._given = (shared, num_tasks, method, options)
        self._log, self._gramian, self._names = log, gramian, names
        self._fitting = False
        self._saves = True  # whether this rank writes the checkpoints
        self._waiting: dict[str, Any] | None = None  # a state that came before its balancer
        self._resumed = False
        self._batch = ExitStack()
        self._logged = 0
        self._frozen: list[Tensor] = []  # those of the submodule named that were left out
        self._had = False  # the module had a balancer of None

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint."""
        return type(self).__qualname__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would train before there is a balancer.

        Raises:
            RuntimeError: a LearningRateFinder or BatchSizeFinder, also one of a Tuner.
        """
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if stage == "fit" and any(
                cls.__name__ in ("LearningRateFinder", "BatchSizeFinder") for cls in type(other).__mro__
            ):
                raise RuntimeError(
                    f"{type(other).__name__} trains before GradientBalancing can make its balancer: run it on its own, "
                    "without this callback, on the sum of the losses"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the balancer and attach it.

        Raises:
            RuntimeError: the module has a ``balancer`` of its own; a strategy whose gradients cannot be balanced.
            ValueError: no optimizer holds any of the shared parameters; whatever ``method`` raises.
        """
        if getattr(pl_module, "balancer", None) not in (None, self.balancer):
            raise RuntimeError(
                f"{type(pl_module).__name__} has an attribute `balancer` already, which GradientBalancing would set"
            )
        wrapped = trainer.strategy.model
        assert wrapped is not None
        self.balancer = balancer = make_balancer(pl_module, wrapped, *self._given)
        held = {id(p) for p in balancer.shared_parameters}
        optimizers = [o for o in trainer.optimizers if any(id(p) in held for g in o.param_groups for p in g["params"])]
        balancer.attach(*(optimizers or trainer.optimizers[:1]))
        self._fitting, self._resumed, self._saves, self._logged = True, False, trainer.is_global_zero, 0
        if self._waiting is not None:
            self.load_state_dict({"balancer": self._waiting})
            self._waiting = None
        shared = self._given[0]
        if isinstance(shared, str):  # now: after a forward pass FSDP's root module may hand out others
            self._frozen = [p for p in pl_module.get_submodule(shared).parameters() if not p.requires_grad]
        self._had = getattr(pl_module, "balancer", self) is None
        pl_module.balancer = balancer  # type: ignore[assignment]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a checkpoint that had no state for the balancer."""
        if trainer.ckpt_path is not None and not self._resumed:
            warnings.warn(f"no {self.state_key} in {trainer.ckpt_path}: the balancer begins anew", stacklevel=2)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep DistributedDataParallel from reducing gradients.

        Raises:
            RuntimeError: a parameter of the submodule named was thawed after fitting had started, and is not known to
                the balancer.
        """
        self._batch.close()
        if batch_idx == 0 and any(p.requires_grad for p in self._frozen):
            raise RuntimeError(
                f"shared parameters of {self._given[0]!r} were thawed after fitting had started, and would not be "
                "balanced: thaw them before, or in another fit"
            )
        if trainer.strategy.model is not None:
            self._batch.enter_context(balancing(trainer.strategy.model, self.balancer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        self._batch.close()
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self._log or not every or step % every or step == self._logged or self.balancer is None:
            return
        self._logged = step
        scalars = self.balancer.monitor().scalars(self._names, gramian=self._gramian)
        del scalars["step"]  # Lightning has its own
        dtype = self.balancer.norms.dtype
        pl_module.log_dict({f"balancer/{name}": value.to(dtype) for name, value in scalars.items()})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._release(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The balancer's, gathered on the rank that writes; of several ranks all must call it, and Lightning does."""
        if self.balancer is None:
            return {}
        return {"balancer": gathered(self.balancer.state_dict(), self._saves)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, now or as soon as there is a balancer.

        Raises:
            ValueError: as `GradientBalancer.load_state_dict`.
        """
        state = Entry(state_dict)["balancer"].value
        if self._fitting and self.balancer is not None:
            self.balancer.load_state_dict(state)
            self._resumed = True
        else:
            self._waiting = state

    def _release(self, pl_module: LightningModule) -> None:
        self._batch.close()
        self._frozen = []
        self._waiting = None
        self._fitting = False
        balancer = self.balancer
        on_module = getattr(pl_module, "balancer", None) is balancer
        if balancer is None or not on_module:
            return
        balancer.detach(discard=True)
        del pl_module.balancer
        if self._had:
            pl_module.balancer = None  # type: ignore[assignment]
