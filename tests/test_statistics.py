"""Standing statistics and truncated latents."""

import math

import pytest
import torch

from sagan_kernels.models import Generator
from sagan_kernels.models.statistics import STREAM, standing_statistics, truncated_normal


def test_truncated_normal_has_the_distribution_of_redrawn_normals():
    limit = 0.7
    z = truncated_normal((200_000,), limit, torch.Generator().manual_seed(0)).double()
    assert z.abs().max() <= limit
    density = math.exp(-(limit**2) / 2) / math.sqrt(2 * math.pi)
    inside = math.erf(limit / math.sqrt(2))
    assert z.var().item() == pytest.approx(1 - 2 * limit * density / inside, rel=0.01)
    assert z.mean().item() == pytest.approx(0, abs=0.005)


def test_no_truncation_is_the_plain_normal():
    z = truncated_normal((5, 3), None, torch.Generator().manual_seed(7))
    assert torch.equal(z, torch.randn(5, 3, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("truncation", [0, -1.0, float("nan")])
def test_truncation_must_be_positive(truncation):
    with pytest.raises(ValueError, match="truncation: must be positive"):
        truncated_normal((2,), truncation, torch.Generator())


@pytest.mark.parametrize("num_classes", [0, 3])
def test_statistics_are_the_moments_of_what_the_layers_see(num_classes):
    generator = Generator(32, num_classes, z_dim=6, base_channels=8, attention_at=(16,)).train()
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    standing = standing_statistics(generator, truncation=0.5, num_images=96, batch_size=96, seed=3)
    for key, value in generator.state_dict().items():
        assert torch.equal(value, before[key])
    random = torch.Generator().manual_seed(3 + STREAM)
    z = truncated_normal((96, 6), 0.5, random)
    seen = standing.linear(z).unflatten(1, (-1, 4, 4))
    norm = standing.blocks[0].norm1
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not standing.training
    for key, value in standing.state_dict().items():
        if key.endswith(("._u", "._v")):
            assert torch.equal(value, before[key])  # power iterations did not advance


def test_statistics_average_over_batches_of_any_size():
    generator = Generator(32, 2, z_dim=6, base_channels=2, attention_at=())
    one = standing_statistics(generator, num_images=64, batch_size=64)
    many = standing_statistics(generator, num_images=64, batch_size=16)
    torch.testing.assert_close(
        one.blocks[0].norm1.running_mean, many.blocks[0].norm1.running_mean, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_made_in_the_precision_of_the_generator(dtype):
    generator = Generator(32, 2, z_dim=6, base_channels=2, attention_at=()).to(dtype)
    standing = standing_statistics(generator, truncation=0.5, num_images=16)
    assert standing.norm.running_mean.dtype == dtype
    assert standing.norm.running_mean.isfinite().all()


def test_statistics_are_not_fitted_on_the_latents_of_the_same_seed():
    drawn = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (0, STREAM)]
    assert not torch.equal(*drawn)
