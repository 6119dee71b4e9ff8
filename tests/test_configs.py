"""The choice of tiles and of arithmetic."""

import pytest
import torch

from sagan_kernels.ops import configs

KERNELS = ["forward", "lse", "over_queries", "row", "column", "double_row", "double_column", "tangent"]


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(configs, "interpreted", lambda: False)
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision = before


@pytest.mark.parametrize(("key", "arch"), list(configs._TABLES))
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_width_has_a_tiling_of_whole_warps(kernel, key, arch):
    for E in (1, 8, 16, 17, 24, 64, 65, 256):
        for Ev in (1, 16, 33, 96, 128, 512):
            part = Ev if kernel == "lse" else configs.value_part(kernel, E, Ev, key, arch)
            assert 1 <= part <= Ev
            tile = configs.tiling(kernel, E, part, key, arch)
            assert tile.block_l >= 16
            assert tile.block_s >= 16


def test_a_row_may_name_warps_and_stages(monkeypatch):
    table = {"forward": ((16, 32, 64, 128, 8, 3), (256, 128, 32, 32))}
    monkeypatch.setitem(configs._TABLES, ("half", "sm_90"), table)
    assert configs.tiling("forward", 8, 32, "half", "sm_90") == configs.Tiling(64, 128, 8, 3)
    assert configs.tiling("forward", 8, 33, "half", "sm_90") == configs.Tiling(32, 32, 4, 2)


def test_float32_stays_float32_unless_tf32_is_allowed(on_a_gpu):
    x = torch.zeros(1)
    assert configs.arithmetic(x) == "tf32x3"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert configs.arithmetic(x) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.fp32_precision = "tf32"
    assert configs.arithmetic(x) == "tf32x3"
    torch.backends.cuda.matmul.fp32_precision = "none"
    assert configs.arithmetic(x) == "tf32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_need_no_choice(dtype, on_a_gpu):
    assert configs.arithmetic(torch.zeros(1, dtype=dtype)) == "half"


def test_a_layer_whose_values_do_not_fit_is_not_fused():
    assert configs.layer_tiling(256, 32, 128, "half", "sm_90") is not None
    assert configs.layer_tiling(512, 64, 256, "half", "sm_90") is None
    assert configs.layer_tiling(256, 32, 128, "tf32x3", "sm_90") is None


@pytest.mark.filterwarnings("error")
def test_a_compiler_looks_into_no_cache(on_a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    device = torch.device("cuda", 0)
    chosen = torch.compile(
        lambda x: x if configs.architecture(device) == "sm_90" else -x, fullgraph=True, backend="eager"
    )
    assert chosen(torch.ones(1)) == 1
