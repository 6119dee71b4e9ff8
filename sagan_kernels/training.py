"""Training a SAGAN from one recipe: hinge loss, two time-scale Adam, EMA, DiffAugment, R1; resumable to the bit."""

import json
import math
import pickle
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sagan_kernels
from sagan_kernels import losses, regularizers, sampling
from sagan_kernels.augment import diff_augment
from sagan_kernels.data import ImageData
from sagan_kernels.evaluation import Scorer, generate, within_class_distance
from sagan_kernels.features import fingerprint, weights_sha256
from sagan_kernels.files import sweep, write_atomically
from sagan_kernels.models.sagan import Discriminator, Generator
from sagan_kernels.models.statistics import standing_statistics
from sagan_kernels.nn import group_spectral_norm, spectral_norms
from sagan_kernels.recipe import Recipe

try:
    from tqdm import tqdm
except ImportError as error:
    raise ImportError('train: must have tqdm, got none; pip install "sagan-kernels[train]"') from error


class Run:
    """The state of one training run: everything a checkpoint holds, and one method a step.

    Random numbers of a step come from (seed, step) alone and batches from (seed, epoch), so a resumed run repeats the
    uninterrupted one exactly, on the same device and number of threads.
    """

    def __init__(self, recipe: Recipe, data: ImageData, device: str | torch.device = "cpu") -> None:
        self.config, self.data, self.device = recipe.train, data, torch.device(device)
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            self.generator = Generator(**recipe.generator)
            self.discriminator = Discriminator(**recipe.discriminator)
            self.ema = Generator(**recipe.generator)
        for network in (self.generator, self.discriminator, self.ema):
            network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for network in (self.generator, self.discriminator):
            if spectral_norms(network):
                group_spectral_norm(network)
        _check_fit(self.generator, self.discriminator, data)
        self.ema.load_state_dict(self.generator.state_dict())
        self.ema.requires_grad_(False).eval()
        betas = (float(self.config.beta1), float(self.config.beta2))
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), self.config.lr_g, betas, fused=True)
        self.optimizer_d = torch.optim.Adam(
            self.discriminator.parameters(), self.config.lr_d, betas, fused=True
        )
        self.step = 0  # generator steps done
        self.best: dict[str, float] | None = None
        self.r1: float | None = (
            None  # the latest penalty: it is not made at every step, but told on every line
        )
        labels = data.labels if self.generator.num_classes else np.zeros_like(data.labels)
        pixels = np.zeros(len(data.class_names))
        known = within_class_distance(data.images, labels, 400)
        pixels[: len(known)] = np.nan_to_num(known)
        pixels = pixels.clip(
            1e-6
        )  # a class of equal images asks for no diversity, and must not divide by zero
        self.real_distance = 2 * torch.from_numpy(pixels).float().to(self.device)  # images are in [-1, 1]

    def advance(self) -> dict[str, float]:
        """One generator step after d_steps discriminator steps; returns the losses."""
        random = torch.Generator().manual_seed(_seed(self.config.seed, self.step))
        noise = random  # of the augmentations, on the images' device
        if self.device.type != "cpu":
            noise = torch.Generator(self.device).manual_seed(_seed(self.config.seed, self.step, 1))
        left = 1 - self.step / self.config.total_steps
        share = min(1.0, left / self.config.decay) if self.config.decay else 1.0
        self.optimizer_g.param_groups[0]["lr"] = self.config.lr_g * share
        self.optimizer_d.param_groups[0]["lr"] = self.config.lr_d * share
        logs: dict[str, float] = {}
        for i in range(self.config.d_steps):
            logs |= self._discriminator_step(self.step * self.config.d_steps + i, random, noise)
        logs |= self._generator_step(random, noise)
        self._average()
        self.step += 1
        return logs if self.r1 is None else logs | {"r1": self.r1}

    def _discriminator_step(
        self, d_step: int, random: torch.Generator, noise: torch.Generator
    ) -> dict[str, float]:
        real, label = self._batch(d_step)
        with self._autocast():
            z, fake_label = self._latents(len(real), random)
            with torch.no_grad():
                fake = self.generator(z, fake_label).float()
            both = diff_augment(torch.cat([real, fake]), self.config.augment, noise)
            labels = None if label is None or fake_label is None else torch.cat([label, fake_label])
            logits = self.discriminator(both.contiguous(memory_format=torch.channels_last), labels).float()
        real_logits, fake_logits = logits.chunk(2)
        loss = losses.hinge_d(real_logits, fake_logits)
        logs = {
            "loss_d": loss.item(),
            "real_logit": real_logits.mean().item(),
            "fake_logit": fake_logits.mean().item(),
        }
        self.optimizer_d.zero_grad()
        loss.backward()
        if self.config.r1_gamma and d_step % self.config.r1_every == 0:
            seen = diff_augment(real, self.config.augment, noise)
            penalty = regularizers.r1_penalty(self.discriminator, seen, label)
            (penalty * (self.config.r1_gamma / 2 * self.config.r1_every)).backward()
            self.r1 = penalty.item()
        self.optimizer_d.step()
        return logs

    def _generator_step(self, random: torch.Generator, noise: torch.Generator) -> dict[str, float]:
        self.discriminator.requires_grad_(False)
        z, label = self._latents(self.config.batch_size, random, pairs=bool(self.config.diversity))
        with self._autocast():
            fake = self.generator(z, label)
            seen = diff_augment(fake.float(), self.config.augment, noise)
            seen = seen.contiguous(memory_format=torch.channels_last)
            adversarial = losses.hinge_g(self.discriminator(seen, label).float())
        logs = {"loss_g": adversarial.item()}
        loss = adversarial
        if self.config.diversity:
            rows = slice(0, 1) if label is None else label[: len(z) // 2]
            shortfall = regularizers.diversity_shortfall(fake.float(), self.real_distance[rows])
            logs["diversity_shortfall"] = shortfall.item()
            loss = loss + self.config.diversity * shortfall
        self.optimizer_g.zero_grad()
        loss.backward()
        self.optimizer_g.step()
        self.discriminator.requires_grad_(True)
        return logs

    @torch.no_grad()
    def _average(self) -> None:
        # a short memory at first, or the average would carry the random initial weights for long
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1 - decay)
        # running statistics and singular vectors are copied: an average of unit vectors is not one
        torch._foreach_copy_(list(self.ema.buffers()), list(self.generator.buffers()))

    def _batch(self, d_step: int) -> tuple[Tensor, Tensor | None]:
        size = min(self.config.batch_size, len(self.data))
        epoch, at = divmod(d_step, len(self.data) // size)
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.data))
        real, label = self.data.batch(order[at * size : (at + 1) * size])
        return real.to(self.device), label.to(self.device) if self.generator.num_classes else None

    def _latents(
        self, count: int, random: torch.Generator, *, pairs: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        z = torch.randn(count, self.generator.z_dim, generator=random).to(self.device)
        if not self.generator.num_classes:
            return z, None
        label = torch.randint(self.generator.num_classes, (count,), generator=random).to(self.device)
        return z, torch.cat([label[: count // 2]] * 2) if pairs else label

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def sampler(self) -> Generator:
        """The averaged generator with batch-norm statistics of its own: what is scored, shown and shipped."""
        return standing_statistics(self.ema)

    def is_finite(self) -> bool:
        """Whether no weight or statistic of the networks is NaN or infinite."""
        networks = (self.generator, self.discriminator, self.ema)
        return all(t.isfinite().all() for network in networks for t in network.state_dict().values())

    def save(self, path: Path) -> None:
        """Write everything needed to go on."""
        state = {
            "step": self.step,
            "best": self.best,
            "r1": self.r1,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer_g": self.optimizer_g.state_dict(),
            "optimizer_d": self.optimizer_d.state_dict(),
        }
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        try:
            state = torch.load(path, weights_only=True, map_location=self.device)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path}: must be a checkpoint of this run, got a damaged file; remove it to start over"
            ) from error
        self.step, self.best, self.r1 = state["step"], state["best"], state["r1"]
        for name in ("generator", "discriminator", "ema", "optimizer_g", "optimizer_d"):
            getattr(self, name).load_state_dict(state[name])


def train(
    recipe: Recipe,
    data: ImageData,
    out: str | Path,
    *,
    scorer: Scorer | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Train to the recipe's length, resuming where `out` holds a run of the same settings.

    `out` gets settings.json (everything that decides the run), metrics.jsonl (a line every log_every steps),
    checkpoint.pt, grids/*.png and best/: both networks of the best score so far, ready for `from_pretrained`.

    Args:
        recipe: networks and settings.
        data: the training split.
        out: the run folder.
        scorer: scores samples; None leaves scores out, and best/ is the latest.
        device: where the networks run.

    Returns:
        The best scores.

    Raises:
        ValueError: networks and data do not fit, or `out` holds a run with other settings.
        FloatingPointError: a loss is not finite.
    """
    out = Path(out)
    run = Run(recipe, data, device)
    _settings(recipe, data, scorer, out)
    checkpoint, metrics = out / "checkpoint.pt", out / "metrics.jsonl"
    if checkpoint.is_file():
        run.load(checkpoint)
    _forget_after(metrics, run.step)
    config = run.config
    sweep(out)
    with (
        metrics.open("a", encoding="utf-8") as log,
        tqdm(
            total=config.total_steps, initial=run.step, unit="step", desc=recipe.name, smoothing=0.02
        ) as bar,
    ):
        while run.step < config.total_steps:
            logs = run.advance()
            bar.update()
            last = run.step == config.total_steps
            saves = run.step % config.checkpoint_every == 0 or last
            scores = run.step % config.score_every == 0 or last
            if not all(map(math.isfinite, logs.values())) or ((saves or scores) and not run.is_finite()):
                raise FloatingPointError(
                    f"train: losses and weights must be finite, got others at step {run.step}; "
                    "start again in another folder with lower lr_g and lr_d"
                )
            if scores:
                logs |= _score(run, scorer, out)
                bar.set_postfix({key: f"{logs[key]:.3g}" for key in ("fid", "diversity") if key in logs})
            if run.step % config.grid_every == 0 or last:
                _grid(run, out / "grids" / f"{run.step:07d}.png")
            if run.step % config.log_every == 0 or scores:
                log.write(json.dumps({"step": run.step} | logs) + "\n")
                log.flush()
            if saves:
                run.save(checkpoint)
    return run.best or {}


def _check_fit(generator: Generator, discriminator: Discriminator, data: ImageData) -> None:
    for key in ("resolution", "num_classes", "image_channels"):
        if generator.config[key] != discriminator.config[key]:
            raise ValueError(
                f"recipe: {key} must be the same in [generator] and [discriminator], "
                f"got {generator.config[key]} and {discriminator.config[key]}"
            )
    side, channels = data.images.shape[2:]
    if (side, channels) != (generator.resolution, generator.config["image_channels"]):
        raise ValueError(
            f"recipe: images must be {generator.resolution} px with {generator.config['image_channels']} channels, "
            f"got {side} px with {channels}"
        )
    missing = sorted(set(range(len(data.class_names))) - set(data.labels.tolist()))
    if generator.num_classes and missing:
        raise ValueError(
            f"recipe: every class must have a training image, got none of {data.class_names[missing[0]]!r}"
        )
    if generator.num_classes and generator.num_classes != len(data.class_names):
        raise ValueError(
            f"recipe: num_classes must be the data's {len(data.class_names)}, or 0, got {generator.num_classes}"
        )


def _settings(recipe: Recipe, data: ImageData, scorer: Scorer | None, out: Path) -> None:
    """Write settings.json, or check that the run in `out` has the same."""
    decides = {
        "name": recipe.name,
        "generator": Generator(**recipe.generator).config,
        "discriminator": Discriminator(**recipe.discriminator).config,
        "train": asdict(recipe.train) | {"augment": list(recipe.train.augment)},
        "features": None
        if scorer is None
        else {"name": scorer.net.name, "sha256": weights_sha256(scorer.net)},
        "data": {"images": len(data), "class_names": data.class_names, "sha256": fingerprint(data)},
    }
    path = out / "settings.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(
                f"{path}: must be the settings of a run, got a damaged file; choose another folder"
            )
        for table, values in decides.items():
            if before.get(table) != values:
                raise ValueError(
                    f"train: {out} holds a run with another [{table}], got {_difference(before.get(table), values)}; "
                    "choose another folder"
                )
        return
    if (out / "checkpoint.pt").exists():
        raise ValueError(
            f"train: {path} must be there beside checkpoint.pt, got nothing; choose another folder"
        )
    machine = {
        "sagan_kernels": sagan_kernels.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    text = json.dumps(decides | {"machine": machine}, indent=1, ensure_ascii=False)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
        return ", ".join(
            f"{key} {before.get(key)!r} there and {after.get(key)!r} here" for key in sorted(changed)
        )
    return f"{before!r} there and {after!r} here"


def _forget_after(metrics: Path, step: int) -> None:
    """Drop lines written after the checkpoint: the resumed run writes them again."""
    if not metrics.is_file():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # the line a kill cut short, or no line of ours
            continue
    write_atomically(metrics, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))


def _score(run: Run, scorer: Scorer | None, out: Path) -> dict[str, float]:
    sampler = run.sampler()
    scores: dict[str, float] = {}
    if scorer is not None:
        samples = generate(
            sampler,
            sampler.config,
            run.config.score_images,
            class_names=run.data.class_names,
            seed=1,
            device=run.device,
        )
        scores = scorer.score(samples).to_dict()
    latest = (
        -math.inf if scorer is None else scores.get("fid", math.inf)
    )  # a distance that is no number never wins
    if run.best is None or latest <= run.best.get("fid", math.inf):
        run.best = {"step": run.step} | scores
        names = run.data.class_names if run.generator.num_classes else None
        for network in (sampler, run.discriminator):
            network.save_pretrained(out / "best", names)
    return scores


def _grid(run: Run, path: Path, columns: int = 8) -> None:
    sampler = run.sampler()
    sampler.class_names = run.data.class_names
    label = range(run.generator.num_classes) if run.generator.num_classes else None
    drawn = list(sampling.draw(sampler, range(columns), label=label))
    sheet = sampling.grid(
        [s.image for s in drawn], columns, row_labels=run.data.class_names if label else None
    )
    write_atomically(path, lambda temporary: sheet.save(temporary))


def _seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
