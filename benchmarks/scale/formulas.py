"""What a step holds, moves and sends on a GPU, and how long it takes: arithmetic, from P, K and the number of GPUs.

Names: P parameters of the trunk, H of all heads together, K tasks; N GPUs that work on one batch, S of which share one
copy of the parameters (1 with DDP, N with FSDP2, those of a node with HSDP), so that a GPU has c = P / S of them.
``python -m benchmarks scale`` prints tables; tests/distributed/test_scale.py holds `collectives` and `held` to bytes
counted on 2 and 4 ranks. `moved` and `seconds` are not measured anywhere.

Terms come from docs/architecture.md: "A step, and the bytes it moves" (`moved`), "Several ranks" (`collectives`,
`held`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

PLAIN, ONE_PASS, ONE_ROW, ROWS = "plain sum", "one pass", "one row", "rows"
FORMS = (PLAIN, ONE_PASS, ONE_ROW, ROWS)
DDP, FSDP2, HSDP = "DDP", "FSDP2", "HSDP"
WRAPPERS = (DDP, FSDP2, HSDP)
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
FORWARD, BACKWARD, AFTER = "forward", "backward", "after"


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    Attributes:
        parameters: P.
        tasks: K.
        wrapper: one of `WRAPPERS`.
        gpus: N.
        per_node: GPUs that NVLink joins; S of HSDP.
        heads: H, in parameters; they are small, and left out of `moved` and `seconds`.
        state: bytes an element of the rows and of the balanced gradient.
        reduced: bytes an element of gradients that are reduced.
        gathered: bytes an element of parameters that FSDP2 gathers.
        transits: whole rows on their way that DDP has room for: 1 on a GPU, 2 on a CPU.
        measure_every: of one pass.
        tokens: a step, of each GPU.
    """

    parameters: float
    tasks: int
    wrapper: str = DDP
    gpus: int = 1
    per_node: int = 8
    heads: float = 0.0
    state: int = 4
    reduced: int = 4
    gathered: int = 2
    transits: int = 1
    measure_every: int = 10
    tokens: int = 8192

    @property
    def shards(self) -> int:
        """S."""
        return {DDP: 1, FSDP2: self.gpus, HSDP: min(self.gpus, self.per_node)}[self.wrapper]

    @property
    def replicas(self) -> int:
        """Copies of the parameters."""
        return self.gpus // self.shards

    @property
    def columns(self) -> float:
        """C."""
        return self.parameters / self.shards


@dataclass(frozen=True)
class Machine:
    """What a GPU does a second, in bytes or operations, and bytes it has.

    Defaults: 40 % of the operations and 80 % of the bandwidths in an H100's data sheet.

    Attributes:
        flops: of matrix products in bfloat16.
        hbm: of its memory.
        nvlink: sent to GPUs of its node.
        network: sent to other nodes.
        memory: bytes.
    """

    flops: float = 400e12
    hbm: float = 2.7e12
    nvlink: float = 360e9
    network: float = 40e9
    memory: float = 80e9


