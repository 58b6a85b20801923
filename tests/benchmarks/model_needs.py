"""Memory and operations of a training step of OpenAI's models, by counting.

    python tests/benchmarks/model_needs.py

What a step keeps for its backward pass is counted tensor by tensor, and its operations by torch's
counter, on the CPU in float32, for images with two captions each. Weights, gradients and AdamW's
two moments are 16 bytes a parameter. A GPU needs some hundred MB more for itself.
"""

import argparse

import torch
from measure import print_table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from models.clip import CLIP
from models.clip_utils import create_model
from models.host import run_script
from models.weights.registry import CONFIGS

CAPTION = "a brown dog runs on the wet sand with a red ball"  # 14 tokens, as Flickr8k's on average
STATE = 16  # bytes a parameter
MEMORY = 8e9  # bytes, of a small GPU


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=CONFIGS, metavar="NAME",
                        default=["RN50", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"],
                        help="default: %(default)s")  # fmt: skip
    args = parser.parse_args()

    rows = []
    for name in args.models:
        model = create_model(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        state, each = STATE * parameters, kept(model, 3) - kept(model, 2)
        rows.append([
            name, f"{parameters / 1e6:.0f}", f"{state / 1e9:.1f}", f"{each / 1e6:.0f}",
            int((MEMORY - state) / each), f"{operations(model) / 1e9:.0f}",
        ])  # fmt: skip
    print_table(
        ["model", "parameters, M", "state, GB", "MB an image", "images in 8 GB",
         "GFLOP an image"], rows,
    )  # fmt: skip


def features(model: CLIP, images: int) -> Tensor:
    """A number that all features of so many images and their captions go into."""
    side = model.visual.input_resolution
    pixels, tokens = torch.zeros(images, 3, side, side), model.tokenize([CAPTION] * 2 * images)
    return model.encode_image(pixels).float().sum() + model.encode_text(tokens).float().sum()


def kept(model: CLIP, images: int) -> int:
    """Bytes that a step keeps for its backward pass, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the graph would hold itself

    with saved_tensors_hooks(note, lambda tensor: tensor):
        end = features(model, images)
    del end  # what is kept was kept until here, at addresses of its own
    return sum(size for address, size in sizes.items() if address not in parameters)


def operations(model: CLIP) -> int:
    """Floating-point operations of a step with one image, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        features(model, 1).backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    run_script(main)
