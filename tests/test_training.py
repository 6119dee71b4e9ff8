"""Training: resuming to the bit, settings, the average, refused recipes, and that it learns."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sagan_kernels.augment import diff_augment
from sagan_kernels.data import ImageData
from sagan_kernels.evaluation import Scorer, within_class_distance
from sagan_kernels.features import FeatureNet
from sagan_kernels.models import Discriminator, Generator
from sagan_kernels.recipe import Recipe, TrainConfig
from sagan_kernels.training import Run, _seed, train

NETWORK = {"resolution": 32, "num_classes": 3, "base_channels": 8, "image_channels": 1, "attention_at": [16]}
GENERATOR = NETWORK | {"z_dim": 8, "widths": [2, 2, 1, 1]}
DISCRIMINATOR = NETWORK | {"widths": [1, 1, 1, 1]}
SETTINGS = {
    "batch_size": 6,
    "total_kimg": 0.036,
    "augment": ("color", "translation", "cutout"),
    "r1_gamma": 1.0,
    "r1_every": 2,
    "diversity": 1.0,
    "log_every": 1,
    "checkpoint_every": 2,
    "score_every": 3,
    "score_images": 12,
    "grid_every": 3,
}


def recipe(**changes):
    return Recipe("tiny", GENERATOR, DISCRIMINATOR, TrainConfig(**SETTINGS | changes))


def images(count=30):
    rng = np.random.default_rng(0)
    return ImageData(
        rng.integers(0, 256, (count, 32, 32, 1), np.uint8), np.arange(count) % 3, ["one", "two", "three"]
    )


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_repeats_the_uninterrupted_one(tmp_path, precision):
    data = images()
    torch.manual_seed(0)
    scorer = Scorer(FeatureNet("tiny-cnn", 1, 3, width=4).eval(), data, pairs_per_class=10)
    train(recipe(precision=precision), data, tmp_path / "whole", scorer=scorer)

    class Stopped(Exception):
        pass

    class Stopping(ImageData):
        def batch(self, index):
            type(self).count += 1
            if type(self).count > 5:  # dies in step 6, two steps after the last checkpoint
                raise Stopped
            return super().batch(index)

    Stopping.count = 0
    stopping = Stopping(data.images, data.labels, data.class_names)
    with pytest.raises(Stopped):
        train(recipe(precision=precision), stopping, tmp_path / "cut", scorer=scorer)
    train(recipe(precision=precision), data, tmp_path / "cut", scorer=scorer)

    whole, cut = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert [line["step"] for line in cut] == [1, 2, 3, 4, 5, 6]
    for key in ("loss_d", "loss_g", "real_logit", "fake_logit", "diversity_shortfall"):
        assert [line[key] for line in cut] == [line[key] for line in whole]
    assert "r1" in whole[0]
    assert cut[5]["fid"] == whole[5]["fid"]


def test_kill_in_mid_run_loses_nothing_but_the_steps_since_the_checkpoint(tmp_path):
    np.savez(tmp_path / "pack.npz", images=images(40).images, labels=images(40).labels)
    toml = ["[generator]", *(f"{k} = {json.dumps(v)}" for k, v in GENERATOR.items()), "[discriminator]"]
    toml += [f"{k} = {json.dumps(v)}" for k, v in DISCRIMINATOR.items()]
    settings = SETTINGS | {"total_kimg": 0.36, "augment": ["cutout"], "score_every": 1000, "grid_every": 1000}
    toml += ["[train]", *(f"{k} = {json.dumps(v)}" for k, v in settings.items())]
    (tmp_path / "tiny.toml").write_text("\n".join(toml))
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from sagan_kernels.data import load_images\n"
        "from sagan_kernels.recipe import load_recipe\n"
        "from sagan_kernels.training import train\n"
        f"data = load_images(r'{tmp_path / 'pack.npz'}', resolution=32, channels=1)\n"
        f"train(load_recipe(r'{tmp_path / 'tiny.toml'}'), data, sys.argv[1])\n"
    )

    def start(folder):
        return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(folder)], env=os.environ,
                                stderr=subprocess.DEVNULL)  # fmt: skip

    assert start(tmp_path / "whole").wait(timeout=250) == 0
    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        lines = (tmp_path / "killed" / "metrics.jsonl").exists() and metrics_so_far(tmp_path / "killed")
        if lines and lines > 12:
            break
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert metrics_so_far(tmp_path / "killed") < 60, "the run ended before it could be killed"
    assert start(tmp_path / "killed").wait(timeout=250) == 0
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def metrics_so_far(folder):
    return (folder / "metrics.jsonl").read_bytes().count(b"\n")


def test_run_folder_holds_settings_grids_and_loadable_best_networks(tmp_path):
    train(recipe(), images(), tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["train"]["r1_gamma"] == 1.0
    assert settings["data"]["images"] == 30
    assert {path.name for path in (tmp_path / "grids").iterdir()} == {"0000003.png", "0000006.png"}
    generator = Generator.from_pretrained(tmp_path / "best")
    assert generator.class_names == ["one", "two", "three"]
    assert Discriminator.from_pretrained(tmp_path / "best").config["widths"] == [1, 1, 1, 1]


def test_best_is_the_lowest_distance_and_not_the_last(tmp_path):
    class Rising(Scorer):
        def __init__(self):
            self.calls = 0
            self.net = FeatureNet("none-cnn", 1, 3, width=2)

        def score(self, data):
            self.calls += 1
            return type("S", (), {"to_dict": lambda _: {"fid": float(self.calls), "diversity": 1.0}})()

    best = train(recipe(), images(), tmp_path, scorer=Rising())
    assert best == {"step": 3, "fid": 1.0, "diversity": 1.0}


def test_folder_of_another_run_is_refused(tmp_path):
    train(recipe(total_kimg=0.006), images(), tmp_path)
    with pytest.raises(ValueError, match=r"another \[train\], got lr_d 0.0004 there and 0.001 here"):
        train(recipe(total_kimg=0.006, lr_d=1e-3), images(), tmp_path)
    with pytest.raises(ValueError, match=r"another \[data\]"):
        train(recipe(total_kimg=0.006), images(33), tmp_path)


def by_hand(run, random):
    """One training step written out: what `Run.advance` must do to both networks, as gradients."""
    config, generator, critic = run.config, run.generator, run.discriminator
    real, label = run._batch(0)
    z = torch.randn(6, 8, generator=random)
    fake_label = torch.randint(3, (6,), generator=random)
    fake = generator(z, fake_label).detach()
    both = diff_augment(torch.cat([real, fake]), config.augment, random)
    logits = critic(both, torch.cat([label, fake_label]))
    loss = torch.relu(1 - logits[:6]).mean() + torch.relu(1 + logits[6:]).mean()
    x = diff_augment(real, config.augment, random).requires_grad_()
    (slope,) = torch.autograd.grad(critic(x, label).sum(), x, create_graph=True)
    loss = loss + config.r1_gamma / 2 * config.r1_every * slope.square().sum((1, 2, 3)).mean()
    of_critic = torch.autograd.grad(loss, list(critic.parameters()))
    with torch.no_grad():  # Adam's first step with these moments: a step of lr against the sign
        for p, g in zip(critic.parameters(), of_critic, strict=True):
            p -= config.lr_d * g / (g.abs() + 1e-8)
    z = torch.randn(6, 8, generator=random)
    label = torch.randint(3, (6,), generator=random)[:3].repeat(2)
    fake = generator(z, label)
    loss = -critic(diff_augment(fake, config.augment, random), label).mean()
    apart = (fake[:3] - fake[3:]).abs().mean((1, 2, 3))
    distance = within_class_distance(run.data.images, run.data.labels, 400)  # on a scale where 255 is 1
    target = torch.tensor([2 * distance[k] for k in label[:3]], dtype=torch.float32)
    loss = loss + config.diversity * torch.relu(1 - apart / target).mean()
    of_generator = torch.autograd.grad(loss, list(generator.parameters()))
    with torch.no_grad():
        for p, g in zip(generator.parameters(), of_generator, strict=True):
            p -= config.lr_g * g / (g.abs() + 1e-8)
    return of_critic, of_generator


def test_a_step_is_the_one_written_out_by_hand():
    theirs, ours = (Run(recipe(diversity=7.0, r1_gamma=3.0, r1_every=5), images()) for _ in range(2))
    gradients = by_hand(theirs, torch.Generator().manual_seed(_seed(0, 0)))
    ours.advance()
    networks = (ours.discriminator, ours.generator)
    for network, expected in zip(networks, gradients, strict=True):
        for (name, p), g in zip(network.named_parameters(), expected, strict=True):
            # a bias that batch norm takes away again has a gradient of rounding errors only, about 3e-7
            atol = 2e-3 * g.abs().max().item() + 2e-6
            torch.testing.assert_close(p.grad, g, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_that_of_the_convolutions(precision):
    run, seen = Run(recipe(precision=precision), images()), set()
    for network in (run.generator, run.discriminator):
        network.blocks[0].register_forward_hook(lambda m, i, output: seen.add(output.dtype))
    run._generator_step(*[torch.Generator().manual_seed(0)] * 2)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_sampler_is_the_average_and_not_the_generator():
    run = Run(recipe(), images())
    run.step = 100
    for _ in range(2):
        run.advance()
    expected = dict(run.ema.named_parameters())
    for name, parameter in run.sampler().named_parameters():
        assert torch.equal(parameter, expected[name])
    assert not torch.equal(run.ema.linear.weight, run.generator.linear.weight)


def test_average_has_a_short_memory_at_first():
    run = Run(recipe(ema_decay=0.9999), images())
    before = [p.clone() for p in run.ema.parameters()]
    run.advance()  # at step 0 the decay is 1/10
    for old, new, trained in zip(before, run.ema.parameters(), run.generator.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.9 * (trained - old))


def test_class_of_equal_images_trains():
    data = images()
    data.images[data.labels == 1] = 77
    run = Run(recipe(), data)
    for _ in range(3):
        assert all(np.isfinite(list(run.advance().values())))
    assert run.is_finite()


def test_class_without_a_training_image_is_refused():
    data = images()
    with pytest.raises(ValueError, match="every class must have a training image, got none of 'four'"):
        Run(recipe(), ImageData(data.images, data.labels, [*data.class_names, "four"]))


def test_penalty_is_told_on_every_line_and_survives_a_resumption(tmp_path):
    train(recipe(r1_every=4), images(), tmp_path)
    lines = metrics(tmp_path)
    assert all("r1" in line for line in lines)
    assert len({line["r1"] for line in lines}) == 2  # steps 0 and 4


def test_diverged_weights_are_never_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="start again in another folder"):
        train(recipe(lr_d=1e30, lr_g=1e30, checkpoint_every=1), images(), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_another_feature_network_is_another_run(tmp_path):
    data = images()
    nets = [FeatureNet("tiny-cnn", 1, 3, width=4).eval() for _ in range(2)]
    short = recipe(total_kimg=0.006)
    train(short, data, tmp_path, scorer=Scorer(nets[0], data, pairs_per_class=10))
    with pytest.raises(ValueError, match=r"another \[features\], got sha256"):
        train(short, data, tmp_path, scorer=Scorer(nets[1], data, pairs_per_class=10))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "checkpoint.pt",
            b"PK\x03\x04 cut",
            r"checkpoint\.pt: must be a checkpoint of this run, got a damaged file",
        ),
        ("settings.json", b"", r"settings\.json: must be the settings of a run, got a damaged file"),
        ("settings.json", b"[]", r"settings\.json: must be the settings of a run, got a damaged file"),
        ("settings.json", None, r"settings\.json must be there beside checkpoint\.pt, got nothing"),
    ],
)
def test_damaged_run_folder_is_named(tmp_path, name, content, message):
    train(recipe(total_kimg=0.006), images(), tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        train(recipe(total_kimg=0.006), images(), tmp_path)


def test_foreign_lines_and_leftovers_are_swept_when_a_run_goes_on(tmp_path):
    train(recipe(), images(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(before + b'5\n{"loss": 1}\n\xff\xfe\n{"step": 6, "lo')
    (tmp_path / ".checkpoint.pt.abcd_123.pt").write_bytes(b"half")
    (tmp_path / ".keep").write_bytes(b"mine")
    train(recipe(), images(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not list(tmp_path.glob(".checkpoint*"))
    assert (tmp_path / ".keep").exists()


def test_average_follows_the_generator_and_copies_its_statistics():
    run = Run(recipe(ema_decay=0.5), images())
    before = [p.clone() for p in run.ema.parameters()]
    run.step = 100  # past the warm-up of the average
    run.advance()
    for old, new, trained in zip(before, run.ema.parameters(), run.generator.parameters(), strict=True):
        torch.testing.assert_close(new, (old + trained) / 2)
    for ours, theirs in zip(run.ema.buffers(), run.generator.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_step_sizes_fall_linearly_over_the_last_share_of_the_run():
    run = Run(recipe(total_kimg=0.048, decay=0.5, lr_g=1e-4, lr_d=4e-4), images())  # 8 steps
    seen = []
    for _ in range(8):
        run.advance()
        seen.append([o.param_groups[0]["lr"] for o in (run.optimizer_g, run.optimizer_d)])
    share = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(seen, [[1e-4 * s, 4e-4 * s] for s in share])


def test_generator_step_leaves_the_discriminator_alone():
    run = Run(recipe(), images())
    before = {key: value.clone() for key, value in run.discriminator.named_parameters()}
    random = torch.Generator().manual_seed(0)
    run._generator_step(random, random)
    for key, value in run.discriminator.named_parameters():
        assert torch.equal(value, before[key])
        assert value.grad is None
        assert value.requires_grad


def test_every_epoch_shows_every_image_at_most_once_in_another_order():
    run = Run(recipe(batch_size=10), images(30))
    epochs = [np.concatenate([run._batch(3 * e + i)[0].numpy() for i in range(3)]) for e in range(2)]
    for epoch in epochs:
        assert len({image.tobytes() for image in epoch}) == 30
    assert not np.array_equal(*epochs)


def test_training_without_labels_runs(tmp_path):
    tables = [table | {"num_classes": 0} for table in (GENERATOR, DISCRIMINATOR)]
    config = TrainConfig(**SETTINGS | {"total_kimg": 0.012, "diversity": 0.0})
    train(Recipe("free", *tables, config), images(), tmp_path)
    assert len(metrics(tmp_path)) == 2


def test_diverged_run_says_so(tmp_path):
    with pytest.raises(FloatingPointError, match="losses and weights must be finite"):
        train(recipe(lr_d=1e30, lr_g=1e30), images(), tmp_path)


def test_training_moves_samples_towards_the_data(tmp_path):
    white = ImageData(np.full((30, 32, 32, 1), 250, np.uint8), np.arange(30) % 3, ["one", "two", "three"])
    run = Run(recipe(r1_gamma=0.0, diversity=0.0, augment=(), lr_g=2e-3, lr_d=2e-3, batch_size=16), white)
    random = torch.Generator().manual_seed(0)
    z, label = torch.randn(16, 8, generator=random), torch.arange(16) % 3
    before = run.generator(z, label).mean().item()
    for _ in range(60):
        run.advance()
    assert run.generator(z, label).mean().item() > max(0.5, before + 0.4)


def test_networks_that_do_not_fit_the_data_are_refused():
    with pytest.raises(ValueError, match=r"num_classes must be the data's 3, or 0, got 4"):
        Run(
            Recipe("x", GENERATOR | {"num_classes": 4}, DISCRIMINATOR | {"num_classes": 4}, TrainConfig()),
            images(),
        )
    with pytest.raises(ValueError, match="image_channels must be the same"):
        Run(Recipe("x", GENERATOR, DISCRIMINATOR | {"image_channels": 3}, TrainConfig()), images())
