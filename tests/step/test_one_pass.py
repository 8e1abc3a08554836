"""Variants without an ascent pass: what they cost, what they leave alone, and which optimizers they need."""

import pytest
import torch
from accelerate import Accelerator
from toy import arguments, olmo2, step_logs, token_dataset, trainer
from transformers import Trainer

from hf_sam import SAMStep, SAMTrainer, SAMTrainingArguments
from hf_sam.step.reference import sam_step

RHO = 0.1
MOMENTUM = {"sam_rho": RHO, "sam_variant": "momentum"}


class Noisy(torch.nn.Module):
    """Dropout and running statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(64, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.dropout = torch.nn.Dropout(0.2)
        self.head = torch.nn.Linear(16, 64)

    def forward(self, input_ids, labels=None, num_items_in_batch=None, attention_mask=None):
        hidden = self.dropout(self.norm(self.embed(input_ids).flatten(0, 1)))
        return {"loss": torch.nn.functional.cross_entropy(self.head(hidden), labels.clamp(min=0).flatten())}


def noisy_run(tmp_path, trainer_class=SAMTrainer, **settings):
    """Train four steps of three micro-batches; returns the trainer, and the number of forward and backward passes."""
    run = trainer(
        tmp_path, model=Noisy(), trainer_class=trainer_class, gradient_accumulation_steps=3, max_steps=4, **settings
    )
    forwards, backwards = [], []
    run.model.register_forward_hook(lambda *args: forwards.append(1))
    run.model.head.register_full_backward_hook(lambda *args: backwards.append(1))
    run.train()
    return run, (len(forwards), len(backwards))


def test_a_step_has_one_pass(tmp_path):
    run, passes = noisy_run(tmp_path / "momentum", **MOMENTUM)
    assert passes == (4 * 3, 4 * 3)
    assert run.sam_history.passes == 1
    assert run.sam_history.acted == 4
    assert noisy_run(tmp_path / "plain", Trainer)[1] == passes
    assert noisy_run(tmp_path / "sam", sam_rho=RHO)[1] == (4 * 6, 4 * 6)
    assert noisy_run(tmp_path / "some", sam_rho=RHO, sam_ascent_micro_batches=1)[1] == (4 * 4, 4 * 4)


def test_states_and_logs_are_those_of_plain_training(tmp_path, caplog):
    plain, _ = noisy_run(tmp_path / "plain", Trainer)
    random_state = torch.get_rng_state()
    run, _ = noisy_run(tmp_path / "momentum", **MOMENTUM)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert run.model.norm.num_batches_tracked == plain.model.norm.num_batches_tracked == 12
    assert run.state.total_flos == plain.state.total_flos
    assert [set(log) for log in step_logs(run)] == [set(log) for log in step_logs(plain)]
    assert not [record for record in caplog.records if record.name.startswith("hf_sam")]
    # The momentum is zero in the first step, so it is a plain one; the others are not.
    assert step_logs(run)[0] == step_logs(plain)[0]
    assert step_logs(run)[-1]["loss"] != step_logs(plain)[-1]["loss"]


def test_it_starts_in_mid_run_with_the_momentum_that_is_there(tmp_path):
    run = trainer(tmp_path, max_steps=4, sam_start_steps=2, learning_rate=1e-3, max_grad_norm=0.0, **MOMENTUM)
    batches = []
    compute_loss = run.compute_loss

    def recording(model, inputs, *args, **kwargs):
        batches.append({name: value.clone() for name, value in inputs.items()})
        return compute_loss(model, inputs, *args, **kwargs)

    run.compute_loss = recording
    plain = olmo2()
    plain.load_state_dict(run.model.state_dict())
    run.train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    named = dict(plain.named_parameters())
    for step, batch in enumerate(batches):
        rho = RHO if step >= 2 else 0.0
        first = {name: optimizer.state[p].get("exp_avg", torch.zeros_like(p)) for name, p in named.items()}
        sam_step(plain, [batch], lambda model, batch: model(**batch).loss, rho, "momentum", moments={"first": first})
        for group in optimizer.param_groups:
            group["lr"] = step_logs(run)[step]["learning_rate"]
        optimizer.step()
    for name, param in run.model.named_parameters():
        torch.testing.assert_close(param, named[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("optim", "name"),
    [
        ("adafactor", "transformers's Adafactor"),
        ("sgd", "torch's SGD"),
        ("rmsprop", "torch's RMSprop"),
        ("adamw_bnb_8bit", "bitsandbytes's AdamW"),
    ],
)
def test_optimizers_without_momentum_are_refused_before_training(tmp_path, optim, name):
    run = trainer(tmp_path, optim=optim, sam_start_steps=100, max_steps=200, **MOMENTUM)
    with pytest.raises(ValueError, match=f"first moment of the optimizer, but {name} keeps none.* e.g. AdamW"):
        run.train()
    assert run.state.global_step == 0


def test_an_optimizer_that_cannot_be_probed_is_refused_after_its_first_step(tmp_path):
    class Other(torch.optim.SGD):
        """Cannot be created from its defaults."""

        def __init__(self, params, size):
            super().__init__(params, lr=0.01)

        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["count"] = 1

    model = olmo2()
    args = arguments(tmp_path, sam_start_steps=100, max_steps=200, **MOMENTUM)
    run = SAMTrainer(
        model=model, args=args, train_dataset=token_dataset(), optimizers=(Other(model.parameters(), 2), None)
    )
    with pytest.raises(ValueError, match="Other keeps none"):
        run.train()
    assert run.state.global_step == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.NAdam(params, lr=0.01),
        lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    ],
)
def test_optimizers_with_momentum_are_accepted(make):
    model = torch.nn.Linear(4, 2)
    optimizer = make(model.parameters())
    step = SAMStep(Accelerator(cpu=True), model, RHO, optimizer=optimizer, variant="momentum")
    before = [param.detach().clone() for param in model.parameters()]
    seen = []

    def forward_backward(x):
        seen.append([param.detach().clone() for param in model.parameters()])
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    x = torch.randn(8, 4)
    for _ in range(2):
        before = [param.detach().clone() for param in model.parameters()]
        step(forward_backward, x)
        assert all(torch.equal(param, w) for param, w in zip(model.parameters(), before, strict=True))
        optimizer.step()
        optimizer.zero_grad()
    distance = torch.cat([(a - b).flatten() for a, b in zip(seen[-1], before, strict=True)]).norm()
    assert distance.item() == pytest.approx(RHO, rel=1e-4)


def test_an_optimizer_that_cannot_be_probed_is_refused_at_the_first_step_with_state():
    class Strange(torch.optim.Optimizer):
        """Has another constructor, and keeps something else."""

        def __init__(self, params, size):
            super().__init__(params, {"lr": 0.1})

        def step(self):
            for param in self.param_groups[0]["params"]:
                self.state[param]["other"] = 1

    model = torch.nn.Linear(4, 2)
    optimizer = Strange(model.parameters(), 3)
    step = SAMStep(Accelerator(cpu=True), model, RHO, optimizer=optimizer, variant="momentum")

    def forward_backward(x):
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    step(forward_backward, torch.randn(8, 4))
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="Strange keeps none"):
        step(forward_backward, torch.randn(8, 4))


def test_a_loop_encloses_its_pass_in_one_context():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = SAMStep(Accelerator(cpu=True), model, RHO, optimizer=optimizer, variant="momentum")
    x = torch.randn(8, 4)
    for _ in range(2):
        before = [param.detach().clone() for param in model.parameters()]
        with step.perturbed() as perturbation:
            moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)]).norm()
            model(x).square().mean().backward()
        assert all(torch.equal(param, w) for param, w in zip(model.parameters(), before, strict=True))
        optimizer.step()
        optimizer.zero_grad()
    assert moved.item() == pytest.approx(RHO, rel=1e-4)
    assert perturbation.norm > 0
    assert step.acted == 2
    with pytest.raises(RuntimeError, match="'momentum' has no ascent pass"), step.ascent():
        pass


def test_an_error_in_the_pass_leaves_the_weights(tmp_path):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = model.weight.detach().clone()
    step = SAMStep(Accelerator(cpu=True), model, RHO, optimizer=optimizer, variant="momentum")

    def fails(x):
        assert not torch.equal(model.weight, before)
        model(x).square().mean().backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step(fails, torch.randn(8, 4))
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_a_skipped_step_of_fp16_leaves_weights_and_momentum(tmp_path):
    class Overflows(SAMTrainer):
        """The loss of the third step is infinite."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            self.seen = []

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.seen.append(model.lm_head.weight.detach().clone())
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * float("inf") if len(self.seen) == 3 else loss

    run = Overflows(
        model=olmo2(),
        args=arguments(tmp_path, max_steps=4, max_grad_norm=0.0, lr_scheduler_type="constant", **MOMENTUM),
        train_dataset=token_dataset(),
    )
    run.train()
    # The step was skipped, so the fourth one perturbs the same weights by the same momentum.
    assert torch.equal(run.seen[2], run.seen[3])
    assert not torch.equal(run.seen[1], run.seen[2])
    assert all(torch.isfinite(param).all() for param in run.model.parameters())


