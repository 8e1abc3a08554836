"""The controls beside the results that they explain: what each changes in a step."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from toy import olmo2, token_dataset

from hf_sam import SAMStep
from hf_sam.experiments.presets import read_preset
from hf_sam.step.variants import VARIANTS, register

FOLDER = Path(__file__).parents[2] / "recipes" / "results" / "toy-controls"


@pytest.fixture
def controls(monkeypatch):
    """The module, with its variants registered."""
    spec = importlib.util.spec_from_file_location("controls", FOLDER / "controls.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "argv", ["controls.py"])
    spec.loader.exec_module(module)
    known = dict(VARIANTS)
    for variant in module.VARIANTS:
        register(variant)
    yield module
    for hooks in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks):
        hooks.clear()
    VARIANTS.clear()
    VARIANTS.update(known)


def trained(variant: str | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and second moments after two plain steps and a third one of a variant; plain if None."""
    accelerator = Accelerator(cpu=True)
    model = olmo2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    model, optimizer = accelerator.prepare(model, optimizer)
    sam = SAMStep(accelerator, model, 0.0, variant=variant or "sam")
    batch = {
        name: torch.stack([torch.as_tensor(row[name]) for row in token_dataset()[:8]])
        for name in ("input_ids", "labels")
    }

    def forward_backward(inputs):
        loss = model(**inputs).loss
        accelerator.backward(loss)
        return loss.detach()

    for step in range(3):
        sam.rho = 0.5 if step == 2 and variant is not None else 0.0
        sam(forward_backward, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    params = list(model.parameters())
    return [p.detach().clone() for p in params], [optimizer.state[p]["exp_avg_sq"].clone() for p in params]


def assert_same(some: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        # Moving average and clipping are computed in another order.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_the_second_moment_is_that_of_the_other_gradient(controls):
    plain, sam = trained(None), trained("sam")
    assert max((a - b).abs().max() for a, b in zip(plain[1], sam[1], strict=True)) > 1e-6
    step_of_sam, memory_of_plain = trained("not-in-second-moment")
    assert_same(step_of_sam, sam[0])
    assert_same(memory_of_plain, plain[1])
    step_of_plain, memory_of_sam = trained("only-in-second-moment")
    assert_same(step_of_plain, plain[0])
    assert_same(memory_of_sam, sam[1])


def test_the_random_direction_has_the_length_of_the_radius(controls):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(olmo2())
    optimizer = torch.optim.AdamW(model.parameters())
    sam = SAMStep(accelerator, model, 3.0, variant="random-direction", optimizer=optimizer)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with sam.perturbed():
        moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.norm() == pytest.approx(3.0, rel=1e-5)
    assert abs(moved.mean()) < 4 * moved.std() / len(moved) ** 0.5


def test_each_control_differs_from_sparse_sam_in_one_setting(controls):
    runs = read_preset(str(FOLDER / "controls.yaml"))["anneal"]["runs"]
    sparse = runs["sam-every-10"]
    assert sparse == read_preset("toy-interval")["anneal"]["runs"]["sam-every-10"]
    changed = {
        name: sorted(key for key in {**run, **sparse} if run.get(key) != sparse.get(key)) for name, run in runs.items()
    }
    assert changed == {
        "adamw": ["sam_interval", "sam_rho"],
        "sam-every-10": [],
        "every-10-unclipped": ["max_grad_norm"],
        "not-in-second-moment": ["sam_variant"],
        "only-in-second-moment": ["sam_variant"],
        "random-direction": ["sam_variant"],
        "random-direction-far": ["sam_rho", "sam_variant"],
        "random-steps": ["sam_interval", "sam_variant"],
        "largest-gradients": ["sam_interval", "sam_variant"],
    }


def test_steps_are_chosen_at_random_or_by_the_norm_of_the_gradient(controls):
    at_random, largest, draw = controls.RandomSteps(), controls.LargestGradients(), random.Random(0)
    assert 50 < sum(at_random.chosen(1.0) for _ in range(1000)) < 150
    assert 50 < sum(largest.chosen(draw.random()) for _ in range(1000)) < 150
    assert largest.chosen(1.0)
    assert not largest.chosen(0.5)


def test_steps_that_are_not_chosen_are_plain(controls, monkeypatch):
    plain, sam = trained(None), trained("sam")
    for act, expected in ((False, plain), (True, sam)):
        monkeypatch.setattr(controls.RandomSteps, "chosen", lambda self, norm, act=act: act)
        for some, others in zip(trained("random-steps"), expected, strict=True):
            assert_same(some, others)
