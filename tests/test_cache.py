"""The cache: what goes in comes out bit for bit, half a cache never shows, damage and strangers are refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smpo_fast import cache
from smpo_fast.cache import CachedPairs, CacheError, CacheWriter, Entry, Unstorable
from smpo_fast.config import SettingsError

LATENT = (4, 6, 5)
IDENTITY = {
    "source": "s",
    "max_pairs": 0,
    "kind": "sdxl",
    "encoders": "e",
    "resolution": 64,
    "flip": True,
    "scorer": "",
}


def latents(row: int, flips: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of a pair: [2, F, C, H, W], a function of the row."""
    mean = torch.randn(2, flips, *LATENT, generator=torch.Generator().manual_seed(row))
    return mean, mean.abs() * 0.1


def embedding(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    return states, states.mean(0)


def entry(row: int) -> Entry:
    rewards = None if row % 3 == 0 else (row / 7, -row / 3)
    return Entry(row, f"uid {row}", ["", "a", "b\0\u6d77"][row % 3], rewards, [1.0, None, 0.5][row % 3], row % 3 == 1)


def write(root: Path, rows: range = range(10), shard_bytes: int = 4000, flips: int = 2, **changes: Any) -> None:
    """A cache whose every fifth row is rejected; a pair's latents take 1920 bytes with both flips."""
    with CacheWriter(root, {**IDENTITY, **changes}, {"pairs": "x", "files": []}, shard_bytes=shard_bytes) as writer:
        for row in rows:
            if row < writer.next_row:
                continue
            if row % 5 == 4:
                writer.reject(row, f"uid {row}", "bad: very")
            else:
                writer.add(entry(row), *latents(row, flips))
            writer.commit()
        prompts = writer.prompts()
        for i in range(0, len(prompts), 2):
            states, pooled = zip(*map(embedding, prompts[i : i + 2]), strict=True)
            writer.add_prompts(torch.stack(states), torch.stack(pooled))
        writer.finish({"unrewarded": 0})


def digests(root: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(root.iterdir())}


def test_round_trip_is_bitwise_in_float16(tmp_path: Path) -> None:
    write(tmp_path / "c")
    pairs = CachedPairs(tmp_path / "c")
    rows = [r for r in range(10) if r % 5 != 4]
    assert pairs.rows.tolist() == rows
    assert len(list((tmp_path / "c").glob("latents-*"))) == 3
    rng = np.random.default_rng(0)
    index, flips = rng.permutation(len(rows)), rng.random((len(rows), 2)) < 0.5
    mean, std = pairs.moments(index, flips)
    assert mean.dtype == torch.float32
    assert mean.shape == (8, 2, *LATENT)
    for i, at in enumerate(index):
        wanted = latents(rows[at])
        for picture in range(2):
            flip = int(flips[i, picture])
            assert torch.equal(mean[i, picture], wanted[0][picture, flip].half().float())
            assert torch.equal(std[i, picture], wanted[1][picture, flip].half().float())


def test_index_rewards_labels_and_prompts(tmp_path: Path) -> None:
    write(tmp_path / "c")
    pairs = CachedPairs(tmp_path / "c")
    entries = [entry(row) for row in pairs.rows]
    assert pairs.uids.tolist() == [e.uid for e in entries]
    np.testing.assert_array_equal(pairs.rewards, [e.rewards or (np.nan, np.nan) for e in entries])
    np.testing.assert_array_equal(pairs.labels, [np.nan if e.label is None else e.label for e in entries])
    assert pairs.texts.tolist() == ["", "a", "b\0\u6d77"]
    assert [pairs.texts[i] for i in pairs.prompt_index] == [e.prompt for e in entries]
    embeds, pooled = pairs.prompts([2, 0, 2, 1])
    for i, text in enumerate(["b\0\u6d77", "", "b\0\u6d77", "a"]):
        assert torch.equal(embeds[i], embedding(text)[0].half().float())
        assert torch.equal(pooled[i], embedding(text)[1].half().float())
    assert pairs.rejections() == [(4, "uid 4", "bad: very"), (9, "uid 9", "bad: very")]
    info = pairs.info
    assert (info.latent, info.flips, info.prompt, info.pooled) == (LATENT, 2, (3, 8), 8)
    assert info.counts == {"pairs": 8, "rejected": 2, "prompts": 3, "unrewarded": 0}
    assert info.rewards == (-8 / 3, 8 / 7)
    assert info.bytes == sum(f.stat().st_size for f in (tmp_path / "c").iterdir() if f.name != "cache.json")
    assert pairs.verify() == []


def test_without_flips_and_without_pooled(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c", IDENTITY, {}) as writer:
        writer.add(entry(0), *latents(0, flips=1))
        writer.add_prompts(embedding("")[0][None], None)
        writer.finish({"unrewarded": 1})
    pairs = CachedPairs(tmp_path / "c")
    assert pairs.prompts([0])[1] is None
    assert torch.equal(pairs.moments([0], np.zeros((1, 2), bool))[0], latents(0, 1)[0][None, :, 0].half().float())
    with pytest.raises(ValueError, match="no mirrored pictures"):
        pairs.moments([0], np.array([[False, True]]))


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (1e5, "beyond float16")]
)
def test_numbers_float16_cannot_hold_are_named_and_leave_no_trace(tmp_path: Path, value: float, message: str) -> None:
    with CacheWriter(tmp_path / "c", IDENTITY, {}) as writer:
        mean, std = latents(7)
        std[1, 0, 2, 3, 4] = value
        with pytest.raises(Unstorable, match=f"row 7: latent std is .*{message}"):
            writer.add(entry(7), mean, std)
        assert writer.entries == []


