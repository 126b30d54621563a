"""From a table of pairs to a cache: nothing stops it, nothing shifts a pair, and a killed run goes on."""

import hashlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from smpo_fast import cache, config, prepare
from smpo_fast.cache import CachedPairs, CacheError
from smpo_fast.config import Config, SettingsError
from smpo_fast.data import decode, to_square
from smpo_fast.labels import weigh

SAMPLES = Path(__file__).parent.parent / os.environ.get("SMPO_PAIRS", "../shared/pairs")
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"no sample pairs at {SAMPLES} (SMPO_PAIRS)")
CPU = torch.device("cpu")


class FakeEncoders:
    """Latents are 8 x 8 means of the pixels, embeddings a function of the prompt's hash."""

    kind, identity = "sdxl", "fake"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(len(pixels))
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        mean = torch.cat([mean, mean.mean(1, keepdim=True)], dim=1)
        return mean, mean.abs() + 0.01

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        seeds = [int.from_bytes(hashlib.sha256(p.encode()).digest()[:4], "little") for p in prompts]
        states = torch.stack([torch.randn(3, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
        return states, states.mean(1)

    def truncated(self, prompts: Sequence[str]) -> int:
        return sum(len(p) > 200 for p in prompts)


class FakeScorer:
    name = identity = "fake"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return np.array([np.asarray(i)[..., 0].mean() for i in images], dtype=np.float32)

    def parts(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"reward": self(images, prompts)}


def png(value: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A picture whose left half is dark and whose right half is ``value``."""
    array = np.zeros((size[1], size[0], 3), np.uint8)
    array[:, size[0] // 2 :] = value
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


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
    return config.from_dict({"data": {"pairs": str(path), "resolution": 32, **data}})


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
            square = to_square(decode(png(50 + picture + 2 * row)), 32)
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
    assert "are they of one reward model?" in capsys.readouterr().err


def test_a_pair_that_cannot_be_scored_is_left_out(tmp_path: Path) -> None:
    class Moody(FakeScorer):
        def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
            return np.array([float("nan") if p == "prompt 2" else i for i, p in enumerate(prompts)], dtype=np.float32)

    pairs = run(settings(write_table(tmp_path / "t.parquet", 4)), tmp_path / "c", scorer=Moody(), batch=4)
    assert pairs.rows.tolist() == [0, 1, 3]
    assert pairs.rewards.tolist() == [[0, 1], [2, 3], [6, 7]]
    assert pairs.rejections() == [(2, "row-2", "the scorer gave no finite score: nan, nan")]


def test_a_pair_the_vae_cannot_encode_is_left_out(tmp_path: Path) -> None:
    class Fragile(FakeEncoders):
        def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            if (pixels.amax(dim=(1, 2, 3)) == 54 / 127.5 - 1).any():
                raise FloatingPointError("NaN")
            mean, std = super().encode_images(pixels)
            return torch.where(mean == mean.max(), 1e6, mean) if (pixels == 59 / 127.5 - 1).any() else mean, std

    pairs = run(settings(write_table(tmp_path / "t.parquet", 6)), tmp_path / "c", encoders=Fragile(), batch=1)
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
    with pytest.raises(SettingsError, match="neither labels .* nor rewards .* give data.scorer"):
        run(settings(write_table(tmp_path / "a.parquet", label_0=None)), tmp_path / "c")
    junk = write_table(tmp_path / "b.parquet", 3, jpg_0=[b"junk"] * 3)
    with pytest.raises(SettingsError, match=r"no usable pair in .*b\.parquet: 3 x jpg_0 not a picture \(row 0, 1, 2\)"):
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
    with pytest.raises(CacheError, match=r"encoders \(model.path or model.vae\): found 'fake', wanted 'other'"):
        run(settings(table), tmp_path / "c", encoders=encoders)
    write_table(table, rows=21)
    with pytest.raises(CacheError, match=r"source \(data.pairs\)"):
        run(settings(table), tmp_path / "c")


def test_hashing_is_spared_for_untouched_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path / "t.parquet", 4)
    run(settings(table), tmp_path / "c")
    hashed: list[Path] = []
    facts = cache.file_facts
    monkeypatch.setattr(cache, "file_facts", lambda file: hashed.append(file) or facts(file))
    prepare.open_cache(settings(table), tmp_path / "c", encoders="fake", kind="sdxl")
    assert hashed == []
    os.utime(table, (1, 1))
    prepare.open_cache(settings(table), tmp_path / "c", encoders="fake", kind="sdxl")
    assert hashed == [table]


def test_a_cache_serves_without_its_source_but_not_for_another_name(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", 4)
    run(settings(table), tmp_path / "c")
    table.unlink()
    assert len(prepare.open_cache(settings(table), tmp_path / "c", encoders="fake", kind="sdxl")) == 4
    with pytest.raises(SettingsError, match="does not exist"):
        prepare.open_cache(settings(tmp_path / "typo.parquet"), tmp_path / "c", encoders="fake", kind="sdxl")


def test_a_folder_of_tables_is_one_table(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    write_table(tmp_path / "t" / "0.parquet", 5)
    write_table(tmp_path / "t" / "1.parquet", 4)
    pairs = run(settings(tmp_path / "t"), tmp_path / "c")
    assert pairs.rows.tolist() == list(range(9))
    assert pairs.labels.tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1]


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from smpo_fast import cache
import test_prepare as t

class Deadly(t.FakeEncoders):
    def encode_images(self, pixels):
        if len(self.calls) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_images(pixels)

cache.SHARD_BYTES = 3000
t.run(t.settings(sys.argv[2]), Path(sys.argv[3]), encoders=Deadly(), batch=2)
"""


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [png(50 + 2 * i) if i % 5 else b"junk" for i in range(20)]
    table = write_table(tmp_path / "t.parquet", jpg_0=bad)
    monkeypatch.setattr(cache, "SHARD_BYTES", 3000)
    run(settings(table), tmp_path / "whole", batch=2)
    here = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(here), str(table), str(tmp_path / "c")]
    child = subprocess.run(command, capture_output=True, cwd=here.parent)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert not (tmp_path / "c").exists()
    assert list((tmp_path / ".c.partial").glob("latents-*"))
    encoders = FakeEncoders()
    run(settings(table), tmp_path / "c", batch=2, encoders=encoders)
    assert 0 < sum(encoders.calls) < 16 * 4
    assert digests(tmp_path / "c") == digests(tmp_path / "whole")
    assert not (tmp_path / ".c.partial").exists()


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
    labels = weigh(config.Labels(), pairs.rewards, pairs.labels)
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
    report = weigh(config.Labels(), pairs.rewards, pairs.labels).report
    expected = {"both": (23, 6, 16), "labels": (23, 0, 22), "rewards": (7, 7, 0)}[kinds]
    assert (report.pairs, report.by_reward, report.by_human) == expected
    if kinds == "both":
        assert (report.compared, report.agreement) == (6, 1.0)
        with pytest.raises(SettingsError, match="16 of 23 pairs have no rewards"):
            weigh(config.Labels(source="reward"), pairs.rewards, pairs.labels)
