"""Small folders as open_clip saves them, of models that are built by open_clip."""

import json
import re
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, PreTrainedTokenizerFast

from flickr8k.render_demo import WORDINGS

SIDE = 160  # pixels, of timm's small test models
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,."
PREPROCESSING = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic",
                 "resize_mode": "squash"}  # fmt: skip
TEXT = {"width": 64, "heads": 2, "layers": 2}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none",
                   "image_size": SIDE},
    "text_cfg": TEXT | {"context_length": 24, "vocab_size": 256, "no_causal_mask": True,
                        "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-06},
                        "hf_tokenizer_name": "nobody/t5",
                        "tokenizer_kwargs": {"clean": "canonicalize"}},
}  # fmt: skip
CONVNEXT = {
    "embed_dim": 32,
    "vision_cfg": {"timm_model_name": "test_convnext", "timm_proj": "linear", "image_size": SIDE},
    "text_cfg": TEXT | {"context_length": 24},
}
CLIPA = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16,
                   "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "text_cfg": TEXT | {"context_length": 24, "vocab_size": 256, "pool_type": "last",
                        "no_causal_mask": True, "hf_tokenizer_name": "nobody/bert",
                        "tokenizer_kwargs": {"strip_sep_token": True}},
}  # fmt: skip
WORLDWIDE = CLIPA | {
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": TEXT | {"context_length": 24, "vocab_size": 256, "pool_type": "eos", "eos_id": 2,
                        "hf_tokenizer_name": "nobody/xlm-v"},
}  # fmt: skip
BERT_TEXT = {"context_length": 24, "hf_tokenizer_name": "nobody/bert", "hf_proj_type": "mlp",
             "hf_pooler_type": "mean_pooler"}  # fmt: skip
EFFICIENTNET_BERT = CONVNEXT | {
    "vision_cfg": CONVNEXT["vision_cfg"] | {"timm_model_name": "test_efficientnet"}
}


def words() -> list[str]:
    """The words of the demo's captions."""
    wording = WORDINGS["en"]
    texts = [*wording.sentences, *(word for words in wording.words.values() for word in words)]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())})


def unigram() -> PreTrainedTokenizerFast:
    """As SigLIP's: no token before a text, and padding with the token after it."""
    tokens = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in words()), "▁", *LETTERS]
    tokenizer = Tokenizer(models.Unigram([(token, -len(token)) for token in tokens], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def wordpiece(pad: int = 0) -> PreTrainedTokenizerFast:
    """As BERT's; or as XLM-RoBERTa's, whose padding is token 1."""
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words(), *LETTERS, *(f"##{c}" for c in LETTERS)]
    if pad:
        tokens[:2] = tokens[1::-1]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]",
               "unk_token": "[UNK]"}  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def bert_folder(folder: Path) -> Path:
    """Of transformers' BERT, without weights."""
    config = BertConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
                        num_attention_heads=2, max_position_embeddings=32)  # fmt: skip
    config.save_pretrained(folder)
    return folder


def save_random(folder: Path, description: dict, tokenizer=None) -> nn.Module:
    """open_clip's model of this description with random weights, which it saves in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    content = {"model_cfg": description, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # some start as zero
            if not name.startswith("logit_"):
                parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model.eval()


def siglip(folder: Path) -> nn.Module:
    return save_random(folder, SIGLIP, unigram())


def convnext(folder: Path) -> nn.Module:
    return save_random(folder, CONVNEXT)


def clipa(folder: Path) -> nn.Module:
    return save_random(folder, CLIPA, wordpiece())


def worldwide(folder: Path) -> nn.Module:
    return save_random(folder, WORLDWIDE, wordpiece(pad=1))


def efficientnet_bert(folder: Path) -> nn.Module:
    """With towers of timm and of transformers."""
    text = BERT_TEXT | {"hf_model_name": str(bert_folder(folder.with_name("bert")))}
    return save_random(folder, EFFICIENTNET_BERT | {"text_cfg": text}, wordpiece())
