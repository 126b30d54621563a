"""Hashes of networks on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from helpers.pipelines import settings

from smpo_fast import embedded
from smpo_fast.models.identity import encoders_identity
from smpo_fast.models.locate import find


def test_identity_follows_the_encoders_content(tmp_path: Path) -> None:
    shutil.copytree(embedded.pipeline_path(), tmp_path / "a")
    before = encoders_identity(find(settings(tmp_path / "a")))
    assert before == encoders_identity(find(settings("embedded"))), "the place does not matter"
    weights = next((tmp_path / "a" / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert encoders_identity(find(settings(tmp_path / "a"))) != before
