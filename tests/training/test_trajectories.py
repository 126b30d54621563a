"""Stored trajectories: read as written by any number of ranks, and refused for another run's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from smpo_fast.common.errors import ConfigError, DataError
from smpo_fast.common.runtime import World
from smpo_fast.training.trajectories import TrajectoryStore

FACTS = {"seed": 3, "inversion": {"steps": 10}}
DRAWN, LANDINGS = 12, 2


def of_rank(folder: Path, rank: int, size: int, facts: dict[str, object] = FACTS) -> TrajectoryStore:
    return TrajectoryStore(folder, facts, DRAWN, World(rank, size))


def tau_of(step: int, position: int) -> torch.Tensor:
    return torch.randn(LANDINGS, 2, 4, 3, 5, generator=torch.Generator().manual_seed(1000 * step + position))


def write(folder: Path, step: int, size: int, ranks: range | None = None) -> None:
    for rank in ranks or range(size):
        mine = range(DRAWN // size)
        tau = torch.stack([tau_of(step, rank + size * place) for place in mine], dim=1)
        split = len(mine) // 2  # two groups of pairs, as buckets make them
        groups = [(mine[:split], tau[:, :split]), (mine[split:], tau[:, split:])]
        of_rank(folder, rank, size).write(step, [(p, t, t.mean((3, 4, 5))) for p, t in groups])


@pytest.mark.parametrize("written_by", [1, 2, 3])
@pytest.mark.parametrize("read_by", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, written_by: int, read_by: int) -> None:
    write(tmp_path, 5, written_by)
    for rank in range(read_by):
        store, places = of_rank(tmp_path, rank, read_by), list(range(DRAWN // read_by))[::-1]
        tau, errors = store.tau(5, places), store.errors(5, places)
        wanted = torch.stack([tau_of(5, rank + read_by * place) for place in places], dim=1)
        assert tau is not None and torch.equal(tau, store.round(wanted)) and (tau - wanted).abs().max() < 2e-3
        assert errors is not None and torch.equal(errors, wanted.mean((3, 4, 5)))


def test_a_step_counts_when_all_its_ranks_have_written(tmp_path: Path) -> None:
    write(tmp_path, 0, 2)
    write(tmp_path, 1, 2, ranks=range(1))
    (tmp_path / "step-000002.0-of-1.building").write_bytes(b"half a file")
    store = of_rank(tmp_path, 0, 1)
    assert store.tau(0, [0]) is not None and store.tau(1, [0]) is None and store.tau(2, [0]) is None
    assert store.complete(0, 1) and not store.complete(0, 2)


def test_another_runs_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    of_rank(tmp_path, 0, 1)
    with pytest.raises(ConfigError, match=r"seed = 3, this run has 4"):
        of_rank(tmp_path, 0, 1, {**FACTS, "seed": 4})


@pytest.mark.parametrize("content", [b"", b'{"seed": 3', b"[3]", b"\xff\xfe"])
def test_a_damaged_description_is_named(tmp_path: Path, content: bytes) -> None:
    of_rank(tmp_path, 0, 1)
    (tmp_path / "trajectories.json").write_bytes(content)
    with pytest.raises(DataError, match="trajectories.json is damaged .*: remove"):
        of_rank(tmp_path, 0, 1)


def test_a_flipped_bit_is_noticed_and_older_files_without_checksums_are_read(tmp_path: Path) -> None:
    write(tmp_path, 0, 1)
    (file,) = tmp_path.glob("step-*")
    stored = bytearray(file.read_bytes())
    with safe_open(file, "pt") as saved:
        values = {name: saved.get_tensor(name).clone() for name in saved.keys()}  # not views of the file
    at = stored.rindex(values["11.tau"].numpy().tobytes())
    stored[at] ^= 1
    file.write_bytes(stored)
    store = of_rank(tmp_path, 0, 1)
    assert store.tau(0, [10]) is not None
    with pytest.raises(DataError, match="step-000000.0-of-1.safetensors is damaged: the checksum of 11.tau differs"):
        store.tau(0, [11])
    file.write_bytes(stored[:-100])
    with pytest.raises(DataError, match="is damaged"):
        store.tau(0, [0])
    save_file(values, file)
    found = store.tau(0, [11])
    assert found is not None and torch.equal(found[:, 0], store.round(tau_of(0, 11)))
