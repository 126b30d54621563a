"""The cache: what goes in comes out bit for bit, half a cache never shows, damage and strangers are refused."""

import errno
import hashlib
import json
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.artifacts import problems, reseal
from safetensors.numpy import load_file

from smpo_fast.common import shared_work, storage
from smpo_fast.common.errors import EnvironmentProblem, UserError
from smpo_fast.common.shared_work import AlreadyFinished
from smpo_fast.data.cache import index, integrity, location
from smpo_fast.data.cache.format import LATENTS_PART, PROMPTS_PART, CacheError, Entry, Unstorable
from smpo_fast.data.cache.identity import check_identity
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.cache.writer import CacheWriter

LATENT = (4, 6, 5)
PIXELS = (48, 40)
IDENTITY = {
    "source": "s",
    "max_pairs": 0,
    "kind": "sdxl",
    "encoders": "e",
    "resolution": 64,
    "buckets": False,
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
    label, frames = [1.0, None, 0.5][row % 3], ((row, 40, 1, 2, 3), (50, row, 4, 5, 6))
    return Entry(row, f"uid {row}", ["", "a", "b\0\u6d77"][row % 3], rewards, label, row % 3 == 1, PIXELS, frames)


def write(root: Path, rows: int = 10, flips: int = 2, calls: list[int] | None = None, **changes: Any) -> None:
    """A cache whose every fifth row is rejected, four rows a part, two prompts a part. calls: gets the rows encoded."""

    def pairs(number: int) -> dict[str, Any]:
        part = writer.pairs(number)
        for row in range(max(4 * number, part.next_row), min(4 * number + 4, rows)):
            if row % 5 == 4:
                part.reject(row, f"uid {row}", "bad: very")
            else:
                part.add(entry(row), *latents(row, flips))
                if calls is not None:
                    calls.append(row)
            part.commit(row + 1)
        return part.close()

    def prompts(number: int) -> dict[str, Any]:
        part = writer.prompts(number)
        for text in writer.texts()[2 * number + part.done : 2 * number + 2]:
            states, pooled = embedding(text)
            part.add(states[None], pooled[None])
        return part.close()

    with CacheWriter(root, {**IDENTITY, **changes}, {"pairs": "x", "files": []}) as writer:
        writer.do_parts(LATENTS_PART, -(-rows // 4), pairs)
        writer.do_parts(PROMPTS_PART, -(-len(writer.texts()) // 2), prompts)
        writer.finish(("bad",))


def one_pair(root: Path, flips: int = 2, value: float | None = None, pooled: bool = True) -> None:
    """A cache of row 7 alone. value: a number among its latents."""

    def pairs(number: int) -> dict[str, Any]:
        part, (mean, std) = writer.pairs(number), latents(7, flips)
        if value is not None:
            std[1, 0, 2, 3, 4] = value
        part.add(entry(7), mean, std)
        part.commit(8)
        return part.close()

    def prompts(number: int) -> dict[str, Any]:
        part = writer.prompts(number)
        states, vector = zip(*map(embedding, writer.texts()), strict=True)
        part.add(torch.stack(states), torch.stack(vector) if pooled else None)
        return part.close()

    with CacheWriter(root, IDENTITY, {}) as writer:
        writer.do_parts(LATENTS_PART, 1, pairs)
        writer.do_parts(PROMPTS_PART, 1, prompts)
        writer.finish()


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
    assert pairs.frames.tolist() == [[list(e.frames[0]), list(e.frames[1])] for e in entries]
    assert (pairs.pixels.tolist(), pairs.shapes.tolist(), pairs.encoded.all()) == ([[48, 40]], [0] * 8, True)
    info = pairs.info
    assert (info.latent(), info.flips, info.prompt, info.pooled) == (LATENT, 2, (3, 8), 8)
    stored = sum(e.rewards is not None and not e.scored for e in entries)
    scored = sum(e.rewards is not None and e.scored for e in entries)
    assert info.counts == {
        "pairs": 8, "encoded": 8, "stored": stored, "scored": scored,
        "rejected": 2, "prompts": 3, "unrewarded": 8 - stored + 2,
    }  # fmt: skip
    assert info.rewards == (-8 / 3, 8 / 7)
    assert info.bytes == sum(f.stat().st_size for f in (tmp_path / "c").iterdir() if f.name != "cache.json")
    assert problems(tmp_path / "c") == []


def test_without_flips_and_without_pooled(tmp_path: Path) -> None:
    one_pair(tmp_path / "c", flips=1, pooled=False)
    pairs = CachedPairs(tmp_path / "c")
    assert pairs.prompts([0])[1] is None
    assert torch.equal(pairs.moments([0], np.zeros((1, 2), bool))[0], latents(7, 1)[0][None, :, 0].half().float())
    with pytest.raises(ValueError, match="no mirrored images"):
        pairs.moments([0], np.array([[False, True]]))


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (1e5, "beyond float16")]
)
def test_numbers_float16_cannot_hold_are_named_and_leave_no_trace(tmp_path: Path, value: float, message: str) -> None:
    with pytest.raises(Unstorable, match=f"row 7: latent std is .*{message}"):
        one_pair(tmp_path / "c", value=value)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_anywhere_leaves_no_half_cache_and_the_next_run_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "whole")
    whole, sync = digests(tmp_path / "whole"), storage.sync
    for stop in range(100):
        calls = 0
        encoded: list[int] = []

        def interrupt(path: Path, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls > stop:
                raise KeyboardInterrupt
            sync(path)

        root = tmp_path / f"c{stop}"
        for room in (storage, shared_work, index):
            monkeypatch.setattr(room, "sync", interrupt)
        try:
            write(root, calls=encoded)
            break
        except KeyboardInterrupt:
            pass
        for room in (storage, shared_work, index):
            monkeypatch.setattr(room, "sync", sync)
        if not location.exists(root):  # the last sync comes after the renaming
            assert not root.exists()
            with suppress(AlreadyFinished):
                write(root, calls=encoded)
        assert digests(root) == whole
        assert sorted(encoded) == [row for row in range(10) if row % 5 != 4]  # none is lost, none is encoded twice
        assert [f.name for f in tmp_path.iterdir() if f.name.startswith(f".c{stop}.")] == []
    assert calls == stop > 15


def test_who_comes_too_late_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path / "c")
    before = digests(tmp_path / "c")
    shared_work.agreed_values(location.partial(tmp_path / "c"), lambda known: {"sha256": "s"})
    with pytest.raises(AlreadyFinished):
        write(tmp_path / "c")
    assert digests(tmp_path / "c") == before
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_a_leftover_of_another_cache_is_not_taken_up(tmp_path: Path) -> None:
    def interrupted(**changes: Any) -> int:
        encoded: list[int] = []
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(CacheWriter, "texts", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            write(tmp_path / "c", calls=encoded, **changes)
        return len(encoded)

    assert interrupted() == 8
    assert interrupted() == 0
    assert interrupted(resolution=128) == 8
    assert interrupted(resolution=128) == 0
    shard = tmp_path / ".c.partial" / "latents-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert interrupted(resolution=128) == 3  # rows 5, 6, 7


def test_writers_of_other_caches_and_occupied_targets_are_refused(tmp_path: Path) -> None:
    with (
        CacheWriter(tmp_path / "c", IDENTITY, {}),
        pytest.raises(UserError, match="another process is working in .* with other settings"),
        CacheWriter(tmp_path / "c", {**IDENTITY, "resolution": 32}, {}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "d").mkdir()
    write(tmp_path / "d")  # an empty folder may be there
    with pytest.raises(AlreadyFinished), CacheWriter(tmp_path / "d", IDENTITY, {}):
        pass
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "other").touch()
    with pytest.raises(UserError, match="exists and is not a cache"):
        CacheWriter(tmp_path / "e", IDENTITY, {})


def test_a_cache_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "c")
    pairs = CachedPairs(tmp_path / "c")
    check_identity(pairs.info, IDENTITY)
    check_identity(pairs.info, {**IDENTITY, "flip": False})  # both flips are there
    with pytest.raises(CacheError, match="scorer .*data.scorer.*: found '', wanted 'pickscore'"):
        check_identity(pairs.info, {**IDENTITY, "scorer": "pickscore"})
    pairs.info.counts["unrewarded"] = 0
    check_identity(pairs.info, {**IDENTITY, "scorer": "pickscore"})  # no reward hangs on it
    check_identity(pairs.info, {"resolution": 64})
    with pytest.raises(CacheError) as caught:
        check_identity(pairs.info, {**IDENTITY, "encoders": "f", "resolution": 128})
    message = str(caught.value)
    assert "encoders (model.path, model.vae or model.lora): found 'e', wanted 'f'" in message
    assert "resolution (data.resolution): found 64, wanted 128" in message
    assert "data.pairs" not in message
    assert "remove this one" in message


def test_flips_that_are_not_there_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", flips=1, flip=False)
    with pytest.raises(CacheError, match=r"flip \(data.flip\): found False, wanted True"):
        check_identity(CachedPairs(tmp_path / "c").info, IDENTITY)


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
    (problem,) = problems(tmp_path / "c")
    assert "latents-00001.safetensors: its content has changed" in problem
    assert problem.endswith("it holds 3 pairs, rows 5 to 7")


def test_verify_names_the_pair_with_a_bad_number_and_the_prompt(tmp_path: Path) -> None:
    write(tmp_path / "c")

    def spoil(name: str, key: str, number: int, value: float) -> None:
        file = tmp_path / "c" / name
        raw = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        item = json.loads(raw[8:start])[key]
        first, last = item["data_offsets"]
        at = start + first + number * (last - first) // item["shape"][0]
        raw[at : at + 2] = np.float16(value).tobytes()
        file.write_bytes(raw)

    spoil("latents-00001.safetensors", "mean", 1, np.nan)
    spoil("latents-00002.safetensors", "std", 0, -1.0)
    spoil("prompts-00000.safetensors", "pooled", 1, np.inf)
    changed, numbers = [], []
    for problem in problems(tmp_path / "c"):
        (changed if "sha256" in problem else numbers).append(
            problem.partition("safetensors: ")[2].partition(": put")[0]
        )
    assert len(changed) == 3
    assert numbers == [
        "row 6 (uid 6): the latents' mean contains a number that is not finite or is below 0",
        "row 8 (uid 8): the latents' std contains a number that is not finite or is below 0",
        "the embedding of prompt 1, 'a', is not finite",
    ]


def test_verify_compares_the_index_with_the_shards_and_the_counts(tmp_path: Path) -> None:
    write(tmp_path / "c")
    table = pq.read_table(tmp_path / "c" / "pairs.parquet")
    pq.write_table(table.take([0, 1, 1, 3, 4, 5, 6]), tmp_path / "c" / "pairs.parquet")
    facts = storage.file_facts(tmp_path / "c" / "pairs.parquet")
    reseal(tmp_path / "c" / "cache.json", lambda info: info["files"].update({"pairs.parquet": facts}))
    found = "\n".join(problems(tmp_path / "c"))
    assert "the index has 7 pairs, cache.json says 8" in found
    assert "rows are not in ascending order" in found
    assert "latents-00000.safetensors: it holds 4 pairs where the index has 4; it holds 4 pairs, rows 0 to 3" in found
    assert "latents-00002.safetensors: it holds" not in found


def test_pairs_of_several_shapes_lie_in_one_shard_and_are_read_apart(tmp_path: Path) -> None:
    sizes = [(48, 40), (40, 48), (48, 40), (40, 48), (40, 48)]

    def pairs(number: int) -> dict[str, Any]:
        part = writer.pairs(number)
        for row, (height, width) in enumerate(sizes):
            mean = torch.full((2, 1, 4, height // 8, width // 8), float(row))
            part.add(replace(entry(row), pixels=(height, width)), mean, mean + 0.5)
        part.commit(5)
        return part.close()

    def prompts(number: int) -> dict[str, Any]:
        part = writer.prompts(number)
        part.add(torch.zeros(3, 2, 2), None)
        return part.close()

    with CacheWriter(tmp_path / "c", {**IDENTITY, "buckets": True, "flip": False}, {}) as writer:
        writer.do_parts(LATENTS_PART, 1, pairs)
        writer.do_parts(PROMPTS_PART, 1, prompts)
        writer.finish()
    cached = CachedPairs(tmp_path / "c")
    assert cached.pixels.tolist() == [[40, 48], [48, 40]]
    assert cached.shapes.tolist() == [1, 0, 1, 0, 0]
    assert sorted(load_file(tmp_path / "c" / "latents-00000.safetensors")) == [
        "mean.40x48", "mean.48x40", "std.40x48", "std.48x40",
    ]  # fmt: skip
    mean, std = cached.moments([4, 1], np.zeros((2, 2), bool))
    assert mean.shape == (2, 2, 4, 5, 6)
    assert (mean[0] == 4).all() and (mean[1] == 1).all() and (std[1] == 1.5).all()
    with pytest.raises(ValueError, match="2 shapes"):
        cached.moments([0, 1], np.zeros((2, 2), bool))
    assert problems(tmp_path / "c") == []


def test_a_broken_shard_header_and_index_are_clear_errors(tmp_path: Path) -> None:
    write(tmp_path / "c")
    for name in ("latents-00000.safetensors", "pairs.parquet"):
        file = tmp_path / "c" / name
        whole = file.read_bytes()
        file.write_bytes(b"\xff" * len(whole))
        with pytest.raises(CacheError, match=f"{name}: cannot be read"):
            CachedPairs(tmp_path / "c", check=False).moments([0], np.zeros((1, 2), bool))
        file.write_bytes(whole)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["pairs.parquet", "prompts.parquet", "rejected.parquet"])
def test_a_changed_byte_of_the_index_is_found_at_opening(tmp_path: Path, name: str) -> None:
    write(tmp_path / "c")
    flip_a_byte(tmp_path / "c" / name)
    with pytest.raises(CacheError, match=f"{name}: its content has changed since it was written"):
        CachedPairs(tmp_path / "c")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_changed_byte_of_a_shard_is_found_by_the_first_run_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    write(tmp_path / "c")
    monkeypatch.setattr(integrity, "CHECK_AT_ONCE", (1 << 20) if at_once else 0)
    flip_a_byte(tmp_path / "c" / "latents-00001.safetensors")
    flip_a_byte(tmp_path / "c" / "prompts-00000.safetensors")
    pairs, unflipped = CachedPairs(tmp_path / "c"), np.zeros((1, 2), bool)
    pairs.moments([0], unflipped)  # of another shard
    for _ in range(2):
        with pytest.raises(CacheError, match="latents-00001.*its content has changed"):
            pairs.moments([5], unflipped)
            pairs.finish_checks()
    with pytest.raises(CacheError, match="its content has changed"):
        pairs.prompts([0])
        pairs.finish_checks()


def test_each_shard_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "c")
    hashed: list[str] = []
    monkeypatch.setattr(integrity, "sha256", lambda file: hashed.append(file.name) or storage.sha256(file))
    pairs = CachedPairs(tmp_path / "c")
    for _ in range(3):
        pairs.moments(np.arange(8), np.zeros((8, 2), bool))
        pairs.prompts([0, 1, 2])
    pairs._mapped.cache_clear()  # as of a shard that was not read for long
    pairs.moments(np.arange(8), np.zeros((8, 2), bool))
    assert sorted(hashed) == sorted(pairs.info.files)


MANY_SHARDS = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from smpo_fast.data.cache.reader import CachedPairs
pairs = CachedPairs(Path(sys.argv[1]))
pairs.moments([0], np.zeros((1, 2), bool))  # numpy imports more when it is first used
limit = len(list(Path("/proc/self/fd").iterdir())) - 1 + int(sys.argv[2])  # less the one that lists them
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try:
    for _ in range(2):
        for i in range(len(pairs)):
            pairs.moments([i], np.zeros((1, 2), bool))
except Exception as error:
    print(type(error).__name__, error)
print(pairs.moments([0], np.zeros((1, 2), bool))[0].shape) if int(sys.argv[2]) else None
"""


def read_all_pairs(root: Path, more_files: int) -> str:
    words = [sys.executable, "-c", MANY_SHARDS, str(root), str(more_files)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_more_shards_than_a_process_may_have_open_files(tmp_path: Path) -> None:
    write(tmp_path / "c", rows=120)  # 30 shards
    assert read_all_pairs(tmp_path / "c", 8) == "torch.Size([1, 2, 4, 6, 5])\n"
    said = read_all_pairs(tmp_path / "c", 0)
    assert said.startswith("EnvironmentProblem ") and "raise its limit (ulimit -n)" in said
    assert "damaged" not in said


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (OSError(errno.ENFILE, "Too many open files in system"), "too many open files"),
        (RuntimeError("can't start new thread"), "no more threads"),
        (OSError(errno.EIO, "Input/output error"), "the disk reports an error"),
        (PermissionError(errno.EACCES, "Permission denied"), "permission denied"),
    ],
)
def test_problems_of_the_machine_are_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    write(tmp_path / "c")
    pairs = CachedPairs(tmp_path / "c")
    monkeypatch.setattr(torch, "from_file", fail)
    with pytest.raises(EnvironmentProblem, match=advice):
        pairs.moments([0], np.zeros((1, 2), bool))
    monkeypatch.setattr(pq, "read_table", fail)
    with pytest.raises(EnvironmentProblem, match=advice):
        CachedPairs(tmp_path / "c")


def test_without_a_thread_shards_are_hashed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    write(tmp_path / "c")
    flip_a_byte(tmp_path / "c" / "latents-00001.safetensors")
    monkeypatch.setattr(integrity, "CHECK_AT_ONCE", 0)
    monkeypatch.setattr(threading.Thread, "start", fail)
    pairs = CachedPairs(tmp_path / "c")
    with pytest.raises(CacheError, match="its content has changed"):
        pairs.moments([5], np.zeros((1, 2), bool))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 2}', "cannot be read"),
        ('{"format": 1}', "cache format 1, this version reads 2: remove .* and prepare again"),
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
    with pytest.raises(CacheError, match="holds no prepared cache.*smpo prepare"):
        CachedPairs(tmp_path)


def test_the_description_is_json_that_people_can_read(tmp_path: Path) -> None:
    write(tmp_path / "c")
    values = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert values["format"] == 2
    assert values["identity"] == IDENTITY
    assert set(values["files"]) == {f.name for f in (tmp_path / "c").iterdir()} - {"cache.json"}
