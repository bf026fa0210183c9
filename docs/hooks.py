"""Hook of mkdocs: links that leave docs/ work in the repository, but would be broken on the site."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Point links to files outside docs/ at the repository, or leave only their text where none is configured."""
    if config.repo_url:
        return re.sub(r"\]\(\.\./([^)]+)\)", rf"]({config.repo_url.rstrip('/')}/blob/main/\1)", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