def test_an_interruption_anywhere_leaves_no_half_cache_and_the_next_run_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "whole")
    whole, sync = digests(tmp_path / "whole"), cache._sync
    taken_up = []
    for stop in range(100):
        calls = 0

        def interrupt(path: Path, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls > stop:
                raise KeyboardInterrupt
            sync(path)

        root = tmp_path / f"c{stop}"
        monkeypatch.setattr(cache, "_sync", interrupt)
        try:
            write(root)
            break
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(cache, "_sync", sync)
        if not cache.exists(root):  # the last sync comes after the renaming
            assert not root.exists()
            with CacheWriter(root, IDENTITY, {}) as writer:
                taken_up.append(writer.next_row)
            write(root)
        assert digests(root) == whole
        assert [f.name for f in tmp_path.iterdir() if f.name.startswith(f".c{stop}.")] == []
    assert calls == stop > 8
    assert sorted(set(taken_up)) == [0, 3, 7, 9]  # rows after the first, second and last shard


def test_a_leftover_of_another_cache_is_not_taken_up(tmp_path: Path) -> None:
    def interrupted(**changes: Any) -> int:
        with CacheWriter(tmp_path / "c", {**IDENTITY, **changes}, {}, shard_bytes=1) as writer:
            found = writer.next_row
            if not found:
                writer.add(entry(0), *latents(0))
                writer.commit()
        return found

    assert interrupted() == 0
    assert interrupted() == 1
    assert interrupted(resolution=128) == 0
    assert interrupted(resolution=128) == 1
    shard = tmp_path / ".c.partial" / "latents-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert interrupted(resolution=128) == 0


def test_two_writers_and_occupied_targets_are_refused(tmp_path: Path) -> None:
    with (
        CacheWriter(tmp_path / "c", IDENTITY, {}),
        pytest.raises(SettingsError, match="another process is preparing"),
        CacheWriter(tmp_path / "c", IDENTITY, {}),
    ):
        pass
    (tmp_path / "d").mkdir()
    write(tmp_path / "d")  # an empty folder may be there
    with pytest.raises(SettingsError, match="exists already"):
        CacheWriter(tmp_path / "d", IDENTITY, {})


def test_a_cache_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "c")
    pairs = CachedPairs(tmp_path / "c")
    pairs.expect(IDENTITY)
    pairs.expect({**IDENTITY, "flip": False})  # both flips are there
    pairs.expect({**IDENTITY, "scorer": "pickscore"})  # all rewards were stored
    pairs.expect({"resolution": 64})
    with pytest.raises(CacheError) as caught:
        pairs.expect({**IDENTITY, "encoders": "f", "resolution": 128})
    message = str(caught.value)
    assert "encoders (model.path or model.vae): found 'e', wanted 'f'" in message
    assert "resolution (data.resolution): found 64, wanted 128" in message
    assert "data.pairs" not in message
    assert "remove this one" in message


def test_flips_that_are_not_there_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", flips=1, flip=False)
    with pytest.raises(CacheError, match=r"flip \(data.flip\): found False, wanted True"):
        CachedPairs(tmp_path / "c").expect(IDENTITY)


@pytest.mark.parametrize(
    "name", ["latents-00001.safetensors", "prompts-00000.safetensors", "pairs.parquet", "rejected.parquet"]
)
def test_missing_and_truncated_files_are_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "c")
    file = tmp_path / "c" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheError, match=f"{name}: has .* bytes instead of {len(whole)}.*prepare"):
        CachedPairs(tmp_path / "c")
    file.unlink()
    with pytest.raises(CacheError, match=f"{name}: is missing"):
        CachedPairs(tmp_path / "c")


def test_changed_content_is_found_by_verify(tmp_path: Path) -> None:
    write(tmp_path / "c")
    file = tmp_path / "c" / "latents-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    problems = CachedPairs(tmp_path / "c").verify()
    assert len(problems) == 1
    assert "latents-00001.safetensors: its content has changed" in problems[0]


def test_a_broken_shard_header_and_index_are_clear_errors(tmp_path: Path) -> None:
    write(tmp_path / "c")
    for name in ("latents-00000.safetensors", "pairs.parquet"):
        file = tmp_path / "c" / name
        whole = file.read_bytes()
        file.write_bytes(b"\xff" * len(whole))
        with pytest.raises(CacheError, match=f"{name}: cannot be read"):
            CachedPairs(tmp_path / "c").moments([0], np.zeros((1, 2), bool))
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        ('{"format": 99}', "format 99"),
    ],
)
def test_a_broken_or_newer_description_is_a_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(CacheError, match=message):
        CachedPairs(tmp_path)


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    write(tmp_path / "c")
    (tmp_path / "other").touch()
    assert {f.stat().st_mode for f in (tmp_path / "c").iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_no_cache_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no prepared cache here.*smpo prepare"):
        CachedPairs(tmp_path)


def test_the_description_is_json_that_people_can_read(tmp_path: Path) -> None:
    write(tmp_path / "c")
    values = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert values["format"] == 1
    assert values["identity"] == IDENTITY
    assert set(values["files"]) == {f.name for f in (tmp_path / "c").iterdir()} - {"cache.json"}
