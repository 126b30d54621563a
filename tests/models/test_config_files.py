"""Files of a pipeline that are damaged, or made to harm: each is refused by name, and nothing is unpickled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pipelines import CPU, edit_json, settings
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from smpo_fast import embedded
from smpo_fast.common.errors import ModelError
from smpo_fast.config.schema import Inversion
from smpo_fast.models.encoders import Encoders
from smpo_fast.models.load import empty_unet, load_pipeline, load_tokenizer, load_unet
from smpo_fast.models.locate import find, schedule_of
from smpo_fast.models.network_spec import network_spec


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded.pipeline_path(), tmp_path / "p"))


def open_configuration(folder: Path) -> None:
    """All that is read before networks are loaded."""
    source = find(settings(folder))
    schedule_of(source, Inversion())
    network_spec(source, 32)
    empty_unet(source)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps = 1000000000"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps = 0"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}, "num_train_timesteps = -1"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}, "num_train_timesteps = 'x'"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": True}, "num_train_timesteps = True"),
        ("scheduler/scheduler_config.json", {"beta_end": float("nan")}, "beta_end = nan"),
        ("scheduler/scheduler_config.json", {"beta_start": [0]}, r"beta_start = \[0\]"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.9, "num_train_timesteps": 99999}, "leave no signal"),
        ("scheduler/scheduler_config.json", {"prediction_type": {}}, "predicts {}"),
        ("model_index.json", {"_class_name": ["StableDiffusionXLPipeline"]}, "holds the pipeline"),
        ("unet/config.json", {"in_channels": "4"}, "'4' input channels"),
        ("unet/config.json", {"block_out_channels": "x"}, "unet/config.json describes no UNet"),
        ("unet/config.json", {"cross_attention_dim": None}, "cross_attention_dim = None"),
        ("vae/config.json", {"block_out_channels": 8}, "block_out_channels = 8"),
    ],
)
def test_values_that_make_no_pipeline_are_refused(
    file: str, values: dict[str, Any], message: str, pipeline: Path
) -> None:
    edit_json(pipeline / file, **values)
    with pytest.raises(ModelError, match=message):
        open_configuration(pipeline)


FILES = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", ["[]", "null", "7", "", "{", "[" * 5000, "\xff"])
def test_files_without_a_json_object_are_refused_by_name(file: str, content: str, pipeline: Path) -> None:
    (pipeline / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=Path(file).name):
        open_configuration(pipeline)


small = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=5)
values = st.recursive(small, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))


@given(data=st.data())
@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_json_is_read_or_refused(data: st.DataObject, pipeline: Path) -> None:
    """Whole files, and single values of each: no other exception than ModelError."""
    file = pipeline / data.draw(st.sampled_from(FILES))
    before = file.read_text()
    whole = json.loads(before)
    if data.draw(st.booleans()):
        changed = data.draw(values)
    else:
        changed = whole | {data.draw(st.sampled_from(sorted(whole))): data.draw(values)}
    file.write_text(json.dumps(changed))
    try:
        open_configuration(pipeline)
    except ModelError:
        pass
    finally:
        file.write_text(before)


class Encoder:
    """A text encoder's configuration."""

    class config:
        max_position_embeddings, vocab_size = 16, 10_000


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"model_max_length": 1000000000}'),
        ("tokenizer_config.json", '{"model_max_length": "x"}'),
        ("tokenizer_config.json", '{"model_max_length": -1}'),
        ("tokenizer_config.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", "{}"),
        ("vocab.json", "{"),
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", None),
        ("merges.txt", "a"),
    ],
)
def test_damaged_tokenizers_are_refused(file: str, content: str | None, pipeline: Path) -> None:
    folder = pipeline / "tokenizer"
    (folder / "tokenizer.json").unlink(missing_ok=True)  # made of the other files
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(folder, Encoder)


def test_prompts_longer_than_the_text_encoder_are_refused_by_every_loader(pipeline: Path) -> None:
    edit_json(pipeline / "tokenizer_2" / "tokenizer_config.json", model_max_length=10**9)
    source = find(settings(pipeline))
    for loader in (lambda: Encoders(source, CPU), lambda: load_pipeline(source, torch.float32)):
        with pytest.raises(ModelError, match="tokenizer_2/tokenizer_config.json: model_max_length = 1000000000"):
            loader()


class Bomb:
    """Its unpickling is an assertion."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickled file was loaded",)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("name", ["shard.bin", "../shard.safetensors", "/shard.safetensors", 7])
def test_an_index_may_name_safetensors_files_of_its_folder_only(part: str, name: Any, pipeline: Path) -> None:
    (weights,) = (pipeline / part).glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    torch.save(Bomb(), pipeline / part / "shard.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (pipeline / part / f"{weights.name}.index.json").write_text(json.dumps(index))
    source = find(settings(pipeline))
    with pytest.raises(ModelError, match=r"safetensors\.index\.json"):
        load_unet(source, settings(pipeline), torch.float32, CPU)
        Encoders(source, CPU)


def test_shards_named_by_an_index_are_loaded(pipeline: Path) -> None:
    (weights,) = (pipeline / "unet").glob("*.safetensors")
    wanted = load_unet(find(settings(pipeline)), settings(pipeline), torch.float32, CPU).state_dict()
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(wanted, "diffusion_pytorch_model-00001-of-00001.safetensors")}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    found = load_unet(find(settings(pipeline)), settings(pipeline), torch.float32, CPU).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_adapters_in_place_of_a_text_encoder_are_refused(pipeline: Path) -> None:
    (pipeline / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter_config.json"):
        Encoders(find(settings(pipeline)), CPU)
