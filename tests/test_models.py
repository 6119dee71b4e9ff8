"""The networks: published parameter counts, settings, gradients."""

import pytest
import torch

from sagan_kernels import regularizers
from sagan_kernels.models import Discriminator, Generator


def count(module):
    return sum(p.numel() for p in module.parameters())


# counted on BigGAN-PyTorch, StudioGAN and mmgeneration with the same settings
@pytest.mark.parametrize(
    ("resolution", "num_classes", "attention_at", "generator", "discriminator"),
    [
        (32, 10, [16], 4_386_308, 1_075_586),
        (64, 100, [32], 12_811_396, 19_650_242),
        (128, 1000, [64], 42_017_412, 39_448_258),
    ],
)
def test_parameter_counts_are_the_published_ones(
    resolution, num_classes, attention_at, generator, discriminator, monkeypatch
):
    for init in ("xavier_uniform_", "zeros_"):
        monkeypatch.setattr(torch.nn.init, init, lambda t: t)  # counting needs no numbers
    kwargs = {"num_classes": num_classes, "attention_at": attention_at, "spectral_norm": False}
    assert count(Generator(resolution, **kwargs)) == generator
    assert count(Discriminator(resolution, **kwargs)) == discriminator
    assert count(Generator(resolution, num_classes=num_classes, spectral_norm=False)) == generator


def test_spectral_norm_adds_no_parameter():
    kwargs = {"resolution": 32, "num_classes": 3, "base_channels": 8}
    for network in (Generator, Discriminator):
        assert count(network(**kwargs)) == count(network(**kwargs, spectral_norm=False))


def test_feat32_and_feat64_placements_have_the_released_widths():
    at_32 = Generator(128, 3, base_channels=4, attention_at=(32,))
    at_64 = Generator(128, 3, base_channels=4, attention_at=(64,))
    assert at_32.attention["32"].query.in_channels == 4 * 4  # 256 of 64
    assert at_64.attention["64"].query.in_channels == 2 * 4  # 128 of 64
    critic = Discriminator(128, 3, base_channels=8, attention_at=(64, 32))
    assert critic.attention["64"].query.in_channels == 8
    assert critic.attention["32"].query.in_channels == 16


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_classes": 0},
        {"image_channels": 1},
        {"attention_at": []},
        {"attention_at": [8, 16]},
        {"spectral_norm": False},
        {"residual": False, "spectral_norm": False, "attention_at": []},
        {"residual": False},
        {"resolution": 64, "attention_at": [8, 16, 32]},
        {"attention_bias": True},
        {"generator": {"upsample": "bilinear", "norm_eps": 1e-4}, "discriminator": {"narrow_blocks": True}},
        {"generator": {"norm_spectral_norm": True}, "discriminator": {"shortcut_relu": True}},
    ],
    ids=str,
)
def test_every_setting_makes_images_and_logits_and_trains(settings):
    settings = {"resolution": 32, "num_classes": 3, "base_channels": 8} | settings
    own = [settings.pop(part, {}) for part in ("generator", "discriminator")]
    generator, discriminator = Generator(z_dim=6, **settings, **own[0]), Discriminator(**settings, **own[1])
    label = torch.tensor([0, 2]) if settings["num_classes"] else None
    image = generator(torch.randn(2, 6), label)
    assert image.shape == (
        2,
        settings.get("image_channels", 3),
        settings["resolution"],
        settings["resolution"],
    )
    assert image.abs().max() <= 1
    logits = discriminator(image, label)
    assert logits.shape == (2,)
    logits.sum().backward()
    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    rebuilt = Generator(**generator.config)
    assert rebuilt.config == generator.config
    rebuilt.load_state_dict(generator.state_dict())


def test_baseline_has_neither_attention_nor_spectral_norm():
    settings = {"resolution": 32, "num_classes": 0, "base_channels": 8, "attention_at": [], "residual": False}
    for network in (Generator, Discriminator):
        keys = " ".join(network(**settings, spectral_norm=False).state_dict())
        assert "attention" not in keys
        assert "parametrizations" not in keys
        assert "shortcut" not in keys


def test_real_and_fake_in_one_batch_give_the_same_logits_as_apart():
    critic = Discriminator(32, 3, base_channels=8).eval()
    x, label = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 1, 0])
    together = critic(x, label)
    apart = torch.cat([critic(x[:2], label[:2]), critic(x[2:], label[2:])])
    torch.testing.assert_close(together, apart)


