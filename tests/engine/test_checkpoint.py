"""A checkpoint continues the run bit for bit, or says why not; a killed save harms nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toy
from helpers.ranks import end_ranks, run_ranks
from torch import Tensor, nn

from smpo_fast.common.errors import CheckpointError
from smpo_fast.common.runtime import World
from smpo_fast.common.storage import as_json
from smpo_fast.engine import checkpoint, collectives, shards
from smpo_fast.engine.checkpoint import Progress
from smpo_fast.engine.protocol import Engine, StepResult
from smpo_fast.engine.shards import ShardReader

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
FACTS = {"seed": 0, "optim": {"lr": 1e-8, "betas": (0.9, 0.999)}}


class FakeEngine:
    """Writes two small files, and remembers what it loaded."""

    unet: nn.Module = nn.Identity()
    dtype = torch.float32

    def __init__(self, **layout: Any) -> None:
        self.layout: dict[str, str | int] = {
            "engine": "deepspeed", "zero_stage": 2, "world_size": 1, "precision": "fp32", "master": "fp32",
            "optimizer": "adamw", **layout
        }  # fmt: skip
        self.content = "weights"
        self.loaded = ""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        raise NotImplementedError

    def step(self, lr: float) -> StepResult:
        raise NotImplementedError

    def largest_weight(self) -> float:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        (folder / "deeper").mkdir()
        (folder / "a.pt").write_text(self.content)
        (folder / "deeper" / "b.pt").write_text(self.content * 2)

    def load(self, files: Sequence[Path]) -> None:
        self.loaded = "".join(file.read_text() for file in files if file.name != "a.pt")

    def full_state(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def full_average(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def save(run: Path, step: int, keep: int = 2, fake: FakeEngine | None = None) -> Path:
    progress = Progress(step, 10 * step, 1.5 * step, 1)
    return checkpoint.save(run, fake or FakeEngine(), progress, World(), FACTS, keep)


def restore(run: Path, fake: FakeEngine | None = None, facts: dict[str, Any] | None = None) -> Progress | None:
    return checkpoint.restore_latest(run, fake or FakeEngine(), World(), facts or FACTS)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in checkpoint.checkpoints_dir(run).iterdir())


# --- one process, a fake engine -------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    assert restore(tmp_path) is None
    folder = save(tmp_path, 50)
    assert folder == tmp_path / "checkpoints" / "step-000050"
    fake = FakeEngine()
    assert restore(tmp_path, fake) == Progress(50, 500, 75.0, 1)
    assert fake.loaded == "weightsweights"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"engine/a.pt", "engine/deeper/b.pt"}
    assert manifest["layout"] == FakeEngine().layout
    assert {"python", "torch"} <= set(manifest["versions"])


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 999_999, 1_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert restore(tmp_path) == Progress(1_000_000, 10_000_000, 1_500_000.0, 1)


def test_a_damaged_checkpoint_is_not_counted_among_those_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "engine" / "a.pt").unlink()
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-000003", "step-000004"]


def test_the_same_step_again(tmp_path: Path) -> None:
    changed = FakeEngine()
    changed.content = "other"
    folder = save(tmp_path, 1)
    save(tmp_path, 1, fake=changed)
    assert (folder / "engine" / "a.pt").read_text() == "weights", "a complete one is kept"
    (folder / "engine" / "a.pt").unlink()
    save(tmp_path, 1, fake=changed)
    assert (folder / "engine" / "a.pt").read_text() == "other", "an incomplete one is replaced"
    assert names(tmp_path) == ["step-000001"]


def test_a_kill_while_the_last_save_prunes_is_made_up_for(tmp_path: Path) -> None:
    """The run is at its end, so nothing will be saved again."""
    tidied = partial(checkpoint.tidy, tmp_path, World(), keep=1)
    tidied()  # there is nothing yet
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, toy.make(toy.settings()), Progress(step), World(), {}, keep=3)
    first, second, third = checkpoint.list_checkpoints(tmp_path)
    first.rename(first.with_name(f".removing-{first.name}"))
    tidied()
    assert list(third.parent.iterdir()) == [third]


def test_leftovers_are_removed_and_never_loaded(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".saving-step-000002", ".removing-step-000000"):
        shutil.copytree(tmp_path / "checkpoints" / "step-000001", tmp_path / "checkpoints" / name)
    assert restore(tmp_path) == Progress(1, 10, 1.5, 1)
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000001", "step-000003"]


def flip_a_bit(folder: Path) -> None:
    path = folder / "engine" / "a.pt"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (flip_a_bit, "the contents of engine/a.pt have changed"),
    "size": (lambda f: (f / "engine" / "a.pt").write_text("w"), "engine/a.pt has 1 bytes instead of 7"),
    "missing": (lambda f: (f / "engine" / "deeper" / "b.pt").unlink(), "engine/deeper/b.pt is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    "torn manifest": (lambda f: (f / "manifest.json").write_text('{"format"'), "manifest.json cannot be read"),
    "odd manifest": (lambda f: (f / "manifest.json").write_text("[]"), "format None"),
    "no files": (lambda f: edit_manifest(f, files=None), "damaged"),
    "edited manifest": (lambda f: edit_manifest(f, progress={"step": 5}), "manifest.json has changed"),
    "format": (lambda f: edit_manifest(f, format=99), "format 99, this one reads 2"),
}


def test_a_manifest_of_an_earlier_version_has_no_hash(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    manifest = json.loads(path.read_text())
    assert len(manifest.pop("sha256")) == 64
    path.write_text(json.dumps(manifest))
    assert restore(tmp_path) == Progress(1, 10, 1.5, 1)


def test_files_that_the_manifest_does_not_list_are_not_loaded(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "engine" / "deeper" / "c.pt").write_text("a stranger's")
    fake = FakeEngine()
    assert restore(tmp_path, fake) == Progress(1, 10, 1.5, 1)
    assert fake.loaded == "weightsweights"


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_offered(tmp_path: Path, kind: str) -> None:
    damage, words = DAMAGES[kind]
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad)
    fake = FakeEngine()
    with pytest.raises(CheckpointError) as caught:
        restore(tmp_path, fake)
    for part in (str(bad), words, f"last usable checkpoint is {good}", f"rm -r {bad}"):
        assert part in str(caught.value)
    assert not fake.loaded
    shutil.rmtree(bad)  # the action it names
    assert restore(tmp_path) == Progress(1, 10, 1.5, 1)


def test_when_no_checkpoint_is_good(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step))
    with pytest.raises(CheckpointError, match="No earlier checkpoint can be used.*rm -r .*checkpoints"):
        restore(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        restore(tmp_path, facts={"seed": 0, "optim": {"lr": 1e-6, "betas": (0.9, 0.999)}})
    assert "optim.lr was 1e-08 and is 1e-06 now" in str(caught.value)
    assert "betas" not in str(caught.value)


def test_a_fact_that_an_earlier_version_did_not_record_has_its_default(tmp_path: Path) -> None:
    save(tmp_path, 1)
    more = FACTS | {"optim": {**FACTS["optim"], "new": 1}, "pairs": {"scores": ""}}  # type: ignore[dict-item]
    defaults = {"optim": {"new": 1, "lr": 1e-3}, "pairs": {"scores": ""}}
    assert checkpoint.restore_latest(tmp_path, FakeEngine(), World(), more, defaults) is not None
    with pytest.raises(CheckpointError, match="optim.new was 2 and is 1 now"):
        checkpoint.restore_latest(tmp_path, FakeEngine(), World(), more, defaults | {"optim": {"new": 2}})
    with pytest.raises(CheckpointError, match="pairs.scores was None and is '' now"):
        checkpoint.restore_latest(tmp_path, FakeEngine(), World(), more, {"optim": {"new": 1}})


@pytest.mark.parametrize(
    "layout, words",
    [
        ({"precision": "bf16"}, "written by 1 process with ZeRO stage 2, precision fp32.*precision bf16"),
        ({"master": "none"}, "this run has .*precision fp32 without master weights"),
        ({"optimizer": "adamw8bit"}, "optimizer adamw.*optimizer adamw8bit"),
    ],
)
def test_another_precision_or_optimizer_is_refused(tmp_path: Path, layout: dict[str, Any], words: str) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=words):
        restore(tmp_path, FakeEngine(**layout))


def test_another_number_of_ranks_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    restore(tmp_path)
    assert capsys.readouterr().out == ""
    assert restore(tmp_path, FakeEngine(world_size=4, zero_stage=3)) == Progress(1, 10, 1.5, 1)
    printed = capsys.readouterr().out
    assert "written by 1 process with ZeRO stage 2" in printed and "4 processes with ZeRO stage 3" in printed


def test_every_file_is_on_disk_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    really, publish = checkpoint.sync, checkpoint.publish_folder

    def sync(path: Path) -> None:
        synced.append(path.name)
        really(path)

    def publish_folder(building: Path, target: Path) -> None:
        assert sorted(synced) == ["a.pt", "b.pt", "manifest.json"]
        publish(building, target)

    monkeypatch.setattr(checkpoint, "sync", sync)
    monkeypatch.setattr(checkpoint, "publish_folder", publish_folder)
    assert save(tmp_path, 1).is_dir()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["sha256", "sync", "_publish", "_prune", "_remove"])
def test_a_save_that_ends_anywhere_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, 1, keep=1)

    def die(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(checkpoint, moment, die)
    with pytest.raises(Killed):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    progress = restore(tmp_path)
    assert progress is not None and progress.step == (2 if moment in ("_prune", "_remove") else 1)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-000003"]


@pytest.mark.parametrize("moment", ["_prepare", "sync", "publish_folder"])
def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, moment, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert restore(tmp_path) == Progress(1, 10, 1.5, 1)


# --- real engines: k steps, save, k steps, against 2k steps ---------------------------------------------------


def continues(
    rank: int, size: int, folder: Path, stage: int | str | None, optimizer: str, precision: str, **optim: str
) -> dict[str, Any]:
    """Save in the middle of the third step; resume in a new engine; compare with a run that was not interrupted."""
    averaged: dict[str, Any] = {"ema": 0.9, "ema_dtype": "bf16-sr"}
    world, settings = World(rank, size), toy.settings(optimizer, precision, **averaged, **optim)
    straight = toy.make(settings, rank, size, stage)
    logged = toy.train(straight, settings, range(4), rank, size)
    stopped = toy.make(settings, rank, size, stage)
    toy.train(stopped, settings, range(2), rank, size)
    toy.accumulate(stopped, settings, 2, rank, size, finish=False)  # a signal stops a run between micro-batches
    checkpoint.save(folder, stopped, Progress(2), world, FACTS, keep=2)
    again = toy.make(settings, rank, size, stage)
    progress = checkpoint.restore_latest(folder, again, world, FACTS)
    at_once = again.full_state()
    logged_again = toy.train(again, settings, range(2, 4), rank, size)
    return {
        "progress": progress == Progress(2),
        "losses and norms": logged[2:] == logged_again,
        "weights as saved": toy.same(stopped.full_state(), at_once),
        "final weights": toy.same(straight.full_state(), again.full_state()),
        "averages": toy.same(straight.full_average(), again.full_average()),
    }


ALIGNED = "adamw8bit_aligned"


def slow(*values: Any) -> Any:
    """Parameters of a test that another combination covers in the default run."""
    return pytest.param(*values, marks=pytest.mark.slow)


LAYOUTS = [
    (0, "adamw", "fp32"), slow(1, "adamw", "bf16"), (2, "adamw", "fp32"), (3, "adamw", "bf16"),
    slow(1, "adamw8bit", "fp32"), slow(2, "paged_adamw8bit", "bf16"), (3, "adamw8bit", "fp32"),
    (2, "lion8bit", "fp32"), slow(1, ALIGNED, "bf16"), (2, ALIGNED, "fp32"), slow("3_offload", ALIGNED, "bf16"),
    slow(0, "adafactor", "fp32"),
]  # fmt: skip


@pytest.mark.parametrize("stage, optimizer, precision", LAYOUTS)
def test_two_ranks_continue_bitwise(tmp_path: Path, stage: int | str, optimizer: str, precision: str) -> None:
    for found in run_ranks(continues, 2, folder=tmp_path, stage=stage, optimizer=optimizer, precision=precision):
        assert all(found.values()), found


def refusals(rank: int, size: int, folder: Path) -> list[str]:
    """The errors when one rank cannot write, when one cannot read, and when one file is damaged."""
    world, messages = World(rank, size), []
    trained = toy.make(toy.settings(), rank, size, 2)
    checkpoint.save(folder, trained, Progress(2), world, FACTS, 2)
    write, read = shards.save_file, ShardReader.elements

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for module, name, broken, action in (
        (shards, "save_file", full, lambda: checkpoint.save(folder, trained, Progress(9), world, FACTS, 2)),
        (ShardReader, "elements", full, lambda: trained.load(list(folder.rglob("*.safetensors")))),
    ):
        if rank == 1:
            setattr(module, name, broken)
        messages += [error_of(action)]
        shards.save_file, ShardReader.elements = write, read  # type: ignore[method-assign]
    files = sorted((folder / "checkpoints" / "step-000002" / "engine").glob("rank*.safetensors"))
    if rank == 0:
        files[-1].write_bytes(files[-1].read_bytes()[:-1] + b"?")
    return [*messages, error_of(lambda: checkpoint.restore_latest(folder, trained, world, FACTS))]


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (OSError, CheckpointError) as error:
        return str(error)
    return "no error"


def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    for unwritten, unread, damaged in run_ranks(refusals, 2, folder=tmp_path):
        assert "No space left" in unwritten and "No space left" in unread
        assert "sha256 differs" in damaged and "rank00001-0000.safetensors" in damaged


NO_MASTERS = {"master": "none"}
ALONE: list[tuple[str, str, dict[str, str]]] = [
    *[(name, precision, {}) for name in ("adamw", "adamw8bit", ALIGNED) for precision in ("fp32", "bf16")],
    ("paged_adamw8bit", "fp32", {}), ("lion8bit", "bf16-autocast", {}), ("adafactor", "bf16", {}),
    (ALIGNED, "bf16", NO_MASTERS), (ALIGNED, "bf16", NO_MASTERS | {"accumulate": "bf16-sr"}),
    (ALIGNED, "bf16", NO_MASTERS | {"accumulate": "bf16-sr", "offload": "states+gradients"}),
]  # fmt: skip


@pytest.mark.parametrize("optimizer, precision, optim", ALONE)
def test_one_process_continues_bitwise(tmp_path: Path, optimizer: str, precision: str, optim: dict[str, str]) -> None:
    found = continues(0, 1, tmp_path, None, optimizer, precision, **optim)
    assert all(found.values()), found


# --- another number of ranks, another stage -------------------------------------------------------------------

# A run continues with each of these in turn, on two ranks and then four, and ends in one process.
MOVES: dict[int, list[int | str]] = {2: [1, 3, "2_offload"], 4: [2, 3]}
MOVERS = [("adamw", "fp32"), (ALIGNED, "fp32"), ("adamw8bit", "fp32")]


def go_on(
    folder: Path, to: Path | None, rank: int, size: int, stage: int | str | None, optimizer: str, precision: str
) -> dict[str, Tensor]:
    """Resume the run of another layout on the same pairs for every rank: the weights loaded, and two steps later."""
    world = World(rank, size)
    trained = toy.make(toy.settings(optimizer, precision, 4 * size, clip=0.0, ema=0.9), rank, size, stage)
    assert checkpoint.restore_latest(folder, trained, world, FACTS) == Progress(2)
    found = state_of(trained)
    if to:
        checkpoint.save(to, trained, Progress(2), world, FACTS, keep=1)
    toy.train(trained, toy.settings(optimizer, precision, 4, clip=0.0), range(2, 4))
    return {f"found {k}": v for k, v in found.items()} | state_of(trained)


def state_of(trained: Engine) -> dict[str, Tensor]:
    return trained.full_state() | {f"average {k}": v for k, v in trained.full_average().items()}


def move(rank: int, size: int, folder: Path, last: str) -> dict[str, Any]:
    states = {}
    for optimizer, precision in MOVERS:
        before = last
        for stage in MOVES[size]:
            here, there = (folder / f"{name} {optimizer}" for name in (before, f"{size} {stage}"))
            states[f"{size} {stage} {optimizer}"] = go_on(here, there, rank, size, stage, optimizer, precision)
            before = f"{size} {stage}"
    return states


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The states at every move of a run that began in one process."""
    folder, states = tmp_path_factory.mktemp("moves"), {}
    for optimizer, precision in MOVERS:
        settings = toy.settings(optimizer, precision, 4, clip=0.0, ema=0.9)
        trained = toy.make(settings)
        toy.train(trained, settings, range(2))
        checkpoint.save(folder / f"alone {optimizer}", trained, Progress(2), World(), FACTS, keep=1)
        states[f"straight {optimizer}"] = {f"found {k}": v for k, v in state_of(trained).items()}
        toy.train(trained, settings, range(2, 4))
        states[f"straight {optimizer}"] |= state_of(trained)
    states |= run_ranks(move, 2, folder=folder, last="alone")[0]
    states |= run_ranks(move, 4, folder=folder, last=f"2 {MOVES[2][-1]}")[0]
    for optimizer, precision in MOVERS:
        last = folder / f"4 {MOVES[4][-1]} {optimizer}"
        states[f"back {optimizer}"] = go_on(last, None, 0, 1, None, optimizer, precision)
        shapes = {name: p.shape for name, p in toy.make(toy.settings(optimizer, precision)).unet.named_parameters()}
        newest = checkpoint.list_checkpoints(last)[-1]
        states[f"read {optimizer}"] = checkpoint.read_weights(newest, shapes)[2]
        averages = checkpoint.read_weights(newest, shapes, averaged=True)[2]
        states[f"read {optimizer}"] |= {f"average {name}": value for name, value in averages.items()}
    return states


