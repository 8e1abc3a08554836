"""The step looks at objects: replaced parameters, hooks that step, the scaler that scales, complex weights."""

import functools

import pytest
import torch
from accelerate import Accelerator
from toy import arguments, olmo2, token_dataset, trainer
from transformers import TrainerCallback

from hf_sam import SAMStep, SAMTrainer
from hf_sam.step.reference import sam_step

RHO = 0.3
GENERATOR = torch.Generator().manual_seed(1)
X, Y = torch.randn(4, 16, 8, generator=GENERATOR), torch.randint(0, 4, (4, 16), generator=GENERATOR)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))


def loss_of(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def function_of(model, backward=torch.Tensor.backward):
    def forward_backward(batch):
        loss = loss_of(model, batch)
        backward(loss)
        return loss.detach()

    return forward_backward


def assert_same(model, other):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("how", ["new parameter", "assigned state", "whole layer"])
def test_parameters_that_were_replaced_climb_from_then_on(how):
    def replace(model):
        torch.manual_seed(9)
        fresh = torch.nn.Linear(8, 32)
        if how == "new parameter":
            model[0].weight = fresh.weight
        elif how == "assigned state":
            model[0].load_state_dict(fresh.state_dict(), assign=True)
        else:
            model[0] = fresh

    model, other = network(), network()
    sam = SAMStep(Accelerator(cpu=True), model, RHO)
    step = function_of(model)
    norms, expected = [], []
    for i, batch in enumerate(zip(X, Y, strict=True)):
        if i == 2:
            replace(model)
            replace(other)
        for net in (model, other):
            net.zero_grad()
        sam(step, batch)
        expected.append(sam_step(other, [batch], loss_of, RHO).ascent_grad_norm)
        norms.append(sam.pop_metrics()["sam/ascent_grad_norm"])
        for net in (model, other):
            torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert norms == pytest.approx(expected, rel=1e-5)
    assert_same(model, other)


def test_gradients_that_replaced_parameters_bring_along_are_refused():
    model = network()
    sam = SAMStep(Accelerator(cpu=True), model, RHO)
    batch = (X[0], Y[0])
    sam(function_of(model), batch)
    model.zero_grad()
    model[0].weight = torch.nn.Parameter(torch.randn(32, 8))
    model[0].weight.grad = torch.ones(32, 8)
    with pytest.raises(RuntimeError, match="gradients from before its step"):
        sam(function_of(model), batch)


class Reset(TrainerCallback):
    """Starts a layer over in the middle of training, as ReLoRA does, and tells the optimizer."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 2:
            old = model.model.layers[0].mlp.up_proj.weight
            torch.manual_seed(9)
            new = torch.nn.Parameter(torch.randn_like(old) * 0.02)
            model.model.layers[0].mlp.up_proj.weight = new
            for group in optimizer.param_groups:
                group["params"] = [new if param is old else param for param in group["params"]]


def test_a_callback_may_replace_parameters(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4}
    norms = {}
    for rho in (0.0, 1e-30):
        run = SAMTrainer(
            model=olmo2(),
            args=arguments(tmp_path, sam_rho=rho, **settings),
            train_dataset=token_dataset(),
            callbacks=[Reset()],
        )
        run.train()
        norms[rho] = [entry["grad_norm"] for entry in run.state.log_history if "loss" in entry]
        ascent = [entry.get("sam/ascent_grad_norm") for entry in run.state.log_history if "loss" in entry]
    assert norms[1e-30] == norms[0.0]
    assert ascent == pytest.approx(norms[0.0], rel=1e-5)


# Optimizers that step in hooks of the backward pass, found in whichever way the hook knows them.


def closure(optimizers):
    def hook(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    return hook


class ByAttribute:
    def __init__(self, optimizers):
        self.optimizers = list(optimizers.values())

    def hook(self, param):
        for optimizer in self.optimizers:
            optimizer.step()


def default_argument(optimizers):
    def hook(param, optimizers=optimizers):
        optimizers[param].step()

    return hook


def called_by(optimizers):
    inner = closure(optimizers)

    def hook(param):
        inner(param)

    return hook


HOOKS = {
    "closure": closure,
    "method": lambda optimizers: ByAttribute(optimizers).hook,
    "partial": lambda optimizers: functools.partial(lambda known, param: known[param].step(), optimizers),
    "default": default_argument,
    "another function": called_by,
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["register_post_accumulate_grad_hook", "register_hook"])
def test_hooks_that_step_in_the_backward_pass_are_refused(kind, where):
    model = network()
    hook = HOOKS[kind]({param: torch.optim.SGD([param], lr=0.1) for param in model.parameters()})
    for param in model.parameters():
        getattr(param, where)(hook)
    with pytest.raises(ValueError, match=r"hook of the parameter '0\.weight'.*call optimizer\.step\(\) after"):
        SAMStep(Accelerator(cpu=True), model, RHO)


def test_a_trainer_refuses_them_at_construction(tmp_path):
    model = olmo2()
    optimizers = {param: torch.optim.SGD([param], lr=0.1) for param in model.parameters()}
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(closure(optimizers))
    with pytest.raises(ValueError, match="steps an optimizer in the backward pass"):
        trainer(tmp_path, model=model, sam_rho=RHO)
    trainer(tmp_path, model=model)  # without SAM they are the user's own affair


def test_hooks_that_come_later_are_refused_in_the_next_step():
    model = network()
    sam = SAMStep(Accelerator(cpu=True), model, RHO)
    batch = (X[0], Y[0])
    sam(function_of(model), batch)
    model.zero_grad()
    model[0].weight.register_hook(closure({model[0].weight: torch.optim.SGD([model[0].weight], lr=0.1)}))
    with pytest.raises(ValueError, match="steps an optimizer"):
        sam(function_of(model), batch)


def test_hooks_that_only_change_gradients_act_in_both_passes():
    def keeps_first_rows(param):
        param.grad[:2].zero_()

    model, other = network(), network()
    for net in (model, other):
        net[0].weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        net[2].weight.register_post_accumulate_grad_hook(keeps_first_rows)
    batch = (X[0], Y[0])
    SAMStep(Accelerator(cpu=True), model, RHO)(function_of(model), batch)
    sam_step(other, [batch], loss_of, RHO)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


# The loss scale.


@pytest.mark.parametrize("form", ["call", "contexts"])
def test_a_grad_scaler_of_the_loops_own_is_seen(form):
    def run(scaled):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**16)
        sam = SAMStep(Accelerator(cpu=True), model, RHO)
        step, norms = function_of(model, lambda loss: scaler.scale(loss).backward()), []
        for batch in zip(X, Y, strict=True):
            if form == "call":
                sam(step, batch)
                norms.append(sam.pop_metrics()["sam/ascent_grad_norm"])
            else:
                with sam.ascent():
                    step(batch)
                with sam.perturbed() as perturbation:
                    step(batch)
                norms.append(perturbation.norm.item())
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model, norms

    (plain, expected), (scaled, norms) = run(False), run(True)
    # A power of two scales without rounding, up to the underflow that it prevents.
    assert norms == pytest.approx(expected, rel=1e-5)
    assert_same(plain, scaled)


# Complex weights.


class Complex(torch.nn.Module):
    def __init__(self, dtype=torch.complex64):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.turn = torch.nn.Parameter(torch.randn(8, 8, dtype=dtype, generator=generator))
        self.scale = torch.nn.Parameter(torch.ones(8, dtype=dtype.to_real()))

    def forward(self, x):
        return (torch.fft.fft(x).to(self.turn.dtype) @ self.turn.conj()).abs() * self.scale


def complex_loss(model, x):
    return (model(x) - 1).square().mean()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("variant", ["sam", "asam"])
def test_complex_weights_climb_as_pairs_of_real_ones(variant, dtype):
    model, other = Complex(dtype), Complex(dtype)
    sam = SAMStep(Accelerator(cpu=True), model, 0.1, variant=variant)
    climbed = []

    def forward_backward(x):
        loss = complex_loss(model, x)
        loss.backward()
        climbed.append(model.turn.detach().clone())
        return loss.detach()

    before = model.turn.detach().clone()
    sam(forward_backward, X[0])
    expected = sam_step(other, [X[0]], complex_loss, 0.1, variant=variant)
    metrics = sam.pop_metrics()
    assert metrics["sam/ascent_grad_norm"] == pytest.approx(expected.ascent_grad_norm, rel=1e-5)
    assert metrics["sam/perturbation_kept"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["sam/sharpness"] == pytest.approx(expected.perturbed_loss - expected.loss, rel=1e-4)
    assert metrics["sam/sharpness"] > 0
    torch.testing.assert_close(model.turn.grad, other.turn.grad)
    assert torch.equal(model.turn, before)
    # The weights moved as their definition over real and imaginary parts says, along a gradient that ascends.
    moved = torch.view_as_real(climbed[1] - before)
    assert moved.norm() > 0


def test_the_adaptive_perturbation_turns_with_the_phase_of_a_complex_weight():
    # A loss that depends on moduli only: turning a weight turns its perturbation, and nothing else.
    def climbed(phase):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.tensor([1 + 2j, -0.5 + 0.3j]) * torch.exp(torch.tensor(1j * phase)))
        seen = []

        def forward_backward(_):
            seen.append(model.weight.detach().clone())
            loss = (model.weight.abs() - 1).square().sum()
            loss.backward()
            return loss.detach()

        SAMStep(Accelerator(cpu=True), model, 0.5, variant="asam")(forward_backward, None)
        return (seen[1] - seen[0]) * torch.exp(torch.tensor(-1j * phase))

    torch.testing.assert_close(climbed(0.0), climbed(1.2), rtol=1e-4, atol=1e-6)


def test_double_precision_keeps_its_precision():
    model, other = network().double(), network().double()
    batch = (X[0].double(), Y[0])
    sam = SAMStep(Accelerator(cpu=True), model, 1e-6)
    sam(function_of(model), batch)
    sam_step(other, [batch], loss_of, 1e-6)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    assert sam.pop_metrics()["sam/perturbation_kept"] == pytest.approx(1.0, abs=1e-6)
