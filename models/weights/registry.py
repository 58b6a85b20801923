"""The models with a name: their architectures, and the addresses and digests of their weights."""

from dataclasses import replace

from models.config import CHINESE_CONTEXT_LENGTH, CHINESE_VOCABULARY, Config

BASE_URL = "https://openaipublic.azureedge.net/clip/models"

SHA256 = {  # of the published weights files, in hexadecimal
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


# Radford et al. 2021, tables 19 and 20: the first ten fields of `Config`, in its order.
SIZES = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, None, 512, 2048, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, None, 512, 2048, 8, 12),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, None, 640, 2560, 10, 12),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, None, 768, 3072, 12, 12),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, None, 1024, 4096, 16, 12),
    "ViT-B/32": (512, 224, 12, 768, 32, 3072, 512, 2048, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 3072, 512, 2048, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 4096, 768, 3072, 12, 12),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 4096, 768, 3072, 12, 12),
    # This project's own, as cn-demo: without published weights, trained on a CPU in minutes.
    "ViT-demo": (256, 64, 3, 192, 16, 768, 128, 512, 2, 3),
}
CONFIGS = {name: Config(*sizes) for name, sizes in SIZES.items()}
# The same with BERT as text tower, for Chinese.
CONFIGS["cn-demo"] = replace(
    CONFIGS["ViT-demo"],
    text_tower="bert",
    vocab_size=CHINESE_VOCABULARY,
    context_length=CHINESE_CONTEXT_LENGTH,
    text_positions=CHINESE_CONTEXT_LENGTH,
    resize_mode="squash",  # as in Chinese-CLIP
)


def available_models() -> list[str]:
    """The names of the models with published weights."""
    return list(SHA256)


def weights_url(name: str) -> str:
    """The web address of the published weights. It contains the SHA-256 of the file."""
    return f"{BASE_URL}/{SHA256[name]}/{weights_filename(name)}"


def weights_filename(name: str) -> str:
    """The name of a model's weights file: `ViT-L/14@336px` -> `ViT-L-14-336px.pt`."""
    return name.replace("/", "-").replace("@", "-") + ".pt"
