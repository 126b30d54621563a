"""``smpo verify``: every kind of artefact, good and with each of its files damaged in each way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.artifacts import CPU, MAKERS, flipped
from helpers.formats import FORMATS

from smpo_fast import cli
from smpo_fast.common.storage import SEAL
from smpo_fast.evaluation.image_store import IMAGES
from smpo_fast.verification import report

# Files without which an artefact is one of an earlier version, which did not write them; their absence is a note.
OPTIONAL = {"export.json", "finished.json"}
DESCRIPTIONS = {
    "cache.json", "evaluation.json", "export.json", "finished.json", "import.json", "labels.json", "manifest.json",
    "scores.json", "trajectories.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All artefacts, none damaged."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.fixture(params=MAKERS)
def artifact(request: pytest.FixtureRequest, made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    good = made[request.param]
    return Path(shutil.copytree(good, tmp_path / good.name))


def verify(path: Path) -> int:
    return report.run(path, None, CPU, deep=False)


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def harmless(file: Path, content: bytes) -> bool:
    """Whether a description keeps its values: a flip may miss them (the last of 17 digits), or hit the seal's name."""
    try:
        now, before = json.loads(content), json.loads(file.read_bytes())
    except ValueError:
        return False
    return now == before or (SEAL not in now and all(now.get(k) == v for k, v in before.items() if k != SEAL))


def groups(folder: Path, damage: str) -> list[list[Path]]:
    """Files that are damaged together: each description alone, since it says how the others should be."""
    files = files_of(folder)
    if damage == "gone":  # nothing would be left to be recognised
        return [[file] for file in files]
    descriptions = [f for f in files if f.name in DESCRIPTIONS or (IMAGES in f.parts and f.suffix == ".json")]
    return [[file] for file in descriptions] + [[f for f in files if f not in descriptions]]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    **{f"a bit flipped at {i}/5": lambda content, i=i: flipped(content, i / 5) for i in range(6)},  # type: ignore[misc]
    "cut in half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "an object without values": lambda content: b"{}",
    "longer": lambda content: content + b" x",
    "gone": lambda content: None,
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_good_artifact_verifies(name: str, made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(made[name]) == 0
    *lines, total = capsys.readouterr().out.splitlines()[1:]
    assert lines and all(line.startswith("ok   ") for line in lines)
    assert total == f"{len(lines)} things checked, none not as they should be"
    files = [file for file in files_of(made[name]) if IMAGES not in file.parts]  # there may be thousands
    assert all(any(file.name in line for line in lines) for file in files), "every file has a line"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_noticed_and_the_file_named(
    damage: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unnoticed = []
    for files in groups(artifact, damage):
        whole = {file: file.read_bytes() for file in files}
        damaged = {file: DAMAGES[damage](content) for file, content in whole.items()}
        if len(files) == 1 and (content := damaged[files[0]]) and harmless(files[0], content):
            continue
        for file, content in damaged.items():
            file.unlink() if content is None else file.write_bytes(content)
        status, lines = verify(artifact), capsys.readouterr().out.splitlines()
        for file, content in damaged.items():
            grade = "note" if content is None and file.name in OPTIONAL else "BAD "
            if status != (grade == "BAD ") or not any(line.startswith(f"{grade} {file}: ") for line in lines):
                unnoticed.append(f"{file.relative_to(artifact)}: status {status}")
            file.write_bytes(whole[file])
    assert unnoticed == []


def test_a_foreign_file_is_named(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no harm in a run's folder, which is its user's as well; everywhere else something might read it."""
    folder = artifact / "unet" if (artifact / "unet").is_dir() else artifact
    (folder / "foreign.safetensors").write_bytes(b"x")
    assert verify(artifact) == (0 if artifact.name == "run" else 1)
    assert f"{folder / 'foreign.safetensors'}: " in capsys.readouterr().out


def test_leftovers_are_named_and_are_no_damage(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / ".tmpAbC123").write_bytes(b"x")
    (artifact / "file.json.17-ab.tmp").write_bytes(b"x")
    assert verify(artifact) == 0
    out = capsys.readouterr().out
    assert out.count("a draft that a killed process left: may be deleted") == 2


def test_unfinished_work_next_to_an_artifact_is_named(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Path(shutil.copytree(made["cache"], tmp_path / "cache"))
    (tmp_path / ".cache.partial").mkdir()
    assert verify(cache) == 0
    assert ".cache.partial: unfinished work" in capsys.readouterr().out


def test_what_nothing_recognises_is_refused_with_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "absent"):
        assert cli.main(["verify", str(path)]) == 2
        said = capsys.readouterr().err
        assert "give the folder of one of these: a cache (smpo prepare), scores (smpo score)" in said
    assert "absent does not exist" in said


@pytest.mark.parametrize("name", ["cache", "imported", "scores", "store", "run", "toy/two_ranks/checkpoints"])
def test_artifacts_of_earlier_versions_verify(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With notes, where they did not record what is recorded now."""
    folder = Path(shutil.copytree(FORMATS / name, tmp_path / Path(name).name))
    assert verify(folder) == 0
    assert "an earlier version" in capsys.readouterr().out
