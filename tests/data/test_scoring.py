"""smpo score: every picture once, whatever is killed; combinations; and what prepare makes of the scores."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.clip import write_clip
from helpers.encoders import FakeEncoders
from PIL import Image

from smpo_fast import cli
from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.config.commands import ScoreOptions
from smpo_fast.config.schema import Labels
from smpo_fast.data.cache import identity, prepare
from smpo_fast.data.cache.format import CacheError
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair, Rejected
from smpo_fast.data.rewards import half_precision, scoring_work
from smpo_fast.data.rewards.combination import combine
from smpo_fast.data.rewards.score_table import ScoreTable
from smpo_fast.data.rewards.scoring import score

ALONE = World()
# A taste that counts: every picture it is shown leaves a line in the file of LOG.
TASTE = """
import os, signal
import numpy

def red(images, prompts):
    if os.environ.get("LOG"):
        with open(os.environ["LOG"], "a") as log:
            for image, prompt in zip(images, prompts):
                log.write(f"{numpy.asarray(image)[0, -1, 0]} {prompt}\\n")
            log.flush()
            if sum(1 for _ in open(os.environ["LOG"])) >= int(os.environ.get("KILL_AFTER", "1000")):
                os.kill(os.getpid(), signal.SIGKILL)
    return [float(numpy.asarray(i)[..., 0].mean()) + len(p) for i, p in zip(images, prompts)]

def green(images, prompts):
    return [float(numpy.asarray(i)[..., 1].mean()) for i in images]

def picky(images, prompts):
    return [float("nan") if numpy.asarray(i)[0, 0, 0] == 7 else 1.0 * numpy.asarray(i)[0, 0, 0] for i in images]

def same(images, prompts):
    return [1.0] * len(images)
"""


@pytest.fixture
def taste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "counting_taste.py").write_text(TASTE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield folder
    sys.modules.pop("counting_taste", None)


def png(red: int, green: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (red, green, 0)).save(file, "PNG")
    return file.getvalue()


def write_table(path: Path, rows: Sequence[tuple[Any, ...]]) -> Path:
    """rows: prompt, picture 0, picture 1, label."""
    names = ("caption", "jpg_0", "jpg_1", "label_0")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path, row_group_size=7)
    return path


def ring(count: int) -> list[tuple[Any, ...]]:
    """Pairs of neighbours: every picture is in two of them."""
    return [("p", png(i), png((i + 1) % count), float(i % 2)) for i in range(count)]


def usable(rows: Any) -> list[RawPair]:
    return [row for row in rows if isinstance(row, RawPair)]


def test_each_picture_is_scored_once_with_each_of_its_prompts(tmp_path: Path, taste: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(scoring_work, "PART_ROWS", 4)
    table = write_table(tmp_path / "t.parquet", [*ring(10), ("other", png(3), png(4), 1.0)])
    facts = score(str(table), tmp_path / "out", ScoreOptions(scorer="counting_taste:red", batch=3), ALONE, Labels())
    assert facts["counts"] == {"pairs": 11, "pictures": 12, "rejected": {}}
    assert sorted((tmp_path / "log").read_text().split("\n")[:-1]) == sorted(
        [*(f"{i} p" for i in range(10)), "3 other", "4 other"]
    )
    found = usable(ScoreTable(tmp_path / "out").with_rewards(reader.read_pairs(table)))
    assert [pair.rewards for pair in found] == [*((i + 1.0, (i + 1) % 10 + 1.0) for i in range(10)), (8.0, 9.0)]
    key = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()[0]
    assert key["picture"] in {hashlib.sha256(png(i)).digest() for i in range(10)}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "labels.json", "labels.png", "pairs.parquet", "rejected.parquet", "scores.json", "scores.parquet",
    ]  # fmt: skip
    assert not list(tmp_path.glob(".*"))


VICTIM = """
import sys
from pathlib import Path
from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Labels
from smpo_fast.data.rewards import scoring, scoring_work

