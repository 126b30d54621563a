"""Reading a run's settings: TOML files, presets, command line, and their description."""

from __future__ import annotations

import argparse
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import ValidationError

from smpo_fast.common.errors import UserError
from smpo_fast.config.schema import SOLVER_PRESETS, Config

DEFAULT_FILE = Path(__file__).parents[1] / "embedded" / "default.toml"


# What a word implies for keys that neither the file nor the command line gives; the last that speaks wins.
FIDELITY_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "release": {
        "grid": "release",
        "landing": "mismatch",
        "first_step": "keep",
        "renoise_time": "source",
        "average": "mean",
        "timesteps": "independent",
    },
}
OBJECTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "smpo": {},
    "dpo": {"source": "noise"},
    "inpo": {"renoise_steps": 0, "noise": 0.1},
    "sft": {"source": "noise"},
}

# Flag names that sibling scripts share, where they mean the same: flag -> key.
ALIASES: dict[str, str] = {
    "pretrained_model_name_or_path": "model.path",
    "pretrained_vae_model_name_or_path": "model.vae",
    "unet_init": "model.unet",
    "revision": "model.revision",
    "variant": "model.variant",
    "train_data_dir": "data.pairs",
    "max_train_samples": "data.max_pairs",
    "resolution": "data.resolution",
    "proportion_empty_prompts": "data.prompt_dropout",
    "output_dir": "run.dir",
    "seed": "run.seed",
    "max_train_steps": "run.steps",
    "checkpointing_steps": "run.save_every",
    "checkpoints_total_limit": "run.keep",
    "train_batch_size": "batch.micro_pairs",
    "learning_rate": "optim.lr",
    "lr_scheduler": "optim.schedule",
    "lr_warmup_steps": "optim.warmup_steps",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_weight_decay": "optim.weight_decay",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip",
    "beta_dpo": "objective.beta",
    "rank": "lora.rank",
    "lora_alpha": "lora.alpha",
}
SWITCHES: dict[str, str] = {
    "gradient_checkpointing": "model.gradient_checkpointing=true",
    "enable_xformers_memory_efficient_attention": "model.attention=xformers",
    "use_8bit_adam": "optim.name=adamw8bit",
    "use_adafactor": "optim.name=adafactor",
    "no_hflip": "data.flip=false",
    "use_dora": "lora.use_dora=true",
}
# Flags that look familiar but mean something else here: said, not guessed.
REFUSED: dict[str, str] = {
    "gradient_accumulation_steps": "accumulation follows from batch.pairs_per_step, batch.micro_pairs and the ranks",
    "scale_lr": "optim.lr is the rate as applied: multiply it yourself (the released recipe's is 1.024e-5)",
    "num_train_epochs": "give run.steps",
    "sdxl": "SDXL or SD1.5 is read from the model",
    "resume_from_checkpoint": "a run continues from its folder: start the same command again",
    "dataset_name": "bring pairs as a parquet file: data.pairs=FILE",
    "mixed_precision": "give model.precision (fp32, bf16, fp16, bf16-autocast)",
}


def keys() -> Iterator[tuple[str, Any]]:
    """All settings as (``section.key``, pydantic field), in file order."""
    for section, field in Config.model_fields.items():
        for key, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            yield f"{section}.{key}", inner


