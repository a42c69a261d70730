"""Networks, losses and steps of the examples on the paper's image data, and which epochs count."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("rich")

import nyuv2
import office
from vision import training
from vision.methods import FAMO, Uncertainty
from vision.training import Run, begin, step
from vision.work import BEST_EPOCH, LAST_EPOCHS, Loading, Protocol


def made(tmp_path, example=nyuv2, **changes):
    """An example's work on its sample."""
    known = {"data_set": "nyuv2", "model": "mtan", "protocol": None, "augment": False, "weights": None, "smoke": True}
    if example is office:
        known = {"data_set": "office-31", "lists": None, "weights": "none", "smoke": True, "check": True}
    args = SimpleNamespace(**{**known, **changes})
    example.write_sample(args, tmp_path / "sample")
    work = example.make(args, tmp_path / "sample")
    work.smoke = True
    return work


@pytest.mark.parametrize("model", ["mtan", "segnet"])
def test_what_is_shared_is_what_several_losses_reach(model, tmp_path):
    work = made(tmp_path, model=model)
    network = work.network()
    _, batches = Loading(2, False, 0, torch.device("cpu")).training(work, range(3))
    losses = work.losses(network, next(iter(batches)), range(3))
    known = list(network.parameters())
    reached = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, known, retain_graph=True, allow_unused=True)
        reached.append({p for p, g in zip(known, gradients, strict=True) if g is not None})
    assert set.intersection(*reached) == set(network.shared.parameters())
    for task, head in enumerate(network.heads):
        assert reached[task] - set(network.shared.parameters()) == set(head.parameters())
    outputs = network(torch.rand(2, 3, 32, 64), range(3))
    assert [tuple(x.shape) for x in outputs] == [(2, 13, 32, 64), (2, 1, 32, 64), (2, 3, 32, 64)]
    assert torch.allclose(outputs[2].norm(dim=1), torch.ones(2, 32, 64), atol=1e-5)


def test_losses_are_of_valid_pixels(tmp_path):
    work = made(tmp_path)
    label, depth = torch.tensor([[[0, 2, -1]]]), torch.tensor([[[[1.0, 3.0, 0.0]]]])
    scores = torch.zeros(1, 13, 1, 3)
    scores[:, 5, :, 2] = 100
    assert work.loss(0, scores, label).item() == pytest.approx(math.log(13))
    assert work.loss(1, torch.tensor([[[[2.0, 3.5, 9.0]]]]), depth).item() == pytest.approx(0.75)
    normal = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 0, 0]]).T[None, :, None]
    guess = torch.tensor([[0.0, 0, 1], [0.6, 0.8, 0], [1, 0, 0]]).T[None, :, None]
    assert work.loss(2, guess, normal).item() == pytest.approx(1 - 0.9)
    for task, truth in ((1, depth * 0), (2, normal * 0)):
        assert work.loss(task, guess[:, :1] if task == 1 else guess, truth).item() in (0.0, 1.0)


def test_task_by_task_is_one_call(tmp_path, small_office):
    """In gradients and state, over three steps with dropout and batch norm."""
    work = made(tmp_path, office)
    states = []
    for one_call in (False, True):
        state = begin(run := Run("db-mtl", (0, 1, 2), 0, 0.9, 0.5, one_call, "none"), work, torch.device("cpu"))
        state.network.train()
        torch.manual_seed(1)
        _, batches = Loading(2, True, 0, torch.device("cpu")).training(work, run.tasks)
        batch = next(iter(batches))
        for seed in range(3):
            torch.manual_seed(seed)
            step(run, work, state.network, state.method, state.optimizer, batch)
        assert state.method.weights.min() > 0
        states.append((state.network.state_dict(), state.method.norms))
    for name, value in states[0][0].items():
        assert torch.allclose(value.double(), states[1][0][name].double(), rtol=1e-4, atol=1e-6), name
    assert torch.allclose(states[0][1], states[1][1], rtol=1e-4)


