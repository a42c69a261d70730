"""The Hugging Face Trainer and Accelerate against the same training as a plain loop; checkpoints, logs; two ranks."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
import trained
from accelerate.state import AcceleratorState, GradientState, PartialState
from dbmtl_kernels.integrations.transformers import BalancedTrainerMixin
from dbmtl_kernels.integrations.wrappers import make_balancer
from hf_job import BATCHES, Data, InOrder, Net, accelerate_loop, first_net, parameters, plain_loop, trainer_of
from ranks import torchrun
from torch import nn
from transformers import BertConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_headed_transformer.py"


@pytest.fixture(autouse=True)
def _own_state(monkeypatch):
    """Accelerate remembers the precision of the first Accelerator of a process, and a Trainer sets the environment."""
    torch.set_num_threads(1)  # conftest puts it back
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def assert_same_training(net, balancer, expected, expected_balancer):
    trained.assert_same_training(net, balancer, expected, expected_balancer, first_net())


class WithArguments(Net):
    """Takes whatever a Trainer passes, and so is taken to divide by ``num_items_in_batch`` itself."""

    def forward(self, x, labels_a, labels_b, **_):
        return super().forward(x, labels_a, labels_b)


class Labels(Data):
    """Those that a Trainer counts, for num_items_in_batch."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "labels": torch.tensor(index)}


class TwoTensors(Net):
    def forward(self, x, labels_a, labels_b):
        out = super().forward(x, labels_a, labels_b)
        return out["a"], out["b"]


class OwnLosses(InOrder):
    """The losses are made here; the second task is absent now and then; in an evaluation the first."""

    def task_losses(self, model, inputs):
        a, b = model(**inputs)
        losses = [(a - inputs["labels_a"]).square().mean() + 0.1, 30 * (b - inputs["labels_b"]).square().mean() + 0.1]
        if model.training:
            self.batch = getattr(self, "batch", -1) + 1
            losses[1] = None if self.batch % 2 else losses[1]
        else:
            losses = [None if inputs["labels_a"][0] > 0 else losses[0].reshape(1), losses[1].half()]
        return losses, (None, a, b)


class Mixed(BalancedTrainerMixin, Seq2SeqTrainer):
    get_train_dataloader = InOrder.get_train_dataloader


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}  # the wrapping without the wait


