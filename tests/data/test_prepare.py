"""From a table of pairs to a cache: nothing stops it, nothing shifts a pair, and a killed run goes on."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.artifacts import problems
from helpers.encoders import FakeEncoders, png
from helpers.paths import SAMPLES, needs_samples
from helpers.ranks import run_ranks
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor

from smpo_fast.common import shared_work, storage
from smpo_fast.common.errors import UserError
from smpo_fast.common.remote import RemoteFolder
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.config.schema import Config, Labels
from smpo_fast.data import aspect_buckets
from smpo_fast.data.aspect_buckets import fit
from smpo_fast.data.cache import identity as cache_identity
from smpo_fast.data.cache import location, pipeline, prepare, stages
from smpo_fast.data.cache.format import CacheError
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.cache.visits import visited
from smpo_fast.data.images import decode
from smpo_fast.method.labels import weigh
from smpo_fast.training.loader import Loader

CPU = torch.device("cpu")


class FakeScorer:
    name = identity = "fake"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return np.array([np.asarray(i)[..., 0].mean() for i in images], dtype=np.float32)

    def parts(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"reward": self(images, prompts)}


def write_table(path: Path, rows: int = 20, **columns: Any) -> Path:
    values = {
        "caption": [f"prompt {i % 7}" for i in range(rows)],
        "jpg_0": [png(50 + 2 * i) for i in range(rows)],
        "jpg_1": [png(51 + 2 * i) for i in range(rows)],
        "label_0": [float(i % 2) for i in range(rows)],
    } | columns
    pq.write_table(pa.table({k: v for k, v in values.items() if v is not None}), path, row_group_size=6)
    return path


def settings(path: Path | str, **data: Any) -> Config:
    return loading.from_dict({"data": {"pairs": str(path), "resolution": 32, **data}})


def run(settings: Config, out: Path, **options: Any) -> CachedPairs:
    prepare.prepare(settings, options.pop("encoders", None) or FakeEncoders(), CPU, out, **options)
    return CachedPairs(out)


def digests(root: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(root.iterdir())}


def test_every_pair_keeps_its_pictures_label_and_prompt(tmp_path: Path) -> None:
    bad = [png(50 + 2 * i) if i % 3 else [b"junk", b"", None][i // 3 % 3] for i in range(20)]
    pairs = run(settings(write_table(tmp_path / "t.parquet", jpg_0=bad)), tmp_path / "c", batch=4)
    kept = [i for i in range(20) if i % 3]
    assert pairs.rows.tolist() == kept
    assert [row for row, _, _ in pairs.rejections()] == [0, 3, 6, 9, 12, 15, 18]
    assert pairs.labels.tolist() == [float(i % 2) for i in kept]
    assert [pairs.texts[i] for i in pairs.prompt_index] == [f"prompt {i % 7}" for i in kept]
    plain, mirrored = (pairs.moments(range(len(kept)), np.full((len(kept), 2), flip))[0] for flip in (False, True))
    for i, row in enumerate(kept):
        for picture in range(2):
            square = fit(decode(png(50 + picture + 2 * row)), (32, 32))[0]
            pixels = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 127.5 - 1
            assert torch.equal(plain[i, picture], FakeEncoders().encode_images(pixels)[0][0].half().float())
            assert torch.equal(mirrored[i, picture], FakeEncoders().encode_images(pixels.flip(3))[0][0].half().float())
    embeds, pooled = pairs.prompts(pairs.prompt_index)
    wanted = FakeEncoders().encode_prompts([f"prompt {i % 7}" for i in kept])
    assert torch.equal(embeds, wanted[0].half().float())
    assert torch.equal(pooled, wanted[1].half().float())


def test_content_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", 11)
    run(settings(table), tmp_path / "one", batch=1)
    run(settings(table), tmp_path / "five", batch=5)
    assert digests(tmp_path / "one") == digests(tmp_path / "five")


def test_the_size_that_was_foretold_is_the_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = run(settings(write_table(tmp_path / "t.parquet", 11)), tmp_path / "c", batch=2)
    said = capsys.readouterr().out
    shards = (load_file(file) for file in (tmp_path / "c").glob("latents-*"))
    stored = sum(array.nbytes for shard in shards for array in shard.values())
    assert f"size: 11 rows x {stored // 11} bytes" in said
    assert stored == 11 * 2 * 2 * 2 * 4 * 4 * 4 * 2 and len(pairs) == 11
    assert "time: about 0 s for the remaining 7 rows" in said and "(measured)" in said


def test_what_a_run_does_later_does_not_change_what_is_cached(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet")
    run(settings(table), tmp_path / "c")
    words = [
        "run.seed=5",
        "batch.pairs_per_step=3",
        "data.prompt_dropout=0.5",
        "data.conditioning=original",
        "optim.lr=0.5",
    ]
    words += ["labels.gamma=3", "inversion.steps=7", "objective.name=dpo", "data.cache=elsewhere", "data.flip=false"]
    other = loading.load(None, [f"data.pairs={table}", *words])
    encoders = FakeEncoders()
    run(other, tmp_path / "c", encoders=encoders)
    assert encoders.calls == []


def test_no_call_of_the_vae_is_larger_than_the_batch(tmp_path: Path) -> None:
    encoders = FakeEncoders()
    run(settings(write_table(tmp_path / "t.parquet", 5)), tmp_path / "c", batch=3, encoders=encoders)
    assert max(encoders.calls) == 3
    assert sum(encoders.calls) == 5 * 2 * 2


def test_without_flip_half_as_much_is_stored(tmp_path: Path) -> None:
    pairs = run(settings(write_table(tmp_path / "t.parquet"), flip=False), tmp_path / "c")
    assert pairs.info.flips == 1


def test_max_pairs_counts_rows(tmp_path: Path) -> None:
    captions = [None, *(f"p{i}" for i in range(19))]
    pairs = run(settings(write_table(tmp_path / "t.parquet", caption=captions), max_pairs=5), tmp_path / "c")
    assert pairs.rows.tolist() == [1, 2, 3, 4]


def test_scorer_fills_in_what_is_missing_and_only_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = {"reward_0": [0.5, None, None, 0.1], "reward_1": [0.4, None, None, 0.2], "label_0": None}
    pairs = run(settings(write_table(tmp_path / "t.parquet", 4, **stored)), tmp_path / "c", scorer=FakeScorer())
    expected = [[0.5, 0.4], [26.0, 26.5], [27.0, 27.5], [0.1, 0.2]]
    np.testing.assert_allclose(pairs.rewards, expected)
    assert pairs.info.counts["scored"] == 2
    assert pairs.info.counts["stored"] == 2
    assert "are they from the same reward model?" in capsys.readouterr().err


def test_a_pair_that_cannot_be_scored_is_left_out(tmp_path: Path) -> None:
    class Moody(FakeScorer):
        def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
            return np.array([float("nan") if p == "prompt 2" else i for i, p in enumerate(prompts)], dtype=np.float32)

    pairs = run(settings(write_table(tmp_path / "t.parquet", 4)), tmp_path / "c", scorer=Moody(), batch=4)
    assert pairs.rows.tolist() == [0, 1, 3]
    assert pairs.rewards.tolist() == [[0, 1], [2, 3], [6, 7]]
    assert pairs.rejections() == [(2, "row-2", "the scorer gave no finite score: nan, nan")]


def test_a_pair_that_one_scorer_left_out_may_be_used_by_another(tmp_path: Path) -> None:
    """So the cache is another with another scorer, although all of its pairs have stored rewards."""

    class Blind(FakeScorer):
        def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
            return np.full(len(images), np.nan, np.float32)

    stored: list[float | None] = [1.0, None, 2.0]
    table = write_table(tmp_path / "t.parquet", 3, reward_0=stored, reward_1=[r and 2 * r for r in stored])
    pairs = run(settings(table, scorer="embedded"), tmp_path / "c", scorer=Blind())
    assert pairs.rows.tolist() == [0, 2] and pairs.info.counts["unrewarded"] == 1
    with pytest.raises(CacheError, match=r"scorer \(data\.scorer\)"):
        run(settings(table, scorer="pickscore"), tmp_path / "c", scorer=FakeScorer())


def test_rows_are_encoded_on_from_where_an_interruption_left_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of several shards, whose rows do not begin at 0."""
    monkeypatch.setattr(pipeline, "PART_ROWS", 8)
    given = settings(write_table(tmp_path / "t.parquet"))

    class Failing(FakeEncoders):
        def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            if pixels.max() > (50 + 2 * 11 - 0.5) / 127.5 - 1:  # from row 11 on
                raise RuntimeError("no memory")
            return super().encode_images(pixels)

    with pytest.raises(RuntimeError, match="no memory"):
        run(given, tmp_path / "c", encoders=Failing(), batch=1)
    run(given, tmp_path / "c", batch=1)
    run(given, tmp_path / "whole", batch=1)
    assert digests(tmp_path / "c") == digests(tmp_path / "whole")


