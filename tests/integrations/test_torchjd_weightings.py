"""TorchJD's weightings in GradientBalancer against TorchJD's own aggregators; matrix weightings on a Gramian.

Where a Gramian is singular the last bit decides what its rank is, and with it what several methods give. The rows of
those families are therefore small multiples of powers of two: their inner products are exact in any order of summation,
so that both libraries start from the same Gramian and have to agree to the end.
"""

import copy

import dbmtl_kernels as dbk
import numpy as np
import pytest
import torch
from dbmtl_kernels.integrations.torchjd import DBMTLAggregator, OnMatrix, grad_vac, nash_mtl
from problems import EPS, assert_same_state, close, flat_gradients, leaf, quadratics
from torch import nn
from torchjd import Stateful
from torchjd import aggregation as jd
from torchjd.autojac import jac_to_grad, mtl_backward

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torchjd"),  # a solver's
    pytest.mark.filterwarnings("ignore::RuntimeWarning:cvxpy"),
]
K = 4
CONSTANT = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

PLAIN = ("PCGrad", "GradVac", "IMTLG", "AlignedMTL", "MGDA", "UPGrad", "DualProj", "Mean", "Sum", "Random")
METHODS = {
    **{name: (getattr(jd, name), getattr(jd, f"{name}Weighting")) for name in PLAIN},
    "CAGrad": (lambda: jd.CAGrad(c=0.4), lambda: jd.CAGradWeighting(c=0.4)),
    "FairGrad": (lambda: jd.FairGrad(alpha=2.0), lambda: jd.FairGradWeighting(alpha=2.0)),
    "Krum": (lambda: jd.Krum(1, 2), lambda: jd.KrumWeighting(1, 2)),
    "Constant": (lambda: jd.Constant(CONSTANT), lambda: jd.ConstantWeighting(CONSTANT)),
    "Nash-MTL": (lambda: jd.NashMTL(K), lambda: nash_mtl(K)),
}
SLOW = ("FairGrad", "Nash-MTL")
FAST = [name for name in METHODS if name not in SLOW]
# Nash-MTL asks for G w = 1 / w. Rows that cancel or vanish leave it no solution; where G is nearly singular and not
# just so, its solver stops on the way, at weights that the last bits decide. All that is well defined is max_norm.
UNSOLVABLE = {("Nash-MTL", family) for family in ("opposite", "zero row", "ill-conditioned")}
# Its weights are not unique where rows are multiples of each other; the vector is.
NOT_UNIQUE = {("Nash-MTL", "parallel")}


def rows_of(family, dtype):
    """(K, 22) task gradients."""
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(K, 22, generator=generator, dtype=torch.float64)
    exact = (random * 8).round() / 8
    either = exact if dtype == torch.float32 else random  # half of float32's digits go where rows nearly cancel
    base, small = random[0].sign() * torch.arange(22).fmod(4), random[1].sign()
    big = 16 if dtype == torch.float32 else 1024
    rows = {
        "random": random * torch.tensor([[0.5], [1.0], [1.5], [2.0]]),
        "conflicting": torch.stack([s * exact[0] + row for s, row in zip((1, -1, 2, -0.5), either, strict=True)]),
        "parallel": torch.stack([exact[0], 2 * exact[0], exact[0] / 2, 4 * exact[0]]),
        "opposite": torch.stack([exact[0], 2 * exact[0], -exact[0], 4 * exact[0]]),
        "zero row": exact * torch.tensor([[1], [0], [1], [1]]),
        "ill-conditioned": torch.stack([big * base, big * base + small, base / big, small]),
    }
    return rows[family].to(dtype)


def theirs(method, matrices):
    """Weights and vectors of TorchJD's own aggregator."""
    torch.manual_seed(1)
    aggregator, captured = METHODS[method][0](), []
    aggregator.weighting.register_forward_hook(lambda _, __, weights: captured.append(weights))
    return [(aggregator(matrix), captured[-1]) for matrix in matrices]


def ours(method, matrices, log):
    """The same through losses whose gradients are the rows; those to take the log of are powers of two less eps."""
    torch.manual_seed(1)
    dtype = matrices[0].dtype
    p, q = torch.zeros(3, 5, dtype=dtype, requires_grad=True), torch.zeros(7, dtype=dtype, requires_grad=True)
    balancer = dbk.GradientBalancer(
        [p, q], K, weighting=METHODS[method][1](), log_transform=log, eps=EPS, state_dtype=dtype, zero_gradients="count"
    )
    out = []
    for matrix in matrices:
        p.grad = q.grad = None
        flat = torch.cat([p.reshape(-1), q])
        losses = [(flat * row).sum() + (2.0 ** (t % 2) - EPS) for t, row in enumerate(matrix)]
        balancer.backward(losses)
        out.append((torch.cat([p.grad.reshape(-1), q.grad]), balancer.weights))
    return out


