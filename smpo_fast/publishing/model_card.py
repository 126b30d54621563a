"""The model card of a run: README.md with the hub's header, composed from what the run recorded about itself."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from smpo_fast.common.remote import is_hub_id
from smpo_fast.common.runtime import print0, warn0
from smpo_fast.common.storage import write_text
from smpo_fast.config.loading import toml_value
from smpo_fast.config.schema import EMBEDDED, Config
from smpo_fast.evaluation.contenders import ALIGNED
from smpo_fast.models.base_facts import CARD, shared_name
from smpo_fast.models.pipeline_folder import LORA_FILE
from smpo_fast.publishing.facts import RunFacts, read_facts
from smpo_fast.publishing.files import CURVES, GRID, repository_files

_METHODS = {
    "smpo": "SmPO-Diffusion (arXiv 2506.02698)",
    "dpo": "Diffusion-DPO (arXiv 2311.12908)",
    "inpo": "InPO (arXiv 2503.18454)",
    "sft": "supervised fine-tuning on the preferred images",
}
_FAMILIES = {"sdxl": "SDXL", "sd15": "Stable Diffusion 1.5"}
_PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}
_LOCAL_SECTIONS = {"run", "log", "export"}  # of no use to a reader of the card
_MARK = re.compile(r"\n<!-- written by smpo-fast; it is kept if you edit it. ([0-9a-f]{64}) -->\n\Z")


def write_card(run_dir: Path, repository: str = "", license: str = "") -> Path:
    """Write README.md into the folder of a finished run, unless it has one that was edited; returns its path.

    repository: the hub id that the examples load; empty: the run's own folder. license: the hub's name of the license,
    in place of the base's. Raises DataError for a folder that is not that of a finished run with an export.
    """
    card = run_dir / CARD
    if card.is_file() and not _is_ours(card.read_text()):
        print0(f"{card} was edited, and is kept")
        return card
    text = compose(read_facts(run_dir), repository or str(run_dir / "export"), license)
    write_text(card, f"{text}\n<!-- written by smpo-fast; it is kept if you edit it. {_hash(text)} -->\n")
    return card


def compose(facts: RunFacts, where: str, license: str = "") -> str:
    """The text of the card. where: a hub id or folder that the examples load; license: in place of the base's."""
    files = repository_files(facts.folder)
    sections = [
        f"---\n{_header(facts, license)}---\n",
        f"# {facts.title}\n",
        *_summary(facts, files),
        *_use(facts, where, files),
        *_evaluation(facts),
        *_training(facts, files),
        *_data(facts),
        *_license(facts, license),
    ]
    return "\n".join(sections)


def _is_ours(text: str) -> bool:
    found = _MARK.search(text)
    return found is not None and found[1] == _hash(text[: found.start()])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _header(facts: RunFacts, license: str) -> str:
    base = facts.environment.get("base", {})
    ids = [name for name in base.get("names", []) if is_hub_id(name)]
    named = {"license": license} if license else base.get("license", {})
    pairs = facts.config.data.pairs
    header = ModelCardData(
        base_model=ids or None,
        base_model_relation=("adapter" if facts.adapters else "finetune") if ids else None,
        datasets=[pairs] if is_hub_id(pairs) and not Path(pairs).exists() else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[
            base.get("kind", "stable-diffusion"),
            "preference-alignment",
            facts.config.objective.name,
            *(["lora"] if facts.adapters else []),
            "smpo-fast",
        ],
        **named,
    )
    return f"{header.to_yaml()}\n"


def _summary(facts: RunFacts, files: Mapping[str, Path]) -> Iterator[str]:
    base = facts.environment.get("base", {})
    family = _FAMILIES.get(base.get("kind", ""), "Stable Diffusion")
    start = " with ".join(f"`{name}`" for name in base.get("names", [])) or "its base"
    what = "LoRA adapters for" if facts.adapters else "A UNet of"
    yield f"{what} {family}, aligned with human preferences by {_METHODS[facts.config.objective.name]}, from {start}."
    yield "It was trained with smpo-fast.\n"
    if GRID in files:
        yield f"![The same prompts and noise with the base and with this model]({GRID})\n"


def _use(facts: RunFacts, where: str, files: Mapping[str, Path]) -> Iterator[str]:
    base = facts.environment.get("base", {})
    pipeline = _PIPELINES.get(base.get("kind", ""), "DiffusionPipeline")
    yield "## How to use it\n\nWith diffusers:\n\n```python\nimport torch"
    yield f"from diffusers import {pipeline}\n"
    if facts.adapters:
        start = next((name for name in base.get("names", []) if is_hub_id(name)), "the base model")
        yield f'pipe = {pipeline}.from_pretrained("{start}", torch_dtype=torch.float16).to("cuda")'
        yield f'pipe.load_lora_weights("{where}")'
    else:
        yield f'pipe = {pipeline}.from_pretrained("{where}", torch_dtype=torch.float16).to("cuda")'
    guidance = facts.evaluation.get("eval", {}).get("guidance", 5.0)
    yield f'image = pipe("a photograph of an owl", guidance_scale={guidance:g}).images[0]\n```\n'
    loose = [name for name in files if name.endswith(".safetensors") and "/" not in name and name != LORA_FILE]
    for name in loose:
        folder = "loras" if files[name].parent.name == "lora-kohya" else "checkpoints"
        yield f"In ComfyUI: put `{name}` into `models/{folder}`; in A1111 and Forge into "
        yield f"`models/{'Lora' if folder == 'loras' else 'Stable-diffusion'}`.\n"
    if base.get("prediction") == "v_prediction":
        zero = " with zero terminal SNR (`rescale_betas_zero_snr`)" if base.get("zero_terminal_snr") else ""
        yield f"The network predicts v{zero}; the scheduler that comes with it is set accordingly.\n"