def test_prompts_are_encoded_on_from_where_an_interruption_left_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PROMPT_BATCH", 2)
    given = settings(write_table(tmp_path / "t.parquet"))

    class Failing(FakeEncoders):
        def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
            if "prompt 3" in prompts:
                raise RuntimeError("no memory")
            return super().encode_prompts(prompts)

    with pytest.raises(RuntimeError, match="no memory"):
        run(given, tmp_path / "c", encoders=Failing())
    run(given, tmp_path / "c")
    run(given, tmp_path / "whole")
    assert digests(tmp_path / "c") == digests(tmp_path / "whole")


@pytest.mark.parametrize("batch", [1, 6])
def test_a_pair_the_vae_cannot_encode_is_left_out(batch: int, tmp_path: Path) -> None:
    class Fragile(FakeEncoders):
        def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            if (pixels.amax(dim=(1, 2, 3)) == 54 / 127.5 - 1).any():
                raise FloatingPointError("NaN")
            mean, std = super().encode_images(pixels)
            return torch.where(mean == mean.max(), 1e6, mean) if (pixels == 59 / 127.5 - 1).any() else mean, std

    pairs = run(settings(write_table(tmp_path / "t.parquet", 6)), tmp_path / "c", encoders=Fragile(), batch=batch)
    assert pairs.rows.tolist() == [0, 1, 3, 5]
    found = pairs.rejections()
    assert [row for row, _, _ in found] == [2, 4]
    assert found[0][2] == "latents: the VAE gave NaN or infinity"
    assert "beyond float16" in found[1][2]


