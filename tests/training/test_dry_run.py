"""``--dry-run`` finds what would stop the run later, and says where the run stands. It loads no network."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.small_run import pair_table, run

from smpo_fast.models import load


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "load_network", lambda *_: pytest.fail("a network was loaded"))


def labels(*values: float | None) -> list[dict[str, float | None]]:
    return [{"label_0": value} for value in values]


@pytest.mark.parametrize(
    ("columns", "words", "message"),
    [
        ((), [], "none of 8 pairs has a preference to learn"),
        (("label_0",), ["data.resolution=33"], "data.resolution = 33 is not a multiple of 4"),
        (("label_0",), ["data.resolution=512"], "was made for 32 px"),
        (("label_0",), ["batch.pairs_per_step=12"], "a step draws 12 pairs (batch.pairs_per_step), but only 7 can be"),
        (("label_0",), ["labels.source=human"], "1 of 8 pairs have no human label"),
    ],
)
def test_what_would_stop_the_run_later(
    columns: tuple[str, ...], words: list[str], message: str, no_networks: None, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    table = pair_table(tmp_path / "t.parquet", labels(1, 0, 1, 0, 1, 0, 1, None), columns)
    assert run(tmp_path / "run", f"data.pairs={table}", "data.max_pairs=0", "--dry-run", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pairs_of_a_table_that_is_not_prepared(
    no_networks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pair_table(tmp_path / "t.parquet", labels(1, 0, 1, 0, 1, 0, 1, 0.5, 7, None))
    assert run(tmp_path / "run", f"data.pairs={table}", "data.max_pairs=0", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "10 rows" in out and "cannot be used: 1: label outside 0 to 1 (1)" in out
    assert "labels: 7 of 10 pairs" in out and "1 with a tie, 2 without a preference" in out
    assert "4 steps draw 24 pairs: 3.43 epochs of 7" in out
    assert "will start from the base model, at step 0 of 4" in out
    assert run(tmp_path / "run", f"data.pairs={table}", "data.max_pairs=9", "data.scorer=embedded", "--dry-run") == 0
    assert "data.scorer will score 9 of them" in capsys.readouterr().out


def test_a_table_of_all_columns_is_read_like_the_one_with_images(tmp_path: Path) -> None:
    from smpo_fast.data.pairs import reader
    from smpo_fast.data.pairs.pair import RawPair

    rows: list[dict[str, float | None]] = [
        {"label_0": 1, "label_1": 0, "reward_0": 0.2, "reward_1": 0.1},
        {"label_0": None, "label_1": 1, "reward_0": None, "reward_1": 0.3},
        {"label_0": None, "label_1": 1, "reward_0": None, "reward_1": None},
        {"label_0": 1, "label_1": 1, "reward_0": 1, "reward_1": 2},
    ]
    names = ("label_0", "label_1", "reward_0", "reward_1")
    for part in range(2):
        pair_table(tmp_path / f"{part}.parquet", rows, names)
    for limit in (0, 5):
        found, pairs = (
            reader.read_preferences(tmp_path, max_pairs=limit),
            list(reader.read_pairs(tmp_path, max_pairs=limit)),
        )
        assert len(found.labels) == len(found.rewards) == len(pairs) == (limit or 8)
        for row, (label, rewards) in zip(pairs, zip(found.labels, found.rewards, strict=True), strict=True):
            wanted = (row.label, row.rewards) if isinstance(row, RawPair) else (None, None)
            assert label == pytest.approx(float("nan") if wanted[0] is None else wanted[0], nan_ok=True)
            assert rewards.tolist() == pytest.approx(wanted[1] or [float("nan")] * 2, nan_ok=True)
        assert sum(found.rejected.values()) == sum(not isinstance(row, RawPair) for row in pairs)


def test_where_the_run_stands(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"

    def words(*more: str, status: int = 0) -> str:
        assert run(folder, cache, *more) == status
        said = capsys.readouterr()
        return said.err if status else said.out

    words("run.steps=2")
    said = words("--dry-run")
    assert "will continue from step 2 of 4" in said and "step-000002, verified by hash" in said
    assert "made with other settings: objective.beta" in words("--dry-run", "objective.beta=1.0", status=2)
    assert f"{folder}: the run continues from its checkpoint of step 2 of 4" in words()
    assert "finished: all 4 steps are done" in words("--dry-run")
    assert "all 4 steps are done; what follows the last step is done again" in words()

    before = sorted(folder.rglob("*"))
    said = words("run.steps=3", status=2)
    assert "run.steps = 3, but the run in" in said and "has made 4 steps" in said
    assert sorted(folder.rglob("*")) == before

    manifest = folder / "checkpoints" / "step-000004" / "manifest.json"
    damaged = next((manifest.parent / "engine").iterdir())
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = words("--dry-run", status=2)
    assert f"the contents of engine/{damaged.name} have changed" in said and "The last usable checkpoint is" in said


@pytest.mark.slow
def test_a_merged_pipeline_of_an_earlier_export_is_marked(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = [cache, "lora.rank=2", "run.steps=1"]
    assert run(tmp_path / "run", *lora, "lora.merge=true") == 0
    assert run(tmp_path / "run", *lora) == 0
    assert "earlier export" not in capsys.readouterr().err, "the same adapters"
    assert run(tmp_path / "run", *lora[:2], "run.steps=2") == 0
    assert "merged has the adapters of an earlier export: smpo merge writes it again" in capsys.readouterr().err
    assert run(tmp_path / "run", *lora[:2], "run.steps=2", "lora.merge=true") == 0
    assert "earlier export" not in capsys.readouterr().err
