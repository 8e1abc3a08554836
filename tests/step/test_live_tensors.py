"""How many tensors of the size of the weights are alive while the perturbed gradient is computed."""

import pytest
import torch
from accelerate import Accelerator
from memory import Tracker

from hf_sam import SAMStep

WIDTH = 256
KINDS = {
    "plain": {"rho": 0.0},
    "sam": {"rho": 0.1},
    "asam": {"rho": 0.1, "variant": "asam"},
    "loss_rise": {"rho": 1.0, "loss_rise": 0.1},
    "momentum": {"rho": 0.1, "variant": "momentum"},
    "noise": {"rho": 0.0, "noise": 0.1},
    "sam_and_noise": {"rho": 0.1, "noise": 0.1},
    "momentum_and_noise": {"rho": 0.1, "noise": 0.1, "variant": "momentum"},
}


def copies_alive(rho, **settings) -> list[float]:
    """Bytes that the step has allocated, in copies of the weights, when each pass begins."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    size = sum(param.nbytes for param in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = SAMStep(Accelerator(cpu=True), model, rho, optimizer=optimizer, **settings)
    alive: list[float] = []
    x = torch.randn(4, WIDTH)

    def forward_backward(x):
        alive.append(tracker.live / size)
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(2):
        alive.clear()
        with Tracker() as tracker:
            step(forward_backward, x)
        optimizer.step()
        optimizer.zero_grad()
    return alive


@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbed_pass_needs_one_copy_of_the_weights(kind):
    *before, alive = copies_alive(**KINDS[kind])
    expected = 0 if kind == "plain" else 1
    # The rest is for inputs, norms and flags.
    assert alive == pytest.approx(expected, abs=0.05)
    assert before == ([pytest.approx(0, abs=0.05)] if "sam" in kind or kind == "loss_rise" else [])
