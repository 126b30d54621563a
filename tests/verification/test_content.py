"""``smpo verify``: content that is wrong although every hash is right, and what ``--deep`` finds."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import artifacts
from helpers.artifacts import problems, reseal
from helpers.images import noise
from helpers.import_sources import WINNERS
from PIL import Image
from safetensors.torch import load_file, save_file

from smpo_fast import cli
from smpo_fast.common.errors import ConfigError
from smpo_fast.common.storage import file_facts, json_hash
from smpo_fast.config import loading
from smpo_fast.config.commands import ImportOptions
from smpo_fast.config.schema import Config
from smpo_fast.data.ingest.importer import import_pairs
from smpo_fast.data.rewards import score_table


def rewrite_tensors(file: Path, **changed: torch.Tensor) -> None:
    """Replace some tensors of a safetensors file."""
    save_file({**load_file(file), **changed}, file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_in_a_checkpoint(value: float, tmp_path: Path) -> None:
    folder = artifacts.checkpoint_folder(tmp_path)
    (file,) = (folder / "engine").glob("*.safetensors")
    name, tensor = next((n, t) for n, t in load_file(file).items() if n.startswith("weight"))
    rewrite_tensors(file, **{name: torch.full_like(tensor, value)})
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][f"engine/{file.name}"] = file_facts(file)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": json_hash(manifest)}))
    assert [p.partition(": put")[0] for p in problems(folder)] == [f"{file}: {name}: NaN or infinite values"]


@pytest.mark.parametrize("kind", ["weight", "ema"])
def test_a_parameter_with_a_gap_in_a_checkpoint(tmp_path: Path, kind: str) -> None:
    folder = artifacts.checkpoint_folder(tmp_path, ema=0.9)
    assert not problems(folder)
    (file,) = (folder / "engine").glob("*.safetensors")
    stored = load_file(file)
    name = next(n for n in stored if n.startswith(f"{kind}@0+"))
    size = stored[name].numel()
    stored[name.replace(f"@0+{size}/", f"@2+{size}/")] = stored.pop(name)
    save_file(stored, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][f"engine/{file.name}"] = file_facts(file)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": json_hash(manifest)}))
    (problem,) = problems(folder)
    assert f"{name.partition('/')[2]}: its slices leave a gap or overlap" in problem


def test_a_checkpoint_under_another_steps_name(tmp_path: Path) -> None:
    folder = artifacts.checkpoint_folder(tmp_path)
    (problem,) = problems(folder.rename(folder.with_name("step-000007")))
    assert "its manifest is of step 1: rename the folder to step-000001" in problem


def test_a_network_of_an_export_that_lacks_a_tensor(tmp_path: Path) -> None:
    folder = artifacts.pipeline(tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    del stored["conv_in.weight"]
    save_file(stored, file)
    name = "unet/diffusion_pytorch_model.safetensors"
    reseal(folder / "export.json", lambda values: values["files"].update({name: file_facts(file)}))
    (problem,) = problems(folder)
    assert problem.startswith(f"{folder / 'unet'}: ") and "conv_in.weight missing" in problem


@pytest.mark.parametrize("content", ['{"a": 64}', '{"files": 3}'])
def test_a_description_of_an_export_that_lists_no_files(content: str, tmp_path: Path) -> None:
    """As after it was exchanged with another JSON file of the export."""
    folder = artifacts.pipeline(tmp_path)
    (folder / "export.json").write_text(content)
    (problem,) = problems(folder)
    assert "export.json: lists no files: export again" in problem


def test_a_pipeline_of_others_is_verified_without_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = artifacts.pipeline(tmp_path)
    (folder / "export.json").unlink()
    assert cli.main(["verify", str(folder)]) == 0
    assert "an earlier version or another program made this, without hashes" in capsys.readouterr().out
    rewrite_tensors(
        folder / "vae" / "diffusion_pytorch_model.safetensors", **{"quant_conv.bias": torch.tensor([np.nan])}
    )
    (problem,) = problems(folder)
    assert "quant_conv.bias: NaN or infinite values" in problem


def test_a_log_with_a_missing_step_and_with_a_number_that_is_not_finite(tmp_path: Path) -> None:
    folder = artifacts.run(tmp_path)
    (folder / "finished.json").unlink()
    rows = [{"step": step, "applied": True, "train_loss": 0.5} for step in (1, 2, 3)]
    for change, expected in (
        (lambda: rows.pop(1), "its steps are not 1 to 2"),
        (lambda: rows.insert(1, {"step": 2, "applied": True, "train_loss": float("nan")}), "step 2: train_loss is not"),
        (lambda: rows[1].update(applied=False), ""),
    ):
        change()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = problems(folder)
        assert [expected in problem for problem in found] == ([True] if expected else [])


def table_of(folder: Path, **columns: list[object]) -> Path:
    folder.mkdir()
    rows = len(next(iter(columns.values())))
    values = {"caption": ["a"] * rows, "jpg_0": [noise(i) for i in range(rows)], "jpg_1": [noise(9)] * rows}
    pq.write_table(pa.table({**values, "label_0": [1.0] * rows, **columns}), folder / "a.parquet")
    return folder


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    found = problems(table_of(tmp_path / "t", label_0=[1.0, 7.0, 0.0], caption=["a", "b", None]))
    assert "row 1 (row-1) cannot be used: label outside 0 to 1: label_0 = 7" in found[0]
    assert "row 2 (row-2) cannot be used: no caption" in found[1]
    assert "2 of 3 rows cannot be used and are left out: label outside 0 to 1 (1), no caption (1)" in found[2]
    assert problems(tmp_path / "t" / "a.parquet") == [line.replace("/t:", "/t/a.parquet:") for line in found]


def test_an_image_with_a_good_header_is_found_by_decoding_it(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
    folder = table_of(tmp_path / "t", jpg_1=[noise(9), file.getvalue()[:-2000]])
    assert problems(folder) == []
    assert "row 1 (row-1) cannot be used: jpg_1 cannot be decoded" in problems(folder, deep=True)[0]


def test_an_image_file_that_a_table_names_has_changed(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i, content in enumerate((*WINNERS[:2], noise(50), noise(51))):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(content)
    rows = [{"prompt": "p", "chosen": f"{i}.png", "rejected": f"{i + 2}.png"} for i in range(2)]
    (tmp_path / "pictures" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    import_pairs(str(tmp_path / "pictures" / "pairs.jsonl"), out, ImportOptions(paths=True))
    assert problems(out) == []
    image = tmp_path / "pictures" / "1.png"
    image.write_bytes(artifacts.flipped(image.read_bytes(), 0.5))
    assert "jpg_0 has changed: '1.png' is not the image that was imported" in problems(out)[0]


def settings_of(**data: object) -> Config:
    return loading.from_dict({"run": {"device": "cpu"}, "data": data})


def test_scores_that_are_not_those_of_the_pairs(tmp_path: Path) -> None:
    """Each wrong table is sealed with right hashes."""
    folder = artifacts.scores(tmp_path)
    table = pq.read_table(folder / "pairs.parquet")
    changed = table.set_column(2, "score_0", pa.array([9.0] * len(table)))
    pq.write_table(changed, folder / "pairs.parquet")
    facts = file_facts(folder / "pairs.parquet")
    reseal(folder / "scores.json", lambda values: values["files"].update({"pairs.parquet": facts}))
    (problem,) = problems(folder)
    assert "pairs.parquet has scores that are not finite, or that scores.parquet does not have" in problem


def test_scores_of_another_table_are_noticed(tmp_path: Path) -> None:
    folder = artifacts.scores(tmp_path)
    assert problems(folder, settings_of(pairs="embedded")) == []
    other = table_of(tmp_path / "t", label_0=[1.0, 0.0])
    (problem,) = problems(folder, settings_of(pairs=str(other)))
    assert f"2 of 2 pairs of {other} are not scored here, the first is row 0" in problem


def test_deep_scores_a_sample_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = artifacts.scores(tmp_path)
    assert problems(folder, settings_of(), deep=True) == []
    table = score_table.ScoreTable(folder)
    values = pq.read_table(folder / "scores.parquet")
    wrong = values.set_column(2, "score", pa.array(table.scores + 0.01))
    pairs = pq.read_table(folder / "pairs.parquet")
    for i, name in ((2, "score_0"), (3, "score_1")):
        pairs = pairs.set_column(i, name, pa.array(pairs[name].to_numpy() + 0.01))
    pq.write_table(wrong, folder / "scores.parquet")
    pq.write_table(pairs, folder / "pairs.parquet")
    facts = {"files": {n: file_facts(folder / n) for n in ("pairs.parquet", "rejected.parquet")}}
    reseal(folder / "scores.json", lambda v: v.update({**file_facts(folder / "scores.parquet"), **facts}))
    assert problems(folder) == []
    (problem,) = problems(folder, settings_of(), deep=True)
    assert "scored again: they differ by at most 0.01" in problem


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the first embedded pairs, made by the embedded networks."""
    folder = tmp_path_factory.mktemp("prepared")
    assert cli.main(["prepare", f"run.dir={folder}", "data.max_pairs=12", "data.flip=true"]) == 0
    return folder / "cache"


