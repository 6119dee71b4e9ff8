"""A small image classifier: the feature space that scores are measured in, trained on the real training images.

Inception weights need a download and know photographs; scores on the data sets of this zoo use a network that was
trained on the very data and ships beside the models, and are named after it (`FID-fashion-cnn`). They must not be
compared with an Inception FID.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sagan_kernels.data import ImageData
from sagan_kernels.files import write_atomically


class FeatureNet(nn.Module):
    """Convolutional classifier for small images; `features` gives the space of the Fréchet distance.

    Shapes: x (B, image_channels, R, R) in [-1, 1] -> logits (B, num_classes); features (B, 128).

    Args:
        name: what scores are called after, such as "fashion-cnn".
        image_channels: 3 or 1.
        num_classes: classes told apart.
        width: channels of the first layer.
    """

    def __init__(self, name: str, image_channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.config = {
            "name": name, "image_channels": image_channels, "num_classes": num_classes, "width": width,
        }  # fmt: skip
        self.name = name
        layers: list[nn.Module] = []
        channels = (image_channels, width, 2 * width, 4 * width)
        for width_in, width_out in pairwise(channels):
            layers += [
                nn.Conv2d(width_in, width_out, 3, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU(),
                nn.Conv2d(width_out, width_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width_out),
                nn.ReLU(),
            ]  # fmt: skip
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x).mean((2, 3))


def train_feature_net(
    data: ImageData, name: str, *, epochs: int = 6, batch_size: int = 128, seed: int = 0
) -> FeatureNet:
    """Train a classifier of `data` with AdamW, a one-cycle schedule and shifts of up to two pixels.

    Deterministic for a given seed, device and number of threads.
    """
    random = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = data.images.shape[3]
        net = FeatureNet(name, channels, len(data.class_names)).to(
            memory_format=torch.channels_last  # type: ignore[call-overload]
        )
    steps = epochs * (len(data) // batch_size) or 1
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    for step in range(steps):
        if step % max(len(data) // batch_size, 1) == 0:
            order = random.permutation(len(data))
        at = (step * batch_size) % max(len(data) - batch_size + 1, 1)
        x, label = data.batch(order[at : at + batch_size])
        dy, dx = random.integers(-2, 3, 2)
        x = F.pad(x, (2, 2, 2, 2), value=float(x[0, 0, 0, 0]))[..., 2 + dy :, 2 + dx :]
        x = x[..., : data.images.shape[1], : data.images.shape[2]].contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x).float(), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def save_feature_net(net: FeatureNet, path: str | Path, **facts: str | float) -> Path:
    """Write weights and configuration to one .safetensors file; `facts` (such as accuracy) go into its header."""
    metadata = {"config": json.dumps(net.config), "facts": json.dumps(facts)}
    tensors = {key: value.contiguous() for key, value in net.state_dict().items()}
    content = save(tensors, metadata=metadata)
    return write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_feature_net(path: str | Path) -> FeatureNet:
    """Read what `save_feature_net` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a feature network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"features: {path} must be a .safetensors file, got nothing there")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            net = FeatureNet(**config)
            net.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"features: {path} must hold a feature network, got a file that cannot be read as one ({error})"
        ) from error
    return net.eval()


@torch.inference_mode()
def embed(net: FeatureNet, batches: Iterator[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 (N, F) and predicted classes int64 (N,) of images in [-1, 1] given in batches."""
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features, predicted = [], []
    for x in batches:
        f = net.features(x.to(net.head.bias.device).contiguous(memory_format=torch.channels_last))
        features.append(f.double().cpu().numpy())
        predicted.append(net.head(f).argmax(1).cpu().numpy())
    return np.concatenate(features), np.concatenate(predicted)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two sets of features (N, F) taken as Gaussians: ‖μ₁-μ₂‖² + tr(Σ₁ + Σ₂ - 2√(Σ₁Σ₂)).

    The trace of √(Σ₁Σ₂) is the sum of the square roots of the eigenvalues of √Σ₁ Σ₂ √Σ₁, which is symmetric:
    no complex matrix square root.

    Source: Heusel et al., arXiv:1706.08500.
    """
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    shift = np.square(first.mean(0) - second.mean(0)).sum()
    return float(shift + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def weights_sha256(net: FeatureNet) -> str:
    """sha256 of the network's weights: says which feature space a score was measured in."""
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(data: ImageData) -> str:
    """sha256 of the images' bytes and labels: says which data a figure was measured on."""
    digest = hashlib.sha256(np.ascontiguousarray(data.images).tobytes())
    digest.update(data.labels.tobytes())
    return digest.hexdigest()
