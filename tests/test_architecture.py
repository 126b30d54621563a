"""The house: who may import whom, one owner per dangerous thing, and nobody bears a library's name."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "smpo_fast"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# A room may import rooms of lower layers, and rooms of its own layer where ALLOWED says so.
LAYERS = {
    "config": 0, "durable": 0, "embedded": 0, "embedded.shapes": 0, "embedded.reward": 0,
    "runtime": 1, "batch": 1, "parts": 1, "remote": 1,
    "order": 2, "schedule": 2, "labels": 2, "prefetch": 2, "trajectories": 2, "reward_models": 2,
    "data": 3, "scorers": 3, "cache": 3, "model": 3, "inversion": 3, "objective": 3, "report": 3, "kernels": 3,
    "slices": 3,
    "sidecar": 4, "optimizers": 4, "engine": 4, "calls": 4, "metrics": 4, "loader": 4, "pictures": 4, "lora": 4,
    "footprint": 4, "doctor": 4, "patch": 4, "containers": 4,
    "scoring": 5, "checkpoint": 5, "window": 5, "prepare": 5, "evaluate": 5, "reference": 5, "sources": 5,
    "formats": 6, "train": 6, "plan": 6,
    "table": 7,
    "importer": 8,
    "generate": 9,
    "cli": 10,
}  # fmt: skip
# What makes the embedded assets: a program of several files that nobody imports.
BUILDERS = ("embedded.networks", "embedded.pairs", "embedded.pretrain_vae", "embedded.pretrain_unet", "embedded.build")
LAYERS |= {name: 7 + i for i, name in enumerate(BUILDERS)}
SAME_LAYER = {
    ("engine", "optimizers"),
    ("footprint", "lora"),
    ("embedded.reward", "embedded.shapes"),
    ("embedded.shapes", "embedded"),
}
OWNERS = {
    "deepspeed": {"engine"},
    "peft": {"lora"},
    "bitsandbytes": {"optimizers"},
    "diffusers": {"model", "patch", "footprint"},  # footprint: a UNet on the meta device from its configuration alone
    "transformers": {"model", "reward_models", "optimizers"},
    "tarfile": {"containers"},
    "fsspec": {"containers", "sources", "remote"},
    "pyarrow": {"data", "sidecar", "cache", "containers", "table"},
    "PIL": {
        "data",
        "reward_models",
        "scorers",
        "scoring",
        "generate",
        "evaluate",
        "report",
        "prepare",
        "pictures",
        "embedded.reward",
    },
    "matplotlib": {"report"},
    "pydantic": {"config"},
    "tomllib": {"config"},
    "argparse": {"config", "train", "cli"},
    "triton": {"kernels"},
    "pickle": set(),
}


def room(file: Path) -> str:
    if file.is_relative_to(ROOT / "kernels"):
        return "kernels"
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imports(file: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions; under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(file: Path) -> set[str]:
    names = {n.removeprefix("smpo_fast.") for n in imports(file) if n.startswith("smpo_fast.")}
    known = sorted(LAYERS, key=len, reverse=True)
    return {next((k for k in known if n == k or n.startswith(f"{k}.")), n) for n in names} - {"__version__"}


@pytest.mark.parametrize("file", [f for f in FILES if room(f) not in ("", "kernels")], ids=room)
def test_imports_go_down(file: Path) -> None:
    mine = room(file)
    assert mine in LAYERS, f"a new room: give {mine} a layer in this test"
    for other in rooms_imported(file):
        allowed = LAYERS[other] < LAYERS[mine] or (mine, other) in SAME_LAYER
        assert allowed, f"{mine} (layer {LAYERS[mine]}) imports {other} (layer {LAYERS[other]})"


def test_kernels_import_torch_triton_and_what_they_share() -> None:
    allowed = {"torch", "triton", "smpo_fast.kernels._launch"} | set(sys.stdlib_module_names)
    for file in (ROOT / "kernels").glob("*.py"):
        for name in imports(file):
            assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{file.name} imports {name}"
    assert imports(ROOT / "kernels" / "__init__.py") == set()


@pytest.mark.parametrize("library", OWNERS)
def test_one_owner_per_dangerous_thing(library: str) -> None:
    users = {room(f) for f in FILES if any(n == library or n.startswith(f"{library}.") for n in imports(f))}
    strangers = users - OWNERS[library] - set(BUILDERS)
    assert not strangers, f"{library} is imported by {strangers}"


def test_nobody_imports_a_top_level_kernels() -> None:
    for file in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert not any(n == "kernels" or n.startswith("kernels.") for n in imports(file)), file


def test_no_module_bears_the_name_of_a_library() -> None:
    """The launcher puts smpo_fast/ first on the path: a module there would be found before the library."""
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
    assert {f.stem for f in PACKAGE.glob("*.py")} & taken <= {"__init__"}
    assert {f.name for f in PACKAGE.iterdir() if f.is_dir()} & taken == set()


def test_every_module_imports_without_a_gpu() -> None:
    names = [f"smpo_fast.{room(f)}".rstrip(".") for f in FILES if room(f) != "kernels"]
    code = "import importlib\n" + "\n".join(f"importlib.import_module({n!r})" for n in [*names, "smpo_fast.kernels"])
    subprocess.run([sys.executable, "-c", code], check=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"})


def test_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, smpo_fast, smpo_fast.config; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_libraries_that_probe_for_hugging_faces_kernels_leave_ours_alone() -> None:
    """With the repository on the path (the DeepSpeed launcher puts it there) `kernels` is importable by accident."""
    code = "import kernels, transformers.utils.import_utils as u; print(u.is_kernels_available())"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split()[-1] == "False"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_begin_with_their_one_sentence(file: Path) -> None:
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
    assert first.endswith((".", ":", "``.")) or len(first) > 20, file


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_public_names_are_documented(file: Path) -> None:
    for node in ast.parse(file.read_text()).body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public and isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), f"{file.name}: {node.name} has no docstring"


def test_the_schedule_holds_no_tensors() -> None:
    assert not any(n == "torch" or n.startswith("torch.") for n in imports(PACKAGE / "schedule.py"))


def test_optional_libraries_are_optional() -> None:
    """Trackers, xformers and triton are imported where they are asked for, never at import."""
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            assert not {n.partition(".")[0] for n in names} & {
                "wandb",
                "trackio",
                "xformers",
                "bitsandbytes",
                "peft",
            }, file
