"""A radius that follows from the rise of the loss (arXiv 2605.10183)."""

import math

import pytest
import torch
from accelerate import Accelerator
from toy import olmo2, step_logs, token_dataset, trainer

from hf_sam import SAMStep, SAMTrainingArguments
from hf_sam.step.reference import sam_step

LOSS_RISE = 0.01


def loss_of(model, batch):
    return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss


def one_step(model, batches, **settings):
    """Gradients and metrics of one step over some micro-batches, whose mean is the loss."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(batches))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = SAMStep(accelerator, model, math.inf, loss_rise=LOSS_RISE, optimizer=optimizer, **settings)

    def forward_backward(batch):
        loss = loss_of(model, batch) / len(batches)
        loss.backward()
        return loss.detach()

    for batch in batches:
        with accelerator.accumulate(model):
            step(forward_backward, batch)
    return {name: param.grad for name, param in model.named_parameters()}, step.pop_metrics()


@pytest.fixture
def batches():
    rows = token_dataset(rows=8)
    parts = [rows[i : i + 2] for i in range(0, 8, 2)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]


@pytest.mark.parametrize("variant", ["sam", "asam"])
@pytest.mark.parametrize("k", [None, 1])
def test_a_step_is_that_of_the_reference(batches, variant, k):
    gradients, metrics = one_step(olmo2(), batches, variant=variant, ascent_micro_batches=k)
    plain = olmo2()
    expected = sam_step(
        plain,
        batches,
        lambda model, batch: loss_of(model, batch) / len(batches),
        rho=math.inf,
        variant=variant,
        ascent_micro_batches=k,
        loss_rise=LOSS_RISE,
    )
    for name, param in plain.named_parameters():
        torch.testing.assert_close(gradients[name], param.grad, rtol=1e-5, atol=1e-7)
    scale = len(batches) / (k or len(batches))
    assert metrics["sam/radius"] == pytest.approx(LOSS_RISE / (expected.ascent_grad_norm * scale), rel=1e-5)


@pytest.mark.parametrize("variant", ["sam", "asam"])
def test_the_loss_rises_by_that_much_to_first_order(batches, variant):
    _, metrics = one_step(olmo2(), batches, variant=variant)
    # The curvature adds a little: a tenth at this radius.
    assert metrics["sam/sharpness"] == pytest.approx(LOSS_RISE, rel=0.2)


def test_rho_is_the_largest_radius(tmp_path):
    free = trainer(tmp_path / "free", sam_loss_rise=LOSS_RISE, max_steps=6)
    free.train()
    radii = [log["sam/radius"] for log in step_logs(free)]
    norms = [log["sam/ascent_grad_norm"] for log in step_logs(free)]
    assert radii == pytest.approx([LOSS_RISE / norm for norm in norms], rel=1e-5)
    assert max(radii) > 1.01 * min(radii)
    largest = sorted(radii)[3]
    capped = trainer(tmp_path / "capped", sam_loss_rise=LOSS_RISE, sam_rho=largest, max_steps=6)
    capped.train()
    logs = step_logs(capped)
    expected = [min(LOSS_RISE / log["sam/ascent_grad_norm"], largest) for log in logs]
    assert [log["sam/radius"] for log in logs] == pytest.approx(expected, rel=1e-5)
    assert largest in [pytest.approx(radius, rel=1e-6) for radius in expected]
    assert min(expected) < largest


def test_the_loss_scale_does_not_change_the_radius(tmp_path):
    run = trainer(tmp_path / "scaled", sam_loss_rise=LOSS_RISE, max_steps=1)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plain = trainer(tmp_path / "plain", sam_loss_rise=LOSS_RISE, max_steps=1)
    for each in (run, plain):
        each.train()
    # A power of two only changes exponents.
    assert step_logs(run)[0]["grad_norm"] > 1000 * step_logs(plain)[0]["grad_norm"]  # clipped without being unscaled
    assert step_logs(run)[0]["sam/radius"] == pytest.approx(step_logs(plain)[0]["sam/radius"], rel=1e-6)


def test_values_out_of_range_are_refused(tmp_path):
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"sam_loss_rise=.* must be a finite number of nats"):
            SAMTrainingArguments(output_dir=str(tmp_path), sam_loss_rise=value)
    with pytest.raises(ValueError, match="with loss_rise it may be infinite"):
        SAMStep(Accelerator(cpu=True), torch.nn.Linear(2, 2), math.inf)
    assert SAMTrainingArguments(output_dir=str(tmp_path), sam_loss_rise="1e-2").uses_sam