CACHED = ["data.max_pairs=12", "data.flip=true", "run.device=cpu"]


def test_deep_finds_a_cache_bit_for_bit(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(prepared), *CACHED, "--deep"]) == 0
    assert "8 pairs encoded again: they differ by at most 0.0e+00 (relative)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shard", "name", "what"),
    [
        ("latents-00000", "mean", "latents"),
        ("latents-00000", "std", "latents"),
        ("prompts-00000", "pooled", "prompt's"),
    ],
)
def test_deep_finds_what_belongs_to_other_rows(
    shard: str, name: str, what: str, prepared: Path, tmp_path: Path
) -> None:
    """Latents and embeddings that were shifted by a row, with right hashes."""
    cache = Path(shutil.copytree(prepared, tmp_path / "cache"))
    file = cache / f"{shard}.safetensors"
    rewrite_tensors(file, **{name: load_file(file)[name].roll(1, 0)})
    reseal(cache / "cache.json", lambda values: values["files"].update({file.name: file_facts(file)}))
    assert problems(cache) == []
    found = problems(cache, loading.load(None, CACHED), deep=True)
    assert len(found) == 8
    assert all(f"its {what}" in problem and "differ from those encoded again" in problem for problem in found)


def test_deep_names_the_settings_that_it_needs(tmp_path: Path) -> None:
    for path, words in (
        (artifacts.cache(tmp_path), "data.pairs=.. model.path=.."),
        (artifacts.scores(tmp_path), "data.pairs=.."),
    ):
        with pytest.raises(ConfigError, match=words):
            problems(path, deep=True)
