"""DiffAugment: each policy against a plain re-statement for one image, its gradients, and its randomness."""

import pytest
import torch
import torch.nn.functional as F

from sagan_kernels.augment import diff_augment


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_translation_is_a_shift_with_zeros_by_at_most_an_eighth():
    x = torch.rand(64, 2, 24, 16) + 1
    y = diff_augment(x, ("translation",), seeded())
    seen = set()
    for before, after in zip(x, y, strict=True):
        padded = F.pad(before, (2, 2, 3, 3))
        shifts = [
            (dy, dx)
            for dy in range(7)
            for dx in range(5)
            if torch.equal(after, padded[:, dy : dy + 24, dx : dx + 16])
        ]
        assert len(shifts) == 1
        seen.add(shifts[0])
    assert len(seen) > 15


@pytest.mark.parametrize("side", [32, 30])
def test_cutout_zeroes_one_square_of_half_the_side(side):
    y = diff_augment(torch.ones(64, 3, side, side), ("cutout",), seeded())
    for image in y:
        assert torch.equal(image[0], image[2])
        rows, cols = (image[0] == 0).any(1), (image[0] == 0).any(0)
        assert (image[0] == 0).sum() == rows.sum() * cols.sum()
        for line in (rows, cols):
            touches = line[0] or line[-1]
            assert line.sum() <= side // 2
            assert touches or line.sum() == side // 2
    assert max((image[0] == 0).sum().item() for image in y) == (side // 2) ** 2


def test_color_moves_brightness_saturation_and_contrast_only():
    x = torch.rand(32, 3, 8, 8) * 2 - 1
    y = diff_augment(x, ("color",), seeded())
    shift = (y.mean((1, 2, 3)) - x.mean((1, 2, 3))).abs()
    assert shift.max() <= 0.5 + 1e-5
    assert shift.max() > 0.3
    gray_x, gray_y = (
        x.mean(1).flatten(1),
        y.mean(1).flatten(1),
    )  # brightness and contrast: affine in the gray image
    fit = [
        torch.linalg.lstsq(torch.stack([a, torch.ones_like(a)], 1), b[:, None])
        for a, b in zip(gray_x, gray_y, strict=True)
    ]
    contrast = torch.stack([f.solution[0, 0] for f in fit])
    assert contrast.min() >= 0.5 - 1e-4
    assert contrast.max() <= 1.5 + 1e-4
    rebuilt = [torch.stack([a, torch.ones_like(a)], 1) @ f.solution for a, f in zip(gray_x, fit, strict=True)]
    torch.testing.assert_close(torch.stack(rebuilt).squeeze(2), gray_y, atol=1e-4, rtol=1e-4)
    spread_x, spread_y = ((t - t.mean(1, keepdim=True)).square().mean((1, 2, 3)).sqrt() for t in (x, y))
    saturation = spread_y / spread_x / contrast
    assert saturation.max() <= 2 + 1e-3
    assert saturation.max() > 1.5
    assert saturation.min() < 0.5


@pytest.mark.parametrize(
    "policy", [("color",), ("translation",), ("cutout",), ("color", "translation", "cutout")]
)
def test_augmentation_is_differentiable_twice(policy):
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: diff_augment(t, policy, seeded()).square(), x)
    assert torch.autograd.gradgradcheck(
        lambda t: diff_augment(t, policy, seeded()).square(), x, fast_mode=True
    )


def test_same_generator_state_gives_the_same_augmentation():
    x, policy = torch.rand(4, 3, 16, 16), ("color", "translation", "cutout")
    assert torch.equal(diff_augment(x, policy, seeded(3)), diff_augment(x, policy, seeded(3)))
    assert not torch.equal(diff_augment(x, policy, seeded(3)), diff_augment(x, policy, seeded(4)))


def test_unknown_policy_is_named():
    with pytest.raises(ValueError, match="policy must be among color, translation, cutout, got 'blur'"):
        diff_augment(torch.zeros(1, 3, 8, 8), ("blur",), seeded())