scoring_work.PART_ROWS = 8
options = scoring.ScoreOptions(scorer="counting_taste:red", batch=2)
scoring.score(sys.argv[1], Path(sys.argv[2]), options, World(), Labels())
"""


def test_a_killed_process_and_two_that_go_on_lose_and_repeat_nothing(
    tmp_path: Path, taste: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, out = write_table(tmp_path / "t.parquet", ring(60)), tmp_path / "out"
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    environment = {**os.environ, "KILL_AFTER": "10", "OMP_NUM_THREADS": "1"}
    victim = subprocess.run([sys.executable, "-c", VICTIM, table, out], env=environment, capture_output=True, text=True)
    assert victim.returncode == -signal.SIGKILL, victim.stderr
    in_flight = (tmp_path / "log").read_text().splitlines()[-2:]  # the batch that the kill met
    monkeypatch.setattr(scoring_work, "PART_ROWS", 8)
    options = ScoreOptions(scorer="counting_taste:red", batch=2)
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(score, str(table), out, options, World(rank, 2), Labels()) for rank in range(2)]
        facts = [rank.result(timeout=120) for rank in ranks]
    assert facts[0] == facts[1]
    seen = (tmp_path / "log").read_text().splitlines()
    assert sorted(seen) == sorted([*(f"{i} p" for i in range(60)), *in_flight])
    found = usable(ScoreTable(out).with_rewards(reader.read_pairs(table)))
    assert [pair.rewards for pair in found] == [(i + 1.0, (i + 1) % 60 + 1.0) for i in range(60)]
    assert not list(tmp_path.glob(".*"))


def score_until_killed(table: Path, out: Path, calls: int) -> bool:
    """Whether scoring, in a child that is killed at its ``calls``-th call into the package, came to its end."""
    child = os.fork()
    if not child:
        left = [calls]

        def count(frame: Any, event: str, arg: object) -> None:
            if event == "call" and "smpo_fast" in frame.f_code.co_filename:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(count)
            score(str(table), out, ScoreOptions(scorer="counting_taste:red", batch=2), ALONE, Labels())
            sys.setprofile(None)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def test_killed_at_twenty_points_nothing_is_lost_and_at_most_a_batch_repeated(
    tmp_path: Path, taste: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_work, "PART_ROWS", 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    table, rng, total = write_table(tmp_path / "t.parquet", ring(20)), np.random.default_rng(0), 0
    for attempt in range(100):
        out, kills = tmp_path / f"out-{attempt}", 0
        monkeypatch.setenv("LOG", str(tmp_path / f"log-{attempt}"))
        while not score_until_killed(table, out, int(rng.integers(30, 700 + 100 * kills))):
            kills += 1
        seen = (tmp_path / f"log-{attempt}").read_text().splitlines()
        assert set(seen) == {f"{i} p" for i in range(20)}
        assert len(seen) <= 20 + 2 * kills
        found = usable(ScoreTable(out).with_rewards(reader.read_pairs(table)))
        assert [pair.rewards for pair in found] == [(i + 1.0, (i + 1) % 20 + 1.0) for i in range(20)]
        assert not list(tmp_path.glob(".*"))
        total += kills
        if total >= 20:
            return
    raise AssertionError(f"{total} kills")


def interrupted_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """The taste fails at a call, as an interruption would end it."""
    import counting_taste

    left, red = [calls], counting_taste.red

    def failing(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        if not left[0]:
            monkeypatch.setattr(counting_taste, "red", red)
            raise RuntimeError("interrupted")
        left[0] -= 1
        return red(images, prompts)

    monkeypatch.setattr(counting_taste, "red", failing)


@pytest.mark.parametrize("calls", [0, 1, 2, 4])
def test_an_interrupted_part_goes_on_behind_its_last_batch(
    calls: int, tmp_path: Path, taste: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(scoring_work, "PART_ROWS", 5)
    table, out = write_table(tmp_path / "t.parquet", ring(12)), tmp_path / "out"
    options = ScoreOptions(scorer="counting_taste:red", batch=2)
    interrupted_after(monkeypatch, calls)
    with pytest.raises(RuntimeError, match="interrupted"):
        score(str(table), out, options, ALONE, Labels())
    score(str(table), out, options, ALONE, Labels())
    assert sorted((tmp_path / "log").read_text().splitlines()) == sorted(f"{i} p" for i in range(12))
    found = usable(ScoreTable(out).with_rewards(reader.read_pairs(table)))
    assert [pair.rewards for pair in found] == [(i + 1.0, (i + 1) % 12 + 1.0) for i in range(12)]


def test_a_table_that_changes_while_it_is_scored_is_noticed(
    tmp_path: Path, taste: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images were counted already when they are replaced; names and sizes of its files stay."""
    table, options = tmp_path / "t.parquet", ScoreOptions(scorer="counting_taste:red")
    one, other = next((a, b) for a, b in pairwise(map(png, range(100, 250))) if len(a) == len(b))
    columns = {"caption": ["p"], "jpg_0": [one], "jpg_1": [png(9)], "label_0": [1.0]}
    pq.write_table(pa.table(columns), table, compression="none", use_dictionary=False)
    interrupted_after(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="interrupted"):
        score(str(table), tmp_path / "out", options, ALONE, Labels())
    table.write_bytes(table.read_bytes().replace(one, other))
    with pytest.raises(UserError, match=r"row 0 of .* changed while it was scored"):
        score(str(table), tmp_path / "out", options, ALONE, Labels())