@pytest.mark.parametrize(
    ("accumulate", "clip", "bf16", "options"),  # 4 does not divide the 14 batches of an epoch
    [
        (1, 0.0, False, {}),
        (4, 0.5, False, {"net": WithArguments}),
        (4, 0.5, True, {}),
        (1, 0.5, True, {"net": WithArguments}),
        (2, 0.5, False, {"net": WithArguments, "data": Labels, "remove_unused_columns": False}),
        (1, 0.0, False, {"net": TwoTensors, "cls": OwnLosses}),
        (1, 0.0, False, {"cls": Mixed, "arguments": Seq2SeqTrainingArguments}),
        pytest.param(1, 0.0, False, COMPILED, marks=pytest.mark.slow),
    ],
)
def test_trains_as_a_plain_loop(accumulate, clip, bf16, options, tmp_path):
    settings = {"gradient_accumulation_steps": accumulate, "max_grad_norm": clip, "bf16": bf16}
    trainer = trainer_of(tmp_path, **settings, **options)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert hasattr(trainer.model_wrapped, "_orig_mod") == ("torch_compile" in options)
    net, balancer = plain_loop(accumulate, clip, bf16, absent=isinstance(trainer, OwnLosses))
    assert balancer.step == 2 * -(-BATCHES // accumulate)
    assert_same_training(trainer.model, trainer.balancer, net, balancer)
    assert 0.0 < trainer.evaluate(trainer.train_dataset)["eval_loss"] < before


def test_other_methods_and_options(tmp_path):
    more = {"method": dbk.GradientBalancer, "balancer_options": {"weighting": dbk.MaxNorm("mean"), "beta": 0.3}}
    trainer = trainer_of(tmp_path, shared=lambda net: net.encoder.linear1.parameters(), more=more, max_steps=3)
    trainer.train()
    balancer = trainer.balancer
    assert type(balancer) is dbk.GradientBalancer
    assert balancer.beta == 0.3
    assert len(balancer.shared_parameters) == 2
    assert float(balancer.norms @ balancer.weights / 2) == pytest.approx(float(balancer.norms.mean()), rel=1e-5)


@pytest.mark.parametrize(("accumulate", "step"), [(1, 24), (3, 4)])
def test_a_resumed_run_is_the_same_bit_for_bit(accumulate, step, tmp_path):
    options = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.5}
    saved = trainer_of(tmp_path, save_strategy="steps", save_steps=4, **options)
    saved.train()
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert torch.load(checkpoint / "balancer.pt", weights_only=True)["steps"]["step"] == step < saved.state.global_step
    resumed = trainer_of(tmp_path, save_strategy="steps", save_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for trainer in (saved, resumed):
        assert_same_training(trainer.model, trainer.balancer, *plain_loop(accumulate, 0.5))


def test_a_checkpoint_of_something_else_or_without_a_state(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=7, max_steps=7).train()
    trainer = trainer_of(tmp_path, shared=lambda net: net.encoder.linear1.parameters())
    with pytest.raises(ValueError, match="the state is of 12 shared parameters, there are 2 here"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-7" / "balancer.pt").unlink()
    trainer = trainer_of(tmp_path, max_steps=9)
    with pytest.warns(UserWarning, match=r"no balancer.pt in .*checkpoint-7: the balancer begins anew"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.balancer.step == 2


def test_only_the_model_is_saved_when_asked_for(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    assert not {"optimizer.pt", "balancer.pt"} & {path.name for path in (tmp_path / "checkpoint-2").iterdir()}


class Recorder(TrainerCallback):
    said = None  # by the balancer at each step

    def on_step_end(self, args, state, control, **_):
        self.said[state.global_step] = self.trainer.balancer.monitor().as_dict("balancer/", ["a", "b"], gramian=True)


@pytest.mark.parametrize("gramian", [True, False])
def test_logs(gramian, tmp_path):
    recorder = Recorder()
    recorder.said = {}
    more = {"task_names": ["a", "b"], "log_gramian": gramian, "callbacks": [recorder]}
    options = {"logging_strategy": "steps", "logging_steps": 3, "gradient_accumulation_steps": 2}
    recorder.trainer = trainer = trainer_of(tmp_path, more=more, **options)
    trainer.train()
    *history, last = trainer.state.log_history
    assert [logs["step"] for logs in history] == [3, 6, 9, 12]
    assert "train_loss" in last
    assert not any(name.startswith("balancer/") for name in last)
    for logs in history:
        said = recorder.said[logs["step"]]
        expected = {k: v for k, v in said.items() if gramian or "co" not in k.split("/")[1][:2]}
        assert {k: v for k, v in logs.items() if k.startswith("balancer/")} == expected
        assert logs["balancer/step"] == logs["step"]


class Named(Net):
    def forward(self, x, labels_a, labels_b):
        out = super().forward(x, labels_a, labels_b)
        losses = dict(zip("ab", out["losses"], strict=True))
        return {**out, "losses": losses if self.training else dict(reversed(losses.items()))}


@pytest.mark.parametrize("names", [2, ("a", "b")])
def test_a_dict_of_losses(names, tmp_path):
    """Its names are in the logs; an evaluation has them in another order."""
    found = []
    for net, tasks in ((Net, 2), (Named, names)):
        more = {"eval_dataset": Data(14)}
        trainer = trainer_of(tmp_path, net, more=more, logging_strategy="steps", logging_steps=28)
        trainer._balancing = (trainer._balancing[0], tasks, *trainer._balancing[2:])
        trainer.train()
        found.append((parameters(trainer.model), trainer.evaluate()["eval_loss"]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    logs = trainer.state.log_history[0]
    assert logs["balancer/loss"] == pytest.approx(logs["balancer/loss/a"] + logs["balancer/loss/b"])


class Unlabelled(Net):
    """What it is to predict has no name that a Trainer takes for labels."""

    def forward(self, x, target_a, target_b):
        return super().forward(x, target_a, target_b)


class Targets(Data):
    def __getitem__(self, index):
        x, a, b = super().__getitem__(index).values()
        return {"x": x, "target_a": a, "target_b": b}


EVERY_EPOCH = {"eval_strategy": "epoch", "num_train_epochs": 1}
TO_FIND_THE_BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4,
    "load_best_model_at_end": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("net", "data", "options", "times"), [(Net, Data, EVERY_EPOCH, 1), (Unlabelled, Targets, TO_FIND_THE_BEST, 2)]
)
def test_evaluation(net, data, options, times, tmp_path):
    """Before, during and after training: the sum of the losses, and the outputs without them."""
    more = {"eval_dataset": data(14)}
    trainer = trainer_of(tmp_path, net, data=data, more=more, per_device_eval_batch_size=7, **options)

    def expected():
        with torch.no_grad():
            parts = [
                trainer.model.eval()(**{k: torch.stack([d[k] for d in part]) for k in part[0]})
                for part in ([more["eval_dataset"][i] for i in range(j, j + 7)] for j in (0, 7))
            ]
        loss = np.mean([float(sum(p["losses"])) for p in parts])
        return pytest.approx(loss, rel=1e-5), [torch.cat([p[name] for p in parts]).numpy() for name in "ab"]

    assert trainer.evaluate()["eval_loss"] == expected()[0]
    trainer.train()
    logged = [logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs]
    loss, outputs = expected()
    assert len(logged) == times
    assert min(logged) == loss
    assert trainer.evaluate()["eval_loss"] == loss
    found = trainer.predict(trainer.eval_dataset)
    assert found.metrics["test_loss"] == loss
    for prediction, output in zip(found.predictions, outputs, strict=True):
        np.testing.assert_allclose(prediction, output, rtol=1e-5, atol=1e-6)


def configured():
    net = Net()
    net.config = BertConfig()  # the Trainer looks there when it smooths labels
    return net


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"more": {"compute_loss_func": lambda *_, **__: None}}, ValueError, "override task_losses"),
        ({"net": configured, "label_smoothing_factor": 0.1}, ValueError, "override task_losses"),
        ({"net": TwoTensors}, ValueError, "TwoTensors must give a dict with `losses`"),
        ({"shared": "trunk"}, AttributeError, "trunk"),
    ],
)
def test_what_is_refused(options, kind, message, tmp_path):
    trainer = None
    with pytest.raises(kind, match=message):  # noqa: PT012
        trainer = trainer_of(tmp_path, **options)
        trainer.train()
    assert (trainer is None) == (message == "override task_losses")  # at once


def test_training_steps_too_early_and_data_parallel_are_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(RuntimeError, match="before train"):
        trainer.compute_loss(trainer.model, {k: v[None] for k, v in Data()[0].items()})
    net = first_net()
    with pytest.raises(RuntimeError, match="inside DataParallel cannot be balanced"):
        make_balancer(net, nn.DataParallel(net), "encoder", 2, dbk.DBMTL, {})


def test_each_training_begins_anew_with_the_weighting_as_it_was_given(tmp_path):
    weighting = dbk.GradNorm(2)
    more = {"method": dbk.GradientBalancer, "balancer_options": {"weighting": weighting}}
    trainer = trainer_of(tmp_path, more=more, max_steps=3)
    earlier, weights = [], []
    for _ in range(3):
        trainer.model.load_state_dict(first_net().state_dict())
        trainer.train()
        assert trainer.balancer.step == 3
        earlier.append(weakref.ref(trainer.balancer))
        weights.append(trainer.balancer.weights.tolist())
    gc.collect()
    assert [balancer() is None for balancer in earlier] == [True, True, False]
    assert weights[0] == weights[1] == weights[2] != [1.0, 1.0]
    assert weighting.weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("accumulate", "precision"), [(1, "bf16"), (7, "no")])
