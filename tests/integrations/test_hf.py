"""The Hugging Face Trainer and Accelerate against the same training as a plain loop; checkpoints, logs; two ranks."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from dbmtl_kernels.integrations.transformers import BalancedTrainerMixin
from dbmtl_kernels.integrations.wrappers import make_balancer
from hf_job import (
    BATCH,
    BATCHES,
    Data,
    InOrder,
    Net,
    WithArguments,
    accelerate_loop,
    first_net,
    parameters,
    plain_loop,
    trainer_of,
)
from problems import assert_same_state, state_of
from ranks import torchrun
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_headed_transformer.py"


@pytest.fixture(autouse=True)
def _own_state(monkeypatch):
    """Accelerate remembers the precision of the first Accelerator of a process, and a Trainer sets the environment."""
    torch.set_num_threads(1)  # conftest puts it back
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def assert_same_training(net, balancer, expected_net, expected_balancer):
    assert not torch.equal(parameters(expected_net), parameters(first_net()))
    assert torch.equal(parameters(net), parameters(expected_net))
    assert_same_state(balancer.state_dict(), expected_balancer.state_dict())


@pytest.mark.parametrize(
    ("cls", "accumulate", "clip", "bf16"),  # 4 does not divide the 14 batches of an epoch
    [(Net, 1, 0.0, False), (WithArguments, 4, 0.5, False), (Net, 4, 0.5, True), (WithArguments, 1, 0.5, True)],
)
def test_trains_as_a_plain_loop(cls, accumulate, clip, bf16, tmp_path):
    trainer = trainer_of(
        tmp_path, first_net(cls), gradient_accumulation_steps=accumulate, max_grad_norm=clip, bf16=bf16
    )
    trainer.train()
    net, balancer = plain_loop(accumulate, clip, bf16)
    assert balancer.step == 2 * -(-BATCHES // accumulate)
    assert_same_training(trainer.model, trainer.balancer, net, balancer)


def test_labels_that_the_trainer_counts(tmp_path):
    """With ``labels`` in the inputs and a model that takes anything, num_items_in_batch would be known and used."""

    class Named(Data):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "labels": torch.tensor(index)}

    trainer = trainer_of(
        tmp_path, first_net(WithArguments), data=Named(), gradient_accumulation_steps=2, max_grad_norm=0.5,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer.train()
    assert_same_training(trainer.model, trainer.balancer, *plain_loop(2, 0.5))


def test_other_methods_and_options(tmp_path):
    more = {"method": dbk.GradientBalancer, "balancer_options": {"weighting": dbk.MaxNorm("mean"), "beta": 0.3}}
    trainer = trainer_of(tmp_path, shared=lambda net: net.encoder.linear1.parameters(), more=more, max_steps=3)
    trainer.train()
    assert type(trainer.balancer) is dbk.GradientBalancer
    assert trainer.balancer.beta == 0.3
    assert len(trainer.balancer.shared_parameters) == 2
    assert float(trainer.balancer.norms @ trainer.balancer.weights / 2) == pytest.approx(
        float(trainer.balancer.norms.mean()), rel=1e-5
    )


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("named", [True, False])
def test_a_resumed_run_is_the_same_bit_for_bit(accumulate, named, tmp_path):
    options = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.5}
    saved = trainer_of(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=2, **options)
    saved.train()
    straight = saved.state.global_step
    checkpoints = sorted(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    first = checkpoints[0] if named else checkpoints[-1]
    assert 0 < int(first.name.partition("-")[2]) < straight or not named
    state = torch.load(first / "balancer.pt", weights_only=True)
    assert state["steps"]["step"] == int(first.name.partition("-")[2])
    resumed = trainer_of(tmp_path, save_strategy="steps", save_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(first) if named else True)
    assert_same_training(resumed.model, resumed.balancer, saved.model, saved.balancer)
    assert_same_training(resumed.model, resumed.balancer, *plain_loop(accumulate, 0.5))


def test_a_checkpoint_without_a_state(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=7, max_steps=7).train()
    (tmp_path / "checkpoint-7" / "balancer.pt").unlink()
    trainer = trainer_of(tmp_path, max_steps=9)
    with pytest.warns(UserWarning, match=r"no balancer.pt in .*checkpoint-7: the balancer begins anew"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.balancer.step == 2


def test_only_the_model_is_saved_when_asked_for(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "optimizer.pt" not in names
    assert "balancer.pt" not in names


def test_a_state_of_something_else_is_refused(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=7, max_steps=7).train()
    trainer = trainer_of(tmp_path, shared=lambda net: net.encoder.linear1.parameters())
    with pytest.raises(ValueError, match="the state is of 12 shared parameters, there are 2 here"):
        trainer.train(resume_from_checkpoint=True)


class Recorder(TrainerCallback):
    """What the balancer said at each step."""

    def __init__(self):
        self.said, self.trainer = {}, None

    def on_step_end(self, args, state, control, **_):
        self.said[state.global_step] = self.trainer.balancer.monitor().as_dict("balancer/", ["a", "b"], gramian=True)


@pytest.mark.parametrize("gramian", [True, False])
def test_logs(gramian, tmp_path):
    more = {"task_names": ["a", "b"], "log_gramian": gramian, "callbacks": [Recorder()]}
    options = {"logging_strategy": "steps", "logging_steps": 3, "gradient_accumulation_steps": 2}
    trainer = trainer_of(tmp_path, more=more, **options)
    recorder = more["callbacks"][0]
    recorder.trainer = trainer
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


def test_evaluation(tmp_path):
    """Before, during and after training: the sum of the losses, and the outputs without them."""
    options = {"eval_strategy": "epoch", "num_train_epochs": 1, "per_device_eval_batch_size": 7}
    trainer = trainer_of(tmp_path, more={"eval_dataset": Data(14)}, **options)

    def expected():
        net = trainer.model.eval()
        with torch.no_grad():
            parts = [
                net(**{k: torch.stack([d[k] for d in part]) for k in part[0]})
                for part in ([trainer.eval_dataset[i] for i in range(j, j + 7)] for j in (0, 7))
            ]
        return np.mean([float(sum(p["losses"])) for p in parts]), torch.cat([p["a"] for p in parts]).numpy()

    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected()[0], rel=1e-5)
    trainer.train()
    (logs,) = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    loss, a = expected()
    assert logs["eval_loss"] == pytest.approx(loss, rel=1e-5)
    predicted = trainer.predict(trainer.eval_dataset)
    assert len(predicted.predictions) == 2
    np.testing.assert_allclose(predicted.predictions[0], a, rtol=1e-5, atol=1e-6)
    assert predicted.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)


class TwoTensors(nn.Module):
    """Gives a pair, and no losses."""

    def __init__(self):
        super().__init__()
        self.net = first_net()

    def forward(self, x, labels_a, labels_b):
        out = self.net(x, labels_a, labels_b)
        return out["a"], out["b"]


class OwnLosses(InOrder):
    """The losses are made here; the second task is absent from every other batch."""

    def task_losses(self, model, inputs):
        a, b = model(**inputs)
        self.batch = getattr(self, "batch", -1) + 1
        losses = [(a - inputs["labels_a"]).square().mean() + 0.1, 30 * (b - inputs["labels_b"]).square().mean() + 0.1]
        return [losses[0], None if self.batch % 2 else losses[1]], (None, a, b)


def test_losses_of_ones_own_and_absent_tasks(tmp_path):
    more = {"eval_dataset": Data(8)}
    trainer = trainer_of(tmp_path, TwoTensors(), OwnLosses, shared="net.encoder", max_grad_norm=0.0, more=more)
    trainer.train()
    net = first_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    balancer = dbk.DBMTL(net.encoder.parameters(), 2)
    for index in range(2 * BATCHES):
        first = index % BATCHES * BATCH
        part = [Data()[i] for i in range(first, first + BATCH)]
        losses = net(**{k: torch.stack([d[k] for d in part]) for k in part[0]})["losses"]
        optimizer.zero_grad()
        balancer([losses[0], None if index % 2 else losses[1]]).backward()
        optimizer.step()
    assert torch.equal(parameters(trainer.model.net), parameters(net))
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="override task_losses"):
        trainer_of(tmp_path, more={"compute_loss_func": lambda *_, **__: None})
    net = first_net()
    net.config = BertConfig()  # the Trainer looks there when it smooths labels
    with pytest.raises(ValueError, match="override task_losses"):
        trainer_of(tmp_path, net, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="TwoTensors must give a dict with `losses`"):
        trainer_of(tmp_path, TwoTensors(), shared="net.encoder").train()
    with pytest.raises(AttributeError, match="trunk"):
        trainer_of(tmp_path, shared="trunk").train()
    trainer = trainer_of(tmp_path)
    with pytest.raises(RuntimeError, match="before train"):
        trainer.compute_loss(trainer.model, {k: v[None] for k, v in Data()[0].items()})
    net = first_net()
    with pytest.raises(RuntimeError, match="inside DataParallel cannot be balanced"):
        make_balancer(net, nn.DataParallel(net), "encoder", 2, dbk.DBMTL, {})


def test_a_model_under_torch_compile(tmp_path):
    """Accelerate compiles; "eager" tests the wrapping without the wait."""
    trainer = trainer_of(tmp_path, torch_compile=True, torch_compile_backend="eager", max_grad_norm=0.0)
    trainer.train()
    assert hasattr(trainer.model_wrapped, "_orig_mod")
    assert_same_training(trainer.model, trainer.balancer, *plain_loop())


def test_training_twice(tmp_path):
    """A second train() begins with a balancer of its own, on the model as it is."""
    trainer = trainer_of(tmp_path, max_steps=4)
    trainer.train()
    first = trainer.balancer
    trainer.train()
    assert trainer.balancer is not first
    assert trainer.balancer.step == first.step == 4


def test_each_training_begins_with_the_weighting_as_it_was_given(tmp_path):
    weights = []
    more = {"method": dbk.GradientBalancer, "balancer_options": {"weighting": dbk.GradNorm(2)}}
    trainer = trainer_of(tmp_path, more=more, max_steps=4)
    for _ in range(2):
        trainer.model.load_state_dict(first_net().state_dict())
        trainer.train()
        weights.append(trainer.balancer.weights.tolist())
    assert weights[0] == weights[1] != [1.0, 1.0]


def test_a_balancer_of_an_earlier_training_is_let_go(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=3)
    earlier = []
    for _ in range(3):
        trainer.train()
        earlier.append(weakref.ref(trainer.balancer))
    gc.collect()
    assert [balancer() is None for balancer in earlier] == [True, True, False]
    assert trainer.balancer.step == 3


def test_frozen_parameters_of_a_named_submodule_are_left_out(tmp_path):
    net = first_net()
    net.encoder.norm1.requires_grad_(False)
    trainer = trainer_of(tmp_path, net, max_steps=3)
    trainer.train()
    assert len(trainer.balancer.shared_parameters) == len(list(net.encoder.parameters())) - 2


class Unlabelled(nn.Module):
    """What it is to predict has no name that a Trainer takes for labels."""

    def __init__(self):
        super().__init__()
        self.net = first_net()

    def forward(self, x, target_a, target_b):
        return self.net(x, target_a, target_b)


class Targets(Data):
    def __getitem__(self, index):
        x, a, b = super().__getitem__(index).values()
        return {"x": x, "target_a": a, "target_b": b}


def test_evaluation_without_labels(tmp_path):
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4,
        "load_best_model_at_end": True, "per_device_eval_batch_size": 7,
    }  # fmt: skip
    trainer = trainer_of(
        tmp_path, Unlabelled(), data=Targets(), shared="net.encoder", more={"eval_dataset": Targets(14)}, **options
    )
    trainer.train()
    data = trainer.eval_dataset
    with torch.no_grad():
        found = trainer.model.eval()(**{k: torch.stack([data[i][k] for i in range(14)]) for k in data[0]})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(sum(found["losses"])), rel=1e-5)
    predicted = trainer.predict(data)
    assert len(predicted.predictions) == 2
    np.testing.assert_allclose(predicted.predictions[1], found["b"].numpy(), rtol=1e-5, atol=1e-6)


def test_evaluation_takes_the_losses_that_training_takes(tmp_path):
    class Shapes(Net):
        def forward(self, x, labels_a, labels_b):
            out = super().forward(x, labels_a, labels_b)
            first, second = out["losses"]
            return {**out, "losses": [first.reshape(1), None if (labels_b > 0).all() else second.half()]}

    trainer = trainer_of(tmp_path, first_net(Shapes), more={"eval_dataset": Data(8)}, max_steps=2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0.0


class Sequences(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = torch.randint(2, 11, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens.flip(0)}


class TwoDirections(nn.Module):
    """A T5 that learns a sequence as it is and reversed."""

    def __init__(self):
        super().__init__()
        self.t5 = T5ForConditionalGeneration(
            T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
        )

    def forward(self, input_ids, labels):
        outputs = [self.t5(input_ids=input_ids, labels=target) for target in (input_ids, labels)]
        return {"losses": [out.loss for out in outputs], "logits": outputs[1].logits}


def test_mixed_into_another_trainer(tmp_path):
    class Mixed(BalancedTrainerMixin, Seq2SeqTrainer):
        pass

    settings = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.01, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Mixed(
        TwoDirections(), settings, train_dataset=Sequences(), eval_dataset=Sequences(), shared="t5.encoder", num_tasks=2
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.balancer.step == 4
    assert trainer.evaluate()["eval_loss"] < before


# --- Accelerate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "precision"), [(1, "bf16"), (7, "no")])
def test_accelerate_trains_as_a_plain_loop(accumulate, precision):
    net, balancer = accelerate_loop(accumulate, mixed_precision=precision)
    assert_same_training(net, balancer, *plain_loop(accumulate, bf16=precision == "bf16"))


def test_accelerate_resumes_bit_for_bit(tmp_path):
    accelerate_loop(2, 1, save=tmp_path)
    net, balancer = accelerate_loop(2, 2, resume=tmp_path, first=1)
    assert_same_training(net, balancer, *plain_loop(2))


# --- two ranks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks with gloo found."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(2, Path(__file__).parent / "hf_job.py", folder, PYTHONWARNINGS="ignore")
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["trainer", "resumed", "accelerate", "loaded", "sharded"])
def test_two_ranks_do_what_one_does_with_the_whole_batch(ranks, name):
    alone, balancer = plain_loop(3, 0.5) if name in ("trainer", "resumed") else plain_loop(7)
    for found in (rank[name] for rank in ranks[1]):
        assert found["identical"]
        assert (torch.tensor(found["parameters"]) - parameters(alone)).abs().max() <= 1e-5
        assert found["norms"] == pytest.approx(balancer.norms.tolist(), rel=1e-5)
        torch.testing.assert_close(torch.tensor(found["cosine"]), balancer.monitor().cosine, rtol=0, atol=1e-5)
        assert found["rows"] < 0.7 * state_of(balancer).rows.numel()  # half, and padding
        assert found["step"] == balancer.step


@pytest.mark.parametrize(("resumed", "straight"), [("resumed", "trainer"), ("loaded", "accelerate")])
def test_two_ranks_resume_bit_for_bit(ranks, resumed, straight):
    for found in ranks[1]:
        assert found[resumed]["parameters"] == found[straight]["parameters"]


def test_one_process_goes_on_from_the_checkpoint_of_two_ranks(ranks, tmp_path):
    options = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5}
    trainer = trainer_of(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(ranks[0] / "trainer" / "checkpoint-3"))
    assert (parameters(trainer.model) - parameters(plain_loop(3, 0.5)[0])).abs().max() <= 1e-5


def test_without_the_context_two_ranks_are_refused(ranks):
    for found in ranks[1]:
        assert "inside `with model.no_sync():`" in found["refusal"]


# --- the example -----------------------------------------------------------------------------------------------


def example(*arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_example_trains_and_goes_on(tmp_path):
    run = example("--steps", "60", "--out", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    for word in ("most frequent", "how many", "balancer/conflicts"):
        assert word in run.stdout
    assert (tmp_path / "checkpoint-60" / "balancer.pt").exists()
    run = example("--steps", "62", "--out", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    state = torch.load(tmp_path / "checkpoint-62" / "balancer.pt", weights_only=True)
    assert state["steps"]["step"] == 62


def test_an_example_that_did_not_train_fails():
    run = example("--steps", "1")
    assert run.returncode == 1
    assert "did not fall" in run.stderr
