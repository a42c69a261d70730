"""Lightning's Trainer against the same training as a plain loop; its checkpoints and logs; two ranks."""

import csv
import pickle
import subprocess
import sys
from pathlib import Path

import dbmtl_kernels as dbk
import lightning.pytorch as pl
import pytest
import torch
import trained
from dbmtl_kernels.integrations.lightning import GradientBalancing
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning_job import BATCHES, Module, checkpointing, first_net, fit, loader, one_pass, parameters, trainer_of
from problems import assert_same_state, overflowing, state_of
from ranks import environment
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(lightning|pytorch_lightning)"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
EPOCHS = 2


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # conftest puts it back


def precision_of(name):
    """Lightning has no "16-mixed" by name on a CPU."""
    if name != "16-mixed":
        return {"precision": name}
    return {"plugins": [MixedPrecision(name, "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3))]}


def plain_loop(precision, accumulate=1, clip=None, algorithm="norm", poison=(), epochs=EPOCHS):
    """What Lightning does, in a loop without it."""
    dtype = {"bf16-true": torch.bfloat16}.get(precision, torch.float32)
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    net = first_net().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    balancer = dbk.DBMTL(net.trunk.parameters(), 2)
    balancer.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3, enabled=precision == "16-mixed")
    for epoch in range(epochs):
        for index, (x,) in enumerate(loader()):
            with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
                losses = net(x.to(dtype))
                if epoch * BATCHES + index in poison:
                    losses[1] = overflowing(losses[1])
                loss = balancer(losses) / accumulate
            if index % accumulate == 0:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
            if (index + 1) % accumulate == 0 or index + 1 == BATCHES:
                scaler.unscale_(optimizer)
                if clip is not None:
                    clipped = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_
                    clipped(net.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
    return net, balancer, scaler


@pytest.mark.parametrize(
    ("precision", "accumulate", "clip", "algorithm"),  # 4 does not divide the 6 batches of an epoch
    [
        ("32-true", 1, None, "norm"), ("32-true", 4, 0.5, "norm"),
        ("bf16-mixed", 4, None, "norm"), ("bf16-mixed", 1, 0.05, "value"),
        ("bf16-true", 1, 0.5, "norm"), ("bf16-true", 4, 0.05, "value"),
        ("16-mixed", 4, 0.5, "norm"), ("16-mixed", 1, 0.05, "value"),
    ],
)  # fmt: skip
def test_trains_as_a_plain_loop(precision, accumulate, clip, algorithm, tmp_path):
    module, balancing, _ = fit(
        tmp_path, EPOCHS, accumulate_grad_batches=accumulate, gradient_clip_val=clip,
        gradient_clip_algorithm=algorithm, **precision_of(precision),
    )  # fmt: skip
    expected, balancer, _ = plain_loop(precision, accumulate, clip, algorithm)
    assert balancer.step == EPOCHS * -(-BATCHES // accumulate)
    trained.assert_same_training(module, balancing.balancer, expected, balancer, first_net())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_overflow_reaches_the_scaler(accumulate, tmp_path):
    poison = (4, 10)
    options = precision_of("16-mixed")
    module, balancing, _ = fit(tmp_path, EPOCHS, module=Module(poison), accumulate_grad_batches=accumulate, **options)
    expected, balancer, scaler = plain_loop("16-mixed", accumulate, poison=poison)
    assert torch.isfinite(parameters(expected)).all()
    assert torch.equal(parameters(module), parameters(expected))
    assert balancing.balancer.nonfinite_steps.tolist() == balancer.nonfinite_steps.tolist() == [0, 2]
    assert options["plugins"][0].scaler.get_scale() == scaler.get_scale()
    assert torch.isfinite(state_of(balancing.balancer).rows).all()


@pytest.mark.parametrize(
    ("precision", "accumulate", "poison"),
    [
        ("32-true", 1, ()),
        ("bf16-true", 1, ()),
        ("16-mixed", 3, ()),
        ("16-mixed", 1, (BATCHES - 1,)),  # the scaler skips the step just before the checkpoint
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(precision, accumulate, poison, tmp_path):
    def run(epochs, *callbacks, **options):
        given = {"accumulate_grad_batches": accumulate, **precision_of(precision), **options}
        return fit(tmp_path, epochs, *callbacks, module=Module(poison), **given)[:2]

    straight, watched = run(3)
    run(1, checkpointing(tmp_path), enable_checkpointing=True)
    resumed, balancing = run(3, resume=tmp_path / "epoch=0.ckpt")
    assert straight.seen[BATCHES:] == resumed.seen
    assert torch.equal(parameters(straight), parameters(resumed))
    assert_same_state(watched.balancer.state_dict(), balancing.balancer.state_dict())


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        self.log("val", sum(self.net(batch[0])))


def test_the_state_of_a_finished_fit_is_saved_and_another_fit_begins_anew(tmp_path):
    _, balancing, trainer = fit(tmp_path, 1)
    first = balancing.balancer
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["GradientBalancing"]["balancer"]
    assert_same_state(saved, first.state_dict())
    trainer = trainer_of(tmp_path, 1, balancing)
    trainer.validate(Validated(), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    trainer.fit(Module(), loader())
    assert balancing.balancer is not first
    assert_same_state(balancing.balancer.state_dict(), first.state_dict())  # not two epochs
    trainer = trainer_of(tmp_path, 2, GradientBalancing(lambda m: m.net.trunk[0].parameters(), 2))
    with pytest.raises(ValueError, match="the state is of 4 shared parameters, there are 2 here"):
        trainer.fit(Module(), loader(), ckpt_path=tmp_path / "end.ckpt")


def test_a_checkpoint_without_a_state(tmp_path):
    trainer, module = trainer_of(tmp_path, 1), Module()
    module.balancer = sum
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.warns(UserWarning, match=r"no GradientBalancing in .*end.ckpt: the balancer begins anew"):
        _, balancing, _ = fit(tmp_path, 2, resume=tmp_path / "end.ckpt")
    assert balancing.balancer.step == BATCHES


class Recorder(pl.Callback):
    def __init__(self):
        self.said = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step not in self.said:  # not yet in the next step
            self.said[trainer.global_step] = pl_module.balancer.monitor().as_dict("balancer/", ["a", "b"], gramian=True)


@pytest.mark.parametrize(("accumulate", "every", "gramian"), [(1, 2, True), (2, 1, False)])
def test_logs(accumulate, every, gramian, tmp_path):
    recorder, logger = Recorder(), CSVLogger(tmp_path)
    balancing = GradientBalancing("net.trunk", 2, names=["a", "b"], gramian=gramian)
    options = {"accumulate_grad_batches": accumulate, "logger": logger, "log_every_n_steps": every}
    trainer = trainer_of(tmp_path, 3, balancing, recorder, **options)
    trainer.fit(Module(poison=(1,)), loader(), loader())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        logged = {int(r["step"]) + 1: r for r in csv.DictReader(file) if r["balancer/norm/a"]}
    steps = 3 * BATCHES // accumulate
    assert sorted(logged) == list(range(every, steps + 1, every))
    for step, row in logged.items():
        said = {k: v for k, v in recorder.said[step].items() if gramian or "co" not in k.split("/")[1][:2]}
        del said["balancer/step"]
        assert {k for k in row if k.startswith("balancer/")} == said.keys()
        assert {k: float(row[k]) for k in said} == pytest.approx(said, rel=1e-6, nan_ok=True)
    assert all(float(row["balancer/nonfinite_steps/b"]) > 0 for step, row in logged.items() if step > 1)
    assert "val" in trainer.callback_metrics  # balancer(losses) in a validation step


def test_other_methods_and_options(tmp_path):
    balancing = GradientBalancing(
        lambda module: module.net.trunk.parameters(), 2, method=dbk.GradientBalancer,
        weighting=dbk.EqualWeights(), log_transform=True, log=False,
    )  # fmt: skip
    module, trainer = Module(), trainer_of(tmp_path, 1, balancing, log_every_n_steps=1)
    trainer.fit(module, loader())
    net = first_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for (x,) in loader():
        optimizer.zero_grad()
        sum(torch.log(loss + 1e-8) for loss in net(x)).backward()
        optimizer.step()
    torch.testing.assert_close(parameters(module), parameters(net), rtol=0, atol=1e-5)
    assert balancing.balancer.weights.tolist() == [1.0, 1.0]
    assert not trainer.logged_metrics


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
        self.manual_backward(self.balancer(self.net(batch[0])) / 2)
        if batch_idx % 2 == 1:
            optimizer.step()


class ByHand(Manual):
    """Attaches a balancer to Lightning's optimizer."""

    def on_fit_start(self):
        self.balancer = dbk.DBMTL(self.net.trunk.parameters(), 2)
        self.balancer.attach(self.optimizers())


@pytest.mark.parametrize(("cls", "callbacks"), [(Manual, [GradientBalancing("net.trunk", 2)]), (ByHand, [])])
def test_manual_optimization(cls, callbacks, tmp_path):
    module = cls()
    trainer_of(tmp_path, EPOCHS, *callbacks).fit(module, loader())
    assert torch.equal(parameters(module), parameters(plain_loop("32-true", accumulate=2)[0]))


class HeadsOnly(Module):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net.heads.parameters(), lr=0.1)


class OwnBalancer(Module):
    def __init__(self):
        super().__init__()
        self.balancer = dbk.DBMTL(self.net.trunk.parameters(), 2)


class Raises(Module):
    def on_train_batch_end(self, *_):
        raise KeyError("stop")


class Thaws(Module):
    def setup(self, stage):
        self.net.trunk[0].requires_grad_(False)

    def on_train_epoch_start(self):
        self.net.trunk[0].requires_grad_(self.current_epoch == 1)


THAWED = r"shared parameters of 'net\.trunk' were thawed after fitting had started"


@pytest.mark.parametrize(
    ("cls", "shared", "kind", "message"),
    [
        (HeadsOnly, "net.trunk", ValueError, "SGD holds none of the shared parameters"),
        (OwnBalancer, "net.trunk", RuntimeError, "OwnBalancer has an attribute `balancer` already"),
        (Raises, "net.trunk", KeyError, "stop"),
        (Thaws, "net.trunk", RuntimeError, THAWED),
        (Module, "net.stem", AttributeError, "stem"),
    ],
)
def test_a_fit_that_fails_leaves_the_module_as_it_was(cls, shared, kind, message, tmp_path):
    module, balancing = cls(), GradientBalancing(shared, 2)
    own = getattr(module, "balancer", None)
    for _ in range(2):
        with pytest.raises(kind, match=message):
            trainer_of(tmp_path, 2, balancing).fit(module, loader())
        assert getattr(module, "balancer", None) is own
        assert hasattr(module, "balancer") == (own is not None)


def test_a_frozen_layer_is_left_out_and_a_balancer_of_none_is_none_again(tmp_path):
    module = Module()
    module.balancer = None
    module.net.trunk[0].requires_grad_(False)
    before = module.net.trunk[0].weight.clone()
    _, balancing, _ = fit(tmp_path, 1, module=module)
    assert [p.shape for p in balancing.balancer.shared_parameters] == [(5, 33), (5,)]
    assert torch.equal(module.net.trunk[0].weight, before)
    assert module.balancer is None


class WithData(Validated):
    """Its validation needs no balancer."""

    batch_size = 12
    train_dataloader = val_dataloader = staticmethod(loader)


def test_finders_that_train_before_there_is_a_balancer_are_refused(tmp_path):
    message = "Finder trains before GradientBalancing can make its balancer"
    with pytest.raises(RuntimeError, match=f"BatchSize{message}"):
        trainer_of(tmp_path, 1, GradientBalancing("net.trunk", 2), BatchSizeFinder()).fit(WithData())
    tuner, other = (Tuner(trainer_of(tmp_path, 1, GradientBalancing("net.trunk", 2))) for _ in range(2))
    tuner.scale_batch_size(WithData(), val_dataloaders=None, method="validate", steps_per_trial=1, max_trials=1)
    with pytest.raises(RuntimeError, match=f"LearningRate{message}"):
        other.lr_find(Module(), loader())


class Renamed(GradientBalancing):
    """A user's subclass."""


def test_pickled_for_processes_that_are_spawned(tmp_path):
    balancing = pickle.loads(pickle.dumps(Renamed("net.trunk", 2, names=["a", "b"])))
    assert isinstance(balancing, Renamed)
    assert balancing.state_key == "Renamed"
    module = Module()
    trainer_of(tmp_path, EPOCHS, balancing).fit(module, loader())
    assert torch.equal(parameters(module), parameters(plain_loop("32-true")[0]))


@pytest.mark.slow
@pytest.mark.parametrize("found", ["pytorch_lightning", "neither"])
def test_packages_of_lightning_that_are_missing(found):
    code = (
        f"import sys; sys.modules.update({{x: None for x in ('lightning', 'pytorch_lightning') if x != '{found}'}})\n"
    )
    code += "from dbmtl_kernels.integrations.lightning import GradientBalancing\n"
    code += "import pytorch_lightning as pl; assert issubclass(GradientBalancing, pl.Callback)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (found == "pytorch_lightning"), done.stderr
    assert ("pip install 'dbmtl-kernels[lightning]'" in done.stderr) == (found == "neither")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(__file__).parent / "lightning_job.py"), str(folder)]
    settings = environment(PYTHONWARNINGS="ignore")
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, trained.of_two_ranks(folder)


@pytest.mark.parametrize("wrapper", ["", "sharded, "])
@pytest.mark.parametrize("name", ["plain", "accumulated", "other", "resumed"])
def test_two_ranks_do_what_one_does_with_the_whole_batch(ranks, wrapper, name, tmp_path):
    alone, balancing, _ = fit(tmp_path, accumulate_grad_batches=3 if name == "accumulated" else 1)
    for found in ranks[1]:
        trained.assert_a_ranks_part(found[wrapper + name], alone, balancing.balancer, rows=0.6)
        assert not found[wrapper + name]["left"]
        if name == "resumed":  # bit for bit
            assert found[wrapper + name]["parameters"] == found[f"{wrapper}plain"]["parameters"]


@pytest.mark.parametrize(("name", "accumulate"), [("1", 1), ("3", 3), ("sharded", 1)])
def test_two_ranks_of_one_pass(ranks, name, accumulate, tmp_path):
    alone, balancing, _ = fit(tmp_path, accumulate_grad_batches=accumulate, method=one_pass)
    for found in ranks[1]:
        trained.assert_a_ranks_part(found[f"one pass, {name}"], alone, balancing.balancer, rows=None)


def test_one_process_goes_on_from_the_checkpoint_of_two_ranks(ranks, tmp_path):
    straight, _, _ = fit(tmp_path)
    resumed, _, _ = fit(tmp_path, resume=ranks[0] / "epoch=0.ckpt")
    assert (parameters(straight) - parameters(resumed)).abs().max() <= 1e-5
    assert len(resumed.seen) == BATCHES


def test_without_the_callback_two_ranks_are_refused(ranks):
    for found in ranks[1]:
        assert "inside `with model.no_sync():`" in found["refusal"]
        assert "dbmtl_kernels.integrations" in found["refusal"]