def test_no_preference_and_the_same_picture_are_left_out(tmp_path: Path) -> None:
    columns = {"label_0": [1.0, None, 1.0, float("nan")], "jpg_1": [png(1), png(2), png(54), png(3)]}
    pairs = run(settings(write_table(tmp_path / "t.parquet", 4, **columns)), tmp_path / "c")
    assert pairs.rows.tolist() == [0]
    assert [reason.partition(":")[0] for _, _, reason in pairs.rejections()] == [
        "no preference",
        "the same picture twice",
        "no preference",
    ]


def test_tables_nothing_can_be_learned_from_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither labels .* nor rewards .* set data.scorer"):
        run(settings(write_table(tmp_path / "a.parquet", label_0=None)), tmp_path / "c")
    junk = write_table(tmp_path / "b.parquet", 3, jpg_0=[b"junk"] * 3)
    with pytest.raises(UserError, match=r"no usable pair in .*b\.parquet: 3 x jpg_0 not a picture \(row 0, 1, 2\)"):
        run(settings(junk), tmp_path / "c")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_what_was_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = ["x" * 300, None, "b", "b"]
    run(settings(write_table(tmp_path / "t.parquet", 4, caption=captions)), tmp_path / "c")
    said = capsys.readouterr()
    assert "3 of 4 pairs" in said.out
    assert "rejected 1: 1 x no caption (row 1)" in said.out
    assert "prompts: 2 distinct and the empty one, 1 longer than" in said.out
    assert "human labels: 3 pairs" in said.out
    assert "pair/s" in said.err


def test_strict_stops_at_the_first_row_that_cannot_be_used(tmp_path: Path) -> None:
    captions = ["a", "b", None, *"cdefg"]
    table = write_table(tmp_path / "t.parquet", 8, caption=captions)
    with pytest.raises(UserError, match=r"data.strict: row 2 of data.pairs \(row-2\) cannot be used: no caption"):
        run(settings(table, strict=True), tmp_path / "c", batch=1)
    encoders = FakeEncoders()
    assert run(settings(table), tmp_path / "c", batch=1, encoders=encoders).rows.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert sum(encoders.calls) == 5 * 4  # rows 0 and 1 were taken up


def test_a_cache_that_serves_is_kept_and_another_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet")
    run(settings(table), tmp_path / "c")
    before = digests(tmp_path / "c")
    encoders = FakeEncoders()
    run(settings(table), tmp_path / "c", encoders=encoders)
    assert encoders.calls == []
    assert digests(tmp_path / "c") == before
    with pytest.raises(CacheError, match=r"resolution \(data.resolution\): found 32, wanted 64"):
        run(settings(table, resolution=64), tmp_path / "c")
    encoders.identity = "other"
    with pytest.raises(
        CacheError, match=r"encoders \(model.path, model.vae or model.lora\): found 'fake', wanted 'other'"
    ):
        run(settings(table), tmp_path / "c", encoders=encoders)
    write_table(table, rows=21)
    with pytest.raises(CacheError, match=r"source \(data.pairs\)"):
        run(settings(table), tmp_path / "c")


def test_hashing_is_spared_for_untouched_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path / "t.parquet", 4)
    run(settings(table), tmp_path / "c")
    hashed: list[Path] = []
    facts = storage.file_facts
    monkeypatch.setattr(storage, "file_facts", lambda file: hashed.append(file) or facts(file))
    cache_identity.open_cache(settings(table), tmp_path / "c", encoders="fake", kind="sdxl")
    assert hashed == []
    os.utime(table, (1, 1))
    cache_identity.open_cache(settings(table), tmp_path / "c", encoders="fake", kind="sdxl")
    assert hashed == [table]


