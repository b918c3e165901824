"""Write numbers with their nouns."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return "1 thread", "2 threads". plural: of the noun, if it is not the noun with an s."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