def test_accelerate_trains_as_a_plain_loop(accumulate, precision):
    net, balancer = accelerate_loop(accumulate, mixed_precision=precision)
    assert_same_training(net, balancer, *plain_loop(accumulate, bf16=precision == "bf16"))


def test_accelerate_resumes_bit_for_bit(tmp_path):
    accelerate_loop(2, 1, save=tmp_path)
    assert_same_training(*accelerate_loop(2, resume=tmp_path), *plain_loop(2))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(2, Path(__file__).parent / "hf_job.py", folder, PYTHONWARNINGS="ignore")
    return folder, trained.of_two_ranks(folder)


@pytest.mark.parametrize(
    ("name", "straight", "settings"),
    [
        ("trainer", "trainer", (3, 0.5)),
        ("resumed", "trainer", (3, 0.5)),
        ("accelerate", "accelerate", (7,)),
        ("loaded", "accelerate", (7,)),
        ("sharded", "sharded", (7,)),
    ],
)
def test_two_ranks_do_what_one_does_with_the_whole_batch(ranks, name, straight, settings):
    for found in ranks[1]:
        trained.assert_a_ranks_part(found[name], *plain_loop(*settings), rows=0.7)  # half, and padding
        assert found[name]["parameters"] == found[straight]["parameters"]  # resumed bit for bit


@pytest.mark.parametrize(
    ("name", "settings"), [("trainer", (3, 0.5)), ("accelerate, True", (7,)), ("accelerate, False", (7,))]
)
def test_two_ranks_of_one_pass(ranks, name, settings):
    expected = plain_loop(*settings, method=dbk.OnePassDBMTL)
    for found in ranks[1]:
        trained.assert_a_ranks_part(found[f"one pass, {name}"], *expected, rows=None)


def test_one_process_goes_on_from_the_checkpoint_of_two_ranks(ranks, tmp_path):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=3, max_grad_norm=0.5)
    trainer.train(resume_from_checkpoint=str(ranks[0] / "trainer" / "checkpoint-3"))
    assert (parameters(trainer.model) - parameters(plain_loop(3, 0.5)[0])).abs().max() <= 1e-5


def test_without_the_context_two_ranks_are_refused(ranks):
    for found in ranks[1]:
        assert "inside `with model.no_sync():`" in found["refusal"]


def example(status, *arguments):
    """Its output."""
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == status, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.mark.slow
def test_the_example_trains_and_goes_on(tmp_path):
    said = example(0, "--steps", "60", "--out", str(tmp_path))
    assert all(word in said for word in ("most frequent", "how many", "balancer/conflicts")), said
    assert (tmp_path / "checkpoint-60" / "balancer.pt").exists()
    example(0, "--steps", "62", "--out", str(tmp_path))
    state = torch.load(tmp_path / "checkpoint-62" / "balancer.pt", weights_only=True)
    assert state["steps"]["step"] == 62


@pytest.mark.slow
def test_an_example_that_did_not_train_fails():
    assert "did not fall" in example(1, "--steps", "1")
