"""Read the fields of a dataclass from its source text, because importing `TrainingArguments` takes seconds."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

_PROTECTION = Path(__file__).parents[1] / "protection"


class Field(NamedTuple):
    """A field of a dataclass, as far as its source text tells.

    Attributes:
        kind: Its annotation without `None`.
        nullable: Whether it may be None.
        default: None where it is not a literal.
        metadata: Those entries that are literals ("help", "choices").
    """

    kind: str
    nullable: bool
    default: Any
    metadata: dict[str, Any]


@functools.cache
def sophon_fields() -> dict[str, Field]:
    """Return the fields that `SophonConfig` adds to `TrainingArguments` or sets differently."""
    return _read_fields(_parse(_PROTECTION / "config.py"), "SophonConfig")


@functools.cache
def training_fields() -> dict[str, Field]:
    """Return the fields of `TrainingArguments`; one that is an enumeration has its values as "choices"."""
    transformers = importlib.util.find_spec("transformers")
    if transformers is None or transformers.origin is None:
        raise ImportError("transformers is not installed: run `pip install transformers`.")
    training = _parse(Path(transformers.origin).with_name("training_args.py"))
    enumerations = {
        node.name: [v.value for s in node.body if isinstance(s, ast.Assign) and isinstance(v := s.value, ast.Constant)]
        for module in (training, _parse(Path(transformers.origin).with_name("trainer_utils.py")))
        for node in module.body
        if isinstance(node, ast.ClassDef) and "Enum" in "".join(ast.unparse(base) for base in node.bases)
    }
    fields = _read_fields(training, "TrainingArguments")
    for field in fields.values():
        if values := enumerations.get(field.kind.removesuffix(" | str")):
            field.metadata["choices"] = values
    return fields


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _read_fields(module: ast.Module, name: str) -> dict[str, Field]:
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = {}
    for node in body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        given = {k.arg: k.value for k in node.value.keywords} if isinstance(node.value, ast.Call) else {}
        if "init" in given:
            continue
        kinds = ast.unparse(node.annotation).split(" | ")
        metadata = given.get("metadata")
        pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
        told = {str(_literal(key)): _literal(value) for key, value in pairs}
        fields[node.target.id] = Field(
            " | ".join(kind for kind in kinds if kind != "None"),
            "None" in kinds,
            _literal(given.get("default")),
            {key: value for key, value in told.items() if value is not None},
        )
    return fields


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
