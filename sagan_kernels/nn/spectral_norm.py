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
    for module in list(model.modules()):
        if parametrize.is_parametrized(module) and all(
            isinstance(step, parametrizations._SpectralNorm)
            for steps in module.parametrizations.values()  # type: ignore[operator]
            for step in steps
        ):
            # torch.nn.utils.parametrize.remove_parametrizations deletes the property from a class that deep copies
            # share, which breaks every other copy: give this module its own class back instead
            names = list(module.parametrizations)  # type: ignore[arg-type]
            weights = {name: getattr(module, name).detach().clone() for name in names}
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            for name, weight in weights.items():
                module.register_parameter(name, nn.Parameter(weight))
    return model.train(was_training)
