"""What the Hub demands of a model card's metadata, as far as it is known."""

from __future__ import annotations

import re

import yaml

LICENSES = {"apache-2.0", "mit", "openrail", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "unknown", "other"}
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def metadata_errors(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a card's metadata, for the rules of the Hub that are known."""
    found = re.match(r"^---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    if found is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"invalid yaml: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    errors, warnings = [], []
    if data.get("license") not in (None, *LICENSES):
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    for name in ("pipeline_tag", "library_name", "license_name"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for name in ("tags", "datasets", "metrics"):
        values = data.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{name}" must be an array of strings')
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not MODEL_ID.fullmatch(str(value)) or str(value).startswith("."):
                errors.append(f'"{name}" with value "{value}" is not valid. Use an id from the Hub.')
    for number, model in enumerate(data.get("model-index") or []):
        errors += _result_errors(model, f"model-index[{number}]")
    if "license" not in data:
        warnings.append("no license was given")
    return errors, warnings


def _result_errors(model: dict, where: str) -> list[str]:
    errors = [] if model.get("name") else [f'"{where}.name" is required']
    if not isinstance(model.get("results"), list):
        return [*errors, f'"{where}.results" is required']
    for number, result in enumerate(model["results"]):
        here = f"{where}.results[{number}]"
        needed = {("task", "type"), ("dataset", "type"), ("dataset", "name")}
        errors += [f'"{here}.{a}.{b}" is required' for a, b in sorted(needed) if not (result.get(a) or {}).get(b)]
        for metric in result.get("metrics") or [{}]:
            errors += [f'"{here}.metrics[].{name}" is required' for name in ("type", "value") if name not in metric]
            if isinstance(metric.get("value"), float) and metric["value"] != metric["value"]:
                errors.append(f'"{here}.metrics[].value" is not a number')
    return errors
