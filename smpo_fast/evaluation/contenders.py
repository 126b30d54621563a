"""Who is compared: the base, what a run exported, and other models by their place or their published name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smpo_fast.common import remote, storage
from smpo_fast.common.errors import ConfigError
from smpo_fast.config import loading
from smpo_fast.config.schema import EMBEDDED, EMBEDDED_V, Config, Model
from smpo_fast.models import lora
from smpo_fast.models.base_loras import is_lora
from smpo_fast.models.export import exported_model
from smpo_fast.models.identity import base_identity, encoders_identity
from smpo_fast.models.load import load_pipeline
from smpo_fast.models.locate import ModelSource, find
from smpo_fast.models.single_file.recognise import recognise

BASE, ALIGNED, EXTRACTED = "base", "aligned", "lora"
PUBLISHED = {
    "SmPO-SDXL": "JaydenLu666/SmPO-SDXL",
    "SmPO-SD1.5": "JaydenLu666/SmPO-SD1.5",
    "InPO-SDXL": "JaydenLu666/InPO-SDXL",
    "InPO-SD1.5": "JaydenLu666/InPO-SD1.5",
    "dpo-sdxl": "mhdang/dpo-sdxl-text2image-v1",
    "mapo-beta": "mapo-t2i/mapo-beta",
    "SPO-SDXL": "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep",
}
_NAMED = re.compile(r"([\w. -]+)=(.+)")


@dataclass(frozen=True)
class Contender:
    """A model that is compared. identity: JSON values that differ if its images might."""

    name: str
    identity: Mapping[str, Any]
    load: Callable[[torch.dtype], Any]


def contenders(config: Config, source: ModelSource, export: Path) -> list[Contender]:
    """The base first, then what the run exported, a LoRA that it extracted, and ``eval.contenders``.

    source: the base; export: the folder of a pipeline, or of a run's adapters. Raises ConfigError for a name that is
    given twice, and errors like ``models.locate.find``.
    """
    found = [_pipeline(BASE, source), _exported(ALIGNED, config.model, source, export)]
    if extracted := extracted_lora(config):
        found.append(_exported(EXTRACTED, config.model, source, extracted))
    found += [_given(word, config.model) for word in config.eval.contenders]
    names = [contender.name for contender in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"eval.contenders: two are called '{repeated[0]}': give one another name, as in name=place")
    return found


def aligned_pipeline(model: Model, export: Path, source: ModelSource, dtype: torch.dtype) -> Any:
    """What a run exported: a pipeline of its own, or the base ``source`` with a LoRA.

    export: the folder of a pipeline or of a run's adapters, or a LoRA's file.
    """
    file = _lora_file(export)
    if file is None:
        return load_pipeline(find(exported_model(model, export)), dtype)
    pipe = load_pipeline(source, dtype)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    return pipe


def extracted_lora(config: Config) -> Path | None:
    """The LoRA that a run has extracted from its full fine-tune, if there is one that diffusers reads."""
    folders = [
        Path(config.run.dir) / name for name in ("lora-diffusers", "lora-kohya") if name in config.export.formats
    ]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return files[0] if files and not config.lora.rank else None


def _lora_file(export: Path) -> Path | None:
    file = export / lora.FILE if export.is_dir() else export
    return file if file.is_file() else None


def _pipeline(name: str, source: ModelSource) -> Contender:
    return Contender(name, _identity(source), lambda dtype: load_pipeline(source, dtype))


def _exported(name: str, model: Model, source: ModelSource, export: Path) -> Contender:
    file = _lora_file(export)
    if file is None:
        return _pipeline(name, find(exported_model(model, export)))
    identity = _identity(source) | {"adapters": storage.sha256(file)}
    return Contender(name, identity, lambda dtype: aligned_pipeline(model, export, source, dtype))


def _identity(source: ModelSource) -> dict[str, Any]:
    return {
        "unet": base_identity(source),
        "encoders": encoders_identity(source),
        "scheduler": storage.as_json(dict(source.scheduler)),
    }


def check_contenders(config: Config) -> None:
    """Check ``eval.contenders`` as far as that needs no weights.

    Raises ConfigError for a name that is taken, and for a place errors like ``models.locate.find``.
    """
    for word in config.eval.contenders:
        name, place = _named(word)
        if not _is_run(place):
            find(_model(place, config.model), weights=False)
        if name in (BASE, ALIGNED, EXTRACTED):
            raise ConfigError(f"eval.contenders: '{name}' is a name of its own here: give another, as in name=place")


def _given(word: str, base: Model) -> Contender:
    """A contender of ``eval.contenders``; what it does not have itself is taken from the base."""
    name, place = _named(word)
    if _is_run(place):
        of_run = loading.load(Path(place) / "config.toml").model
        return _exported(name, of_run, find(of_run), Path(place) / "export")
    return _pipeline(name, find(_model(place, base)))


def _named(word: str) -> tuple[str, str]:
    """Name and place of a contender."""
    found = _NAMED.fullmatch(word)
    name, place = (found[1].strip(), found[2]) if found else ("", word)
    if place in PUBLISHED:
        name, place = name or place, PUBLISHED[place]
    return name or Path(place).stem, place


def _is_run(place: str) -> bool:
    return (Path(place) / "config.toml").is_file() and (Path(place) / "export").is_dir()


def _model(place: str, base: Model) -> Model:
    """The section [model] of a contender: a pipeline of its own, or the base with another UNet or one LoRA more."""
    if place in (EMBEDDED, EMBEDDED_V):
        return exported_model(base, Path(place))
    if is_lora(place):
        return base.model_copy(update={"lora": [*base.lora, place]})
    if Path(place).is_file():
        whole = set(recognise(Path(place), "eval.contenders").parts) > {"unet"}
    else:
        folder = Path(place)
        if not folder.is_dir() and remote.is_hub_id(place):
            folder = remote.fetch_repository(place, only=["model_index.json"])
        whole = (folder / "model_index.json").is_file()
    if whole:
        return exported_model(base, Path(place)).model_copy(update={"path": place})
    return base.model_copy(update={"unet": place, "lora": []})
