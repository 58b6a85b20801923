"""A GPU with CUDA that computes nothing, on a machine without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)


class HostWaitsError(AssertionError):
    """Something makes the CPU wait until the GPU has done all that it was asked to do."""


class FakeGpu(FakeTensorMode):
    """While entered, tensors on `cuda` are torch's fake tensors: they have a device, a shape and a
    type, but no numbers. What is on the CPU is computed.

    Within `step()`, `HostWaitsError` is raised for a copy from the GPU that is not asynchronous and
    into new memory, which torch pins; for one to it that is not asynchronous and from pinned
    memory; and for waiting for an event of the same step. What is copied from the GPU is zero. That
    a number is read, or decides about a shape, is an error of the fake tensors' own; so are tensors
    on two devices in one operation, but torch lets fake and true ones mix, which is an
    `AssertionError` here.
    """

    def __init__(self, monkeypatch):
        super().__init__(allow_non_fake_inputs=True)
        self.in_step = False
        self.steps = 0
        self.pinned: list[Tensor] = []
        # What torch asks before it lets a GPU compute.
        monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        monkeypatch.setattr(torch.cuda, "Event", partial(FakeEvent, self))
        monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_backward)

    @contextmanager
    def step(self) -> Iterator[None]:
        self.in_step = True
        self.steps += 1
        yield
        self.in_step = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [isinstance(tensor, FakeTensor) for tensor in tensors]
        target = kwargs.get("device")
        to_gpu = target is not None and torch.device(target).type == "cuda"
        if func in COPIES:
            self._check_copy(func, args, kwargs)
            if func is aten._to_copy.default and any(on_gpu) and target and not to_gpu:
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
        elif any(on_gpu):
            shapes = [t.shape for t, is_on in zip(tensors, on_gpu, strict=True) if not is_on]
            assert not any(shapes), f"{func}: tensors of {shapes} on the CPU, others on the GPU"
        if any(on_gpu) or to_gpu:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with _disable_current_modes():
            if func is aten.is_pinned.default:
                return any(tensor is args[0] for tensor in self.pinned)
            if func is aten._pin_memory.default:
                self.pinned.append(args[0].clone())
                return self.pinned[-1]
            return func(*args, **kwargs)

    def _check_copy(self, func, args: tuple, kwargs: dict) -> None:
        if func is aten.copy_.default:
            source, target = args[1], args[0].device
            asynchronous = args[2] if len(args) > 2 else False
        else:
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
            asynchronous = kwargs.get("non_blocking", False)
        if not self.in_step or target.type == source.device.type:
            return
        pinned = any(tensor is source for tensor in self.pinned)
        if isinstance(source, FakeTensor):
            pinned = func is aten._to_copy.default
        if not (asynchronous and pinned):
            raise HostWaitsError(f"a copy from {source.device} to {target}: {list(source.shape)}")


class FakeEvent:
    """An event of CUDA."""

    def __init__(self, gpu: FakeGpu):
        self.gpu = gpu

    def record(self) -> None:
        self.step = self.gpu.steps

    def synchronize(self) -> None:
        if self.step == self.gpu.steps:
            raise HostWaitsError("the step that the GPU is to do now is waited for")


@torch.no_grad()
def run_backward(outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], *_, **__) -> None:
    """What torch's own engine for the backward pass does, but without looking for a GPU first."""
    arrived: dict = {}  # the gradients of what a node of the graph computed, one for each output

    def arrive(node, number: int, gradient: Tensor) -> None:
        metadata = node._input_metadata[number]
        assert gradient.device == metadata.device, node
        gradient = gradient.sum_to_size(metadata.shape).to(metadata.dtype)
        slots = arrived.setdefault(node, [None] * len(node._input_metadata))
        slots[number] = gradient if slots[number] is None else slots[number] + gradient

    for output, gradient in zip(outputs, gradients, strict=True):
        arrive(output.grad_fn, output.output_nr, gradient)
    while arrived:  # the latest first: what it was computed from came earlier
        node = max(arrived, key=lambda node: node._sequence_nr())
        slots = arrived.pop(node)
        if hasattr(node, "variable"):
            leaf = node.variable
            leaf.grad = slots[0] if leaf.grad is None else leaf.grad + slots[0]
            continue
        results = getattr(node, "apply", node)(*slots)  # the first: of a torch.autograd.Function
        results = results if isinstance(results, tuple) else (results,)
        # What is no tensor, such as the epsilon of a norm, comes last and has no gradient.
        for (following, number), result in zip(node.next_functions, results, strict=False):
            if following is not None and result is not None:
                arrive(following, number, result)