def test_settings_of_an_ascent_pass_are_refused(tmp_path):
    for name, value in (
        ("sam_ascent_micro_batches", 1),
        ("sam_ascent_sync", "local"),
        ("sam_loss_rise", 0.1),
    ):
        with pytest.raises(ValueError, match=f"{name}=.* has no meaning with sam_variant='momentum'"):
            SAMTrainingArguments(output_dir=str(tmp_path), **MOMENTUM, **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_rise": -0.1}, "loss_rise=-0.1 must be a finite number"),
        ({"noise": float("nan")}, "noise=nan must be a finite number"),
        ({"noise": -0.1}, "noise=-0.1 must be"),
        ({"variant": "momentum", "loss_rise": 0.1}, "loss_rise=0.1 has no meaning with the variant 'momentum'"),
        ({"variant": "momentum", "ascent_micro_batches": 1}, "ascent_micro_batches=1 has no meaning"),
        ({"variant": "momentum", "ascent_sync": "local"}, "ascent_sync='local' has no meaning"),
    ],
)
def test_a_loop_is_told_about_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        SAMStep(Accelerator(cpu=True), torch.nn.Linear(4, 2), RHO, **settings)


def test_an_infinite_radius_needs_its_rise_of_the_loss_at_each_step():
    step = SAMStep(Accelerator(cpu=True), torch.nn.Linear(4, 2), float("inf"), loss_rise=0.1)
    step.loss_rise = 0.0
    with pytest.raises(ValueError, match="rho=inf must be a finite number"):
        step(lambda x: x.sum(), torch.randn(4))


