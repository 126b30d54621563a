"""LoRA: a frozen base with trained low-rank adapters, peft's layers; `lora_files` writes them for other programs.

The reference is the same network with its adapters disabled. That is exact only while the adapters start as zero and
the base never changes; so every initialisation offered has B = 0, and there is no dropout, which would make policy and
reference differ before the first step.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smpo_fast.common.errors import ConfigError, EnvironmentProblem, ModelError
from smpo_fast.common.runtime import rng
from smpo_fast.config.schema import Config, Lora, Model
from smpo_fast.models.export import export_pipeline, to_export_dtype
from smpo_fast.models.load import empty_unet, load_unet
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.pipeline_folder import LORA_FILE as FILE
from smpo_fast.models.pipeline_folder import LORA_SETTINGS

PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "ff": ("ff.net.0.proj", "ff.net.2"),
}
_PEFT_INITS = {"gaussian": "gaussian", "kaiming": True}  # lora.init -> init_lora_weights


def check(config: Config, source: ModelSource) -> None:
    """Check the settings of ``[lora]`` before anything is loaded.

    Raises ConfigError for targets that match no layer and for ``lora.merge`` without adapters, and EnvironmentProblem
    when peft is missing.
    """
    lora = config.lora
    if not lora.rank:
        if lora.merge:
            raise ConfigError("lora.merge = true, but without adapters there is nothing to merge: set lora.rank")
        return
    if importlib.util.find_spec("peft") is None:
        raise EnvironmentProblem(f"lora.rank = {lora.rank} needs peft, which is not installed: pip install peft")
    target_modules(empty_unet(source), lora.targets)


def target_modules(unet: nn.Module, targets: Sequence[str]) -> list[str]:
    """The module names, or their ends, that peft adapts.

    Raises ConfigError for an empty list and for a target that ends the name of no layer.
    """
    layers = {name: m for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    if not targets:
        raise ConfigError("lora.targets is empty: give 'attention', 'ff', 'all-linear', or ends of module names")
    found: list[str] = []
    for word in targets:
        if word == "all-linear":
            found += [name for name, m in layers.items() if isinstance(m, nn.Linear)]
            continue
        for end in PRESETS.get(word, (word,)):
            if not any(name == end or name.endswith(f".{end}") for name in layers):
                raise ConfigError(
                    f"lora.targets: '{word}' ends the name of no linear or convolution layer of the UNet; give "
                    "'attention', 'ff', 'all-linear', or ends of module names such as 'attn2.to_k'"
                )
            found.append(end)
    return found


def add_adapters(unet: Any, lora: Lora, seed: int) -> None:
    """Freeze a UNet and add adapters in float32, the same for a seed on every rank and device.

    Call this when the UNet is on the device that it computes on: DoRA measures the weights' magnitudes here, and must
    find the same values in every later forward pass.
    """
    from peft import LoraConfig

    unet.requires_grad_(False)
    wanted = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,  # type: ignore[arg-type]
        target_modules=target_modules(unet, lora.targets),
        init_lora_weights=_PEFT_INITS[lora.init],  # type: ignore[arg-type]
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the host
        torch.default_generator.manual_seed(int(rng(seed, "lora").integers(2**62)))
        unet.add_adapter(wanted)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def adapters_off(unet: Any) -> Iterator[None]:
    """Inside, the UNet computes as the base alone; for no-gradient calls."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


@dataclass(frozen=True)
class Adapters:
    """Adapters without their network.

    tensors: by peft's names, such as ``mid_block.attentions.0.proj_in.lora_A.weight`` [rank, inputs]; settings: those
    of peft's LoraConfig, as JSON values.
    """

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    def alpha(self, layer: str) -> float:
        """peft's alpha of a layer."""
        return float(self.settings["alpha_pattern"].get(layer, self.settings["lora_alpha"]))


def trained_adapters(config: Config, source: ModelSource, state: Mapping[str, Tensor]) -> Adapters:
    """The adapters of a trained network in ``model.export_dtype``.

    state: the network's weights by name, of any shapes; only the adapters are used. Raises ModelError for weights that
    are not finite or do not fit the dtype.
    """
    from peft.utils import get_peft_model_state_dict

    unet: Any = empty_unet(source)  # peft takes names and settings from a network
    add_adapters(unet, config.lora, config.run.seed)
    adapters = {name: t for name, t in state.items() if ".lora_" in name}
    weights = to_export_dtype(get_peft_model_state_dict(unet, state_dict=adapters), config.model.export_dtype)
    return Adapters({name: t.contiguous() for name, t in weights.items()}, _as_json(unet.peft_config["default"]))


def scale_1_adapters(tensors: Mapping[str, Tensor], ranks: Mapping[str, int]) -> Adapters:
    """Adapters of a rank of its own for each layer, with alpha = rank.

    tensors: by peft's names, in shapes as peft gives them; ranks: by layer, of at least one.
    """
    from peft import LoraConfig

    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {layer: rank for layer, rank in ranks.items() if rank != usual}
    wanted = LoraConfig(
        r=usual, lora_alpha=usual, target_modules=list(ranks), rank_pattern=others, alpha_pattern=dict(others)
    )
    return Adapters(tensors, _as_json(wanted))


def _as_json(settings: Any) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.to_dict().items()}


def read_adapters(folder: Path) -> Adapters:
    """The adapters that a run has exported. Raises ModelError for a folder without any, and for a damaged file."""
    file = folder / FILE
    if not file.is_file():
        raise ModelError(f"{folder} has no {FILE}: train with lora.rank first")
    try:
        with safe_open(file, framework="pt") as opened:
            said = dict(json.loads((opened.metadata() or {}).get(LORA_SETTINGS, "{}")))
            tensors = {name.removeprefix("unet."): opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file} cannot be read ({error}): put back a good copy, or finish the run again") from error
    return Adapters(tensors, {str(name).removeprefix("unet."): value for name, value in said.items()})


def merged_state(source: ModelSource, model: Model, adapters: Adapters) -> dict[str, Tensor]:
    """The weights of a UNet by name with adapters added to them, in float32."""
    unet: Any = load_unet(source, model, torch.float32, torch.device("cpu"))
    tensors, settings = ({f"unet.{name}": x for name, x in found.items()} for found in vars(adapters).values())
    unet.load_lora_adapter(tensors, prefix="unet", metadata=settings or None)
    unet.fuse_lora()
    unet.unload_lora()
    return dict(unet.state_dict())


def merge(config: Config, source: ModelSource, adapters: Path, folder: Path) -> None:
    """Write the pipeline whose UNet has the adapters of the folder ``adapters`` added to its weights, in float32.

    Raises ModelError for a folder without adapters.
    """
    state = merged_state(source, config.model, read_adapters(adapters))
    export_pipeline(source, state, folder, config.model.export_dtype)