class Collective(NamedTuple):
    """What is given to a collective in a step.

    Attributes:
        kind: `GATHER`, `SCATTER` or `REDUCE`.
        bytes: of the whole tensor: what an all-gather makes, what the others are given.
        ranks: that take part.
        when: `FORWARD`, `BACKWARD` (which it runs beside), or `AFTER` (nothing runs beside it).
        spans: whether they are of several nodes.
    """

    kind: str
    bytes: float
    ranks: int
    when: str
    spans: bool = False

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a ring."""
        return self.bytes * (self.ranks - 1) / self.ranks * (2 if self.kind == REDUCE else 1)


def passes(job: Job, form: str) -> int:
    """Backward passes of a step that measures nothing."""
    return job.tasks if form in (ONE_ROW, ROWS) else 1


def collectives(job: Job, form: str) -> Iterator[Collective]:
    """Of a step; of one pass, of a step that measures nothing. Messages of a few numbers a task are left out.

    DDP (rows/sharded.py): a whole row is reduce-scattered a task, the balanced gradient all-gathered; heads are
    all-reduced.
    FSDP2: parameters are gathered for the forward pass and each backward pass, gradients scattered after each. Heads
    are of the root, which stays gathered until the first backward pass is over, and each has a gradient in one pass.
    HSDP: what is scattered is all-reduced over the copies besides.
    """
    p, h, times = job.parameters, job.heads, passes(job, form)
    if job.gpus == 1:
        return
    if job.wrapper == DDP:
        everyone = {"ranks": job.gpus, "spans": job.gpus > job.per_node}
        if times == 1 and form not in (ONE_ROW, ROWS):
            yield Collective(REDUCE, (p + h) * job.reduced, when=BACKWARD, **everyone)
            return
        yield Collective(SCATTER, times * p * job.state, when=BACKWARD, **everyone)
        yield Collective(REDUCE, h * job.reduced, when=AFTER, **everyone)
        yield Collective(GATHER, p * job.state, when=AFTER, **everyone)
        return
    inside = {"ranks": job.shards, "spans": job.shards > job.per_node}
    yield Collective(GATHER, (p + h) * job.gathered, when=FORWARD, **inside)
    yield Collective(GATHER, (times * p + (times - 1) * h) * job.gathered, when=BACKWARD, **inside)
    scattered = (times * p + h) * job.reduced
    yield Collective(SCATTER, scattered, when=BACKWARD, **inside)
    if job.replicas > 1:
        yield Collective(REDUCE, scattered / job.shards, job.replicas, BACKWARD, job.gpus > job.per_node)


def measured(job: Job) -> float:
    """The share of steps of one pass that measure; with DDP one task by a pass of its own, else all, by one row.

    docs/forms.md: one task in every ``measure_every`` steps; with FSDP2 all, in every K * measure_every.
    """
    return 1 / job.measure_every / (1 if job.wrapper == DDP else job.tasks)


def measuring(job: Job) -> Iterator[Collective]:
    """What a step of one pass that measures gives to collectives more than another."""
    if job.gpus == 1:
        return
    if job.wrapper == DDP:
        yield Collective(REDUCE, job.parameters * job.reduced, job.gpus, BACKWARD, job.gpus > job.per_node)
        return
    plain = list(collectives(job, ONE_PASS))
    for mine, base in zip(collectives(job, ONE_ROW), plain, strict=True):
        yield mine._replace(bytes=mine.bytes - base.bytes)


def sent(job: Job, form: str) -> float:
    """Bytes that a GPU sends in a mean step."""
    total = sum(one.sent for one in collectives(job, form))
    return total + (measured(job) * sum(one.sent for one in measuring(job)) if form == ONE_PASS else 0.0)


def held(job: Job, form: str) -> float:
    """Bytes of gradients and balancer between two steps: ``.grad`` of the trunk, rows, and rows on their way.

    Rows: K c, of DDP K P / N, as each rank keeps its columns of every row. The balanced gradient is what ``.grad``
    shows. DDP's rows on their way are whole, with what comes of them: P + P / N each; with one row there is one at a
    time. The sum of one row lies where the balanced gradient will, of DDP in its columns there. What one pass with
    FSDP2 keeps of a step that measured, up to 2 c, is left out.
    """
    grads = job.columns * (job.state if form in (ONE_ROW, ROWS) else job.reduced)
    if form in (PLAIN, ONE_PASS):
        return grads
    replicated = job.wrapper == DDP and job.gpus > 1
    rows = job.tasks * job.columns / (job.gpus if replicated else 1) * job.state if form == ROWS else 0.0
    rows_away = 1 if form == ONE_ROW else job.transits
    transit = rows_away * (job.parameters + job.parameters / job.gpus) * job.state if replicated else 0.0
    return grads + rows + transit


def moved(job: Job, form: str) -> float:
    """Bytes of memory read and written beside the passes and the optimizer in a mean step, as on a GPU.

    Rows (3 K + K + 1) c; one row (4 K + 1) c, of which K c read squares. Of DDP the columns are P / N, and a pass
    is first copied into a row on its way (2 P), the gathered gradient written (P). One pass: the squares of what is
    measured, c.
    """
    if form == PLAIN:
        return 0.0
    if form == ONE_PASS:
        every = measured(job)
        return every * job.columns * job.reduced if job.wrapper == DDP else every * moved(job, ONE_ROW)
    if job.wrapper == DDP and job.gpus > 1:
        inner = moved(replace(job, parameters=job.parameters / job.gpus, gpus=1), form)
        return inner + (2 * job.tasks + 1) * job.parameters * job.state
    return (4 * job.tasks + 1) * job.columns * job.state


def seconds(job: Job, form: str, machine: Machine) -> float:
    """Of a mean step.

    2 P operations a token forward, 4 P in each backward pass. A collective runs beside the pass of its kind, and what
    is longer counts; after them nothing does. Then memory moves, and the optimizer's 28 bytes a parameter (AdamW: four
    numbers read, three written).
    """
    time = _step(job, form, machine)
    if form != ONE_PASS:
        return time
    if job.wrapper == DDP:
        one = 4 * job.parameters * job.tokens / machine.flops
        more = max(one, _wire(list(measuring(job)), machine)) + job.columns * job.reduced / machine.hbm
    else:
        more = _step(job, ONE_ROW, machine) - time
    return time + measured(job) * more


def _step(job: Job, form: str, machine: Machine) -> float:
    """Of a step that measures nothing."""
    found = list(collectives(job, form))
    wire = {when: _wire([one for one in found if one.when == when], machine) for when in (FORWARD, BACKWARD, AFTER)}
    forward = 2 * job.parameters * job.tokens / machine.flops
    memory = (0.0 if form == ONE_PASS else moved(job, form)) + 28 * job.columns
    return (
        max(forward, wire[FORWARD])
        + max(2 * passes(job, form) * forward, wire[BACKWARD])
        + wire[AFTER]
        + memory / machine.hbm
    )


def _wire(found: list[Collective], machine: Machine) -> float:
    """Seconds, one after another."""
    return sum(one.sent / (machine.network if one.spans else machine.nvlink) for one in found)


def fits(job: Job, form: str, machine: Machine) -> bool:
    """Whether that and the parameters with AdamW's two numbers (12 bytes each) fit in memory; activations left out."""
    return held(job, form) + 12 * job.columns <= machine.memory
