"""The JSON files of a pipeline: they come from anywhere, so whatever is wrong in one is a ModelError that names it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smpo_fast.common.console import printable
from smpo_fast.common.errors import ModelError


def read_object(file: Path, key: str = "model.path") -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError, naming the setting ``key``, where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{key}: {file} cannot be read: is this a diffusers pipeline folder? ({error})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{key}: {file} holds {shown(found)}, but it should hold a JSON object")
    return found


def whole_number(value: Any, low: int, high: int, what: str) -> int:
    """A value that must be a whole number from low to high; raises ModelError naming ``what`` it is."""
    if type(value) is not int or not low <= value <= high:
        raise ModelError(f"{what} = {shown(value)}: a whole number from {low} to {high} is expected")
    return value


def shown(value: Any) -> str:
    """A value of a file as a message can show it: printable, and not too long."""
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def some(names: Sequence[str]) -> str:
    """The first of many names of tensors, and how many there are."""
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_weight_index(folder: Path) -> None:
    """Raise ModelError for an index of shards that names anything but safetensors files of its folder.

    The libraries would load a pickled file that an index names, although they are told to use safetensors.
    """
    for file in sorted(folder.glob("*.safetensors.index*.json")):
        names = read_object(file).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{file}: its weight_map should name a file for each tensor")
        for name in sorted(set(names.values())):
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise ModelError(f"{file} names {shown(name)}: only safetensors files of its own folder are loaded")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} has an adapter_config.json: adapters in place of a network are not supported")
