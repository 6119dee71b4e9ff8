"""Seeds, labels, truncation and grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_kernels.models import Generator
from sagan_kernels.models.statistics import standing_statistics
from sagan_kernels.sampling import draw, grid, latent, to_bytes


def make(num_classes=3, image_channels=1, base_channels=2):
    """A tiny generator whose classes look different, in training mode as one fresh from training."""
    sides = (16,) if base_channels >= 8 else ()
    generator = Generator(32, num_classes, 6, base_channels, image_channels, sides)
    with torch.no_grad():
        for block in generator.blocks:
            block.norm1.gain.normal_()
            block.norm1.bias.normal_()
        for attention in generator.attention.values():
            attention.gamma.fill_(0.7)
        generator.to_image.bias.normal_()
    return generator


def pixels(samples):
    return np.stack([np.asarray(sample.image, np.int16) for sample in samples])


def test_a_seed_gives_the_same_image_whatever_the_batch():
    generator = make(base_channels=8)
    alone = pixels([next(draw(generator, [seed], batch_size=1)) for seed in range(7)])
    for batch_size in (2, 7, 64):
        together = list(draw(generator, range(7), batch_size=batch_size))
        assert [sample.seed for sample in together] == list(range(7))
        assert np.abs(pixels(together) - alone).max() <= 1  # the last gray level may round the other way
    assert len({image.tobytes() for image in alone}) == 7


def test_images_are_those_of_the_network_in_eval_mode():
    generator = make(image_channels=3, base_channels=8).eval()
    (sample,) = draw(generator, [5], label=2)
    with torch.no_grad():
        x = generator(latent(5, 2, 6)[None], torch.tensor([2]))
    assert sample.image.mode == "RGB"
    assert np.abs(pixels([sample]) - to_bytes(x).astype(np.int16)).max() <= 1


def test_drawing_leaves_the_generator_as_it_was():
    generator = make()
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    list(draw(generator, [0], truncation=0.5))
    assert generator.training
    assert generator.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())
    generator(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)).sum().backward()


def test_inference_mode_ends_between_images():
    samples = draw(make(), [0, 1], batch_size=1)
    next(samples)
    assert not torch.is_inference_mode_enabled()


def test_latents_of_seeds_and_labels_are_independent():
    drawn = torch.stack([latent(seed, label, 400) for seed in range(5) for label in (None, 0, 1, 2)]).double()
    correlation = torch.corrcoef(drawn) - torch.eye(len(drawn))
    assert correlation.abs().max() < 0.2  # 4 standard deviations of a chance correlation
    assert drawn.std().item() == pytest.approx(1, abs=0.03)


def test_a_random_label_comes_from_the_seed_and_can_be_asked_for():
    generator = make()
    random = list(draw(generator, range(24)))
    assert {sample.label for sample in random} == {0, 1, 2}
    for sample in random[:4]:
        (again,) = draw(generator, [sample.seed], label=sample.label)
        assert np.abs(pixels([again]) - pixels([sample])).max() <= 1


def test_several_labels_draw_every_seed_with_each():
    samples = list(draw(make(), [4, 9], label=[2, 0]))
    assert [(sample.label, sample.seed) for sample in samples] == [(2, 4), (2, 9), (0, 4), (0, 9)]


def test_an_unconditional_generator_has_no_labels():
    generator = make(num_classes=0)
    (sample,) = draw(generator, [3])
    assert sample.label is None
    assert sample.image.mode == "L"
    with pytest.raises(ValueError, match="label must be left out for an unconditional generator, got 0"):
        draw(generator, [3], label=0)


def test_truncation_uses_statistics_that_fit_it():
    generator = make()
    (sample,) = draw(generator, [3], label=1, truncation=0.4)
    z = latent(3, 1, 6, 0.4)
    assert z.abs().max() <= 0.4
    standing = standing_statistics(generator, truncation=0.4)
    with torch.no_grad():
        fitting, other = (
            to_bytes(net(z[None], torch.tensor([1]))).astype(np.int16)[..., 0]
            for net in (standing, generator.eval())
        )
    assert np.abs(pixels([sample]) - fitting).max() <= 1
    assert np.abs(pixels([sample]) - other).max() > 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label": 3}, "label must be 0 to 2, got 3"),
        ({"label": [0, -1]}, "label must be 0 to 2, got -1"),
        ({"truncation": 0}, "truncation: must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seeds": [1, -4]}, "seeds must not be negative, got -4"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_the_call(wrong, message):
    with pytest.raises(ValueError, match=message):
        draw(make(), **{"seeds": [0]} | wrong)


def test_bytes_are_rounded_to_the_nearest_and_clamped():
    x = torch.tensor([-1.5, -1, 0.001, 1, 1.5]).reshape(1, 1, 1, 5)
    assert to_bytes(x).ravel().tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grid_holds_every_image_enlarged_by_whole_pixels(mode):
    images = [
        Image.new(mode, (32, 32), (20 * i + 20,) * 3 if mode == "RGB" else 20 * i + 20) for i in range(5)
    ]
    sheet = grid(images, 2)
    assert sheet.mode == mode
    assert sheet.size == (6 + 2 * 102, 6 + 3 * 102)
    for i in range(5):
        x, y = 6 + i % 2 * 102, 6 + i // 2 * 102
        tile = np.asarray(sheet)[y : y + 96, x : x + 96]
        assert (tile == 20 * i + 20).all()
    assert (np.asarray(sheet)[6 + 2 * 102 :, 6 + 102 :] == 255).all()  # no sixth image


def test_grid_writes_labels_beside_and_titles_below():
    images = [Image.new("L", (32, 32), 255) for _ in range(4)]
    blank = np.asarray(grid(images, 2))
    assert (blank == 255).all()
    sheet = np.asarray(
        grid(images, 2, row_labels=["T-shirt/top", "Bag"], titles=["seed 1", "", "", "x" * 99])
    )
    left = sheet.shape[1] - 2 * 102
    ink = sheet < 128
    assert ink[6:102, :left].any()  # label of the first row
    assert ink[102:122, left : left + 96].any()  # first title
    assert not ink[102:122, left + 102 : left + 198].any()  # second is empty
    assert ink[122 + 96 :, left + 102 : left + 198].any()
    assert not ink[:, left + 199 :].any()  # the long one is cut to its image


def test_grid_refuses_texts_that_do_not_fit():
    images = [Image.new("L", (32, 32))] * 3
    with pytest.raises(ValueError, match="row_labels must be 2 texts, got 1"):
        grid(images, 2, row_labels=["a"])
    with pytest.raises(ValueError, match="titles must be 3 texts, got 2"):
        grid(images, 2, titles=["a", "b"])
    with pytest.raises(ValueError, match="must have images and columns, got 0 images"):
        grid([], 2)


def test_seeds_may_come_from_anything_and_labels_from_numpy():
    generator = Generator(32, 3, z_dim=4, base_channels=2, attention_at=()).eval()
    drawn = list(draw(generator, iter([3, 5]), label=np.int64(2)))
    assert [(s.seed, s.label) for s in drawn] == [(3, 2), (5, 2)]
