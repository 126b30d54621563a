"""Settings and DeepSpeed files of any content, and functions that accept each or refuse it with a UserError."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import World
from smpo_fast.config import arguments, loading
from smpo_fast.engine import combinations, ds_config

NAMES = [name for name, _ in loading.keys()]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 0, -1, 10**18])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "embedded", "smpo", "none", "cpu", "nan", "inf", "[", '"', "\n", "\x1b[2J", "1" * 5000])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
TEXTS = VALUES.map(str) | st.text(max_size=20)
DS_KEYS = [
    "bf16", "bf16.enabled", "bfloat16", "fp16", "fp16.enabled", "data_types", "data_types.grad_accum_dtype",
    "zero_optimization", "zero_optimization.stage", "zero_optimization.offload_optimizer",
    "zero_optimization.offload_optimizer.device", "zero_optimization.offload_optimizer.ratio",
    "zero_optimization.offload_param", "zero_optimization.offload_param.device", "zero_optimization.zenflow",
    "zero_optimization.reduce_bucket_size", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler", "amp", "torch_autocast",
    "communication_data_type", "zero_allow_untested_optimizer",
]  # fmt: skip
DS_VALUES = VALUES | st.sampled_from(
    [{}, [], {"enabled": True}, {"device": "cpu"}, {"device": "nvme"}, 1, 2, 3, "auto"]
)


def fuzz(count: int) -> Any:
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


def load_words(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    arguments.add_settings(parser)
    try:
        loaded = arguments.settings_of(argparse.Namespace(**vars(parser.parse_args([])) | {"overrides": words}))
    except UserError:
        return
    assert loading.from_dict(loaded.model_dump()) == loaded


def load_values(values: dict[str, dict[str, Any]]) -> None:
    try:
        loading.from_dict(values)
    except UserError:
        pass


def load_text(text: bytes, folder: Path) -> None:
    (folder / "any.toml").write_bytes(text)
    try:
        loading.load(folder / "any.toml")
    except UserError:
        pass


def resolve(values: Any, folder: Path) -> None:
    (folder / "any.json").write_text(json.dumps(values))
    config, world = loading.from_dict({"batch": {"pairs_per_step": 8}}), World(size=2)
    try:
        raw = ds_config.read_ds_file(folder / "any.json")
        precision = combinations.resolve_precision(config, raw, torch.device("cpu"))
        resolved, _ = ds_config.resolve_ds_settings(raw, "any.json", config, world.size, precision)
        combinations.check_combination(config, precision, world, resolved)
    except UserError:
        pass


def ds_file(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dotted, value in pairs:
        place = found
        *parents, last = dotted.split(".")
        for parent in parents:
            place[parent] = place[parent] if isinstance(place.get(parent), dict) else {}
            place = place[parent]
        place[last] = copy.deepcopy(value)
    return found


WORDS = st.lists(st.tuples(st.sampled_from(NAMES) | st.text(max_size=8), TEXTS).map("=".join), max_size=4)
SECTIONS = st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=4).map(ds_file)
TOML = st.binary(max_size=60) | st.tuples(st.sampled_from(NAMES), TEXTS).map(
    lambda pair: f"[{pair[0].partition('.')[0]}]\n{pair[0].partition('.')[2]} = {pair[1]}\n".encode(errors="replace")
)
DS_FILES = VALUES | st.lists(st.tuples(st.sampled_from(DS_KEYS), DS_VALUES), max_size=4).map(ds_file)
