"""BalancedTrainer: the Trainer of Hugging Face transformers for a model with several losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..balancer import GradientBalancer
from ..checkpoint import gathered
from ..dbmtl import DBMTL
from ..functional import sum_of_losses
from .wrappers import Shared, balancing, make_balancer

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object

FILE = "balancer.pt"  # in the folder of a checkpoint


class BalancedTrainerMixin(Base):
    """Balances the gradients of K losses in a Trainer; to be named before it among the bases of a class.

    When training starts, a balancer is made and attached to the optimizer; with ``gradient_accumulation_steps`` one
    optimizer step is one step. Each micro-batch counts the same, whatever ``num_items_in_batch``: the log of a loss
    does not know by what it was divided. The balancer's state is saved as ``balancer.pt`` in each ``checkpoint-N`` and
    taken up by ``resume_from_checkpoint``; what `Monitor.as_dict` gives goes with the logs, as ``balancer/...``.
    Several ranks under DistributedDataParallel or FSDP2 need nothing more.

    The training loss is that of ``balancer(losses)``, a sum of logs with `DBMTL`; the evaluation loss is the plain sum
    of the losses, whatever the labels are called.

    Args:
        args: of the Trainer, as all others that are not named here.
        shared: a function from the model to its shared parameters, or the name of a submodule that has them all; those
            of it that are frozen when training starts are left out.
        num_tasks: K, or the names of the tasks.
        method: the class of the balancer: `DBMTL`, or `GradientBalancer` with a ``weighting`` among the options.
        balancer_options: other arguments of ``method``.
        task_names: of the tasks, in the logs; by default those that the balancer knows, or indices.
        log_gramian: log conflicts and cosines besides, for which the K P elements of the state are read.
        kwargs: of the Trainer.

    Attributes:
        balancer: that of the last training, or None.

    Raises:
        ValueError: a ``compute_loss_func`` or label smoothing, which would not be used: override `task_losses`.
    """

    # Of transformers that know it: what compute_loss returns has to be divided by the number of micro-batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        shared: Shared,
        num_tasks: int | Collection[str],
        method: Callable[..., GradientBalancer] = DBMTL,
        balancer_options: Mapping[str, Any] | None = None,
        task_names: Sequence[str] | None = None,
        log_gramian: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "compute_loss_func", None) is not None or self.label_smoother is not None:
            raise ValueError(
                "compute_loss_func and label_smoothing_factor would not be used: override task_losses(model, inputs)"
            )
        self.model_accepts_loss_kwargs = False  # of others: the same as loss_is_scaled_for_ga
        if not self.label_names:  # else the Trainer would take the losses for predictions
            self.can_return_loss = True
        self.balancer: GradientBalancer | None = None
        self._balancing = (shared, num_tasks, method, dict(balancer_options or {}))
        self._task_names, self._log_gramian = task_names, log_gramian
        self._resumed_from: str | None = None
        self.add_callback(_WhenTrainingBegins(self))

    def task_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """The K losses, and the outputs for an evaluation. To be overridden by other models.

        Args:
            model: as wrapped for training.
            inputs: a batch on the device.

        Returns:
            what the model gives as ``losses`` (a dict of names to losses, or whatever a balancer takes), and a dict of
            the rest.

        Raises:
            ValueError: the model gives nothing of that name.
        """
        outputs = model(**inputs)
        if not isinstance(outputs, Mapping) or "losses" not in outputs:
            raise ValueError(
                f"{type(model).__name__} must give a dict with `losses`, one for each task; or override "
                "task_losses(model, inputs)"
            )
        return outputs["losses"], {name: value for name, value in outputs.items() if name != "losses"}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """The balanced loss for training; the plain sum of the losses for evaluation."""
        losses, outputs = self.task_losses(model, inputs)
        if not torch.is_grad_enabled():
            names = None if self.balancer is None else self.balancer.task_names
            loss = sum_of_losses(losses, names or self._balancing[1])
        elif self.balancer is None:
            raise RuntimeError("compute_loss() for training before train() has made the balancer")
        else:
            loss = self.balancer(losses)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward, in which the balancer, not the model's wrapper, averages gradients."""
        with balancing(model, self.balancer):
            return super().training_step(model, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the training loss, what `Monitor.as_dict` gives."""
        if "loss" in logs and self.balancer is not None:
            logs.update(self.balancer.monitor().as_dict("balancer/", self._task_names, gramian=self._log_gramian))
        super().log(logs, *args, **kwargs)

    def begin_balancing(self) -> None:
        """Make the balancer and attach it. Called when training begins.

        Raises:
            RuntimeError: a model whose gradients cannot be balanced (DataParallel, DeepSpeed).
            ValueError: the optimizer holds none of the shared parameters; a state of something else; whatever
                ``method`` raises.
        """
        self.end_balancing()
        self.balancer = None  # of an earlier training, or of one that ran out of memory
        assert self.model is not None
        assert self.optimizer is not None
        balancer = make_balancer(self.model, self.model_wrapped, *self._balancing)
        balancer.attach(self.optimizer)
        if self._resumed_from is not None:
            file = Path(self._resumed_from, FILE)
            if file.exists():
                balancer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            else:
                warnings.warn(f"no {FILE} in {file.parent}: the balancer begins anew", stacklevel=2)
            self._resumed_from = None
        self.balancer = balancer

    def end_balancing(self) -> None:
        """Detach the balancer from the optimizer, which may live longer. Called when training ends."""
        if self.balancer is not None:
            self.balancer.detach(discard=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.balancer is not None:
            state = gathered(self.balancer.state_dict(), self.args.should_save)
            if self.args.should_save:
                torch.save(state, Path(output_dir, FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint


class BalancedTrainer(BalancedTrainerMixin, Trainer):
    """A Trainer for K losses; see `BalancedTrainerMixin`."""


class _WhenTrainingBegins(TrainerCallback):
    """The optimizer exists, the model is wrapped and on its device, checkpoints are loaded."""

    def __init__(self, trainer: BalancedTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Make the balancer."""
        self._trainer.begin_balancing()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let the optimizer forget it."""
        self._trainer.end_balancing()
