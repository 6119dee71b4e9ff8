"""Entry points of `torch.hub`: one function for each entry of the zoo.

torch.hub.load("/path/to/checkout", "sagan_32_fashion", source="local")
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

from torch import nn as _nn

from sagan_kernels import create_model as _create_model
from sagan_kernels import list_models as _list_models

dependencies = ["torch", "numpy", "safetensors"]


def _entrypoint(name: str) -> _Callable[..., _nn.Module]:
    def load(
        pretrained: bool = True,
        part: str = "generator",
        progress: bool = True,
        revision: str | None = None,
        map_location: str = "cpu",
        **overrides: _Any,
    ) -> _nn.Module:
        del progress  # the weights lie in the checkout: nothing is fetched
        if revision is not None:
            raise ValueError(
                f"{name}: revision must be None, since the weights come with the code, got {revision!r}; "
                f"name it with the repository: torch.hub.load('owner/repository:{revision}', {name!r})"
            )
        model = _create_model(name, pretrained=pretrained, part=part, **overrides)
        return model.to(map_location)

    load.__name__ = load.__qualname__ = name
    load.__doc__ = f"""{name}: images from latents and labels, or logits from images and labels.

    Args:
        pretrained: with its trained weights, in eval mode.
        part: "generator" or "discriminator".
        progress: taken for the convention's sake; nothing is fetched.
        revision: None. The weights are those of the code's own revision, which torch.hub takes with the repository.
        map_location: device of the network.
        overrides: keyword arguments of the network that replace the entry's.
    """
    return load


globals().update({_name: _entrypoint(_name) for _name in _list_models()})
