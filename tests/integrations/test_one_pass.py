"""OnePassDBMTL in the trainers: given as their ``method`` it trains as in a plain loop, and resumes bit for bit."""

import os

import dbmtl_kernels as dbk
import hf_job
import lightning_job
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from trained import parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(lightning|pytorch_lightning)"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _own_state(monkeypatch):
    torch.set_num_threads(1)  # conftest puts it back
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def assert_same(net, balancer, expected, other):
    assert not torch.equal(parameters(expected), parameters(type(expected)()))
    assert torch.equal(parameters(net), parameters(expected))
    assert torch.equal(balancer.weights, other.weights)
    assert balancer.step == other.step > 2
    assert type(balancer) is dbk.OnePassDBMTL


def lightning(folder, epochs=2, *callbacks, accumulate=1, **options):
    options |= {"accumulate_grad_batches": accumulate, "method": dbk.OnePassDBMTL}
    module, balancing, _ = lightning_job.fit(folder, epochs, *callbacks, **options)
    return module.net, balancing.balancer


def lightning_plain(accumulate):
    net = lightning_job.first_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    balancer = dbk.OnePassDBMTL(net.trunk, 2)
    balancer.attach(optimizer)
    for index, (x,) in enumerate([*lightning_job.loader(), *lightning_job.loader()]):
        if index % accumulate == 0:
            optimizer.zero_grad()
        (balancer(net(x)) / accumulate).backward()
        if index % accumulate == accumulate - 1:
            optimizer.step()
    return net, balancer


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning(accumulate, tmp_path):
    assert_same(*lightning(tmp_path, accumulate=accumulate), *lightning_plain(accumulate))


def test_lightning_resumes(tmp_path):
    lightning(tmp_path, 1, lightning_job.checkpointing(tmp_path), enable_checkpointing=True)
    assert_same(*lightning(tmp_path, resume=tmp_path / "epoch=0.ckpt"), *lightning_plain(1))


ONE = {"method": dbk.OnePassDBMTL}


@pytest.mark.parametrize("accumulate", [1, 7])
def test_trainer(accumulate, tmp_path):
    trainer = hf_job.trainer_of(tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=0.0, more=ONE)
    trainer.train()
    assert_same(trainer.model, trainer.balancer, *hf_job.plain_loop(accumulate, **ONE))


def test_trainer_resumes(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 10, "max_grad_norm": 0.0, "more": ONE}
    hf_job.trainer_of(tmp_path, **options).train()
    trainer = hf_job.trainer_of(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert_same(trainer.model, trainer.balancer, *hf_job.plain_loop(**ONE))


def test_accelerate(tmp_path):
    expected = hf_job.plain_loop(7, **ONE)
    assert_same(*hf_job.accelerate_loop(7, **ONE), *expected)
    hf_job.accelerate_loop(7, 1, save=tmp_path, **ONE)
    assert_same(*hf_job.accelerate_loop(7, resume=tmp_path, **ONE), *expected)