def difference(a, b, size=None):
    """Relative to the largest number of ``b``, or of another tensor."""
    return float((a - b).abs().max()) / max(float((b if size is None else size).abs().max()), 1e-30)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("family", ["random", "conflicting", "parallel", "opposite", "zero row", "ill-conditioned"])
@pytest.mark.parametrize("method", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_weights_and_gradients_are_torchjds(method, family, log):
    worst = 0.0
    for dtype in (torch.float64, torch.float32):
        if method == "Constant" and dtype == torch.float32:
            continue  # TorchJD's needs weights in the dtype of the matrix
        rows = rows_of(family, dtype)
        matrices = [rows, rows.flip(0)]  # two steps, for methods with a memory
        scale = 2.0 ** -(torch.arange(K, dtype=dtype) % 2)[:, None] if log else 1.0
        given = [matrix * scale for matrix in matrices]
        for (vector, weights), (expected, their_weights), matrix in zip(
            ours(method, matrices, log), theirs(method, given), given, strict=True
        ):
            assert expected.isfinite().all()
            if (method, family) in UNSOLVABLE:
                assert vector.isfinite().all()
                assert vector.norm() <= 1.0 + 1e-6
                continue
            # Of weighted rows that cancel is left what rounding leaves, which differs from one processor to another.
            terms = their_weights.abs() @ matrix.abs() if family == "opposite" else None
            worst = max(worst, difference(vector, expected, terms))
            if (method, family) not in NOT_UNIQUE:
                worst = max(worst, difference(weights, their_weights))
    assert worst <= 1e-5


def train(method, with_torchjd, steps=50):
    """The losses, the norm of each gradient and the weights of every step."""
    torch.manual_seed(7)
    trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh()).double()
    heads = nn.ModuleList(nn.Linear(12, 1) for _ in range(K)).double()
    shared = list(trunk.parameters())
    optimizer = torch.optim.SGD([*shared, *heads.parameters()], lr=0.05)
    if method == "DB-MTL":
        aggregator, balancer = DBMTLAggregator(beta=0.5), dbk.DBMTL(shared, K, beta=0.5, state_dtype=torch.float64)
    else:
        aggregator, weighting = (make() for make in METHODS[method])
        balancer = dbk.GradientBalancer(shared, K, weighting=weighting, log_transform=True, state_dtype=torch.float64)
    generator = torch.Generator().manual_seed(8)
    curve = []
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        z = trunk(x)
        losses = [(head(z).squeeze(1) - (x[:, t] * (-1.5) ** t)).square().mean() for t, head in enumerate(heads)]
        optimizer.zero_grad()
        if with_torchjd:
            mtl_backward([dbk.log_transform(loss) for loss in losses], features=z)
            weights = jac_to_grad(shared, aggregator)
        else:
            balancer(losses).backward()
            weights = balancer.weights
        norms = [p.grad.norm() for p in (*shared, *heads.parameters())]
        optimizer.step()
        curve.append([float(x.detach()) for x in (*losses, *norms, *weights)])
    return np.array(curve)


@pytest.mark.parametrize("method", ["DB-MTL", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS)])
def test_training_curves_are_torchjds(method):
    mine, expected = (train(method, with_torchjd) for with_torchjd in (False, True))
    what = slice(K) if method == "Nash-MTL" else slice(None)  # its solver stops near the weights
    np.testing.assert_allclose(mine[:, what], expected[:, what], rtol=1e-10 if method == "DB-MTL" else 1e-6)
    assert expected[-5:, :K].mean() < expected[:5, :K].mean()


