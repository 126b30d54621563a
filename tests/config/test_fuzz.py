"""Settings and DeepSpeed files of any content: accepted, or refused with a UserError, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.any_settings import DS_FILES, SECTIONS, TOML, WORDS, fuzz, load_text, load_values, load_words, resolve
from hypothesis import given

from smpo_fast.common.errors import UserError
from smpo_fast.config import loading
from smpo_fast.engine import ds_config


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_settings(count: int, tmp_path: Path) -> None:
    fuzz(count)(given(WORDS)(load_words))()
    fuzz(count)(given(SECTIONS)(load_values))()
    fuzz(count)(given(TOML)(lambda text: load_text(text, tmp_path)))()


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_deepspeed_file(count: int, tmp_path: Path) -> None:
    fuzz(count)(given(DS_FILES)(lambda values: resolve(values, tmp_path)))()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[run]\ndir = "\xff"\n', "UTF-8"),
        (b"[run]\nsteps = " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"[run]\nsteps = " + b"1" * 5000, "4300 digits"),
        (b"[objective]\nname = ['smpo']\n", "objective.name"),
        (b"[inversion]\nsolver = {}\n", "inversion.solver"),
    ],
)
def test_toml_that_python_cannot_read(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "any.toml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        loading.load(tmp_path / "any.toml")


@pytest.mark.parametrize("text", ['{"bf16": 1}', '{"zero_optimization": []}', '{"data_types": "fp32"}', "[" * 99999])
def test_deepspeed_files_whose_sections_are_no_objects(text: str, tmp_path: Path) -> None:
    (tmp_path / "any.json").write_text(text)
    with pytest.raises(UserError, match="section|nested"):
        ds_config.read_ds_file(tmp_path / "any.json")
