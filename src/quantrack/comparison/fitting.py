"""Texts as long as MLflow keeps them."""

from __future__ import annotations


def fitting(text: str, rest_is_in: str, most: int) -> str:
    """A text that is too long, cut after a line, with a word on where the rest is.

    >>> print(fitting(9 * "| row |\\n", "all.md", 30))
    | row |
    <BLANKLINE>
    (The rest: all.md.)
    """
    if len(text) <= most:
        return text
    rest = f"\n\n(The rest: {rest_is_in}.)"
    head = text[: most - len(rest)]
    return (head[: head.rfind("\n")] if "\n" in head else head) + rest