class Inverse(jd.Weighting, Stateful):
    """By the norms of a matrix's rows; counts its calls in its state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen = None

    def forward(self, matrix):
        self.calls += 1
        self.seen = matrix
        return matrix.norm(dim=1).reciprocal()

    def reset(self):
        self.calls.zero_()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_on_matrix_gives_a_root_of_the_gramian(dtype, rtol):
    weighting = OnMatrix(Inverse())
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(3, 50, generator=generator, dtype=dtype) * torch.tensor([[1e-4], [1.0], [1e4]])
    for matrix in (wide, torch.ones(3, 1, dtype=dtype), torch.zeros(2, 2, dtype=dtype)):
        gramian = matrix @ matrix.T
        weights = weighting(gramian)
        root = weighting.weighting.seen
        assert root.dtype == dtype
        assert root.shape == gramian.shape
        norms = matrix.norm(dim=1).clamp(min=1e-30)
        error = root @ root.T - gramian
        assert (error.abs() <= rtol * norms.outer(norms)).all()  # small rows are as precise as large ones
        if matrix.any():
            close(weights.numpy(), norms.reciprocal().numpy(), rtol)
    weighting(torch.tensor([[1.0, 0.0], [0.0, -1e-9]], dtype=dtype))  # rounding made a square negative
    assert weighting.weighting.seen.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    weighting(torch.tensor([[1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]], dtype=dtype))  # an eigenvalue negative
    close(weighting.weighting.seen.numpy(), np.full((2, 2), 0.5**0.5), 1e-5)


def test_on_matrix_passes_reset_through():
    weighting = OnMatrix(Inverse())
    weighting(torch.eye(2))
    assert weighting.weighting.calls == 1
    weighting.reset()
    assert weighting.weighting.calls == 0
    OnMatrix(jd.Constant(torch.ones(2)).weighting).reset()  # nothing to reset


@pytest.mark.parametrize(
    ("make", "different"),
    [
        (lambda: nash_mtl(2, max_norm=0.0), 7),
        (lambda: nash_mtl(2, max_norm=0.0, update_weights_every=3), 3),
        (lambda: grad_vac(2), 3),  # its targets change in every step
        (lambda: OnMatrix(Inverse()), 7),
    ],
)
def test_a_weighting_with_a_memory_goes_on_bit_for_bit(make, different):
    def run(interrupt):
        torch.manual_seed(4)
        p = leaf(8)
        balancer, other = (dbk.GradientBalancer([p], 2, weighting=make()) for _ in range(2))
        weights = []
        for step in range(7):
            if interrupt and step == 4:
                other.load_state_dict(copy.deepcopy(balancer.state_dict()))
                balancer = other
            p.grad = None
            balancer.backward(quadratics(p))
            weights.append(balancer.weights.tolist())
            with torch.no_grad():
                p -= 1e-3 * p.grad
        return p.detach(), weights, balancer.state_dict()

    (p, weights, state), (q, others, other) = run(False), run(True)
    assert torch.equal(p, q)
    assert weights == others
    assert_same_state(state, other)
    assert len({tuple(w) for w in weights}) == different


def test_grad_vac_is_torchjds():
    mine, theirs = grad_vac(K), jd.GradVacWeighting()
    for step in range(4):
        rows = rows_of("conflicting", torch.float64) * (step + 1.0)
        weights = []
        for weighting in (mine, theirs):
            torch.manual_seed(step)
            weights.append(weighting(rows @ rows.T))
        assert torch.equal(*weights)
    assert torch.equal(mine.targets, theirs._phi_t)
    mine.reset()
    assert not mine.targets.any()


def weigh(balancer, p, rows, **options):
    torch.manual_seed(3)
    p.grad = None
    balancer.backward([(p * row).sum() + 1 for row in rows], **options)
    return balancer.weights.tolist()


def test_memories_stay_with_their_tasks():
    rows = torch.tensor([[1, 0.2, 0, 0], [-1, 1, 0, 0.1], [-1, -0.5, 2, 0]], dtype=torch.float64)
    p = leaf(4)

    def make(weighting):
        return dbk.GradientBalancer([p], 3, weighting=weighting, state_dtype=torch.float64)

    balancer = make(grad_vac(3))
    weigh(balancer, p, rows[:2], tasks=[0, 1])
    later = weigh(balancer, p, rows[[0, 2]], tasks=[0, 2])
    assert later == weigh(make(grad_vac(3)), p, rows[[0, 2]], tasks=[0, 2])  # the pair met for the first time
    assert weigh(balancer, p, rows[:2], tasks=[0, 1]) != weigh(make(grad_vac(3)), p, rows[:2], tasks=[0, 1])

    balancer = make(grad_vac(3))
    weigh(balancer, p, rows)
    before = balancer.weighting.targets.clone()
    balancer.remove_task(0)
    balancer.add_task()
    assert torch.equal(balancer.weighting.targets[:2, :2], before[1:, 1:])
    assert not balancer.weighting.targets[2].any()
    assert not balancer.weighting.targets[:, 2].any()

    balancer, other = (make(nash_mtl(3, update_weights_every=10, max_norm=0.0)) for _ in range(2))
    weigh(balancer, p, rows)
    balancer.remove_task(0)
    balancer.add_task()
    assert weigh(balancer, p, rows[[1, 2, 0]]) == weigh(other, p, rows[[1, 2, 0]])
    balancer.add_task()
    assert balancer.weighting.num_tasks == 4


def test_a_state_is_taken_over_whole_or_not_at_all():
    p, rows = leaf(8), torch.randn(2, 8, dtype=torch.float64)
    for make in (lambda: grad_vac(2), lambda: nash_mtl(2), jd.PCDWeighting, lambda: dbk.GradNorm(2)):
        balancer, other = (dbk.GradientBalancer([p], 2, weighting=make()) for _ in range(2))
        weigh(balancer, p, rows)
        state = copy.deepcopy(balancer.state_dict())
        assert state["weighting"]
        other.load_state_dict(copy.deepcopy(state))  # some make their buffers when they first run
        assert_same_state(other.state_dict(), state)
        with pytest.raises(ValueError, match=r"(?s)the state is not one of \w+: .*(Unexpected|Missing) key"):
            balancer.load_state_dict({**state, "weighting": {"something": torch.ones(3)}})
        assert_same_state(balancer.state_dict(), state)
    kept = {**dbk.GradientBalancer([p], 2, weighting=dbk.EqualWeights()).state_dict(), "weighting": state["weighting"]}
    with pytest.raises(ValueError, match=r"a weighting that keeps \['start', 'used', 'weights'\], EqualWeights keeps"):
        dbk.GradientBalancer([p], 2, weighting=dbk.EqualWeights()).load_state_dict(kept)


def test_nash_mtl_with_tasks_missing():
    p = leaf(8)
    balancer = dbk.GradientBalancer([p], 3, weighting=nash_mtl(3), state_dtype=torch.float64)
    balancer.backward(quadratics(p, num_tasks=3))
    state = copy.deepcopy(balancer.weighting.state_dict())
    losses = quadratics(p, num_tasks=3)
    losses[1] = losses[1] * float("nan")
    p.grad = None
    balancer.backward(losses)
    rows = flat_gradients(quadratics(p, num_tasks=3), [p], log=False)[[0, 2]]
    close(p.grad.numpy(), jd.NashMTL(2)(torch.from_numpy(rows)).numpy(), rtol=1e-5)
    assert_same_state(dict(balancer.weighting.state_dict()), dict(state))


@pytest.mark.parametrize(("key", "value"), [("step", -1), ("weights", torch.tensor([1.0, torch.nan]).double())])
def test_a_damaged_state_of_nash_mtl_changes_nothing(key, value):
    weighting = nash_mtl(2)
    weighting(torch.eye(2))
    before = weighting.get_extra_state()
    with pytest.raises(ValueError, match=rf"state_dict\['{key}'\]: must be"):
        weighting.load_state_dict({"_extra_state": before | {key: value}})
    assert_same_state(weighting.get_extra_state(), before)


def balancer_of(weighting):
    return dbk.GradientBalancer([leaf(3)], 3, weighting=weighting)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: OnMatrix(Inverse), TypeError, "must be a TorchJD weighting"),
        (lambda: OnMatrix(lambda matrix: matrix[0]), TypeError, "must be a TorchJD weighting"),
        (lambda: OnMatrix(jd.NashMTL(2)), TypeError, "must be a TorchJD weighting"),
        (lambda: OnMatrix(Inverse())(torch.ones(2, 3)), ValueError, r"a Gramian is square, got shape \(2, 3\)"),
        (lambda: nash_mtl(0), ValueError, "num_tasks must be at least 1"),
        (lambda: nash_mtl(2, max_norm=-1.0), ValueError, "max_norm must be non-negative"),
        (
            lambda: nash_mtl(3).load_state_dict(nash_mtl(2).state_dict()), ValueError,
            r"state_dict\['weights'\]: of shape \(2,\), here of shape \(3,\)",
        ),
        (lambda: balancer_of(jd.UPGradWeighting), TypeError, "callable from a Gramian"),
        (lambda: balancer_of(nash_mtl(2)), ValueError, "is for 2 tasks, the balancer for 3"),
        (lambda: balancer_of(grad_vac(2)), ValueError, "is for 2 tasks, the balancer for 3"),
        (lambda: balancer_of(dbk.GradNorm(2)), ValueError, "is for 2 tasks, the balancer for 3"),
        (lambda: grad_vac(2)(torch.eye(3)), ValueError, "a Gramian of 3 tasks, and 2 are known"),
    ],
)  # fmt: skip
def test_what_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
