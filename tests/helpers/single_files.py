"""Single-file checkpoints for tests: a pipeline folder's tensors by their original names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smpo_fast import embedded
from smpo_fast.models import public_pipelines
from smpo_fast.models.single_file import layout
from smpo_fast.models.single_file.parts import WEIGHTS, classic_names, empty_state


def pretend_public(patch: pytest.MonkeyPatch, folders: Mapping[str, Path], cache: Path) -> None:
    """Let small pipelines be the public ones: their configurations and vocabularies. Conversions go to ``cache``."""

    def vocabulary(tokenizer: Path) -> None:
        source = next(iter(folders.values())) / tokenizer.name
        for file in source.iterdir():
            shutil.copyfile(file, tokenizer / file.name)

    public = public_pipelines.folder
    patch.setattr(public_pipelines, "folder", lambda kind: folders.get(kind) or public(kind))
    patch.setattr(public_pipelines, "write_vocabulary", vocabulary)
    patch.setenv("XDG_CACHE_HOME", str(cache))


def pipeline_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """A part's tensors by diffusers' names."""
    return classic_names(part, load_file(folder / part / WEIGHTS[part]))


def original_tensors(folder: Path, kind: str, *parts: str) -> dict[str, Tensor]:
    """The tensors of a pipeline's parts (default: all) as an original checkpoint has them."""
    found: dict[str, Tensor] = {}
    for part in parts or tuple(layout.PREFIXES[kind]):
        tensors = pipeline_tensors(folder, part)
        config = json.loads((folder / part / "config.json").read_text())
        thirds: dict[str, dict[int, Tensor]] = {}
        for name, (original, third) in layout.original_names(part, tensors, config).items():
            value = tensors[name]
            value = value.T if name == "text_projection.weight" else value
            if part == "vae" and "attn_1" in original and value.ndim == 2:
                value = value[:, :, None, None]
            thirds.setdefault(original, {})[third or 0] = value
        for original, pieces in thirds.items():
            found[layout.PREFIXES[kind][part] + original] = torch.cat([pieces[i] for i in sorted(pieces)]).contiguous()
    return found


def write(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    """Write a safetensors file; metadata keys have '_' for the first '.'."""
    named = {key.replace("_", ".", 1): value for key, value in metadata.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"format": "pt", **named})
    return file


def write_header(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16", **metadata: str) -> Path:
    """A file of true size without content: the header, then a hole."""
    header: dict[str, object] = {"__metadata__": metadata}
    place = 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + place)
    return file


def true_shapes(kind: str, *parts: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a public checkpoint's tensors, from its configurations alone."""
    found: dict[str, tuple[int, ...]] = {}
    for part in parts or tuple(layout.PREFIXES[kind]):
        config = json.loads((public_pipelines.folder(kind) / part / "config.json").read_text())
        state = empty_state(part, config)
        for name, (original, third) in layout.original_names(part, state, config).items():
            shape = tuple(state[name].shape)
            shape = shape if third is None else (3 * shape[0], *shape[1:])
            found[layout.PREFIXES[kind][part] + original] = shape
    return found


MINIATURE = embedded.pipeline_path()
