"""Subclasses of hosts' classes, made when they are needed: `object.__class__` is set to one, and set back."""

import copyreg
import types
from collections.abc import Callable
from typing import Any, ClassVar


class Swapped:
    """What every such subclass has: the class to go back to, and the way through a pickle."""

    __slots__ = ()
    swapped_host: ClassVar[type]
    swapped_form: ClassVar[Any]
    swapped_mixin: ClassVar[type["Swapped"]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(
                f"swap_layers: a {self.swapped_host.__name__} must be copied as other objects are, got a __reduce__ of"
                " its own; call unswap_layers first"
            )
        _, (_, *rest), *state = reduced
        return (_rebuild, (self.swapped_mixin, self.swapped_host, self.swapped_form, *rest), *state)


def swap_class(instance: object, mixin: type[Swapped], form: Any) -> None:
    """Make `instance` run the methods of `mixin`, which find what they need to know in `self.swapped_form`."""
    instance.__class__ = _subclass(mixin, type(instance), form)


def unswap_class(instance: object) -> None:
    """Give `instance` its own class back, if it is swapped."""
    if isinstance(instance, Swapped):
        instance.__class__ = instance.swapped_host


def _subclass(mixin: type[Swapped], host: type, form: Any) -> type:
    """One class for one form of one host, so that instances of a class go on sharing it."""
    if (mixin, host, form) not in _subclasses:
        _subclasses[mixin, host, form] = _new_subclass(mixin, host, form)
    return _subclasses[mixin, host, form]


def _new_subclass(mixin: type[Swapped], host: type, form: Any) -> type:
    # the host comes first, or objects could not change class; so what goes before it is put into the class itself
    methods = {name: method for c in (Swapped, mixin) for name, method in vars(c).items() if callable(method)}

    def body(namespace: dict[str, Any]) -> None:
        # the name stays: printouts, and code that asks for a class by name, see the host's
        namespace |= {
            "__module__": host.__module__,
            "__qualname__": host.__qualname__,
            "__doc__": host.__doc__,
        }
        namespace |= methods | {"swapped_host": host, "swapped_form": form, "swapped_mixin": mixin}

    return types.new_class(host.__name__, (host, mixin), exec_body=body)


def _rebuild(mixin: type[Swapped], host: type, form: Any, *rest: Any) -> Any:
    cls = _subclass(mixin, host, form)
    new: Callable[..., Any] = cls.__new__
    return new(cls, *rest)


_subclasses: dict[tuple[type[Swapped], type, Any], type] = {}
