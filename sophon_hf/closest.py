"""The hint that ends a message about an unknown name."""

from __future__ import annotations

from collections.abc import Iterable


def hint(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """The question "Did you mean ...?" where one of the known names is close, and `otherwise` where none is; with a space before."""
    from difflib import get_close_matches

    close = get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else otherwise
