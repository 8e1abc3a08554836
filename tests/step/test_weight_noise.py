"""Random noise on the weights: what is drawn, when it acts, and what it leaves alone."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from toy import olmo2, step_logs, trainer
from transformers import Trainer

from hf_sam import SAMStep, SAMTrainingArguments
from hf_sam.step.noise import uniform_noise
from hf_sam.step.reference import sam_step

CPU = torch.device("cpu")


def test_numbers_have_mean_0_and_variance_1():
    drawn = uniform_noise("key", 0, 1 << 20, CPU)
    # A million numbers: standard errors of 1e-3 and 0.6e-3.
    assert drawn.mean().abs() < 5e-3
    assert drawn.square().mean() == pytest.approx(1.0, abs=5e-3)
    assert drawn.abs().max() <= 3**0.5
    assert (drawn[1:] * drawn[:-1]).mean().abs() < 5e-3


@pytest.mark.parametrize("cuts", [[1], [65_536], [70_000, 131_072, 131_073], list(range(10_000, 200_000, 7_777))])
def test_numbers_do_not_depend_on_how_a_parameter_is_cut(cuts):
    whole = uniform_noise("key", 0, 200_000, CPU)
    bounds = [0, *cuts, 200_000]
    pieces = [uniform_noise("key", a, b - a, CPU) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(pieces), whole)


def test_other_keys_have_other_numbers():
    one, two = uniform_noise("key 1", 0, 10_000, CPU), uniform_noise("key 2", 0, 10_000, CPU)
    assert (one * two).mean().abs() < 0.05


class Seen:
    """A loop that records the weights at which it computes each gradient."""

    def __init__(self, model):
        self.model, self.weights = model, []

    def __call__(self, x):
        self.weights.append([param.detach().clone() for param in self.model.parameters()])
        loss = self.model(x).square().mean()
        loss.backward()
        return loss.detach()


def test_each_weight_is_moved_in_proportion_to_itself():
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 200)
    seen = Seen(model)
    step = SAMStep(Accelerator(cpu=True), model, 0.0, noise=0.1)
    step(seen, torch.randn(4, 300))
    ((weight, _),) = seen.weights
    relative = (weight - model.weight) / model.weight
    expected = 0.1 * uniform_noise("hf-sam perturbation 0 0 weight", 0, weight.numel(), CPU).view(weight.shape)
    torch.testing.assert_close(relative, expected, rtol=0, atol=1e-4)
    assert step.acted == 1


def test_noise_and_ascent_add_up():
    torch.manual_seed(0)
    model, plain = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 6)
    step = SAMStep(Accelerator(cpu=True), model, 0.2, noise=0.1, seed=3)
    step(Seen(model), x)
    noise = {
        name: 0.1 * uniform_noise(f"hf-sam perturbation 3 0 {name}", 0, p.numel(), CPU).view(p.shape)
        for name, p in plain.named_parameters()
    }
    sam_step(plain, [x], lambda model, x: model(x).square().mean(), 0.2, noise=noise)
    torch.testing.assert_close(model.weight.grad, plain.weight.grad)


def test_it_acts_in_the_steps_that_the_interval_leaves_out(tmp_path):
    settings = {"sam_noise": 0.1, "sam_start_steps": 1, "sam_end_steps": 5, "max_steps": 6}
    run = trainer(tmp_path / "both", sam_rho=0.05, sam_interval=2, **settings)
    run.train()
    assert ["sam/sharpness" in log for log in step_logs(run)] == [False, True, False, True, False, False]
    assert (run.sam_history.acted, run.sam_history.noisy) == (2, 4)
    assert run.sam_history.passes == pytest.approx(1 + 2 / 6)
    alone = trainer(tmp_path / "alone", **settings)
    alone.train()
    assert (alone.sam_history.acted, alone.sam_history.noisy) == (0, 4)
    assert alone.sam_history.passes == 1


def test_random_states_and_logs_are_those_of_plain_training(tmp_path):
    runs = []
    for trainer_class, settings in ((Trainer, {}), (None, {"sam_noise": 0.1})):
        classes = {"trainer_class": trainer_class} if trainer_class else {}
        run = trainer(
            tmp_path, model=olmo2(dropout=0.1), max_steps=3, gradient_accumulation_steps=2, **classes, **settings
        )
        run.train()
        runs.append((run, torch.get_rng_state()))
    (plain, plain_state), (noisy, noisy_state) = runs
    assert torch.equal(plain_state, noisy_state)
    assert [set(log) for log in step_logs(plain)] == [set(log) for log in step_logs(noisy)]
    assert plain.state.total_flos == noisy.state.total_flos
    assert step_logs(plain)[0]["loss"] != step_logs(noisy)[0]["loss"]


def test_weights_of_16_bits_keep_the_noise_on_average():
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 200).to(torch.bfloat16)
    seen = Seen(model)
    step = SAMStep(Accelerator(cpu=True), model, 0.0, noise=1e-3)
    step(seen, torch.randn(4, 300, dtype=torch.bfloat16))
    change = (seen.weights[0][0].double() - model.weight.double()).flatten()
    noise = uniform_noise("hf-sam perturbation 0 0 weight", 0, change.numel(), CPU).double() * 1e-3
    noise = noise * model.weight.double().flatten()
    # bf16 rounds to 4e-3 of a weight, so rounding to nearest would leave nearly nothing of a noise of 1e-3.
    assert (torch.dot(change, noise) / torch.dot(noise, noise)).item() == pytest.approx(1.0, abs=0.05)


def test_a_step_whose_ascent_gradient_is_not_finite_is_a_plain_one():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    seen = Seen(model)
    step = SAMStep(Accelerator(cpu=True), model, 0.2, noise=0.1)

    def infinite_at_first(x):
        loss = seen(x)
        if len(seen.weights) == 1:
            model.weight.grad.fill_(float("inf"))
        return loss

    step(infinite_at_first, torch.randn(5, 6))
    at_ascent, at_descent = seen.weights
    assert all(torch.equal(a, b) for a, b in zip(at_ascent, at_descent, strict=True))
    assert step.pop_metrics()["sam/skipped"] == 1


def test_values_out_of_range_are_refused(tmp_path):
    for value in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"sam_noise=.* must be a finite number"):
            SAMTrainingArguments(output_dir=str(tmp_path), sam_noise=value)
    assert SAMTrainingArguments(output_dir=str(tmp_path), sam_noise="0.1").uses_sam


def test_weights_without_ascent_gradient_get_noise_too():
    """The second module is used in the second micro-batch only, and the ascent pass has the first one."""
    torch.manual_seed(0)
    modules = torch.nn.ModuleList([torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    step = SAMStep(accelerator, modules, 0.2, noise=0.1, ascent_micro_batches=1)
    seen = []

    def forward_backward(batch):
        which, x = batch
        seen.append(modules[1].weight.detach().clone())
        loss = modules[which](x).square().mean()
        loss.backward()
        return loss.detach()

    for which in (0, 1):
        with accelerator.accumulate(modules):
            step(forward_backward, (which, torch.randn(5, 6)))
    noise = uniform_noise("hf-sam perturbation 0 0 1.weight", 0, 18, CPU).view(3, 6)
    torch.testing.assert_close(seen[-1], modules[1].weight.detach() * (1 + 0.1 * noise))


def test_complex_weights_move_by_their_modulus():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, 200, dtype=torch.complex64).t())
    module = torch.nn.Module()
    module.weight = weight
    step = SAMStep(Accelerator(cpu=True), module, 0.0, noise=0.1)
    seen = []

    def forward_backward(x):
        seen.append(module.weight.detach().clone())
        loss = (module.weight * x).abs().square().mean()
        loss.backward()
        return loss.detach()

    step(forward_backward, torch.randn(200, 300))
    relative = ((seen[0] - weight.detach()) / weight.detach()).abs().square().mean().sqrt()
    assert relative.item() == pytest.approx(0.1, rel=0.02)


def test_settings_without_effect_on_noise_are_reported(tmp_path, caplog):
    settings = {"sam_noise": 0.1, "sam_interval": 8, "sam_ascent_micro_batches": 1, "sam_variant": "asam"}
    run = trainer(tmp_path, max_steps=4, **settings)
    run.train()
    assert "SAM only adds noise: sam_rho and sam_loss_rise are 0, so sam_variant, sam_interval" in caplog.text
    assert "SAM acts in only one step" not in caplog.text
    assert run.args.layout_dependence() == {}
    # Nor is an optimizer without momentum in the way.
    trainer(tmp_path, max_steps=2, sam_noise=0.1, sam_variant="momentum", optim="adafactor").train()
