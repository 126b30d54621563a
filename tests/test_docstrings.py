"""What CONTRIBUTING promises of docstrings, as a test: shapes of tensors, errors raised, and sources of formulas."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.paths import ROOT

FILES = sorted([*(ROOT / "smpo_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
METHOD = [*(ROOT / "smpo_fast" / "method").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
SHAPE = re.compile(
    r"\[[\w\s,.*+/()'-]*\]|scalar|shapes? (as|of)|any shape|same arguments|same shape|shaped like|like ``?\w"
)
SOURCE = re.compile(r"arXiv|eq\.|equation|released script|paper|ECCV|ICML|UniPC|DDIM", re.IGNORECASE)
# Not the function's own errors: a stub, a guard against our own mistakes, a signal, or control flow of Python.
NOT_DOCUMENTED = {"NotImplementedError", "AssertionError", "KeyboardInterrupt", "StopIteration", "SystemExit"}


def public_functions(file: Path) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """(name, function, docstring that counts for it) of a file: a method may rely on its class's docstring."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or ""
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            about = ast.get_docstring(node) or ""
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    own = ast.get_docstring(inner) or ""
                    yield f"{node.name}.{inner.name}", inner, f"{own}\n{about}"


FUNCTIONS = [
    pytest.param(file, function, text, id=f"{file.relative_to(ROOT)}:{name}")
    for file in FILES
    for name, function, text in public_functions(file)
]


def takes_tensors(function: ast.FunctionDef) -> bool:
    """Whether an annotation of a parameter names a tensor or an array."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    notes = [re.sub(r"Callable\[.*\]", "", ast.unparse(a.annotation)) for a in arguments if a.annotation]
    return any(re.search(r"\b(Tensor|ndarray)\b", note) for note in notes)


def raised(function: ast.FunctionDef) -> set[str]:
    """Names of the exceptions that leave a function's own body; not those of functions inside it."""
    found: set[str] = set()
    queue: list[ast.AST] = list(function.body)
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Try):  # what it raises and catches itself
            caught = {n.id for h in node.handlers if h.type for n in ast.walk(h.type) if isinstance(n, ast.Name)}
            raises = [n for part in node.body for n in ast.walk(part) if isinstance(n, ast.Raise)]
            for inner in raises:
                if isinstance(inner.exc, ast.Call) and isinstance(inner.exc.func, ast.Name):
                    inner.exc = None if inner.exc.func.id in caught else inner.exc
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
        queue += ast.iter_child_nodes(node)
    errors = {name for name in found if name.endswith(("Error", "Problem", "Failed")) or hasattr(builtins, name)}
    return errors - NOT_DOCUMENTED


@pytest.mark.parametrize(("file", "function", "text"), FUNCTIONS)
def test_a_public_function_documents_shapes_and_errors(file: Path, function: ast.FunctionDef, text: str) -> None:
    if takes_tensors(function):
        assert SHAPE.search(text), f"{file.name}: {function.name} takes tensors: give their shapes, as [B, 2, C, H, W]"
    for name in raised(function):
        assert name in text, f"{file.name}: {function.name} raises {name}: say when"


@pytest.mark.parametrize("file", METHOD, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_formula_names_its_source(file: Path) -> None:
    """Modules of the method and kernels whose docstrings state a formula say where it comes from."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    text = "\n".join(ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, documented))
    if re.search(r"``[^`]* = [^`]*``|::\n", text):
        assert SOURCE.search(text), f"{file.name} states a formula without its source"
