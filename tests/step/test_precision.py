"""16-bit weights, fp16 loss scaling, and what of the perturbation reaches the weights."""

import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from toy import olmo2, step_logs, trainer

from hf_sam import SAMTrainer
from hf_sam.step import perturbation
from hf_sam.step.backends import select_backend


class Wide(torch.nn.Module):
    """One matrix of weights with the spread of a language model's, large enough for averages to settle."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter((0.02 * torch.randn(1000, 1000, generator=generator)).to(dtype))
        self.weight.grad = torch.randn(1000, 1000, generator=generator).to(dtype)


# At rho = 0.02 over a million weights e is 2e-5 a coordinate, and the spacing of the weights mostly 6e-5 to 2.4e-4
# in bf16: the proportions of rho = 0.05 on a billion weights, scaled to what a test can average over.
RHO = 0.02


def kept_by(dtype, step=0):
    backend = select_backend(Accelerator(cpu=True), Wide(dtype))
    return backend.perturb(RHO, step=step, measure=True).kept.item()


def round_to_nearest(monkeypatch):
    monkeypatch.setattr(perturbation, "stochastic_round", lambda values, dtype, generator: values.to(dtype))


def test_stochastic_rounding_keeps_the_perturbation_of_bf16_weights_on_average():
    kept = [kept_by(torch.bfloat16, step) for step in range(5)]
    assert sum(kept) / len(kept) == pytest.approx(1.0, abs=0.05)
    assert len(set(kept)) == len(kept)  # another draw in every step


def test_rounding_to_nearest_swallows_it(monkeypatch):
    class Far(Wide):
        """Weights that are far from zero for their gradient: 0.5 has a spacing of 2e-3 in bf16."""

        def __init__(self, dtype):
            super().__init__(dtype)
            self.weight.data.copy_((0.5 + self.weight.float()).to(dtype))

    stochastic = select_backend(Accelerator(cpu=True), Far(torch.bfloat16))
    assert stochastic.perturb(RHO, measure=True).kept.item() == pytest.approx(1.0, abs=0.05)
    round_to_nearest(monkeypatch)
    nearest = select_backend(Accelerator(cpu=True), Far(torch.bfloat16))
    assert abs(nearest.perturb(RHO, measure=True).kept.item()) < 0.01
    assert kept_by(torch.bfloat16) < 0.75


def test_fp16_weights_keep_it_too():
    assert kept_by(torch.float16) == pytest.approx(1.0, abs=0.05)


def test_fp32_weights_keep_all_of_it():
    assert kept_by(torch.float32) == pytest.approx(1.0, abs=1e-4)


def test_bf16_weights_are_restored_bit_for_bit_and_the_global_stream_is_left_alone():
    model = Wide(torch.bfloat16)
    before, state = model.weight.detach().clone(), torch.get_rng_state()
    backend = select_backend(Accelerator(cpu=True), model)
    backend.perturb(RHO)
    assert not torch.equal(model.weight, before)
    backend.restore()
    assert torch.equal(model.weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_in_pure_bf16_warns_with_the_remedy_and_reports_what_was_kept(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_sam"):
        run = trainer(tmp_path, model=olmo2(dtype=torch.bfloat16), sam_rho=0.5, max_steps=4)
        run.train()
    assert "load the model in float32" in caplog.text
    kept = [entry["sam/perturbation_kept"] for entry in step_logs(run)]
    assert sum(kept) / len(kept) == pytest.approx(1.0, abs=0.1)


def test_fp32_training_does_not_warn(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_sam"):
        trainer(tmp_path, sam_rho=0.05, max_steps=2, bf16=True).train()
    assert "16-bit" not in caplog.text


def test_a_lost_perturbation_is_warned_about(tmp_path, caplog, monkeypatch):
    round_to_nearest(monkeypatch)
    model = olmo2(dtype=torch.bfloat16)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    with caplog.at_level(logging.WARNING, logger="hf_sam"):
        trainer(tmp_path, model=model, sam_rho=1e-3, max_steps=1).train()
    assert "the rest is lost in rounding" in caplog.text


class Fp16Trainer(SAMTrainer):
    """fp16 autocast and a gradient scaler on the CPU, where accelerate offers neither: set as it sets them on a GPU."""

    scale = 2.0**10

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=10_000)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


def scaled_run(tmp_path, scale, trainer_class=Fp16Trainer, **overrides):
    AcceleratorState._reset_state()
    scaled = type("Scaled", (trainer_class,), {"scale": scale})
    run = trainer(tmp_path, trainer_class=scaled, **{"sam_rho": 0.05, "max_steps": 4, **overrides})
    run.train()
    return run


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fp16_trajectory_does_not_depend_on_the_loss_scale(tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "learning_rate": 1e-3}
    small, large = (scaled_run(tmp_path, scale, **settings) for scale in (2.0**9, 2.0**12))
    fp32 = trainer(tmp_path, sam_rho=0.05, max_steps=4, **settings)
    fp32.train()
    for mine, theirs, exact in zip(step_logs(small), step_logs(large), step_logs(fp32), strict=True):
        for name in ("loss", "grad_norm", "sam/perturbed_loss", "sam/ascent_grad_norm"):
            # Another scale makes other tiny fp16 gradients underflow; a scale that leaked would be a factor of 8.
            assert mine[name] == pytest.approx(theirs[name], rel=1e-2), name
            assert mine[name] == pytest.approx(exact[name], rel=2e-2), name


def test_the_scaler_is_exact_in_fp32(tmp_path):
    class Fp32Scaler(Fp16Trainer):
        """Loss scaling without fp16: powers of two change no digit."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.accelerator.native_amp = False
            self.accelerator.state._mixed_precision = "no"

    # Without clipping, because accelerate unscales for it only in fp16.
    runs = [scaled_run(tmp_path, scale, Fp32Scaler, max_grad_norm=0.0) for scale in (1.0, 2.0**14)]
    for mine, theirs in zip(*map(step_logs, runs), strict=True):
        assert {**mine, "grad_norm": None} == {**theirs, "grad_norm": None}
    pairs = zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_overflow_of_the_loss_scale_skips_the_step_and_lowers_the_scale(tmp_path):
    class OverflowsOnce(Fp16Trainer):
        """A scale too large for one step: both of its passes overflow, as they would on an accelerator."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            self.overflows = self.state.global_step == 1
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss + (loss - loss.detach()) * float("inf") if self.overflows else loss

    weights_after = []

    class Recorder(OverflowsOnce):
        def log(self, logs, start_time=None):
            weights_after.append([p.detach().clone() for p in self.model.parameters()])
            super().log(logs, start_time)

    run = scaled_run(tmp_path, 2.0**10, Recorder, max_steps=3)
    assert [entry["sam/skipped"] for entry in step_logs(run)] == [0, 1, 0]
    assert run.accelerator.scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(weights_after[0], weights_after[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights_after[1], weights_after[2], strict=True))
    assert "sam/sharpness" not in step_logs(run)[1]


def test_overflow_in_the_ascent_pass_alone_is_a_plain_step(tmp_path):
    class AscentOverflows(Fp16Trainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.calls += 1
            return loss * float("inf") if self.calls == 3 else loss

    overflowed = scaled_run(tmp_path, 2.0**10, AscentOverflows, max_steps=2)
    plain = scaled_run(tmp_path, 2.0**10, max_steps=2, sam_end_steps=1)
    assert [entry["sam/skipped"] for entry in step_logs(overflowed)] == [0, 1]
    pairs = zip(overflowed.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
