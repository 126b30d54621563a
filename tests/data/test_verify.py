"""``smpo verify``: a damaged cache, and one that does not fit the settings, are explained."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.encoders import png

from smpo_fast.cli import main
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.training.loader import Loader


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a prepared cache of the first 40 embedded pairs."""
    words = [f"run.dir={tmp_path_factory.mktemp('run')}", "data.max_pairs=40", "model.attention=sdpa"]
    assert main(["prepare", *words]) == 0
    return words


def cache_of(words: list[str]) -> Path:
    return Path(words[0].partition("=")[2]) / "cache"


def test_a_good_cache_verifies_with_and_without_settings(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(cache_of(words))]) == 0
    assert main(["verify", str(cache_of(words)), *words]) == 0
    assert "40 pairs, each where the index says, every number finite" in capsys.readouterr().out


def test_buckets_go_through_real_networks(tmp_path: Path) -> None:
    sizes = [(32, 32), (64, 32), (32, 80), (40, 30)]
    table = pa.table(
        {
            "caption": [f"a {i % 3}" for i in range(24)],
            **{f"jpg_{k}": [png(i + 50 * k, sizes[i % 4]) for i in range(24)] for k in range(2)},
            "label_0": [1.0] * 24,
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    words = [f"run.dir={tmp_path}", f"data.pairs={tmp_path / 't.parquet'}", "data.buckets=true", "data.flip=true"]
    assert main(["prepare", *words]) == 0
    assert main(["verify", str(tmp_path / "cache"), *words]) == 0
    cached = CachedPairs(tmp_path / "cache")
    assert cached.info.factor == 4
    assert cached.pixels.tolist() == [[24, 40], [32, 32], [48, 16]]
    words += ["data.conditioning=original", "batch.pairs_per_step=8"]
    loader = Loader(cached, loading.load(None, words), World())
    for step in range(6):
        for pairs in loader.step_batch(step):
            height, width = (int(side) for side in pairs.cond.time_ids[0, 0, 4:])
            assert pairs.latents.shape[2:] == (4, height // 4, width // 4)
            assert torch.isfinite(pairs.latents).all()


def test_settings_that_it_does_not_serve_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(cache_of(words)), *words, "data.resolution=64", "data.buckets=true"]) == 1
    said = capsys.readouterr().out
    assert "resolution (data.resolution): found 32, wanted 64" in said
    assert "buckets (data.buckets): found False, wanted True" in said
    assert "max_pairs" not in said


def test_damage_is_named_with_what_to_do(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    file = cache_of(words) / "latents-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["verify", str(cache_of(words))]) == 1
    said = capsys.readouterr().out
    assert f"{file}: its content has changed since it was written (sha256 differs): put back a good copy" in said
    assert "; it holds 40 pairs" in said
    file.write_bytes(whole[:9])
    assert main(["verify", str(cache_of(words))]) == 1
    assert f"{file}: has 9 bytes instead of" in capsys.readouterr().out
    file.write_bytes(whole)