def test_a_cache_serves_without_its_source_but_not_for_another_name(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", 4)
    run(settings(table), tmp_path / "c")
    table.unlink()
    assert len(cache_identity.open_cache(settings(table), tmp_path / "c", encoders="fake", kind="sdxl")) == 4
    with pytest.raises(UserError, match="does not exist"):
        cache_identity.open_cache(settings(tmp_path / "typo.parquet"), tmp_path / "c", encoders="fake", kind="sdxl")


def test_a_folder_of_tables_is_one_table(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    write_table(tmp_path / "t" / "0.parquet", 5)
    write_table(tmp_path / "t" / "1.parquet", 4)
    pairs = run(settings(tmp_path / "t"), tmp_path / "c")
    assert pairs.rows.tolist() == list(range(9))
    assert pairs.labels.tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1]


class Logging(FakeEncoders):
    """Writes what it encodes to a file, before it does."""

    def __init__(self, log: Path, seconds: float = 0.0) -> None:
        super().__init__()
        self.log, self.seconds = log, seconds

    def note(self, word: str) -> None:
        with self.log.open("a") as log:
            log.write(f"{word}\n")
        time.sleep(self.seconds)  # what encoding takes

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        for picture in pixels:
            self.note(hashlib.sha256(picture.numpy().tobytes()).hexdigest())
        return super().encode_images(pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        for prompt in prompts:
            self.note(f"prompt {prompt}")
        return super().encode_prompts(prompts)


def small_parts(table: Path, out: Path, log: Path, seconds: float = 0.0, **world: int) -> None:
    """Prepare in parts of a few pairs and prompts, two at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "SHARD_BYTES", 3000)
        patch.setattr(pipeline, "PROMPT_SHARD", 4)
        patch.setattr(pipeline, "PROMPT_BATCH", 2)
        run(settings(table), out, batch=2, encoders=Logging(log, seconds), world=World(**world))


def prepare_rank(rank: int, size: int, table: Path, out: Path) -> list[str]:
    log = out.with_name(f"log-{rank}")
    log.touch()
    small_parts(table, out, log, 0.002, rank=rank, size=size)
    return log.read_text().split("\n")[:-1]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A table of 80 rows, its cache, and what was encoded for it."""
    folder = tmp_path_factory.mktemp("many")
    bad = [png(50 + 2 * i) if i % 5 else b"junk" for i in range(80)]
    captions = [f"prompt {i % 23}" for i in range(80)]
    table = write_table(
        folder / "t.parquet", 80, jpg_0=bad, jpg_1=[png(51 + 2 * i) for i in range(80)], caption=captions
    )
    small_parts(table, folder / "c", folder / "log")
    return table, folder / "c", (folder / "log").read_text().split("\n")[:-1]


def test_ranks_share_the_work_and_write_the_same_bytes(tmp_path: Path, many: tuple[Path, Path, list[str]]) -> None:
    table, whole, encoded = many
    logs = run_ranks(prepare_rank, 2, table=table, out=tmp_path / "c")
    assert sorted(line for log in logs for line in log) == sorted(encoded)  # all of it, and each once
    assert all(logs), "a rank had nothing to do"
    assert digests(tmp_path / "c") == digests(whole)


def alone(function: str, *arguments: Any) -> str:
    """What a function of this file prints in a process of its own, which may fork: nothing has been started in it."""
    here = Path(__file__).parent
    words = ", ".join(repr(str(a)) if isinstance(a, Path) else repr(a) for a in arguments)
    code = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]!r}; "
    code += f"import test_prepare; test_prepare.{function}({words})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=here.parent, text=True)
    assert child.returncode == 0 and "Traceback" not in child.stderr, child.stderr[-3000:]
    return child.stdout


