"""Adapters of the library peft: a folder with them is the model that they change, changed."""

import json
import sys

import pytest
import torch
from peers import save_transformers, small_transformers, their_features

from models import load, tokenize
from models.errors import InputError


def test_an_adapter_is_merged_into_its_base_model(tmp_path):
    """The features are those of peft's own model, which keeps the adapter apart."""
    peft = pytest.importorskip("peft", reason="needs peft")
    theirs, base = small_transformers(), tmp_path / "base"
    save_transformers(theirs, base)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "fc1"])
    theirs.name_or_path = str(base)
    adapted = peft.get_peft_model(theirs, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # starts as zero
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = tokenize(["a red bird", "two boats"])
    expected = their_features(adapted.base_model.model.eval(), images, tokens)
    for path, is_same in ((tmp_path / "adapter", True), (base, False)):
        ours, _ = load(path, "cpu")
        for found, features in zip(their_features(ours, images, tokens), expected, strict=True):
            assert torch.allclose(found, features, atol=1e-4) is is_same


def test_without_the_library_an_adapter_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    content = {"base_model_name_or_path": "openai/clip-vit-base-patch32", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    told = r"adapter of the library peft for the model openai/clip-vit-base-patch32.*pip install"
    with pytest.raises(InputError, match=told):
        load(tmp_path, "cpu")
