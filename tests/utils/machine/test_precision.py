"""A step in float16, whose loss is scaled; products of CUDA in TF32."""

import pytest
import torch
from tiny import TINY, tiny_clip
from torch.utils._python_dispatch import TorchDispatchMode

from utils.flickr8k_dataloader import Batch
from utils.machine.precision import Precision
from utils.machine.processes import ALONE
from utils.training.gradients import accumulate_gradients

CPU = torch.device("cpu")


class Products(TorchDispatchMode):
    """Notes the shape of every product of matrices, and whether CUDA would compute it in TF32."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[list[int], bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.found.append(([*result.shape], torch.backends.cuda.matmul.allow_tf32))
        return result


def test_steps_have_tf32_products_but_logits_and_scores_have_none():
    """Whatever a library has set before."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    model, precision = tiny_clip(), Precision(CPU, use_amp=False)
    images = torch.zeros(3, 3, TINY.image_resolution, TINY.image_resolution, dtype=torch.uint8)
    tokens = torch.tensor([[1, 2, 6, 0, 0], [1, 6, 0, 0, 0]]).repeat(3, 1)
    with Products() as products:
        accumulate_gradients(model, Batch(images, None, tokens), precision, ALONE)
    logits = [is_tf32 for shape, is_tf32 in products.found if shape == [3, 6]]
    assert logits == [False, False]  # computed again in the backward pass
    others = [is_tf32 for shape, is_tf32 in products.found if shape != [3, 6]]
    assert len(others) > 20 and all(others)
    with Products() as products, precision.autocast():
        model.encode_text(tokens)
    assert products.found and not any(is_tf32 for _, is_tf32 in products.found)
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_mixed_precision_is_that_of_the_chosen_gpu(monkeypatch, capability, dtype):
    """Not of the first one. Tensor cores have bfloat16 from compute capability 8.0 on (CUDA C++
    Programming Guide, "Compute Capabilities")."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", {torch.device("cuda", 1): capability}.get
    )
    assert Precision(torch.device("cuda", 1), use_amp=True).dtype is dtype


def test_a_step_in_float16_is_scaled_clipped_and_skipped_when_it_overflows():
    """The update of plain SGD is the clipped gradient, whatever the scale of the loss."""
    linear = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    precision = Precision(torch.device("cpu"), use_amp=False)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    direction = torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    precision.backward((linear.weight * direction).sum())
    precision.update(linear, optimizer, max_norm=1.0)
    assert linear.weight.tolist()[0] == pytest.approx([1 - 0.6, 2, 3 - 0.8, 4])
    before = linear.weight.clone()
    precision.backward((linear.weight * 1e38).sum())
    precision.update(linear, optimizer, max_norm=1.0)
    assert torch.equal(linear.weight, before)
    assert precision.scaler.get_scale() == 2.0**9