def test_r1_gradient_matches_finite_differences():
    critic = Discriminator(32, 2, base_channels=8, widths=[1, 1, 1, 1]).double().eval()
    torch.nn.init.constant_(critic.attention["16"].gamma, 0.8)
    x, label = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1])
    parameters = list(critic.parameters())
    gradient = torch.autograd.grad(regularizers.r1_penalty(critic, x, label), parameters, allow_unused=True)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True) if g is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * 1e-6)
        values.append(regularizers.r1_penalty(critic, x, label).item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign * 1e-6)
    assert slope.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 48}, "resolution must be one of 32, 64, 128, 256, got 48"),
        (
            {"resolution": 32, "attention_at": [4]},
            r"attention_at must be among its feature maps \[8, 16, 32\] at 32 px",
        ),
        ({"resolution": 32, "base_channels": 0}, "base_channels must be a whole number from 1, got 0"),
        ({"resolution": 32, "base_channels": 8.5}, "base_channels must be a whole number from 1, got 8.5"),
        ({"resolution": "32"}, "resolution must be one of 32, 64, 128, 256, got '32'"),
        ({"resolution": 32, "attention_at": 16}, "attention_at must be a list of whole numbers, got 16"),
        (
            {"resolution": 32, "attention_at": [16.0]},
            r"attention_at must be a list of whole numbers, got \[16.0\]",
        ),
        ({"resolution": 32, "z_dim": -4}, "z_dim must be a whole number from 1, got -4"),
        ({"resolution": 32, "num_classes": -3}, "num_classes must be a whole number from 0, got -3"),
        ({"resolution": 32, "image_channels": 2}, "image_channels must be 1 or 3, got 2"),
        ({"resolution": 32, "spectral_norm": "no"}, "spectral_norm must be true or false, got 'no'"),
        ({"resolution": 32, "upsample": "bicubic"}, "upsample must be nearest or bilinear, got 'bicubic'"),
        ({"resolution": 32, "norm_eps": 0}, "norm_eps must be a number between 0 and 1, got 0"),
        (
            {"resolution": 32, "norm_spectral_norm": True, "num_classes": 0},
            "norm_spectral_norm must be false without classes, got True",
        ),
        ({"resolution": 32, "widths": [1, 2]}, r"widths must be 4 positive numbers at 32 px, got \[1, 2\]"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Generator(**arguments)


def test_discriminator_refuses_attention_where_it_has_no_such_map():
    with pytest.raises(ValueError, match=r"among its feature maps \[8, 16\] at 32 px, got 32"):
        Discriminator(32, attention_at=[32])


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_missing_label_is_named(network):
    model = network(32, 3, base_channels=8)
    x = torch.zeros(1, 128) if network is Generator else torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="a label is needed, one of 3 classes"):
        model(x)


def test_discriminator_settings_change_what_they_say():
    """Narrow blocks meet at their incoming width; the shortcut sees the ReLU where it is asked to."""
    narrow = Discriminator(64, 3, base_channels=8, narrow_blocks=True)
    assert [block.conv1.out_channels for block in narrow.blocks] == [8, 8, 16, 32, 64]
    assert [block.conv2.out_channels for block in narrow.blocks] == [8, 16, 32, 64, 128]
    block = Discriminator(32, 3, base_channels=8, shortcut_relu=True, spectral_norm=False).blocks[3]
    x = torch.randn(2, 16, 8, 8)
    inner = block.conv2(block.conv1(x.relu()).relu())
    torch.testing.assert_close(block(x), inner + x.relu())


def test_generator_settings_change_what_they_say():
    generator = Generator(
        32, 3, base_channels=8, upsample="bilinear", norm_eps=0.5, norm_spectral_norm=True
    ).eval()
    block = generator.blocks[0]
    x = torch.randn(2, 32, 4, 4)
    label = torch.tensor([0, 2])
    gain = block.norm1.gain
    torch.testing.assert_close(torch.linalg.matrix_norm(gain, 2), torch.tensor(1.0), rtol=1e-2, atol=0)
    normed = x / 1.5**0.5 * (1 + gain[label])[..., None, None] + block.norm1.bias[label][..., None, None]
    torch.testing.assert_close(block.norm1(x, label), normed)
    up = torch.nn.functional.interpolate(normed.relu(), size=(8, 8), mode="bilinear", align_corners=False)
    inner = block.conv2(block.norm2(block.conv1(up), label).relu())
    big = torch.nn.functional.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(block(x, label), inner + block.shortcut(big), rtol=1e-4, atol=1e-5)
