"""The terms of an objective by name, whatever kinds of them it has."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any


def terms_of(objective: Any) -> Iterator[tuple[str, Any, Any]]:
    """The name, the term, and the head that it is of (or the term again), of each."""
    values = [getattr(objective, field.name) for field in fields(objective)]
    items: list[Any] = [item for value in values if isinstance(value, tuple) for item in value]
    taken: list[str] = []
    for item in [item for item in items if hasattr(item, "name")]:
        for term in getattr(item, "terms", (item,)):  # a head has several
            taken.append(new_name(str(term.name), taken))
            yield taken[-1], term, item


def new_name(name: str, taken: list[str]) -> str:
    """``name``, with a number behind it where it is taken."""
    count = sum(other == name or other.startswith(f"{name} #") for other in taken)
    return f"{name} #{count + 1}" if count else name
