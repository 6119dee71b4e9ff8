"""Recipes: refused with one line where they are wrong, and read whole where they are right."""

import pytest

from sagan_kernels import zoo
from sagan_kernels.recipe import TrainConfig, load_recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[generator]\nreslution = 32",
            r"\[generator\] must have known keys only, got 'reslution'; did you mean 'resolution'",
        ),
        ("[discriminator]\nz_dim = 3", r"\[discriminator\] must have known keys only, got 'z_dim'"),
        ("[train]\nbatch_size = 'x'", "batch_size must be a whole number, got 'x'"),
        ("[train]\nbatch_size = 2.5", "batch_size must be a whole number, got 2.5"),
        ("[train]\naugment = 'cutout'", "augment must be a list of texts, got 'cutout'"),
        ("[train]\ntotal_kimg = inf", "total_kimg: must be finite, got inf"),
        ("[train]\nseed = -1", "seed: must not be negative, got -1"),
        ("[train]\nr1_gamma = -1", "r1_gamma: must not be negative, got -1"),
        ("[train]\nscore_images = 1", "score_images: must be at least 2, got 1"),
        ("[train]\ndecay = 1.5", "decay: must be from 0 to 1, got 1.5"),
        ("[train]\nlrg = 1", r"got 'lrg'; did you mean 'lr_g'\?"),
        ("[train]\nbatch_size = 0", "batch_size: must be positive, got 0"),
        ("[train]\nbeta2 = 1.0", "beta2: must be at least 0 and below 1, got 1.0"),
        ("[train]\nprecision = 'fp16'", "precision: must be fp32 or bf16, got 'fp16'"),
        ("[train]\naugment = ['blur']", "augment: must be among color, translation, cutout, got 'blur'"),
        (
            "[train]\nbatch_size = 5\ndiversity = 1.0",
            "needs an even batch_size to make pairs, got batch_size 5",
        ),
        ("[train", "must be TOML"),
    ],
)
def test_wrong_recipe_is_refused_with_one_line(tmp_path, text, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(tmp_path / "r.toml")
    assert "\n" not in str(caught.value)


def test_every_recipe_of_the_zoo_is_read():
    for name in zoo.list_models():
        recipe = load_recipe(zoo.entry(name).path)
        assert recipe.name == name
        assert recipe.train.total_steps > 0


def test_what_a_recipe_leaves_out_is_the_paper_s():
    config = TrainConfig()
    assert (config.lr_g, config.lr_d, config.beta1, config.beta2, config.d_steps) == (1e-4, 4e-4, 0.0, 0.9, 1)


def test_override_replaces_a_field(tmp_path):
    (tmp_path / "r.toml").write_text("[train]\nseed = 3\nlr_g = 1.0")
    assert load_recipe(tmp_path / "r.toml", seed=4).train.seed == 4
    assert load_recipe(tmp_path / "r.toml").train.lr_g == 1.0