def _evaluation(facts: RunFacts) -> Iterator[str]:
    rows = facts.evaluation.get("comparisons", [])
    if not rows:
        return
    if "protocol" not in facts.evaluation:
        warn0(f"{facts.folder}/evaluation is of an earlier version: smpo evaluate makes one that the card can show")
        return
    yield "## Evaluation\n"
    yield "| model | score | base | model | gain (95 % interval) | same-noise win-rate (95 % interval) | p |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        name = "this" if row["model"] == ALIGNED else row["model"]
        yield (
            f"| {name} | {row['name']} | {row['base']:.4g} | {row['aligned']:.4g} | {row['gain']:+.3g} "
            f"({row['gain_low']:+.3g} to {row['gain_high']:+.3g}) | {row['win_rate']:.1%} ({row['win_low']:.1%} to "
            f"{row['win_high']:.1%}) | {row['p_corrected']:.2g} |"
        )
    said = facts.evaluation["protocol"]
    yield (
        f"\n{said[0].upper()}{said[1:]}. Base and model start from the same noise. The intervals are percentiles of a "
        "bootstrap over prompts; a tie counts half a win; p is of a paired permutation test of the gain, corrected for "
        f"{len(rows)} comparisons (Holm).\n"
    )


def _training(facts: RunFacts, files: Mapping[str, Path]) -> Iterator[str]:
    c, said = facts.config, facts.environment
    weights = f"LoRA of rank {c.lora.rank}" if facts.adapters else "all weights of the UNet"
    yield "## Training\n"
    yield f"- {_METHODS[c.objective.name]}, beta {c.objective.beta:g}, {weights}"
    yield f"- {len(facts.rows)} steps of {c.batch.pairs_per_step} pairs at {c.data.resolution} px, seed {c.run.seed}"
    yield f"- {c.optim.name}, learning rate {c.optim.lr:g}, {said.get('precision', '')}"
    if c.exported[0] == "ema":
        yield f"- the weights are an exponential moving average of those of the steps, decay {c.optim.ema:g}"
    if facts.rows:
        hours = sum(row["seconds"] for row in facts.rows) / 3600
        yield f"- {said.get('ranks', 1)} x {said.get('device', 'unknown device')}, {hours:.2g} hours of training steps"
    versions = said.get("versions", {})
    yield f"- {', '.join(f'{name} {version}' for name, version in versions.items())}\n"
    if CURVES in files:
        yield f"![Loss, accuracy and gradient norm over the steps]({CURVES})\n"
    changed = "\n".join(_changed_settings(c))
    yield f"<details><summary>Settings that differ from the defaults</summary>\n\n```toml\n{changed}\n```\n</details>\n"


def _changed_settings(config: Config) -> Iterator[str]:
    """The settings that a reader needs to repeat the run, as TOML; paths of this machine by their last part."""
    defaults = Config().model_dump()
    for section, values in config.model_dump().items():
        other = {k: v for k, v in values.items() if v != defaults[section][k] and section not in _LOCAL_SECTIONS}
        if other:
            yield f"[{section}]"
            yield from (f"{key} = {toml_value(_without_place(value))}" for key, value in other.items())


def _without_place(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_without_place(item) for item in value]
    is_path = isinstance(value, str) and (Path(value).is_absolute() or "://" in value or Path(value).exists())
    return shared_name(value) if is_path else value


def _data(facts: RunFacts) -> Iterator[str]:
    labels = facts.environment.get("labels")
    if not labels:
        return
    pairs = facts.config.data.pairs
    name = "the miniature's own pairs" if pairs == EMBEDDED else f"`{shared_name(pairs)}`"
    yield "## Data\n"
    yield (
        f"{labels['used']} of the {labels['pairs']} preference pairs of {name}: {labels['by_reward']} with a "
        f"preference by reward, {labels['by_human']} by human label; left out were {labels['ties_dropped']} ties and "
        f"{labels['without_preference']} without a preference."
    )
    if labels["by_reward"] and labels["low"] is not None:
        yield f"Rewards between {labels['low']:.4g} and {labels['high']:.4g} became preferences between 0 and 1."
    if labels["compared"]:
        yield f"Rewards and human labels agree in {labels['agreement']:.1%} of {labels['compared']} pairs."
    low, middle, high = labels["weight_quantiles"]
    yield (
        f"The weight of a pair in the loss is {labels['weight_mean']:.3g} on average (5 % {low:.3g}, median "
        f"{middle:.3g}, 95 % {high:.3g}).\n"
    )


def _license(facts: RunFacts, license: str) -> Iterator[str]:
    known = facts.environment.get("base", {}).get("license", {})
    name = license or known.get("license_name") or known.get("license")
    yield "## License\n"
    if license:
        yield f"{license}.\n"
    elif name:
        yield f"{name}, passed on from the base.\n"
    else:
        yield "That of the base, whose name is not recorded with its files.\n"