def fork(function: Callable[[], None]) -> int:
    """The id of a child process that calls a function and ends; 1 is its exit status after an exception."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_repeatedly(table: str, out: str, log: str, points: int, seconds: float) -> None:
    """Start the preparation and kill it ``points`` times at random moments, then let it end."""
    moments, began, kills = np.random.default_rng(points), time.monotonic(), 0
    while not location.exists(Path(out)):
        child = fork(lambda: small_parts(Path(table), Path(out), Path(log), 0.001))
        if kills < points:
            time.sleep(moments.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            kills += not location.exists(Path(out))
        os.waitpid(child, 0)
        assert time.monotonic() - began < 300, "no end"
    print(f"{kills} kills")


@pytest.mark.parametrize("points", [pytest.param(p, marks=pytest.mark.slow) for p in (20, 200)])
def test_killed_at_random_points_it_loses_and_repeats_nothing(
    tmp_path: Path, many: tuple[Path, Path, list[str]], points: int
) -> None:
    table, whole, encoded = many
    out, log = tmp_path / "c", tmp_path / "log"
    told = alone("kill_repeatedly", table, out, log, points, 2 / points)
    kills = int(told.rpartition(" kills")[0].split()[-1])
    assert kills > points // 2, "a faster machine finishes before the last of them"
    assert digests(out) == digests(whole)
    again = Counter(log.read_text().split("\n")[:-1])
    assert again.keys() == set(encoded)
    # What was being encoded when it was killed is all that is encoded again: two pairs (8 pictures) or two prompts.
    assert again.total() - len(encoded) <= 8 * points
    assert max(again.values()) <= 3 + points // 20
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def kill_one_of_three(table: str, out: str) -> None:
    """Three processes share the work; one kills itself in the middle of a part. Prints how each ended."""

    class Deadly(Logging):
        def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            if len(self.calls) == 14:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().encode_images(pixels)

    def work(rank: int) -> None:
        if rank == 0:
            globals()["Logging"] = Deadly
        small_parts(Path(table), Path(out), Path(out).with_name("log"), 0.002, rank=rank, size=3)

    children = [fork(lambda rank=rank: work(rank)) for rank in range(3)]
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


def test_a_kill_just_after_publishing_leaves_nothing_for_good(
    tmp_path: Path, many: tuple[Path, Path, list[str]]
) -> None:
    out = tmp_path / "c"
    shutil.copytree(many[1], out)
    for leftover in ("all.lock", "last.lock"):
        (out / leftover).touch()
    location.publish(out)
    assert digests(out) == digests(many[1])


@pytest.mark.slow
def test_what_a_dead_process_held_is_taken_over(tmp_path: Path, many: tuple[Path, Path, list[str]]) -> None:
    table, whole, encoded = many
    assert "[-9, 0, 0]" in alone("kill_one_of_three", table, tmp_path / "c")
    assert digests(tmp_path / "c") == digests(whole)
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert set(lines) == set(encoded) and len(lines) - len(encoded) <= 8


def test_a_process_starts_over_when_the_one_it_joined_was_stopped_and_removed_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreed_values, calls = shared_work.agreed_values, []

    def first_time_without_a_folder(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 1:
            raise shared_work.AlreadyFinished
        return agreed_values(*arguments)

    monkeypatch.setattr(shared_work, "agreed_values", first_time_without_a_folder)
    assert len(run(settings(write_table(tmp_path / "t.parquet")), tmp_path / "c")) == 20 and len(calls) == 2


def test_an_interrupted_preparation_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "t.parquet")
    monkeypatch.setattr(pipeline, "SHARD_BYTES", 3000)

    class Tired(FakeEncoders):
        def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            if len(self.calls) == 12:
                raise KeyboardInterrupt
            return super().encode_images(pixels)

    with pytest.raises(KeyboardInterrupt):
        run(settings(table), tmp_path / "c", batch=2, encoders=Tired())
    assert not (tmp_path / "c").exists()
    run(settings(table), tmp_path / "c", batch=2)
    assert "resuming an interrupted preparation: 6 of 20 rows are done" in capsys.readouterr().out
    assert sorted(f.name for f in tmp_path.iterdir()) == ["c", "t.parquet"]


# --- only what the run visits ---------------------------------------------------------------------------------------


def of_run(table: Path, steps: int = 3, seed: int = 1, **data: Any) -> Config:
    """A run of some steps of 4 pairs."""
    sections = {"run": {"steps": steps, "seed": seed}, "batch": {"pairs_per_step": 4}}
    return loading.from_dict({"data": {"pairs": str(table), "resolution": 32, **data}, **sections})


def test_only_what_the_run_visits_is_encoded_and_the_run_is_the_same(tmp_path: Path) -> None:
    bad = [png(50 + 2 * i) if i % 5 else b"junk" for i in range(60)]
    table = write_table(tmp_path / "t.parquet", 60, jpg_0=bad, jpg_1=[png(51 + 2 * i) for i in range(60)])
    whole = run(of_run(table), tmp_path / "whole")
    encoders, chosen = FakeEncoders(), of_run(table, only_visited=True)
    few = run(chosen, tmp_path / "few", encoders=encoders)
    assert (len(few), few.encoded.sum(), sum(encoders.calls)) == (48, 12, 12 * 4)
    assert few.rows.tolist() == whole.rows.tolist() and few.rejections() == whole.rejections()
    assert problems(few.root) == []
    for step in range(3):
        a, b = (Loader(c, chosen, World()).step_batch(step)[0] for c in (whole, few))
        assert a.ids == b.ids and torch.equal(a.latents, b.latents) and torch.equal(a.weight, b.weight)
        assert torch.equal(a.cond.prompt, b.cond.prompt)
    shorter = of_run(table, steps=2)
    assert len(cache_identity.open_cache(shorter, tmp_path / "few", encoders="fake", kind="sdxl")) == 48
    with pytest.raises(CacheError, match=r"the 12 pairs that another run visits .* Of the 16 .*steps = 4.* 4 are"):
        cache_identity.open_cache(of_run(table, steps=4), tmp_path / "few", encoders="fake", kind="sdxl")
    with pytest.raises(CacheError, match="run.seed = 2"):
        cache_identity.open_cache(of_run(table, seed=2), tmp_path / "few", encoders="fake", kind="sdxl")
    with pytest.raises(CacheError, match="has no latents: the cache was prepared with data.only_visited"):
        few.moments(np.flatnonzero(~few.encoded)[:1], np.zeros((1, 2), bool))


def test_a_survey_scores_every_pair_and_nothing_scores_it_again(tmp_path: Path) -> None:
    class Counting(FakeScorer):
        scored = 0

        def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
            Counting.scored += len(images)
            return super().__call__(images, prompts)

    table = write_table(tmp_path / "t.parquet", 40, label_0=None)
    few = run(of_run(table, only_visited=True), tmp_path / "few", scorer=Counting())
    assert few.encoded.sum() < 40 and Counting.scored == 2 * 40
    whole = run(of_run(table), tmp_path / "whole", scorer=FakeScorer())
    assert np.array_equal(few.rewards, whole.rewards)


def test_a_visited_pair_that_cannot_be_encoded_is_replaced_as_a_whole_cache_would(tmp_path: Path) -> None:
    class Fragile(FakeEncoders):
        def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            if any((pixels.amax(dim=(1, 2, 3)) == (50 + 2 * row) / 127.5 - 1).any() for row in range(0, 60, 4)):
                raise FloatingPointError("NaN")
            return super().encode_images(pixels)

    table = write_table(tmp_path / "t.parquet", 40)
    run(of_run(table), tmp_path / "whole", encoders=Fragile(), batch=2)
    few = run(of_run(table, only_visited=True), tmp_path / "few", encoders=Fragile(), batch=2)
    whole = CachedPairs(tmp_path / "whole")
    rejected = {row for row, _, _ in few.rejections()}
    assert rejected and rejected <= {row for row, _, _ in whole.rejections()}
    wanted = visited(of_run(table), few.rewards, few.labels, few.shapes)
    assert few.encoded[wanted].all()


# --- buckets --------------------------------------------------------------------------------------------------------


def test_buckets_keep_the_aspect_of_both_pictures_and_say_what_was_cut(tmp_path: Path) -> None:
    sizes = [((40, 32), (40, 32)), ((96, 32), (96, 40)), ((32, 96), (40, 96)), ((64, 32), (32, 64))]
    tables = [[png(50 + picture, sizes[i % 4][picture]) for i in range(12)] for picture in range(2)]
    table = write_table(tmp_path / "t.parquet", 12, jpg_0=tables[0], jpg_1=tables[1])
    cached = run(settings(table, buckets=True), tmp_path / "c", batch=5)
    assert problems(cached.root) == []
    shapes = cached.pixels[cached.shapes]
    for row in range(12):
        both = [sizes[row % 4][picture][::-1] for picture in range(2)]
        wanted = aspect_buckets.choose(aspect_buckets.buckets(32), both)
        assert tuple(shapes[row]) == wanted
        for picture in range(2):
            pixels, frame = aspect_buckets.fit(decode(png(50 + picture, both[picture][::-1])), wanted)
            assert tuple(cached.frames[row, picture]) == frame
            moved = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
            mean = cached.moments([row], np.zeros((1, 2), bool))[0][0, picture]
            assert torch.equal(mean, FakeEncoders().encode_images(moved)[0][0].half().float())
    with pytest.raises(CacheError, match=r"buckets \(data.buckets\): found True, wanted False"):
        run(settings(table), tmp_path / "c")


# --- at size --------------------------------------------------------------------------------------------------------


def large_table(path: Path, rows: int) -> Path:
    """Pairs of 256 px JPEGs of about 40 kB, 100 to a row group, with a prompt to every seven pairs."""
    noise = np.random.default_rng(0)
    coarse = [Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(40)]
    files = []
    for picture in coarse:
        file = io.BytesIO()
        picture.resize((256, 256)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    kinds = {"caption": pa.string(), "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64()}
    schema = pa.schema(list(kinds.items()))
    with pq.ParquetWriter(path, schema, compression="none") as table:
        for first in range(0, rows, 100):
            here = range(first, first + 100)
            columns = [[f"a picture of {i // 7}" for i in here]]
            # bytes behind a JPEG's end are not read: no two cells are equal, as in real tables
            columns += [[files[(i + 7 * k) % 40] + i.to_bytes(4, "big") for i in here] for k in range(2)]
            table.write_table(pa.table([*columns, [float(i % 2) for i in here]], schema=schema))
    return path


def peak_megabytes(words: list[str], log: Path) -> float:
    """The most memory a program had at a time."""
    with log.open("w") as out:
        child = subprocess.Popen([sys.executable, "-m", *words], stdout=out, stderr=out, cwd=Path(__file__).parents[2])
        _, status, usage = os.wait4(child.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, log.read_text()[-3000:]
    return usage.ru_maxrss / 1024


@pytest.mark.slow
def test_ten_thousand_pairs_take_no_more_memory_than_a_thousand(tmp_path: Path) -> None:
    peaks: dict[int, list[float]] = {}
    for rows in (1000, 10_000):
        words = [f"run.dir={tmp_path / str(rows)}", f"data.pairs={large_table(tmp_path / f'{rows}.parquet', rows)}"]
        began = time.monotonic()
        prepared = peak_megabytes(["smpo_fast.cli", "prepare", *words, "data.flip=true"], tmp_path / "prepare.log")
        seconds = time.monotonic() - began
        words += ["run.steps=1", "batch.pairs_per_step=8", "data.flip=true", "eval.prompts=", "log.tensorboard=false"]
        trained = peak_megabytes(["smpo_fast.train", *words], tmp_path / "train.log")
        peaks[rows] = [prepared, trained]
        size = (tmp_path / f"{rows}.parquet").stat().st_size / 1e6
        print(
            f"\n{rows} pairs, {size:.0f} MB: prepare {seconds:.0f} s ({rows / seconds:.0f} pairs/s), peak memory "
            f"{prepared:.0f} MB; training start, peak memory {trained:.0f} MB"
        )
        assert len(CachedPairs(tmp_path / str(rows) / "cache")) == rows
    assert peaks[10_000][0] - peaks[1000][0] < 60
    assert peaks[10_000][1] - peaks[1000][1] < 60


# --- in a bucket of another kind ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fetched", range(4))
def test_a_fetch_that_is_interrupted_leaves_no_cache(
    fetched: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the next start fetches the index again."""
    run(settings(write_table(tmp_path / "t.parquet")), tmp_path / "c")
    url = f"memory://{tmp_path.name}/interrupted"
    location.send(tmp_path / "c", url)
    left, fetch = [fetched], RemoteFolder.fetch

    def limited(self: RemoteFolder, names: Sequence[str], folder: Path) -> None:
        for name in names:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            fetch(self, [name], folder)

    monkeypatch.setattr(RemoteFolder, "fetch", limited)
    with pytest.raises(KeyboardInterrupt):
        location.fetch_index(tmp_path / "here", url)
    assert not location.exists(tmp_path / "here")
    monkeypatch.undo()
    assert location.fetch_index(tmp_path / "here", url) and location.exists(tmp_path / "here")


