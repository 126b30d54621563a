"""What a model card says of the base: names, kind, and the license that passes on to what is trained from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from smpo_fast.common.remote import is_hub_id
from smpo_fast.common.runtime import warn0
from smpo_fast.config.schema import EMBEDDED, EMBEDDED_V, Model
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.public_pipelines import HUB_IDS

CARD = "README.md"
LICENSE_KEYS = ("license", "license_name", "license_link")
# Of bases whose card is not beside their weights.
_KNOWN = {
    HUB_IDS["sdxl"]: "openrail++",
    HUB_IDS["sd15"]: "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    EMBEDDED: "apache-2.0",
    EMBEDDED_V: "apache-2.0",
}


def base_facts(model: Model, source: ModelSource) -> dict[str, Any]:
    """Facts of the base, as JSON values: 'kind', 'prediction', 'zero_terminal_snr', 'names' and 'license'.

    names: hub ids, or the names of local files and folders, of the UNet (if it is another's), the pipeline and the
    LoRAs that policy and reference start from. license: keys of a hub card's header; empty where none is known.
    """
    places = [place for place in (model.unet, model.path) if place]
    return {
        "kind": source.kind,
        "prediction": source.prediction_type,
        "zero_terminal_snr": bool(source.scheduler.get("rescale_betas_zero_snr")),
        "names": [*map(shared_name, places), *(lora.file.name for lora in source.loras)],
        "license": _license(places, source),
    }


def shared_name(place: str) -> str:
    """A hub id as it is; of a path on this machine or a URL the last part, since others cannot use the rest."""
    return place if is_hub_id(place) and not Path(place).exists() else Path(place).name


def _license(places: list[str], source: ModelSource) -> dict[str, str]:
    """The license that the base's file, a card beside its weights, or its known name gives; the UNet's own first."""
    for folder in (source.unet_folder, source.unet_folder.parent, source.folder):
        if (folder / CARD).is_file() and (found := _of_card(folder / CARD)):
            return found
    if source.file and (name := source.file.header.metadata.get("modelspec.license")):
        return {"license": "other", "license_name": name}
    known = next((_KNOWN[place] for place in places if place in _KNOWN), "")
    return {"license": known} if known else {}


def _of_card(card: Path) -> dict[str, str]:
    try:
        header = ModelCard(card.read_text(), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        warn0(f"{card}: its header cannot be read ({error}), so the model card will not have its license")
        return {}
    return {key: str(header[key]) for key in LICENSE_KEYS if header.get(key)}
