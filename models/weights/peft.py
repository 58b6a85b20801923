"""Adapters of the library peft, which change a model of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from models.errors import InputError, one_line
from models.files import read_json

CONFIG_FILE = "adapter_config.json"


@contextmanager
def merged_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder of transformers with the base model of the adapter in `folder`, into which
    peft has merged the adapter. Raises `InputError` without that library."""
    base = (read_json(folder / CONFIG_FILE) or {}).get("base_model_name_or_path")
    try:
        from peft import PeftModel
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as error:
        raise InputError(
            f"an adapter of the library peft for the model {one_line(base)}, which that library "
            f"merges ({one_line(error)}): pip install peft transformers"
        ) from None
    with TemporaryDirectory() as merged:
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)
        model.merge_and_unload().save_pretrained(merged)
        AutoImageProcessor.from_pretrained(base).save_pretrained(merged)
        yield Path(merged)
