"""Weights that train in a step but are not in the model: they climb, or the step says that it cannot know."""

import pytest
import torch
from accelerate import Accelerator
from toy import arguments
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sam import SAMStep, SAMTrainingArguments, with_sam
from hf_sam.step.reference import sam_step

RHO = 0.3
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(3, 8, 6, generator=GENERATOR)
Y = torch.arange(8) % 3


class Body(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 8)

    def forward(self, x):
        return torch.tanh(self.layer(x))


def head():
    torch.manual_seed(1)
    return torch.nn.Linear(8, 3)


def loss_of(body, output, x):
    return torch.nn.functional.cross_entropy(output(body(x)), Y)


def by_hand(head_climbs, steps=3, freeze_head=False):
    """SAM and SGD over both modules as one; the losses' norms and the trained modules."""
    model = torch.nn.ModuleList([Body(), head()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for x in X[:steps]:
        names = {name for name, _ in model.named_parameters() if head_climbs or name.startswith("0.")}
        step = sam_step(model, [x], lambda m, batch: loss_of(m[0], m[1], batch), RHO, perturbed_names=names)
        norms.append(step.ascent_grad_norm)
        optimizer.step()
    return norms, model


def assert_follows(norms, body, output, expected):
    expected_norms, (other, other_head) = expected
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for mine, theirs in zip(
        [*body.parameters(), *output.parameters()], [*other.parameters(), *other_head.parameters()], strict=True
    ):
        torch.testing.assert_close(mine, theirs)


class HeadInTrainer(Trainer):
    """The head belongs to the trainer's loss, as in sentence-transformers' SoftmaxLoss or ArcFace."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = {"softmax": head()}

    def create_optimizer(self, model=None):
        params = [*self.model.parameters(), *self.losses["softmax"].parameters()]
        self.optimizer = torch.optim.SGD(params, lr=self.args.learning_rate)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return loss_of(model, self.losses["softmax"], inputs["x"])


class ClearsAll(TrainerCallback):
    """The host clears the gradients of its model only."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.zero_grad()


def train_with_head(tmp_path, trainer_class=HeadInTrainer, callbacks=(ClearsAll,), **settings):
    rows = [{"x": row} for x in X for row in x]
    config = SAMTrainingArguments if "sam_rho" in settings else TrainingArguments
    settings = {
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "max_steps": 3,
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
    } | settings
    run = (with_sam(trainer_class) if "sam_rho" in settings else trainer_class)(
        model=Body(),
        args=arguments(tmp_path, config, **settings),
        train_dataset=rows,
        callbacks=[callback() for callback in callbacks],
    )
    run.train()
    return run


def norms_of(run):
    return [entry["sam/ascent_grad_norm"] for entry in run.state.log_history if "loss" in entry]


def test_a_head_that_the_trainer_owns_and_its_optimizer_trains_climbs_with_the_rest(tmp_path):
    run = train_with_head(tmp_path, sam_rho=RHO)
    assert_follows(norms_of(run), run.model, run.losses["softmax"], by_hand(head_climbs=True))


def test_names_outside_of_the_model_can_be_excluded(tmp_path):
    run = train_with_head(tmp_path, sam_rho=RHO, sam_exclude_modules=[r"optimizer\.|softmax"])
    assert_follows(norms_of(run), run.model, run.losses["softmax"], by_hand(head_climbs=False))


@pytest.mark.parametrize("callbacks", [(), (ClearsAll,)])
def test_gradients_outside_of_the_model_are_left_as_plain_training_leaves_them(tmp_path, callbacks):
    # Nobody clears the head's gradient: in plain training it adds up over the steps, and so it does here.
    plain = train_with_head(tmp_path, callbacks=callbacks)
    sam = train_with_head(tmp_path, callbacks=callbacks, sam_rho=1e-30)
    for mine, theirs in zip(sam.losses["softmax"].parameters(), plain.losses["softmax"].parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            assert torch.equal(mine.grad, theirs.grad)


def test_what_the_optimizer_does_not_train_does_not_climb(tmp_path):
    class Untrained(HeadInTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
            return self.optimizer

    run = train_with_head(tmp_path, Untrained, callbacks=(), max_steps=1, sam_rho=RHO)
    norms, (other, other_head) = by_hand(head_climbs=False, steps=1)
    assert norms_of(run) == pytest.approx(norms, rel=1e-5)
    torch.testing.assert_close(run.model.layer.weight, other.layer.weight)
    # The gradient that is left in it is that of one pass, at w + e.
    torch.testing.assert_close(run.losses["softmax"].weight.grad, other_head.weight.grad)


def run_loop(sam_of, body, output, optimizer, function_of):
    accelerator = Accelerator(cpu=True)
    sam = sam_of(accelerator)
    forward_backward = function_of(body, output)
    norms = []
    for x in X:
        sam(forward_backward, x)
        norms.append(sam.pop_metrics()["sam/ascent_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
    return norms


def closure(body, output):
    def forward_backward(x):
        loss = loss_of(body, output, x)
        loss.backward()
        return loss.detach()

    return forward_backward


class Loop:
    """A loop whose step is a method."""

    def __init__(self, body, output):
        self.parts = {"body": body, "head": output}

    def step(self, x):
        loss = loss_of(self.parts["body"], self.parts["head"], x)
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("function_of", [closure, lambda *parts: Loop(*parts).step], ids=["closure", "method"])
def test_a_loop_that_names_its_optimizer(function_of):
    body, output = Body(), head()
    optimizer = torch.optim.SGD([*body.parameters(), *output.parameters()], lr=0.1)
    norms = run_loop(lambda acc: SAMStep(acc, body, RHO, optimizer=optimizer), body, output, optimizer, function_of)
    assert_follows(norms, body, output, by_hand(head_climbs=True))


@pytest.mark.parametrize("function_of", [closure, lambda *parts: Loop(*parts).step], ids=["closure", "method"])
def test_a_loop_that_does_not_name_it_is_refused_with_the_names_and_loses_nothing(function_of):
    body, output = Body(), head()
    optimizer = torch.optim.SGD([*body.parameters(), *output.parameters()], lr=0.1)
    before = [param.detach().clone() for param in (*body.parameters(), *output.parameters())]
    with pytest.raises(RuntimeError, match=r"2 trainable parameters.*weight.*optimizer=\[\.\.\.\]"):
        run_loop(lambda acc: SAMStep(acc, body, RHO), body, output, optimizer, function_of)
    for param, copy in zip((*body.parameters(), *output.parameters()), before, strict=True):
        assert torch.equal(param, copy)
        assert param.grad is None


def test_two_prepared_models_with_one_optimizer_climb_together():
    accelerator = Accelerator(cpu=True)
    body, output = Body(), head()
    optimizer = torch.optim.SGD([*body.parameters(), *output.parameters()], lr=0.1)
    body, output, optimizer = accelerator.prepare(body, output, optimizer)
    sam = SAMStep(accelerator, body, RHO)
    norms = []
    for x in X:
        with sam.ascent():
            accelerator.backward(loss_of(body, output, x))
        with sam.perturbed() as perturbation:
            accelerator.backward(loss_of(body, output, x))
        norms.append(perturbation.norm.item())
        optimizer.step()
        optimizer.zero_grad()
    assert_follows(norms, body, output, by_hand(head_climbs=True))


@pytest.mark.parametrize("named", [True, False])
def test_two_prepared_models_with_an_optimizer_each(named):
    accelerator = Accelerator(cpu=True)
    body, output = Body(), head()
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (body, output))
    body, output, first, second = accelerator.prepare(body, output, first, second)

    class Both:
        def step(self):
            first.step()
            second.step()

        def zero_grad(self):
            first.zero_grad()
            second.zero_grad()

    def run():
        optimizer = [first, second] if named else None
        return run_loop(lambda _: SAMStep(accelerator, body, RHO, optimizer=optimizer), body, output, Both(), closure)

    if named:
        assert_follows(run(), body, output, by_hand(head_climbs=True))
    else:
        with pytest.raises(RuntimeError, match="2 trainable parameters"):
            run()


def test_adversaries_take_turns():
    # The generator's step reaches the discriminator, whose gradient the loop clears before its own step.
    def play(rho):
        accelerator = Accelerator(cpu=True)
        generator, discriminator = Body(), head()
        ours, theirs = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (generator, discriminator))
        fool = SAMStep(accelerator, generator, rho, optimizer=ours)
        tell = SAMStep(accelerator, discriminator, rho, optimizer=theirs)

        def fooling(x):
            loss = -loss_of(generator, discriminator, x)
            loss.backward()
            return loss.detach()

        def telling(x):
            loss = loss_of(generator, discriminator, x)
            loss.backward()
            return loss.detach()

        for x in X:
            fool(fooling, x)
            ours.step()
            ours.zero_grad()
            theirs.zero_grad()
            tell(telling, x)
            theirs.step()
            ours.zero_grad()
            theirs.zero_grad()
        return [*generator.parameters(), *discriminator.parameters()]

    for mine, plain in zip(play(1e-30), play(0.0), strict=True):
        assert torch.equal(mine, plain)


def test_a_tensor_that_the_loss_learns():
    # A learned temperature, which is no module.
    body, output, temperature = Body(), head().requires_grad_(False), torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([*body.parameters(), temperature], lr=0.1)
    sam = SAMStep(Accelerator(cpu=True), body, RHO, optimizer=optimizer)

    def loss(body, temperature, x):
        return torch.nn.functional.cross_entropy(output(body(x)) * temperature, Y)

    def forward_backward(x):
        value = loss(body, temperature, x)
        value.backward()
        return value.detach()

    sam(forward_backward, X[0])
    other, learned = Body(), torch.nn.Parameter(torch.ones(()))
    both = torch.nn.ParameterList([*other.parameters(), learned])
    expected = sam_step(both, [X[0]], lambda _, x: loss(other, learned, x), RHO)
    assert sam.pop_metrics()["sam/ascent_grad_norm"] == pytest.approx(expected.ascent_grad_norm, rel=1e-5)
    torch.testing.assert_close(temperature.grad, learned.grad)
    assert temperature.item() == 1.0