def test_a_domain_with_few_pictures_begins_anew(tmp_path, small_office):
    work = made(tmp_path, office)
    work.data["train"][1] = torch.utils.data.Subset(work.data["train"][1], [0, 1])
    loading = Loading(2, True, 0, torch.device("cpu"))
    length, batches = loading.training(work, range(3))
    found = list(batches)
    assert length == len(found) == 2
    pictures = [{tuple(x.flatten().tolist()) for x in batch.inputs[1]} for batch in found]
    assert pictures[0] == pictures[1]
    assert not set.intersection(*({tuple(x.flatten().tolist()) for x in batch.inputs[0]} for batch in found))


def test_uncertainty_weighting_and_famo_by_hand():
    method = Uncertainty(2)
    with torch.no_grad():
        method.log_variances.copy_(torch.tensor([0.0, math.log(4)]))
    losses = [torch.tensor(3.0), torch.tensor(8.0)]
    assert method(losses).item() == pytest.approx(0.5 * (3 + 8 / 4 + math.log(4)))
    famo = FAMO(2, torch.device("cpu"))
    x = torch.tensor([2.0, 4.0], requires_grad=True)
    famo(list(x)).backward()
    # weights 1/2 each: gradient of their sum of logs, over sum of weight / loss
    expected = torch.tensor([0.5 / 2, 0.5 / 4]) / (0.5 / 2 + 0.5 / 4)
    assert torch.allclose(x.grad, expected)
    famo.update([torch.tensor(1.0), torch.tensor(4.0)])  # the first fell: it weighs less
    assert famo.logits[0] < famo.logits[1]


@pytest.mark.parametrize(("model", "method"), [("mtan", "db-mtl"), ("segnet", "one-pass")])
def test_all_losses_fall(method, model, tmp_path):
    work = made(tmp_path, model=model)
    work.protocol = replace(work.protocol, rate=1e-2)
    run = Run(method, (0, 1, 2), 0, 0.9, 0.5, False, "")
    state = begin(run, work, torch.device("cpu"))
    _, batches = Loading(2, False, 0, torch.device("cpu")).training(work, run.tasks)
    batch = next(iter(batches))
    first = torch.stack(work.losses(state.network, batch, run.tasks))
    for _ in range(25):
        step(run, work, state.network, state.method, state.optimizer, batch)
    assert (torch.stack(work.losses(state.network, batch, run.tasks)) < 0.8 * first).all()


# --- which epochs count ------------------------------------------------------------------------------------------


def outcome_of(monkeypatch, tmp_path, select, epochs, values):
    """Train nothing, and measure ``values`` one after another: of validation, or of the test data."""
    work = made(tmp_path)
    work.protocol = Protocol("x", 2, epochs, 0.1, select)
    monkeypatch.setattr(training, "_epoch", lambda run, work, loading, state, what: state.optimizer.step() or 1.0)
    epoch = iter(values)

    def measure(self, work, network, split, tasks):
        seen["value"] = next(epoch) if split == ("val" if select == BEST_EPOCH else "test") else seen["value"]
        return {"depth": {"absolute error": seen["value"] + (100 if split == "test" else 0)}}

    seen = {}
    monkeypatch.setattr(Loading, "measure", measure)
    run = Run("ew", (0, 1, 2), 0, 0.9, 0.5, False, "")
    return training.train(run, work, Loading(2, False, 0, torch.device("cpu")), tmp_path / "c.pt", resume=False)


@pytest.mark.parametrize(("epochs", "first"), [(12, 3), (3, 1)])
def test_the_mean_of_the_last_ten_epochs(epochs, first, monkeypatch, tmp_path):
    """Others are not measured: there would be no value for them."""
    values = [float(x) for x in range(epochs - first + 1)]
    outcome = outcome_of(monkeypatch, tmp_path, LAST_EPOCHS, epochs, values)
    assert outcome.metrics["depth"]["absolute error"] == 100 + sum(values) / len(values)
    assert outcome.selected == f"mean of epochs {first} to {epochs}"


def test_the_test_metrics_of_the_best_validation_epoch(monkeypatch, tmp_path):
    outcome = outcome_of(monkeypatch, tmp_path, BEST_EPOCH, 4, [0.2, 0.7, 0.4, 0.7])
    assert outcome.metrics == {"depth": {"absolute error": 100.7}}
    assert outcome.selected == "epoch 2"
