"""Spectral normalization: a weight divided by its largest singular value."""

from torch import nn
from torch.nn.utils import parametrizations, parametrize


def spectral_norm(module: nn.Module, name: str = "weight", *, eps: float = 1e-12) -> nn.Module:
    """Divide `module`'s parameter `name` by its spectral norm, estimated by one power iteration a training forward.

    The same object and state-dict keys as `torch.nn.utils.parametrizations.spectral_norm`.

    Gradients: of every order, through W/σ; u and v are constants.

    Reference: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", arXiv:1802.05957.
    """
    return parametrizations.spectral_norm(module, name, eps=eps)


def fold_spectral_norm(model: nn.Module) -> nn.Module:
    """Bake W/σ into the weights of every spectral-normed layer of `model`, in place, and return it.

    Uses the stored u and v, so outputs equal the eval-mode model's to rounding. The model can no longer resume
    training with spectral normalization: fold a copy where that matters.
    """
    was_training = model.training
    model.eval()  # a training-mode read of the weight would advance u and v once more
    for module in model.modules():
        if parametrize.is_parametrized(module):
            # a deep copy shares the class whose property is about to be deleted, and would lose its weight
            module.__class__ = type(type(module).__name__, type(module).__bases__, dict(vars(type(module))))
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model.train(was_training)
