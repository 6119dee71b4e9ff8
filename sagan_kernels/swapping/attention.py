"""The forward that a swapped attention layer runs, on the host's own parameters."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sagan_kernels import reference
from sagan_kernels.ops import attention, sagan_attention
from sagan_kernels.swapping.projections import call, has_weight, weight_and_bias
from sagan_kernels.swapping.subclass import Swapped
from sagan_kernels.swapping.variants import Variant


class SwappedAttention(Swapped):
    """Mixed into a host's class in front of it; `swapped_form` is the host's `Variant`.

    Inputs that are not (B, C, H, W), arguments whose meaning is not known, and a host asked for its map go to the
    host's own forward.
    """

    __slots__ = ()
    swapped_form: ClassVar[Variant]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = cast(nn.Module, self)
        variant = self.swapped_form
        x = args[0] if args else kwargs.get(_first_argument(self.swapped_host))
        rest = len(args) + len(kwargs) > 1
        if (
            not isinstance(x, Tensor)
            or x.ndim != 4
            or (rest and not variant.ignores_rest)
            or (variant.map_flag is not None and getattr(self, variant.map_flag, False))
        ):
            return self.swapped_host.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        if variant.returns_map:
            return _with_map(layer, variant, x)
        y = _fused(layer, variant, x)
        return _composed(layer, variant, x)[0] if y is None else y


class AttentionMap:
    """The (B, L, S) attention map of a swapped layer whose host returns it: computed at its first use.

    Takes part in PyTorch's functions, in indexing and in arithmetic as the tensor would; `tensor()` is the tensor.
    Memory: query and key until then, and the map from then on.
    """

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self._factors = query, key
        self._map: Tensor | None = None

    def tensor(self) -> Tensor:
        """The map, with gradients to query and key."""
        if self._map is None:
            query, key = self._factors
            self._map = torch.softmax(query @ key.mT, dim=-1)
        return self._map

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(
            lambda a: a.tensor() if isinstance(a, AttentionMap) else a, (args, kwargs or {})
        )
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a half-built object, in a copy or a pickle
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def __len__(self) -> int:
        return len(self._factors[0])

    def __repr__(self) -> str:
        (B, L, _), S = self._factors[0].shape, self._factors[1].shape[1]
        return f"AttentionMap({B}, {L}, {S})"


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.tensor(), name)(
        *(o.tensor() if isinstance(o, AttentionMap) else o for o in others)
    )


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(AttentionMap, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("__radd__", "__rsub__", "__rmul__", "__rmatmul__", "__neg__", "__abs__", "__array__"):
    setattr(AttentionMap, _name, _operator(_name))


def _fused(layer: nn.Module, variant: Variant, x: Tensor) -> Tensor | None:
    """The whole layer from its weights; None where a projection must be called."""
    if variant.gamma is None or variant.after is not None:
        return None
    paths = [variant.query, variant.key, variant.value, *([] if variant.out is None else [variant.out])]
    # asked of all first: computing a weight may change its layer
    if not all(has_weight(layer, path) for path in paths):
        return None
    weights = [weight_and_bias(layer, path) for path in paths]
    (query, query_bias), (key, key_bias), (value, value_bias) = weights[:3]
    out, out_bias = weights[3] if variant.out is not None else (None, None)
    scale = _scale(layer, variant)
    if scale != 1:
        query = query * scale
        query_bias = query_bias if query_bias is None else query_bias * scale
    gamma: Tensor = getattr(layer, variant.gamma)
    if gamma.ndim:  # under autocast the host's sum is then in gamma's dtype
        x = x.to(torch.promote_types(x.dtype, gamma.dtype))
    return sagan_attention(
        x, query, key, value, out, gamma,
        query_bias=query_bias, key_bias=key_bias, value_bias=value_bias, out_bias=out_bias,
        pool=variant.pool, normalize=variant.normalize,
    )  # fmt: skip


def _composed(layer: nn.Module, variant: Variant, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer from its projections, called as the host calls them: (y, query (B, L, E), key (B, S, E))."""
    query, key, value = (call(layer, path, x) for path in (variant.query, variant.key, variant.value))
    if variant.pool:
        key, value = nn.functional.max_pool2d(key, 2), nn.functional.max_pool2d(value, 2)
    query, key, value = (reference.positions(t) for t in (query, key, value))
    scale = _scale(layer, variant)
    query = query if scale == 1 else query * scale
    o = attention(query, key, value, normalize=variant.normalize).mT.unflatten(2, x.shape[2:])
    if variant.out is not None:
        o = call(layer, variant.out, o)
    if variant.after is not None:
        o = getattr(layer, variant.after)(o)
    if variant.gamma is not None:
        o = getattr(layer, variant.gamma) * o
    return x + o, query, key


def _with_map(layer: nn.Module, variant: Variant, x: Tensor) -> tuple[Tensor, Tensor | AttentionMap]:
    y, query, key = _composed(layer, variant, x)
    found = AttentionMap(query, key)
    # nn.DataParallel gathers tensors only, and a traced program returns them only
    if (
        hasattr(layer, "_is_replica")
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
    ):
        return y, found.tensor()
    return y, found


def _scale(layer: nn.Module, variant: Variant) -> float:
    return getattr(layer, variant.scale) if isinstance(variant.scale, str) else variant.scale


@functools.cache
def _first_argument(host: type) -> str:
    """The name of the first argument of the host's forward; empty if it has none of its own."""
    parameters = list(inspect.signature(host.forward).parameters)  # type: ignore[attr-defined]
    return parameters[1] if len(parameters) > 1 else ""
