"""Names for parts: quantizers, models, losses, data sets, stages.

The one file that `quant` and `models` share; it imports nothing but the standard library.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


class UnknownNameError(ValueError):
    """A name that no part is registered under; the message lists those that are."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered part: its factory, and the version of the numbers that it makes."""

    name: str
    factory: T
    version: int

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]

    @property
    def source(self) -> str:
        """Where the method comes from: the docstring's paragraph that opens with `Source:`."""
        _, _, rest = (inspect.getdoc(self.factory) or "").partition("Source:")
        return " ".join(rest.partition("\n\n")[0].split())

    def options(self) -> dict[str, inspect.Parameter]:
        """What YAML may set: the keyword-only parameters, with resolved annotations."""
        signature = inspect.signature(self.factory, eval_str=True)
        return {
            name: p
            for name, p in signature.parameters.items()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }


class Registry(Generic[T]):
    """Parts of one kind by name. Registering is the only wiring that a new part needs.

    What stands after the `*` of a factory's signature is what YAML may set.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, version: int = 1) -> Callable[[T], T]:
        """Decorator: makes the factory known as `name`.

        `version` is raised when the numbers that the part makes change; it enters stage keys.
        """

        def add(factory: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, factory, version)
            return factory

        return add

    def __getitem__(self, name: str) -> Entry[T]:
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(unknown(self.kind, name, self._entries)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


def unknown(kind: str, name: str, known: Any) -> str:
    """The message for a name nobody knows: `unknown quantizer 'pcat'; did you mean ...`."""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r};{hint} known: {', '.join(sorted(known))}"