def test_an_upload_replaces_files_of_another_cache_that_have_the_same_length(tmp_path: Path) -> None:
    """And one that was interrupted sends only what is missing."""
    run(settings(write_table(tmp_path / "t.parquet")), tmp_path / "c")
    bucket = RemoteFolder(f"memory://{tmp_path.name}/other")
    names = sorted(file.name for file in (tmp_path / "c").iterdir())

    def stored(name: str) -> bytes:
        return bytes(bucket._system.cat_file(f"{bucket._path}/{name}"))

    for name in names:
        content = (tmp_path / "c" / name).read_bytes()
        bucket._system.pipe_file(f"{bucket._path}/{name}", content[:-1] + bytes([content[-1] ^ 1]))
    put, left = bucket._put, [3]  # the mark, and two files

    def limited(file: Path, name: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        put(file, name)

    bucket._put = limited  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        bucket.send(tmp_path / "c", [name for name in names if name != "cache.json"], "cache.json")
    bucket._put = put  # type: ignore[method-assign]
    assert bucket.size("cache.json") is None, "nobody takes a half-replaced cache for one"
    assert location.send(tmp_path / "c", bucket.url) == len(names) - 2
    assert all(stored(name) == (tmp_path / "c" / name).read_bytes() for name in names)
    assert location.send(tmp_path / "c", bucket.url) == 0
    assert sorted(Path(path).name for path in bucket._system.ls(bucket._path, detail=False)) == names


def test_a_cache_at_a_url_is_sent_there_and_fetched_shard_by_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, url = write_table(tmp_path / "t.parquet"), f"memory://{tmp_path.name}/cache"
    monkeypatch.setattr(pipeline, "SHARD_BYTES", 3000)

    def there(run_dir: str) -> Config:
        sections = {
            "data": {"pairs": str(table), "resolution": 32, "cache": url},
            "run": {"dir": str(tmp_path / run_dir)},
        }
        return loading.from_dict(sections)

    one = there("one")
    made = run(one, location.locate(one))
    assert f"{url}: {len(made.info.files) + 1} files uploaded" in capsys.readouterr().out
    run(one, location.locate(one))
    assert "files uploaded" not in capsys.readouterr().out

    two, encoders = there("two"), FakeEncoders()
    root = location.locate(two)
    assert root == tmp_path / "two" / "cache"
    prepare.prepare(two, encoders, CPU, root)
    assert encoders.calls == []
    cached = cache_identity.open_cache(two, root, encoders="fake", kind="sdxl")
    assert list(root.glob("*.safetensors")) == []
    assert torch.equal(cached.moments([7], np.zeros((1, 2), bool))[0], made.moments([7], np.zeros((1, 2), bool))[0])
    assert len(list(root.glob("latents-*"))) == 1

    bucket = RemoteFolder(url)
    bucket._system.pipe_file(f"{bucket._path}/latents-00000.safetensors", b"x" * 100)
    with pytest.raises(CacheError, match=f"{url}/latents-00000.safetensors: its content is not what cache.json says"):
        cached.moments([0], np.zeros((1, 2), bool))
    whole = (tmp_path / "one" / "cache" / "latents-00000.safetensors").read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    bucket._system.pipe_file(f"{bucket._path}/latents-00000.safetensors", flipped)
    with pytest.raises(CacheError, match=f"{url}/latents-00000.safetensors: its content is not what cache.json says"):
        cached.moments([0], np.zeros((1, 2), bool))
    assert sorted(file.name for file in root.glob("*latents-00000*")) == []
    (root / "latents-00000.safetensors").write_bytes(flipped)  # as fetched by a version that compared sizes only
    with pytest.raises(CacheError, match="latents-00000.safetensors: its content has changed"):
        cached.moments([0], np.zeros((1, 2), bool))
    (root / "latents-00000.safetensors").unlink()
    with pytest.raises(UserError, match="needs the package s3fs"):
        location.locate(loading.from_dict({"data": {"cache": "s3://a/b"}, "run": {"dir": str(tmp_path / "three")}}))


@needs_samples
def test_hostile_pairs_are_all_accounted_for(tmp_path: Path) -> None:
    path = SAMPLES / "hostile_pairs.parquet"
    pairs = run(settings(path), tmp_path / "c", batch=3)
    cases = pq.read_table(path, columns=["case"])["case"].to_pylist()
    assert sorted([*pairs.rows.tolist(), *(row for row, _, _ in pairs.rejections())]) == list(range(len(cases)))
    rejected = {cases[row]: reason.partition(":")[0] for row, _, reason in pairs.rejections()}
    assert rejected == {
        "truncated jpeg": "jpg_0 cannot be decoded",
        "not an image": "jpg_0 not a picture",
        "empty bytes": "jpg_0 holds no bytes",
        "null image": "jpg_0 holds no bytes",
        "1x1 pixel": "jpg_0 too small",
        "null caption": "no caption",
        "nan label": "no preference",
        "label out of range": "label outside 0 to 1",
        "identical images": "the same picture twice",
        "nan reward": "one reward of two",
        "inf reward": "reward is not finite",
    }
    labels = weigh(Labels(), pairs.rewards, pairs.labels)
    assert labels.report.by_human == 10
    assert labels.report.ties_dropped == 1
    table = pq.read_table(path)
    for row, prompt, label in zip(pairs.rows, pairs.prompt_index, pairs.labels, strict=True):
        assert pairs.texts[prompt] == table["caption"][row].as_py()
        assert label == table["label_0"][row].as_py()


@needs_samples
@pytest.mark.parametrize("kinds", ["both", "labels", "rewards"])
def test_real_pairs_with_labels_rewards_or_both(tmp_path: Path, kinds: str) -> None:
    table = pq.read_table(SAMPLES / "real_pairs.parquet")
    if kinds == "labels":
        table = table.drop_columns(["reward_0", "reward_1"])
    if kinds == "rewards":
        table = table.drop_columns(["label_0", "label_1"])
    pq.write_table(table, tmp_path / "t.parquet")
    pairs = run(settings(tmp_path / "t.parquet", resolution=64), tmp_path / "c")
    report = weigh(Labels(), pairs.rewards, pairs.labels).report
    expected = {"both": (23, 6, 16), "labels": (23, 0, 22), "rewards": (7, 7, 0)}[kinds]
    assert (report.pairs, report.by_reward, report.by_human) == expected
    if kinds == "both":
        assert (report.compared, report.agreement) == (6, 1.0)
        with pytest.raises(UserError, match="16 of 23 pairs have no rewards"):
            weigh(Labels(source="reward"), pairs.rewards, pairs.labels)


def test_a_call_of_the_vae_has_few_large_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Counting(FakeEncoders):
        def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            calls.append(len(pixels))
            return super().encode_images(pixels)

    given = settings(write_table(tmp_path / "t.parquet", 4))
    side = given.data.resolution
    monkeypatch.setattr(stages, "CALL_PIXELS", 3 * side * side)
    run(given, tmp_path / "few", encoders=Counting(), batch=8)
    monkeypatch.setattr(stages, "CALL_PIXELS", 1)
    few, _ = max(calls), calls.clear()
    run(given, tmp_path / "one", encoders=Counting(), batch=8)
    assert (few, max(calls)) == (3, 1)
