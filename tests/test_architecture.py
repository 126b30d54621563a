"""The map of the code: which package may import which, one owner for each library, and no name that hides another."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "smpo_fast"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Lowest first: a package may import those above it in this list, and nothing else. The programs come last.
LAYERS = (
    "common", "embedded", "kernels", "config", "method", "models", "data", "engine", "evaluation", "training",
    "publishing", "verification", "planning", "tuning", "train", "cli", "api",
)  # fmt: skip
# What a package may use of the layers below it, where that is less than all of them.
ONLY = {
    "embedded": {"common"},
    "kernels": set(),
    "config": {"common"},
    "method": {"common", "config"},
    "engine": {"common", "config", "kernels"},
    "train": {"common", "config", "training", "publishing", "tuning"},
}
# Each of these libraries is imported in one place (a package, or a module of it) and nowhere else.
OWNERS = {
    "deepspeed": {"engine"},
    "bitsandbytes": {"engine"},
    "peft": {"models.lora"},
    "diffusers": {"models"},
    "transformers": {"models", "data.rewards", "engine.optimizers"},
    "tarfile": {"data.ingest"},
    "fsspec": {"common.remote", "data.ingest"},
    "pyarrow": {"data"},
    "PIL": {"common.plots", "data", "evaluation", "api"},
    "matplotlib": {"common.plots"},
    "pydantic": {"config"},
    "tomllib": {"config"},
    "argparse": {"config", "train", "cli"},
    "triton": {"kernels"},
    "pickle": set(),
}
BUILDER = "embedded.build"  # makes the embedded assets: a program of its own, which nothing imports
OPTIONAL = {"wandb", "trackio", "xformers", "bitsandbytes", "peft"}


def module(file: Path) -> str:
    """Dotted name below ``smpo_fast``: 'data.cache.reader', 'kernels.geglu'; '' for the package itself."""
    inside = file.is_relative_to(PACKAGE)
    parts = file.relative_to(PACKAGE if inside else ROOT).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def package(name: str) -> str:
    return name.partition(".")[0]


def imports(file: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(file: Path) -> set[str]:
    """What a file imports of this project, without the leading ``smpo_fast.``."""
    return {n.removeprefix("smpo_fast.") for n in imports(file) if n.startswith("smpo_fast.")} - {"__version__"}


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("file", [f for f in FILES if module(f)], ids=module)
def test_imports_go_one_way(file: Path) -> None:
    mine = package(module(file))
    assert mine in LAYERS, f"a new package: give {mine} a layer in this test"
    allowed = ONLY.get(mine, set(LAYERS[: LAYERS.index(mine)])) | {mine}
    for name in ours(file):
        assert package(name) in allowed, f"{module(file)} imports {name}; {mine} may import {sorted(allowed)}"
        assert within(module(file), {BUILDER}) or not within(name, {BUILDER}), f"{module(file)} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_package_uses_anothers_private_names(file: Path) -> None:
    mine = package(module(file))
    for name in ours(file):
        private = any(part.startswith("_") for part in name.split("."))
        assert not private or package(name) == mine, f"{module(file)} imports {name}"


def test_kernels_import_torch_triton_and_what_they_share() -> None:
    shared = {f"smpo_fast.kernels.{name}" for name in ("_launch", "_triton", "_rounding")}
    allowed = {"torch", "triton"} | shared | sys.stdlib_module_names
    for file in (ROOT / "kernels").glob("*.py"):
        for name in imports(file):
            assert within(name, allowed), f"{file.name} imports {name}"
    for name in imports(ROOT / "kernels" / "__init__.py"):
        assert package(name) in sys.stdlib_module_names, name


@pytest.mark.parametrize("library", OWNERS)
def test_each_library_has_one_owner(library: str) -> None:
    users = {module(f) for f in FILES if any(within(n, {library}) for n in imports(f))}
    strangers = {user for user in users if not within(user, OWNERS[library] | {BUILDER})}
    assert not strangers, f"{library} is imported by {strangers}"


def test_nothing_imports_a_top_level_kernels() -> None:
    for file in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert not any(within(n, {"kernels"}) for n in imports(file)), file


def test_no_module_hides_a_library() -> None:
    """The DeepSpeed launcher puts smpo_fast/ first on the path: a module there would be found before the library.

    Taken are the standard library, what is installed, and optional dependencies that may not be installed here.
    """
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions()) | OPTIONAL
    taken |= {"evaluate", "datasets", "kernels", "open_clip", "hpsv2", "ImageReward", "torchao"}
    assert {f.stem for f in PACKAGE.glob("*.py")} & taken <= {"__init__"}
    assert {f.name for f in PACKAGE.iterdir() if f.is_dir()} & taken == set()


def test_every_module_imports_without_a_gpu() -> None:
    names = [f"smpo_fast.{module(f)}".rstrip(".") for f in FILES if package(module(f)) != "kernels"]
    code = "import importlib\n" + "\n".join(f"importlib.import_module({n!r})" for n in [*names, "smpo_fast.kernels"])
    subprocess.run([sys.executable, "-c", code], check=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"})


def test_settings_import_nothing_heavy() -> None:
    code = "import sys, smpo_fast.config.loading; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


PROBE = """
try:
    from kernels import get_kernel
    print(get_kernel())
