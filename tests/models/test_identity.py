"""Hashes of networks on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.pipelines import settings

from smpo_fast import embedded
from smpo_fast.models.identity import encoders_identity, weights_identity
from smpo_fast.models.locate import find


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_identity_follows_the_encoders_content(part: str, tmp_path: Path) -> None:
    shutil.copytree(embedded.pipeline_path(), tmp_path / "a")
    before = encoders_identity(find(settings(tmp_path / "a")))
    assert before == encoders_identity(find(settings("embedded"))), "the place does not matter"
    file = next((tmp_path / "a" / part).glob("merges.txt" if part.startswith("tokenizer") else "*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert encoders_identity(find(settings(tmp_path / "a"))) != before


@pytest.mark.parametrize("place", [0, -1])
def test_weights_are_known_by_both_ends_and_their_configuration(place: int, tmp_path: Path) -> None:
    """Only a MiB of each end is read, so the file is larger than both."""
    content = bytearray(3 << 20)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.safetensors").write_bytes(content)
    before = weights_identity(tmp_path)
    content[place] = 1
    (tmp_path / "weights.safetensors").write_bytes(content)
    changed = weights_identity(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert len({before, changed, weights_identity(tmp_path)}) == 3
