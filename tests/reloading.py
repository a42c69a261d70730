"""Reload each module of the package, one after another, there and back, and train on after each; in one process."""

import importlib
import pkgutil
import sys
import warnings

import dbmtl_kernels as dbk
import torch

OPTIONAL = ("__main__", ".lib", ".integrations")
# A class of these that another of them imported stays that of before: what is made anew there may be of both.
PUBLIC = ("balancer", "dbmtl", "functional", "onepass", "recipe")


def find():
    """Names of all modules, imported."""
    found = [module.name for module in pkgutil.walk_packages(dbk.__path__, "dbmtl_kernels.")]
    names = ["dbmtl_kernels", *(name for name in found if not any(part in name for part in OPTIONAL))]
    for name in names:
        importlib.import_module(name)
    return names


def forms():
    return [
        lambda p: dbk.DBMTL(p, 3),
        lambda p: dbk.DBMTL(p, 3, beta=0.0),
        lambda p: dbk.OnePassDBMTL(p, 3),
        lambda p: dbk.GradientBalancer(p, 3, weighting=dbk.MaxNorm(), beta=0.5),
        lambda p: dbk.GradientBalancer(p, 3, weighting=dbk.GradNorm(3)),
    ]


class Job:
    def __init__(self, form):
        self.p = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 5))
        self.optimizer = torch.optim.SGD([self.p], lr=0.1)
        self.balancer = form([self.p])
        if hasattr(self.balancer, "attach"):
            self.balancer.attach(self.optimizer)

    def bits(self):
        """Of a step, and of what is done now and then."""
        self.optimizer.zero_grad()
        self.balancer([(self.p - t).square().mean() + 0.1 for t in range(3)]).backward()
        self.optimizer.step()
        self.balancer.monitor().as_dict()
        self.balancer.load_state_dict(self.balancer.state_dict())
        if hasattr(self.balancer, "attach"):
            self.balancer.detach()
            self.balancer.attach(self.optimizer)
            self.optimizer.zero_grad()
            self.balancer.rebind([self.p])
        return self.p.detach().clone()


def operate():
    ema = torch.zeros(2, 4)
    out, norms = torch.ops.dbmtl_kernels.balance_(torch.ones(2, 4), ema, 0.5, 1e-8, "max", 0.0, "auto")
    return torch.cat([out, norms, ema.flatten()])


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    names = find()
    inner = [name for name in names if "." in name and name.split(".")[1] not in PUBLIC]
    path = inner + names + names[::-1]
    wanted = [[job.bits() for _ in path] for job in map(Job, forms())]
    result = operate()
    jobs = list(map(Job, forms()))
    for step, name in enumerate(path):
        importlib.reload(sys.modules[name])
        assert torch.equal(operate(), result), name
        for number, (job, form) in enumerate(zip(jobs, forms(), strict=True)):
            try:
                assert torch.equal(job.bits(), wanted[number][step]), "made before the reloads"
                if step < len(inner):
                    assert torch.equal(Job(form).bits(), wanted[number][0]), "made after it"
            except BaseException:
                print(f"{name}, form {number}")
                raise
    print(f"{len(names)} modules")


if __name__ == "__main__":
    main()
