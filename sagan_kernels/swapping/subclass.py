"""Subclasses of hosts' classes, made when they are needed: `object.__class__` is set to one, and set back."""

import copyreg
import functools
import types
from collections.abc import Callable
from typing import Any, ClassVar


class Swapped:
    """What every such subclass has: the class to go back to, and the way through a pickle."""

    __slots__ = ()
    host_class: ClassVar[type]
    form: ClassVar[Any]
    mixin: ClassVar[type["Swapped"]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        assert isinstance(reduced, tuple)
        constructor, (_, *rest), *state = reduced
        assert constructor is copyreg.__newobj__  # type: ignore[attr-defined]
        return (_rebuild, (self.mixin, self.host_class, self.form, *rest), *state)


def swap_class(instance: object, mixin: type[Swapped], form: Any) -> None:
    """Make `instance` run the methods of `mixin`, which find what they need to know in `self.form`."""
    instance.__class__ = _subclass(mixin, type(instance), form)


def unswap_class(instance: object) -> bool:
    """Give `instance` its own class back; False where it has it."""
    if not isinstance(instance, Swapped):
        return False
    instance.__class__ = instance.host_class  # type: ignore[assignment]
    return True


@functools.cache
def _subclass(mixin: type[Swapped], host: type, form: Any) -> type:
    """One class for one form of one host, so that instances of a class go on sharing it."""

    # the host comes first, or objects could not change class; so what goes before it is put into the class itself
    methods = {name: method for c in (Swapped, mixin) for name, method in vars(c).items() if callable(method)}

    def body(namespace: dict[str, Any]) -> None:
        # the name stays: printouts, and code that asks for a class by name, see the host's
        namespace |= {"__module__": host.__module__, "__qualname__": host.__qualname__, "__doc__": host.__doc__}
        namespace |= methods | {"host_class": host, "form": form, "mixin": mixin}

    return types.new_class(host.__name__, (host, mixin), exec_body=body)


def _rebuild(mixin: type[Swapped], host: type, form: Any, *rest: Any) -> Any:
    cls = _subclass(mixin, host, form)
    new: Callable[..., Any] = cls.__new__
    return new(cls, *rest)
