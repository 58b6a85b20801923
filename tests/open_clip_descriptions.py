"""The descriptions of models that open_clip brings, by name."""

import json
from pathlib import Path

import open_clip

DESCRIPTIONS = {
    file.stem: json.loads(file.read_text())
    for file in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))
}
# What in a description says that the model has a tower or a tokenizer of another kind.
OTHER = ("timm_model_name", "hf_model_name", "hf_tokenizer_name", "multimodal_cfg", "no_ln_pre",
         "ls_init_value", "attentional_pool", "embed_cls")  # fmt: skip
OWN = [name for name, d in DESCRIPTIONS.items() if not any(o in json.dumps(d) for o in OTHER)]