except ModuleNotFoundError as error:
    print(error, error.name)
import smpo_fast.kernels as ours
print(ours.__name__)
"""
PROBE_OF_LIBRARIES = """
import diffusers.utils.import_utils as theirs, transformers.utils.import_utils as others
print(theirs.is_kernels_available(), others.is_kernels_available())
"""


def in_root(code: str, *more: Path) -> list[str]:
    """What a program prints in the repository's root, with other folders on the path after it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *more]))}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_in_the_root_libraries_do_not_take_our_kernels_for_hugging_faces() -> None:
    """The root is first on the path of ``python -c`` and ``python -m``: there `kernels` is importable by accident.

    tests/kernels, which has no ``__init__``, would be found after it.
    """
    found = in_root(PROBE_OF_LIBRARIES + PROBE, ROOT / "tests")
    assert found == ["False False", "No module named 'kernels' kernels", "smpo_fast.kernels"]


def test_in_the_root_libraries_find_hugging_faces_kernels_where_it_is_installed(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel():\n    return 'theirs'\n")
    assert in_root(PROBE, tmp_path) == ["theirs", "smpo_fast.kernels"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_begin_with_one_sentence(file: Path) -> None:
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
    assert first.endswith((".", ":", "``.")) or len(first) > 20, file


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_public_names_are_documented(file: Path) -> None:
    for node in ast.parse(file.read_text()).body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public and isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), f"{file.name}: {node.name} has no docstring"


def test_package_signs_import_nothing() -> None:
    """An ``__init__`` says what its package is for; names come from the modules that define them."""
    for file in PACKAGE.rglob("__init__.py"):
        if module(file) not in ("", "embedded"):
            assert imports(file) == set(), f"{file}: re-exports"


def test_the_schedule_holds_no_tensors() -> None:
    assert not any(within(n, {"torch"}) for n in imports(PACKAGE / "method" / "schedule.py"))


def test_optional_libraries_are_imported_where_they_are_used() -> None:
    """Never at import of a module."""
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            assert not {n.partition(".")[0] for n in names} & OPTIONAL, file


def test_no_test_imports_another() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        assert not any(package(n).startswith("test_") for n in imports(file)), f"{file}: move it to tests/helpers/"


def test_the_map_in_the_docs_is_true() -> None:
    """docs/architecture.md names every package, and every path in it exists."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").is_file():
            assert f"`{folder.name}`" in text, f"docs/architecture.md does not mention {folder.name}"
    for path in re.findall(r"`([\w/.-]*/[\w/.-]+)`", text):
        places = (ROOT / path, PACKAGE / path, (PACKAGE / path).with_suffix(".py"))
        assert any(place.exists() for place in places), f"docs/architecture.md names {path}, which does not exist"