@pytest.mark.parametrize("optimizer, precision", MOVERS)
def test_the_weights_of_four_ranks_are_read_without_an_engine(
    moved: dict[str, dict[str, Tensor]], optimizer: str, precision: str
) -> None:
    read, straight = moved[f"read {optimizer}"], moved[f"straight {optimizer}"]
    assert read and all(torch.equal(value, straight[f"found {name}"]) for name, value in read.items())


def test_weights_are_read_with_progress_and_facts_or_refused(tmp_path: Path) -> None:
    trained = toy.make(toy.settings())
    folder = checkpoint.save(tmp_path, trained, Progress(3), World(), FACTS, keep=1)
    shapes = {name: tuple(p.shape) for name, p in trained.unet.named_parameters()}
    progress, facts, weights = checkpoint.read_weights(folder, shapes)
    assert (progress, facts) == (Progress(3), as_json(FACTS))
    assert all(torch.equal(weights[name], value) for name, value in trained.full_state().items())
    with pytest.raises(CheckpointError, match="has no average of the weights: it was written without optim.ema"):
        checkpoint.read_weights(folder, shapes, averaged=True)
    with pytest.raises(CheckpointError, match="'weight' of other.weight, elements 0 to 5, is missing"):
        checkpoint.read_weights(folder, {"other.weight": (2, 3)})
    (file,) = (folder / "engine").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"checkpoint {folder}: damaged"):
        checkpoint.read_weights(folder, shapes)


