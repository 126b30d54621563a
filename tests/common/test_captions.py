"""Very long captions are cut before they are tokenized, without changing what a text encoder reads."""

from __future__ import annotations

import time

import pytest
import torch

from smpo_fast.common.captions import MAX_CHARACTERS, bounded
from smpo_fast.config import loading
from smpo_fast.models.encoders import Encoders
from smpo_fast.models.locate import find


def test_short_captions_are_untouched() -> None:
    caption = "a  cat\n" * (MAX_CHARACTERS // 7)
    assert bounded(caption) is caption
    assert len(bounded(caption * 2)) == MAX_CHARACTERS


@pytest.mark.parametrize(
    "caption", ["a red circle " * 1_000_000, " " * 10_000_000 + "a red circle " * 10, "x" * 10_000_000]
)
def test_ten_megabytes_give_the_same_tokens_in_a_second(caption: str) -> None:
    from transformers import CLIPTokenizer

    source = find(loading.from_dict({}).model)
    tokenizer = CLIPTokenizer.from_pretrained(source.folder / "tokenizer")
    began = time.process_time()
    ids = tokenizer(bounded(caption), truncation=True, max_length=77).input_ids
    assert time.process_time() - began < 10
    assert ids == tokenizer(caption.lstrip()[:20_000], truncation=True, max_length=77).input_ids


def test_the_encoders_cut_before_they_tokenize() -> None:
    encoders = Encoders(find(loading.from_dict({}).model), torch.device("cpu"))
    huge = "a red circle " * 1_000_000
    began = time.process_time()
    assert encoders.truncated([huge, "a red circle"]) == 1
    assert torch.equal(encoders.encode_prompts([huge])[0], encoders.encode_prompts([huge[:5000]])[0])
    assert time.process_time() - began < 10
