"""Batch normalization whose gain and bias depend on the class."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConditionalBatchNorm2d(nn.Module):
    """y = (1 + gain[label]) · (x - mean) / √(var + eps) + bias[label], per channel.

    Shapes: x (B, C, H, W), label (B,) int64 or None -> (B, C, H, W). With num_classes = 0 there is one row of gain
    and bias and the label is not used: ordinary batch normalization, its gain stored less one.

    Starts as plain normalization, since gain = bias = 0. Running statistics as in `torch.nn.BatchNorm2d`; in eval
    mode the layer is one affine map per image.

    Reference: de Vries et al., arXiv:1707.00683, in BigGAN's form (`1 + gain`), arXiv:1809.11096.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, num_classes: int, *, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.eps = eps
        self.momentum: float | None = momentum  # None: cumulative average, as in torch.nn.BatchNorm2d
        self.num_classes = num_classes
        self.gain = nn.Parameter(torch.zeros(max(num_classes, 1), num_features))
        self.bias = nn.Parameter(torch.zeros(max(num_classes, 1), num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        if not self.training:
            scale, shift = self.affine(label)
            return torch.addcmul(shift.to(x.dtype)[..., None, None], x, scale.to(x.dtype)[..., None, None])
        self.num_batches_tracked += 1
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        normalized = F.batch_norm(
            x, self.running_mean, self.running_var, training=True, momentum=momentum, eps=self.eps
        )
        gain, bias = self._rows(label)
        return torch.addcmul(
            bias.to(x.dtype)[..., None, None], normalized, (1 + gain).to(x.dtype)[..., None, None]
        )

    def affine(self, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """The eval-mode layer as y = scale · x + shift; both (B, C), or (1, C) when unconditional."""
        gain, bias = self._rows(label)
        scale = (1 + gain) * torch.rsqrt(self.running_var + self.eps)
        return scale, bias - self.running_mean * scale

    def _rows(self, label: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.num_classes == 0:
            return self.gain, self.bias
        if label is None:
            raise ValueError(
                f"ConditionalBatchNorm2d: a label is needed, one of {self.num_classes} classes, got None"
            )
        return F.embedding(label, self.gain), F.embedding(label, self.bias)

    def extra_repr(self) -> str:
        return f"{self.gain.shape[1]}, num_classes={self.num_classes}, eps={self.eps}"