def test_a_schedule_may_start_at_radius_0():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    step = SAMStep(Accelerator(cpu=True), model, 0.0)
    x = torch.randn(8, 4)
    for rho in (0.0, 0.1):
        step.rho = rho
        model.zero_grad()
        before = model.weight.detach().clone()
        with step.ascent():
            model(x).square().mean().backward()
        with step.perturbed():
            assert torch.equal(model.weight, before) == (rho == 0)
            model(x).square().mean().backward()
        assert torch.equal(model.weight, before)


def test_optimizers_of_other_models_may_have_no_momentum():
    accelerator = Accelerator(cpu=True)
    one, other = torch.nn.Linear(4, 2), torch.nn.Linear(2, 1)
    accelerator.prepare(torch.optim.AdamW(one.parameters()), torch.optim.SGD(other.parameters(), lr=0.1))
    SAMStep(accelerator, one, RHO, variant="momentum")
    with pytest.raises(ValueError, match="torch's SGD"):
        SAMStep(accelerator, other, RHO, variant="momentum")


def moved_by(optimizer, model) -> float:
    """Distance of the weights at which the second of two steps computes its gradient."""
    step = SAMStep(Accelerator(cpu=True), model, RHO, optimizer=optimizer, variant="momentum")
    distances = []

    def forward_backward(x):
        parts = [(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)]
        distances.append(torch.cat(parts).norm().item())
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(2):
        before = [param.detach().clone() for param in model.parameters()]
        step(forward_backward, torch.ones(3, 4))
        optimizer.step()
        model.zero_grad()
    return distances[-1]


def test_momentum_of_a_parameter_group():
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "momentum": 0.9}], lr=0.1)
    assert moved_by(optimizer, model) == pytest.approx(RHO, rel=1e-4)


def test_momentum_of_an_optimizer_in_another_one():
    class Wrapper:
        """As Lookahead, keeps the optimizer in an attribute."""

        def __init__(self, optimizer):
            self.optimizer, self.param_groups, self.step = optimizer, optimizer.param_groups, optimizer.step

    model = torch.nn.Linear(4, 2)
    assert moved_by(Wrapper(torch.optim.AdamW(model.parameters())), model) == pytest.approx(RHO, rel=1e-4)


def test_the_inputs_of_a_single_pass_need_not_be_readable_twice():
    model = torch.nn.Linear(4, 2)
    step = SAMStep(Accelerator(cpu=True), model, 0.0, noise=0.1)

    def forward_backward(rows):
        loss = model(torch.stack(list(rows))).square().mean()
        loss.backward()
        return loss.detach()

    step(forward_backward, (torch.randn(4) for _ in range(3)))
    with pytest.raises(TypeError, match="read only once"):
        SAMStep(Accelerator(cpu=True), model, 0.1)(forward_backward, (torch.randn(4) for _ in range(3)))