def test_a_kill_just_after_publishing_leaves_nothing_for_good(tmp_path: Path, taste: Path) -> None:
    table, out = write_table(tmp_path / "t.parquet", ring(4)), tmp_path / "out"
    options = ScoreOptions(scorer="counting_taste:red")
    score(str(table), out, options, ALONE, Labels())
    files = sorted(out.iterdir())
    for leftover in ("all.lock", "last.lock"):
        (out / leftover).touch()
    score(str(table), out, options, ALONE, Labels())
    assert sorted(out.iterdir()) == files


def test_scores_that_are_there_are_reported_on_again_and_others_refused(
    tmp_path: Path, taste: Path, monkeypatch: Any
) -> None:
    table = write_table(tmp_path / "t.parquet", ring(6))
    words = ["score", str(table), str(tmp_path / "out"), "--scorer", "counting_taste:red"]
    assert cli.main(words) == 0
    before = json.loads((tmp_path / "out" / "labels.json").read_text())
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    assert cli.main([*words, "--set", "labels.temperature=0.5"]) == 0
    after = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert not (tmp_path / "log").exists()
    assert after["report"]["weight_mean"] > before["report"]["weight_mean"]
    assert before["labels"]["gamma"] == 10, "the labels are those of no run"
    with pytest.raises(UserError, match="holds other scores .they differ in scorers"):
        score(str(table), tmp_path / "out", ScoreOptions(scorer="counting_taste:green"), ALONE, Labels())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear me")
    with pytest.raises(UserError, match="holds no scores"):
        score(str(table), tmp_path / "full", ScoreOptions(scorer="counting_taste:red"), ALONE, Labels())


def test_bad_rows_and_bad_scores_are_rejected_and_counted(tmp_path: Path, taste: Path) -> None:
    rows = [
        ("p", png(1), png(2), 1.0),
        ("p", png(3), b"junk" * 9, 1.0),
        (None, png(1), png(2), 0.0),
        ("p", png(7), png(2), 1.0),
    ]
    table = write_table(tmp_path / "t.parquet", rows)
    facts = score(str(table), tmp_path / "out", ScoreOptions(scorer="counting_taste:picky"), ALONE, Labels())
    assert facts["counts"]["pairs"] == 1
    reasons = {r["row"]: r["reason"] for r in pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()}
    assert "jpg_1 not a picture" in reasons[1]
    assert reasons[2].startswith("no caption")
    assert reasons[3] == "jpg_0 the scorer gave no finite score: nan"
    assert sum(facts["counts"]["rejected"].values()) == 3
    found = list(ScoreTable(tmp_path / "out").with_rewards(reader.read_pairs(table)))
    assert [isinstance(item, Rejected) for item in found] == [False, True, True, True]


def test_a_combination_is_the_weighted_sum_of_standard_scores(tmp_path: Path, taste: Path) -> None:
    name = "0.7*counting_taste:red + -2*counting_taste:green"
    raw = np.array([[1, 10], [2, 10], [6, 40]])
    combined, constants = combine(name, raw)
    # mean 3, std sqrt(14/3); mean 20, std sqrt(200)
    by_hand = 0.7 * (raw[:, 0] - 3) / np.sqrt(14 / 3) - 2 * (raw[:, 1] - 20) / np.sqrt(200)
    np.testing.assert_allclose(combined, by_hand, rtol=1e-12)
    assert [c["weight"] for c in constants] == [0.7, -2]
    table = write_table(tmp_path / "t.parquet", [("p", png(i, 3 * i * i), png(i + 1, 5), 1.0) for i in range(5)])
    facts = score(str(table), tmp_path / "out", ScoreOptions(scorer=name), ALONE, Labels())
    stored = pq.read_table(tmp_path / "out" / "scores.parquet")
    parts = [np.array(stored[n].to_pylist()) for n in ("counting_taste:red", "counting_taste:green")]
    again = sum(c["weight"] * (p - c["mean"]) / c["std"] for c, p in zip(facts["scorers"], parts, strict=True))
    np.testing.assert_allclose(stored["score"].to_numpy(), again, rtol=1e-6)
    np.testing.assert_allclose([p.mean() for p in parts], [c["mean"] for c in facts["scorers"]], rtol=1e-6)
    with pytest.raises(UserError, match="gives all images the same score"):
        combine("1*a + 1*b", np.array([[1, 2], [1, 3]], np.float32))


