"""Names of other libraries that are not public and that this package uses (docs/architecture.md, "Private interfaces").

Each case fails by its name on a release that moved it.
"""

import inspect

import older
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def tensor_version():
    x = torch.zeros(2)
    before = x._version
    x.add_(1)
    assert x._version > before


def hooks_of_a_parameter():
    p = torch.zeros(2, requires_grad=True)
    first, last = (p.register_post_accumulate_grad_hook(lambda _: None) for _ in range(2))
    assert list(p._post_accumulate_grad_hooks) == [first.id, last.id]
    assert not torch.zeros(2, requires_grad=True)._post_accumulate_grad_hooks


def assert_async():
    torch._assert_async(torch.tensor(True), "message")


def node_names():
    p = torch.ones(2, requires_grad=True)
    assert type((p * 2).grad_fn.next_functions[0][0]).__name__ == "AccumulateGrad"
    assert (p * 2).grad_fn.next_functions[0][0].variable is p
    hidden = checkpoint(lambda x: x * 2, p, use_reentrant=True)
    assert type(hidden.grad_fn).__name__ == "CheckpointFunctionBackward"
    compiled = torch.compile(lambda x: (x * 2).sum(), backend="aot_eager")(p)
    assert type(compiled.grad_fn).__name__ == "CompiledFunctionBackward"


def nodes_that_pass_on():
    from torch.nn.parallel import distributed

    p = torch.ones(2, requires_grad=True)
    one, other = p.sum(), p.prod()
    stack = torch.stack([one, other])
    assert stack.grad_fn.name() == "StackBackward0"
    assert stack.unbind()[1].grad_fn.name() == "UnbindBackward0"
    assert stack[-1].grad_fn.name() == "SelectBackward0"
    assert stack[0].grad_fn._saved_index == 0
    assert stack[-1].grad_fn._saved_index in (1, -1, 2**64 - 1)
    assert [node for node, _ in stack.grad_fn.next_functions] == [one.grad_fn, other.grad_fn]
    assert issubclass(distributed._DDPSink, torch.autograd.Function)


def fully_sharded_parameters():
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    assert {"sharded_param", "_unsharded_param"} <= FSDPParam.__annotations__.keys()


def callback_after_a_pass():
    order = []
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    first, last = x * 2, y * 2
    last.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(lambda: order.append("end")))
    first.register_hook(lambda _: order.append("a node"))
    (first + last).sum().backward()
    assert order == ["a node", "end"]


def dispatch_keys():
    from torch._C import DispatchKey, DispatchKeySet

    plain = DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)
    assert torch._C._dispatch_tls_local_include_set() == plain
    assert torch._C._dispatch_keys(torch.ones(2)) == torch._C._dispatch_keys(torch.empty(0))
    assert torch._C._dispatch_keys(torch._neg_view(torch.ones(2))) != torch._C._dispatch_keys(torch.empty(0))
    assert torch._C._len_torch_function_stack() == 0
    assert torch._C._autograd._profiler_enabled() is False


def raw_stream():
    if torch.cuda.is_available():
        assert torch._C._cuda_getCurrentRawStream(0) == torch.cuda.current_stream(0).cuda_stream


def graph_task():
    ids = []
    p = torch.ones(2, requires_grad=True)
    for _ in range(2):
        loss = p.sum()
        loss.grad_fn.register_hook(lambda *_: ids.append(torch._C._current_graph_task_id()))
        loss.backward()
    assert torch._C._current_graph_task_id() == -1
    assert -1 not in ids
    assert ids[0] != ids[1]


def node_sequence():
    x = torch.ones(2, requires_grad=True)
    first = x * 2
    second = first + 1
    assert second.grad_fn._sequence_nr() > first.grad_fn._sequence_nr()
    assert first.grad_fn.next_functions[0][0]._sequence_nr() > second.grad_fn._sequence_nr()  # a leaf


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def custom_backward():
    out = Doubled.apply(torch.ones(2, requires_grad=True))
    assert isinstance(out.grad_fn, Doubled._backward_cls)
    assert not isinstance((out + 1).grad_fn, Doubled._backward_cls)


class Sub(torch.Tensor):
    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen += 1
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def subclass_without_functions():
    x = torch.ones(2).as_subclass(Sub)
    before = Sub.seen
    out = torch.add(x, 1)
    assert Sub.seen == before + 1
    assert type(out) is torch.Tensor


def compiled_module():
    module = nn.Linear(2, 2)
    assert torch.compile(module)._orig_mod is module


def donated_buffer():
    from torch._functorch import config

    assert isinstance(config.donated_buffer, bool)


def hits_of_the_cache_on_disk():
    from torch._dynamo.utils import counters
    from torch._functorch._aot_autograd import autograd_cache
    from torch._inductor import codecache

    assert counters["inductor"]["a name that nobody counts"] == 0
    assert '["fxgraph_cache_hit"] += 1' in inspect.getsource(codecache)
    assert '["autograd_cache_hit"] += 1' in inspect.getsource(autograd_cache)


def distributed_data_parallel():
    ddp = nn.parallel.DistributedDataParallel
    assert ddp._get_active_ddp_module() is None
    names = ddp.__init__.__code__.co_names
    assert "require_backward_grad_sync" in names
    assert "require_forward_param_sync" in names
    assert callable(torch.distributed.Reducer._reset_state)


def slice_of_a_storage():
    x = torch.arange(6.0)
    part = torch.empty(0).set_(x.untyped_storage()[8:16], 0, (2,))
    assert part.data_ptr() == x[2:].data_ptr()
    x += 1
    del x
    assert part.tolist() == [3.0, 4.0]


def fully_sharded_1():
    from torch.distributed.fsdp import _common_utils, _flat_param

    assert _common_utils.FSDP_FLATTENED == "_fsdp_flattened"
    assert _flat_param.FlatParameter(torch.zeros(2), requires_grad=False)._is_flat_param


def dtensor_local():
    from torch.distributed.tensor import DTensor

    assert "_local_tensor" in DTensor.__slots__


def trainer():
    import transformers

    assert callable(transformers.Trainer._save_optimizer_and_scheduler)
    assert callable(transformers.Trainer._load_optimizer_and_scheduler)


def torchjd():
    from torchjd import aggregation

    vac = aggregation.GradVacWeighting()
    vac(torch.eye(2))
    assert vac._phi_t.shape == (2, 2)
    assert vac._state_key[0] == 2
    nash = aggregation.NashMTL(2).weighting
    assert callable(nash._init_optim_problem)
    assert hasattr(nash, "step")
    assert hasattr(nash, "prvs_alpha")


CASES = [
    assert_async, callback_after_a_pass, compiled_module, custom_backward,
    pytest.param(dispatch_keys, marks=older.sets_compare), distributed_data_parallel,
    donated_buffer, dtensor_local, fully_sharded_1, fully_sharded_parameters, graph_task, hits_of_the_cache_on_disk,
    hooks_of_a_parameter,
    node_names, node_sequence, nodes_that_pass_on, raw_stream, slice_of_a_storage,
    subclass_without_functions, tensor_version, torchjd, trainer,
]  # fmt: skip


@pytest.mark.counts_calls
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_is_still_there(case):
    case()
