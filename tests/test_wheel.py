"""The package without a clone: a wheel and a source archive, installed elsewhere, with kernels and recipes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers.paths import CONFIGS, ROOT
from helpers.small_run import SMALL

from smpo_fast.training.run_log import read_metrics


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files that a Docker build gets: all that building needs."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    folder = tmp_path_factory.mktemp("source")
    archive = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True).stdout
    for name in archive.decode().split("\0")[:-1]:
        if Path(name).parts[0] in kept and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def programs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of a clean environment with the wheel; libraries are those of this one."""
    wheels, clean = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clean)], check=True)
    (site,) = clean.glob("lib/*/site-packages")
    # as plain folders: their own .pth files, which would lead back to the checkout, are not read
    (site / "libraries.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)]
    subprocess.run([*pip, *built], check=True)
    (wheel,) = wheels.glob("smpo_fast-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"smpo_fast/recipes/{file.name}" for file in CONFIGS.iterdir()} <= names
    assert {f"smpo_fast/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")} <= names
    assert "smpo_fast/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "kernels", "configs"))]
    subprocess.run([*pip, "--python", str(clean / "bin" / "python"), "install", "--no-deps", str(wheel)], check=True)
    return clean / "bin"


def start(programs: Path, here: Path, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A program of the clean environment, started in another folder."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(programs / program), *words], cwd=here, env=environment, capture_output=True, text=True, check=False
    )


def test_the_installed_package_trains_and_knows_its_recipes(programs: Path, tmp_path: Path) -> None:
    code = "import smpo_fast, smpo_fast.kernels as kernels; print(smpo_fast.__file__, kernels.__file__)"
    where = start(programs, tmp_path, "python", "-c", code)
    assert where.stdout.count(str(programs.parent)) == 2, where
    done = start(programs, tmp_path, "smpo", "train", *SMALL, "run.steps=10", "run.save_every=10", "run.dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_metrics(tmp_path / "run")) == 10
    shown = start(programs, tmp_path, "smpo", "train", "--config", "sdxl_smpo", "--print-config")
    assert 'path = "stabilityai/stable-diffusion-xl-base-1.0"' in shown.stdout
    planned = start(
        programs, tmp_path, "smpo", "plan", "--ds_config", "ds_zero2", "--gpus", "2", "--gpu", "H100", *SMALL
    )
    assert "ZeRO 2" in planned.stdout, planned


def test_a_launcher_starts_the_module(programs: Path, tmp_path: Path) -> None:
    """As ``torchrun -m smpo_fast.train`` does."""
    words = ["-m", "torch.distributed.run", "--nproc-per-node=1", "--master-port=0", "-m", "smpo_fast.train"]
    done = start(programs, tmp_path, "python", *words, "--print-config", "run.steps=7")
    assert done.returncode == 0, done.stderr
    assert "steps = 7" in done.stdout


def test_the_dockerfile_installs_as_the_readme_says() -> None:
    of_readme = re.findall(r"^    (pip install \S.*?)(?: +#.*)?$", (ROOT / "README.md").read_text(), re.M)
    of_image = re.findall(r"^RUN (pip .+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert of_image == of_readme[:1] == ["pip install -e ."]
    used = [command for command in of_readme if "[" in command]  # extras that pages name exist
    assert all(name in (ROOT / "setup.py").read_text() for name in re.findall(r"\[(\w+)\]", " ".join(used)))


@pytest.mark.slow
def test_the_source_archive_has_what_building_needs(source: Path, tmp_path: Path) -> None:
    words = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(words, cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("smpo_fast-*.tar.gz")
    with tarfile.open(archive) as found:
        names = {name.partition("/")[2] for name in found.getnames()}
    assert {"setup.py", "README.md", "kernels/pair_loss.py", "configs/sdxl_smpo.toml"} <= names
    assert "smpo_fast/embedded/default.toml" in names