@pytest.mark.parametrize("optimizer, precision", MOVERS)
@pytest.mark.parametrize("move_", [*[f"{n} {stage}" for n in MOVES for stage in MOVES[n]], "back"])
def test_a_run_continues_on_other_ranks_and_stages(
    moved: dict[str, dict[str, Tensor]], move_: str, optimizer: str, precision: str
) -> None:
    state, straight = moved[f"{move_} {optimizer}"], moved[f"straight {optimizer}"]
    found = [name for name in state if name.startswith("found ")]
    assert found and all(torch.equal(state[name], straight[name]) for name in found)
    if optimizer == "adamw8bit":  # its states are quantised again in other blocks
        assert 0 < toy.distance(state, straight) < 2e-3
    else:
        assert toy.same(state, straight)


# --- a rank dies ----------------------------------------------------------------------------------------------


def die_while_saving(rank: int, size: int, folder: Path) -> None:
    world, settings = World(rank, size), toy.settings()
    trained = toy.make(settings, rank, size, 2)
    toy.train(trained, settings, range(1), rank, size)
    checkpoint.save(folder, trained, Progress(1), world, FACTS, keep=1)
    toy.train(trained, settings, range(1, 2), rank, size)
    if rank == 1:
        write = shards.save_file

        def torn(tensors: Any, file: Path) -> None:
            write(tensors, file)
            os.truncate(file, 1000)
            os.kill(os.getpid(), signal.SIGKILL)

        shards.save_file = torn
    checkpoint.save(folder, trained, Progress(2), world, FACTS, keep=1)