def test_half_precision_that_gives_nan_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {False: np.array([1.0, 2.0]), True: np.array([1.0, np.nan])}
    monkeypatch.setattr(half_precision, "load_scorer", lambda name, device, half: lambda *_: scores[half])
    assert half_precision.compare(["clip"], [], [], torch.device("cpu"))["half"] == {"clip": False}


def test_half_precision_is_taken_where_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, rng = write_clip(tmp_path / "clip"), np.random.default_rng(0)
    pictures = []
    for _ in range(10):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
        pictures.append(file.getvalue())
    table = write_table(tmp_path / "t.parquet", [(f"cat {i}", pictures[i], pictures[i + 1], 1.0) for i in range(9)])
    name = f"pickscore:{clip}"
    exact = score(str(table), tmp_path / "full", ScoreOptions(scorer=name), ALONE, Labels())
    monkeypatch.setattr(half_precision, "TOLERANCE", 1.0)
    half = score(str(table), tmp_path / "half", ScoreOptions(scorer=name, half=True), ALONE, Labels())
    assert half["half"] == {name: True}
    assert "float16 differs from float32 by at most" in capsys.readouterr().out
    difference = np.abs(
        pq.read_table(tmp_path / "full" / "scores.parquet")["score"].to_numpy()
        - pq.read_table(tmp_path / "half" / "scores.parquet")["score"].to_numpy()
    )
    assert 0 < difference.max() < 0.05
    monkeypatch.setattr(half_precision, "TOLERANCE", 1e-9)
    refused = score(str(table), tmp_path / "refused", ScoreOptions(scorer=name, half=True), ALONE, Labels())
    assert refused["half"] == {name: False}
    assert refused["sha256"] == exact["sha256"]
    assert "float32 is used" in capsys.readouterr().err
    with pytest.raises(UserError, match="no half precision"):
        score(str(table), tmp_path / "no", ScoreOptions(scorer="embedded", half=True), ALONE, Labels())


def test_an_image_without_a_score_changes_no_constant_of_a_combination() -> None:
    raw = np.array([[1.0, 20.0], [np.nan, 7.0], [3.0, 10.0]], np.float32)
    found, constants = combine("0.5*clip + 0.5*aesthetic", raw)
    assert [(fact["mean"], fact["std"]) for fact in constants] == [(2.0, 1.0), (15.0, 5.0)]
    assert found[[0, 2]].tolist() == [0.0, 0.0] and np.isnan(found[1])


def test_prepare_takes_the_scores_for_rewards(tmp_path: Path, taste: Path) -> None:
    rows = [("p", png(i), png(3 * i + 20, 9), float(i % 2)) for i in range(6)]
    table = write_table(tmp_path / "t.parquet", rows)
    score(str(table), tmp_path / "out", ScoreOptions(scorer="counting_taste:red"), ALONE, Labels())
    write_table(table, [*rows, ("p", png(250), png(251), 1.0)])  # grown since
    given = {"data": {"pairs": str(table), "resolution": 32, "flip": False}}

    def prepared(**more: str) -> CachedPairs:
        settings = loading.from_dict({"data": {**given["data"], **more}})
        prepare.prepare(settings, FakeEncoders(), torch.device("cpu"), tmp_path / "cache")
        return identity.open_cache(settings, tmp_path / "cache", encoders="fake", kind="sdxl")

    cached = prepared(scores=str(tmp_path / "out"))
    np.testing.assert_array_equal(cached.rewards, [(i + 1.0, 3 * i + 21.0) for i in range(6)])
    ((row, _, reason),) = cached.rejections()
    assert (row, reason) == (6, "not in data.scores: picture 0 with this prompt was not scored")
    with pytest.raises(CacheError, match="data.scores"):
        prepared()
    with pytest.raises(UserError, match="scores = .* and scorer = .*: give one"):
        prepared(scores=str(tmp_path / "out"), scorer="embedded")
    with pytest.raises(UserError, match="holds no finished scores"):
        prepared(scores=str(tmp_path / "nowhere"))