def load(file: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Settings from a TOML file (the embedded default without one) and ``section.key=value`` words.

    Raises SettingsError for an unreadable file, an unknown key, a wrong type or value, or an impossible
    combination; the message names the file or the command line, the key, what was found and what is right.
    """
    file = DEFAULT_FILE if file is None else file
    given = _read_toml(file)
    origin = {f"{section}.{key}": str(file) for section, keys_ in given.items() for key in keys_}
    for word in overrides:
        name, value = _parse_override(word)
        section, _, key = name.partition(".")
        given.setdefault(section, {})[key] = value
        origin[name] = "command line"
    return _validate(_with_presets(given), origin, default_origin=str(file))


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """Settings from nested dicts, with presets; raises SettingsError like ``load``."""
    return _validate(_with_presets({k: dict(v) for k, v in values.items()}), {}, default_origin="settings")


def dump(config: Config) -> str:
    """The resolved settings as TOML text that ``load`` reads back to an equal Config."""
    lines: list[str] = []
    for section, values in config.model_dump().items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, the overrides and the sibling scripts' flags to a program's parser."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML settings (default: the embedded run)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file")
    group = parser.add_argument_group("flags as sibling scripts name them")
    for flag, key in ALIASES.items():
        group.add_argument(f"--{flag}", metavar="VALUE", help=f"same as {key}=VALUE")
    for flag, word in SWITCHES.items():
        group.add_argument(f"--{flag}", action="store_true", help=f"same as {word}")
    for flag in REFUSED:
        group.add_argument(f"--{flag}", nargs="?", const="", default=None, help=argparse.SUPPRESS)


def from_arguments(args: argparse.Namespace) -> Config:
    """The settings that a parser made by ``add_arguments`` was given."""
    for flag, why in REFUSED.items():
        if getattr(args, flag) is not None:
            raise UserError(f"command line: --{flag} is not a setting here: {why}")
    words = [f"{key}={getattr(args, flag)}" for flag, key in ALIASES.items() if getattr(args, flag) is not None]
    words += [word for flag, word in SWITCHES.items() if getattr(args, flag)]
    return load(args.config, [*words, *args.overrides])


def describe() -> str:
    """All settings with type, default and meaning, as the Markdown of docs/settings.md."""
    lines = []
    for section, field in Config.model_fields.items():
        lines += [
            f"## `[{section}]`",
            "",
            f"{field.annotation.__doc__}",
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for key, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            lines.append(f"| `{key}` | `{_toml_value(inner.default)}` | {inner.description} |".replace("\n", " "))
        lines.append("")
    return "\n".join(lines)


def _read_toml(file: Path) -> dict[str, dict[str, Any]]:
    try:
        text = file.read_text()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): give --config a TOML file") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: not valid TOML: {error}") from error
    for section, table in values.items():
        if not isinstance(table, dict):
            raise UserError(f"{file}: '{section}' stands outside a section: keys belong below a [section] line")
    return values


def _parse_override(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not equals or "." not in name:
        raise UserError(f"command line: '{word}' is not of the form section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return name, text  # a bare word is a string
    field = dict(keys()).get(name)
    return name, text if field is not None and field.annotation is str and not isinstance(value, str) else value


def _with_presets(given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    inversion = given.get("inversion", {})
    objective = OBJECTIVE_PRESETS.get(given.get("objective", {}).get("name", "smpo"), {})
    fidelity = FIDELITY_PRESETS.get(inversion.get("fidelity", "paper"), {})
    solver = SOLVER_PRESETS.get(inversion.get("solver", "renoise"), {})
    return {**given, "inversion": {**fidelity, **objective, **solver, **inversion}}


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
        found = "" if name not in known else f" (found {first['input']!r}; meaning: {known[name].description})"
        raise UserError(f"{where}: {name}: {first['msg'].removeprefix('Value error, ')}{found}") from error


def _unknown_key(name: str, where: str, known: list[str]) -> NoReturn:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    key = name.partition(".")[2]
    same_key = [k for k in known if k.partition(".")[2] == key or k == ALIASES.get(key)]
    hint = (same_key or near or [""])[0]
    raise UserError(f"{where}: unknown key '{name}'" + (f": did you mean '{hint}'?" if hint else ""))


def _floats(given: dict[str, dict[str, Any]], known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Whole numbers for float settings are what people write; strict validation would refuse them."""

    def convert(name: str, value: Any) -> Any:
        annotation = known[name].annotation
        wants_float = float in (annotation, *get_args(annotation))
        return float(value) if wants_float and type(value) is int else value

    return {s: {k: convert(f"{s}.{k}", v) for k, v in values.items()} for s, values in given.items()}


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, (int, float)) else json.dumps(value)
