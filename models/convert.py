"""Write weights in another format, for another program or to pass them on.

python models/convert.py logs/RUN my_clip --format transformers
python models/convert.py ViT-B/32 clip.safetensors --format safetensors --half
"""

import sys
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # Python looks for modules in this folder only, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors import SafetensorError

from models.clip import CLIP
from models.clip_utils import find_weights, read_model
from models.errors import InputError, listed, one_line
from models.files import check_writable
from models.host import run_script
from models.open_clip_model import OpenClipModel
from models.scripts import ArgumentParser, add_activation, path
from models.weights.formats import FORMATS


def convert(model: CLIP, output: Path, to: str, half: bool = False) -> None:
    """Write a float32 model to `output` in one atomic step, floats as float16 if `half`. Raises
    `InputError` if the format or float16 cannot hold the model, and as `check_output` does."""
    check_output(output, to)
    if isinstance(model, OpenClipModel) and to != "open_clip":
        raise InputError("a model that open_clip builds; take its own format, --format open_clip")
    floats = {key: t for key, t in model.state_dict().items() if t.is_floating_point()}
    too_large = [key for key, t in floats.items() if half and not t.half().isfinite().all()]
    if too_large:
        raise InputError(f"float16 ends at 65,504, which {listed(too_large)} exceed; omit --half")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(
            dir=output.parent, prefix=".unfinished.", ignore_cleanup_errors=True
        ) as staging:
            written = Path(staging) / "output"
            FORMATS[to].write(model, written, torch.float16 if half else torch.float32)
            written.rename(output)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{output}: cannot be written ({one_line(error)}); make room, or name another place"
        ) from error


def check_output(output: Path, to: str) -> None:
    """Raise `InputError` if `output` exists or cannot be written, or the format lacks a package."""
    if output.exists():
        raise InputError(f"{output}: exists already; name a new file or folder")
    check_writable(output)
    FORMATS[to].check()


def main() -> None:
    purposes = (f"  {name}: {kind.purpose}" for name, kind in FORMATS.items())
    epilog = "\n".join(["formats (the Python that opens one is printed in the end):", *purposes])
    parser = ArgumentParser(description=__doc__, epilog=epilog)
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="weights file or folder, a run, or a model name")
    add("output", type=path, metavar="OUT", help="what to write; it must not exist yet")
    add("--format", choices=list(FORMATS), required=True, help="see below")
    add("--half", action="store_true", help="float16: half the size; features agree to 3 digits")
    add_activation(parser)
    args = parser.parse_args()
    check_output(args.output, args.format)
    model = read_model(find_weights(args.weights), args.activation)
    convert(model, args.output, args.format, args.half)
    tower, kind = model.text_tower, FORMATS[args.format]
    names = {"clip": tower.transformers_model, "tokenizer": tower.transformers_tokenizer}
    code = textwrap.dedent(kind.opened_by).strip().format(args.output.as_posix(), **names)
    print(f"written to {args.output}\n  {args.format}: {kind.purpose}")
    print(textwrap.indent(code, "    "))


if __name__ == "__main__":
    run_script(main)