def test_damaged_scores_are_refused(tmp_path: Path, taste: Path) -> None:
    table, out = write_table(tmp_path / "t.parquet", ring(6)), tmp_path / "out"
    score(str(table), out, ScoreOptions(scorer="counting_taste:red"), ALONE, Labels())
    content = (out / "scores.parquet").read_bytes()
    (out / "scores.parquet").write_bytes(content[:-9])
    with pytest.raises(UserError, match=f"has {len(content) - 9} bytes, scores.json says {len(content)}"):
        ScoreTable(out)
    (out / "scores.parquet").write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match="has changed since it was written"):
        ScoreTable(out)


def test_a_flipped_bit_in_scores_is_refused(tmp_path: Path, taste: Path) -> None:
    table, out = write_table(tmp_path / "t.parquet", ring(4)), tmp_path / "out"
    score(str(table), out, ScoreOptions(scorer="counting_taste:red"), ALONE, Labels())
    facts, content = (out / "scores.json").read_text(), bytearray((out / "scores.parquet").read_bytes())
    content[len(content) // 3] ^= 1
    (out / "scores.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"scores.parquet has changed since it was written .*: score again"):
        ScoreTable(out)
    for damaged in (facts.replace('"bytes"', '"bytus"'), "[]", "7"):
        (out / "scores.json").write_text(damaged)
        with pytest.raises(UserError, match="holds no finished scores .*: make them with smpo score"):
            ScoreTable(out)


def test_what_cannot_be_scored_is_said(tmp_path: Path, taste: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "t.parquet", [("p", b"junk" * 9, png(1), 1.0)])
    assert cli.main(["score", str(table), str(tmp_path / "out"), "--scorer", "counting_taste:same"]) == 2
    assert "no pair could be scored" in capsys.readouterr().err
    assert cli.main(["score", str(table), str(tmp_path / "out"), "--scorer", "1*nonsense + 1*embedded"]) == 2
    assert "--scorer: scorer 'nonsense' is unknown" in capsys.readouterr().err
    assert cli.main(["score", str(tmp_path / "no"), str(tmp_path / "out"), "--scorer", "embedded"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path, taste: Path) -> None:
    """Prints the figures of docs/data.md: run with -s."""
    gained = {}
    for pairs in (1000, 10000):
        rng, names = np.random.default_rng(0), ("caption", "jpg_0", "jpg_1", "label_0")
        table = tmp_path / f"{pairs}.parquet"
        schema = pa.schema(zip(names, (pa.string(), pa.binary(), pa.binary(), pa.float64()), strict=True))
        with pq.ParquetWriter(table, schema) as writer:
            for first in range(0, pairs, 100):
                noise = rng.integers(0, 256, (200, 180, 180, 3), dtype=np.uint8)
                encoded = []
                for picture in noise:
                    file = io.BytesIO()
                    Image.fromarray(picture).save(file, "BMP")
                    encoded.append(file.getvalue())
                rows = [[f"prompt {first + i}" for i in range(100)], encoded[::2], encoded[1::2], [1.0] * 100]
                writer.write_table(pa.table(rows, schema=schema))
        code = (
            "import re, sys, time; from pathlib import Path; from smpo_fast.data.rewards import scoring;"
            "from smpo_fast.config.commands import ScoreOptions; from smpo_fast.config.schema import Labels;"
            "from smpo_fast.common.runtime import World;"
            "status = Path('/proc/self/status');"
            "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) / 1024; before = peak();"
            "began = time.monotonic(); options = ScoreOptions(scorer='counting_taste:red');"
            "scoring.score(sys.argv[1], Path(sys.argv[2]), options, World(), Labels());"
            "print(peak() - before, time.monotonic() - began)"
        )
        words = [sys.executable, "-c", code, str(table), str(tmp_path / f"out-{pairs}")]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        memory, seconds = map(float, done.stdout.splitlines()[-1].split())
        gained[pairs] = memory
        print(f"{pairs} pairs: {memory:.0f} MB over the start, {2 * pairs / seconds:.0f} pictures/s")
    assert gained[10000] < gained[1000] + 40
