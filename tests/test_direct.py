"""The short way is taken by plain tensors only: whoever wants to see an operator sees it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sagan_kernels.ops import attention
from sagan_kernels.ops.direct import DirectFunction, run


def taken(*args):
    return run(lambda *_: "operator", lambda *_: "body", *args)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_plain_tensors_take_the_short_way():
    assert taken(torch.zeros(1), torch.nn.Parameter(torch.zeros(1)), None, 3, "torch") == "body"


def test_other_tensors_and_modes_take_the_operator():
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(1))
    assert taken(fake) == "operator"
    with Watching():
        assert taken(torch.zeros(1)) == "operator"


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, within the interpreter
def test_tensors_whose_memory_is_not_what_they_stand_for(impl):
    q, k, v = (torch.randn(1, n, w) for n, w in [(7, 4), (5, 4), (5, 3)])
    if torch.cuda.is_available():
        q, k, v = q.cuda(), k.cuda(), v.cuda()
    negated = torch.complex(q, -q).conj().imag  # a view of -q with a bit that says so
    assert negated.is_neg()
    zeros = torch._efficientzerotensor(v.shape, device=v.device)  # as derivatives are made of
    assert taken(negated) == taken(zeros) == "operator"
    found, expected = (attention(negated, k, v, impl=i) for i in (impl, "reference"))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(expected, attention(q, k, v, impl="reference"))
    assert not attention(q, k, zeros, impl=impl).any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tracing, in newer versions
def test_a_trace_records_the_operator():
    class Model(torch.nn.Module):
        def forward(self, x):
            seen.append(taken(x))
            return x + 1

    seen = []
    torch.jit.trace(Model(), torch.zeros(1), check_trace=False)
    assert seen == ["operator"]


def test_a_mode_sees_the_operators_of_attention():
    q, k, v = (torch.randn(1, n, w, requires_grad=True) for n, w in [(3000, 4), (3000, 4), (3000, 5)])
    with Watching() as mode:
        attention(q, k, v, impl="torch").sum().backward()
    assert {"sagan_kernels.attention_forward.default", "sagan_kernels.attention_backward.default"} <= {
        *mode.seen
    }


def test_direct_function_is_a_function_under_transforms():
    class Double(DirectFunction):
        @staticmethod
        def forward(x):
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    assert torch.autograd.grad(Double.apply(x).sum(), x)[0].tolist() == [2, 2, 2]
    assert torch.func.grad(lambda x: Double.apply(x).sum())(torch.ones(3)).tolist() == [2, 2, 2]
