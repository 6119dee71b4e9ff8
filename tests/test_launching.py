"""A kind of launch is worked out once, and never mistaken for another kind."""

import pytest
import torch

from sagan_kernels.ops import launching


class Kernel:
    """Stands for a Triton kernel: tells how it was launched."""

    arg_names = ("x_ptr", "bias_ptr", "L", "stride", "BLOCK", "FLAG")

    def __init__(self):
        self.bound, self.direct = [], []

    def __getitem__(self, grid):
        def bind(*args, **named):
            self.bound.append((grid, args, named))
            return Compiled(self)

        return bind


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.direct.append((grid, args))


class OnGpu:
    """As much of a CUDA tensor as a launch looks at."""

    is_cuda = True

    def __init__(self, address, dtype=torch.float32):
        self.address, self.dtype = address, dtype

    def data_ptr(self):
        return self.address

    def get_device(self):
        return 0


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launching.forget()
    kernel = Kernel()
    asked = []

    def arguments():
        asked.append(1)
        return 7, (100, 3), {"FLAG": True, "BLOCK": 64, "num_warps": 4}

    def launch(*tensors, kind=()):
        launching.launch(kernel, tensors, kind, arguments)

    launch.kernel, launch.asked = kernel, asked
    yield launch
    launching.forget()


def test_second_launch_of_a_kind_goes_to_the_compiled_kernel(launch):
    launch(OnGpu(4096), None)
    launch(OnGpu(8192), None)
    assert len(launch.asked) == len(launch.kernel.bound) == 1
    # the addresses of this call, then numbers, then constants in the kernel's order, without Triton's own options
    assert launch.kernel.direct == [((7, 1, 1), (8192, None, 100, 3, 64, True))]


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ([OnGpu(8192, torch.float16), None], ()),
        ([OnGpu(8192), OnGpu(64)], ()),
        ([OnGpu(8200), None], ()),  # may not be read 16 bytes at a time
        ([OnGpu(8192), None], (1,)),
    ],
    ids=["dtype", "none", "alignment", "kind"],
)
def test_another_kind_is_bound_anew(launch, tensors, kind):
    launch(OnGpu(4096), None)
    launch(*tensors, kind=kind)
    assert len(launch.kernel.bound) == 2
    assert not launch.kernel.direct


def test_kinds_do_not_pile_up(launch, monkeypatch):
    monkeypatch.setattr(launching, "_KEPT", 3)
    for kind in range(8):
        launch(OnGpu(4096), None, kind=(kind,))
    assert len(launching._launchers) <= 3


def test_kernels_of_cpu_tensors_are_bound_every_time(launch):
    for _ in range(2):
        launch(torch.zeros(3), None)
    assert len(launch.kernel.bound) == 2
