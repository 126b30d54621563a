"""The DeepSpeed file: what is filled in, what is accepted, and what is refused with both places named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toy

from smpo_fast.common.errors import ConfigError
from smpo_fast.engine import combinations, ds_config

CPU = torch.device("cpu")


def resolve(raw: dict[str, Any], size: int = 2, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = toy.settings(**changes)
    precision = combinations.resolve_precision(settings, raw, CPU)
    return ds_config.resolve_ds_settings(raw, "my.json", settings, size, precision)


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "2_offload", "3_offload"])
def test_the_files_in_configs_leave_the_run_to_decide(stage: int | str) -> None:
    raw = ds_config.read_ds_file(toy.CONFIGS / f"ds_zero{stage}.json")
    assert ds_config.zero_stage(raw) == int(str(stage)[0])
    offloaded = {"zero_force_ds_cpu_optimizer": False} if str(stage).endswith("offload") else {}
    settings, filled = resolve(raw)
    assert "auto" not in json.dumps(settings)
    assert filled == {
        "train_batch_size": 10,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": toy.CLIP,
        "bf16.enabled": False,
        "fp16.enabled": False,
        "data_types.grad_accum_dtype": "fp32",
        "zero_allow_untested_optimizer": True,
        **offloaded,
    }
    assert settings["train_batch_size"] == 2 * 3 * 2, "DeepSpeed's own product, with the last micro-batch full"


def test_half_precision_gradients_travel_in_fp32_unless_the_file_says_otherwise() -> None:
    settings, filled = resolve({}, precision="bf16")
    assert settings["communication_data_type"] == filled["communication_data_type"] == "fp32"
    settings, filled = resolve({"communication_data_type": "bf16"}, precision="bf16")
    assert settings["communication_data_type"] == "bf16" and "communication_data_type" not in filled


def test_other_autos_become_deepspeeds_defaults() -> None:
    settings, filled = resolve({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    assert settings["zero_optimization"] == {"stage": 2}
    assert filled["zero_optimization.reduce_bucket_size"] == "DeepSpeed's default"


def test_values_that_agree_are_accepted() -> None:
    raw = {
        "train_batch_size": 10,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": toy.CLIP,
        "bf16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    _, filled = resolve(raw)
    assert set(filled) == {"fp16.enabled", "zero_allow_untested_optimizer"}


@pytest.mark.parametrize(
    "raw, words",
    [
        ({"train_batch_size": 64}, ["train_batch_size = 64", "batch.pairs_per_step = 10"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu = 4", "batch.micro_pairs = 2"]),
        ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps = 8", "ranks = 2", "give 3"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping = 1.0", "optim.clip = 0.05"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled = true", 'model.precision = "fp32"']),
        ({"bfloat16": {"enabled": True}}, ["bf16.enabled = true", 'model.precision = "fp32"']),
        ({"fp16": {"enabled": True}}, ["fp16.enabled = true", 'model.precision = "fp32"']),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype", "summed in fp32"]),
        ({"zero_allow_untested_optimizer": False}, ["zero_allow_untested_optimizer = false", 'optim.name = "adamw"']),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "[optim]"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "[optim]"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast", "bf16-autocast"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op", "averaged"]),
        ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation = false"]),
        ({"zero_optimization": {"compute_grad_norm": False}}, ["zero_optimization.compute_grad_norm = false"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": True},
            ["zero_force_ds_cpu_optimizer = true", 'optim.name = "adamw"'],
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ['device = "nvme"', 'take "cpu"']),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["offload_param.device", 'take "cpu"']),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.3}}}, ["offload_optimizer.ratio = 0.3"]),
        ({"zero_optimization": {"mics_shard_size": 8}}, ["zero_optimization.mics_shard_size = 8", "all ranks"]),
        ({"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow = false"]),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16.bf16_master_weights_and_grads = true"]),
    ],
)
def test_a_contradiction_names_both_places(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(raw)
    for word in ["my.json", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("stage", [4, -1, "2", 2.0, True])
def test_an_unknown_stage_is_refused(stage: Any) -> None:
    with pytest.raises(ConfigError, match="zero_optimization.stage"):
        ds_config.zero_stage({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("text, words", [("{", "not valid JSON"), ("[]", "is an object"), (None, "cannot be read")])
def test_a_file_without_settings_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "my.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        ds_config.read_ds_file(path)
    assert str(path) in str(caught.value)