def load_again(rank: int, size: int, folder: Path) -> Progress | None:
    trained = toy.make(toy.settings(), rank, size, 2)
    return checkpoint.restore_latest(folder, trained, World(rank, size), FACTS)


def test_a_rank_killed_while_saving(tmp_path: Path) -> None:
    first, second = end_ranks(die_while_saving, 2, folder=tmp_path)
    assert second.code == -signal.SIGKILL
    assert first.code != 0, "the other rank ends with an error"
    (torn,) = (tmp_path / "checkpoints" / ".saving-step-000002" / "engine").glob("rank00001*")
    assert time.time() - torn.stat().st_mtime < 60, "in bounded time"
    assert names(tmp_path) == [".saving-step-000002", "step-000001"]
    assert run_ranks(load_again, 2, folder=tmp_path) == [Progress(1), Progress(1)]


def hang_while_saving(rank: int, size: int, folder: Path) -> float:
    """Rank 1 never comes back from its save until rank 0 has given up."""
    world, given_up = World(rank, size), folder / "given up"
    trained = toy.make(toy.settings(), rank, size, 2)
    everyone = torch.distributed.group.WORLD
    assert everyone._get_backend(world.device).options._timeout == collectives.COLLECTIVE_TIMEOUT
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=3), everyone)
    toy.train(trained, toy.settings(), range(1), rank, size)
    began = time.monotonic()
    if rank == 1:
        while not given_up.exists():
            time.sleep(0.1)
        return 0.0
    try:
        checkpoint.save(folder, trained, Progress(1), world, FACTS, keep=1)
    except RuntimeError:
        return time.monotonic() - began
    finally:
        given_up.touch()
    return math.inf


@pytest.mark.slow
def test_a_rank_that_hangs_while_the_others_save(tmp_path: Path) -> None:
    first, _ = end_ranks(hang_while_saving, 2, folder=tmp_path)
    assert first.value is not None and first.value < 60, first.output[-3000:]
    assert list(checkpoint.list_checkpoints(tmp_path)) == []
