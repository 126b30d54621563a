"""Reading a run's settings: TOML files, presets, command line, and their description."""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import ValidationError

from smpo_fast.common.errors import ConfigError
from smpo_fast.config import recipes
from smpo_fast.config.presets import apply_presets
from smpo_fast.config.schema import Config
from smpo_fast.config.sibling_flags import ALIASES

NO_FILE = Path(os.devnull)  # reads as no settings at all: every key has its default
DEFAULT_FILE = Path(__file__).parents[1] / "embedded" / "default.toml"


def keys() -> Iterator[tuple[str, Any]]:
    """All settings as (``section.key``, pydantic field), in file order."""
    for section, field in Config.model_fields.items():
        for key, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            yield f"{section}.{key}", inner


def load(file: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Settings from a TOML file (the embedded default without one) and ``section.key=value`` words.

    file: a path, or the name of a shipped recipe.

    Raises ConfigError for an unreadable file, an unknown key, a wrong type or value, or an impossible
    combination; the message names the file or the command line, the key, what was found and what is right.
    """
    file = DEFAULT_FILE if file is None else recipes.located(file, ".toml")
    given = _read_toml(file)
    origin = {f"{section}.{key}": str(file) for section, keys_ in given.items() for key in keys_}
    for word in overrides:
        name, value = _parse_override(word)
        section, _, key = name.partition(".")
        given.setdefault(section, {})[key] = value
        origin[name] = "command line"
    return _validate(apply_presets(given), origin, default_origin=str(file))


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """Settings from nested dicts, with presets; raises ConfigError like ``load``."""
    return _validate(apply_presets({k: dict(v) for k, v in values.items()}), {}, default_origin="settings")


def read_overlay(file: Path) -> dict[str, Any]:
    """The settings of a TOML file that holds some of them, by ``section.key``. Raises ConfigError like ``load``."""
    values = {f"{section}.{key}": v for section, table in _read_toml(file).items() for key, v in table.items()}
    for name in values.keys() - dict(keys()).keys():
        _unknown_key(name, str(file), list(dict(keys())))
    return values


def given(config: Config) -> set[str]:
    """The settings, by ``section.key``, that a file, the command line or a preset gave to a loaded Config."""
    return {f"{name}.{key}" for name in config.model_fields_set for key in getattr(config, name).model_fields_set}


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """The settings with other values by ``section.key``. Raises ConfigError like ``load``."""
    found = config.model_dump()
    for name, value in values.items():
        section, _, key = name.partition(".")
        found[section][key] = value
    return _validate(found, {}, default_origin="settings")


def dump(config: Config) -> str:
    """The resolved settings as TOML text that ``load`` reads back to an equal Config."""
    lines: list[str] = []
    for section, values in config.model_dump().items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _read_toml(file: Path) -> dict[str, dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(recipes.names(".toml"))
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}): give --config a TOML file, or one of the names {known}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML, which is UTF-8 text: {error}") from error
    try:
        values = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or an integer of more digits than Python reads
        raise ConfigError(f"{file}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: not valid TOML: nested too deeply") from error
    for section, table in values.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: '{section}' is outside any section: write keys below a [section] line")
    return values


def _parse_override(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not equals or "." not in name:
        raise ConfigError(f"command line: '{word}' is not of the form section.key=value")
    try:
        value = text if "\n" in text else tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return name, text  # a bare word is a string
    field = dict(keys()).get(name)
    return name, text if field is not None and field.annotation is str and not isinstance(value, str) else value


def _validate(given: dict[str, dict[str, Any]], origin: dict[str, str], default_origin: str) -> Config:
    known = dict(keys())
    for section, values in given.items():
        for key in values:
            if f"{section}.{key}" not in known:
                _unknown_key(f"{section}.{key}", origin.get(f"{section}.{key}", default_origin), list(known))
    try:
        return Config.model_validate(_floats(given, known))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:2])
        where = origin.get(name, default_origin)
        found = "" if name not in known else f" (found {_brief(first['input'])}; meaning: {known[name].description})"
        raise ConfigError(f"{where}: {name}: {first['msg'].removeprefix('Value error, ')}{found}") from error


def _unknown_key(name: str, where: str, known: list[str]) -> NoReturn:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    key = name.partition(".")[2]
    same_key = [k for k in known if k.partition(".")[2] == key or k == ALIASES.get(key)]
    hint = (same_key or near or [""])[0]
    raise ConfigError(f"{where}: unknown key '{name}'" + (f": did you mean '{hint}'?" if hint else ""))


def _floats(given: dict[str, dict[str, Any]], known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Whole numbers for float settings are what people write; strict validation would refuse them."""

    def convert(name: str, value: Any) -> Any:
        annotation = known[name].annotation
        wants_float = float in (annotation, *get_args(annotation))
        if not wants_float or type(value) is not int:
            return value
        try:
            return float(value)
        except OverflowError:
            return math.inf  # which validation refuses

    return {s: {k: convert(f"{s}.{k}", v) for k, v in values.items()} for s, values in given.items()}


def _brief(value: Any) -> str:
    """A value as Python writes it, cut to a length that fits into a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}.."


def toml_value(value: Any) -> str:
    """A setting's value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    # TOML knows JSON's escapes, but not its pairs of them for one character; DEL must be escaped in TOML alone
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
