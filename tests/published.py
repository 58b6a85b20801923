"""Weights files in the format of those that OpenAI published."""

from pathlib import Path

import torch
from torch import Tensor, nn

BUFFERS = ("input_resolution", "context_length", "vocab_size")


class Part(nn.Module):
    """An empty module to put weights into. TorchScript asks for a `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def save_published(weights: dict[str, Tensor], path: Path) -> Path:
    """Write a TorchScript archive with float16 weights and three extra buffers; return `path`."""
    root = Part()
    for key, tensor in weights.items():
        *parents, name = key.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, Part())
            module = getattr(module, parent)
        half = tensor.detach().half() if tensor.is_floating_point() else tensor
        if half.is_floating_point() and "running_" not in name:
            module.register_parameter(name, nn.Parameter(half.clone()))
        else:
            module.register_buffer(name, half.clone())
    for name, value in zip(BUFFERS, (224, 77, 49408), strict=True):
        root.register_buffer(name, torch.tensor(value))
    torch.jit.script(root.eval()).save(str(path))
    return path
