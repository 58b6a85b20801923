"""A step in float16, whose loss is scaled."""

import pytest
import torch

from utils.machine.precision import Precision


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
