"""When SAM acts, and the learning rate of a shortened anneal."""

import itertools
import math

import pytest
import torch
from toy import olmo2, step_logs, trainer, weights
from transformers import Trainer

from hf_sam import SAMArguments
from hf_sam.schedule import SAMWindow
from hf_sam.step.counts import ascent_count, resolve_count
from hf_sam.step.reference import sam_step


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({}, range(20)),
        ({"sam_start_steps": 5}, range(5, 20)),
        ({"sam_start_steps": 0.72}, range(15, 20)),
        ({"sam_end_steps": 0.25}, range(5)),
        ({"sam_start_steps": 2, "sam_end_steps": 9, "sam_interval": 3}, (2, 5, 8)),
        ({"sam_phase": "anneal", "anneal_steps": 4}, range(16, 20)),
        ({"sam_phase": "anneal", "anneal_steps": 0.11, "sam_interval": 2}, (17, 19)),
        ({"sam_phase": "anneal", "anneal_steps": 4, "sam_start_steps": 18}, (18, 19)),
        ({"sam_end_steps": 100}, range(20)),
        ({"sam_start_steps": 100}, ()),
    ],
)
def test_window_holds_the_steps_asked_for(flags, steps):
    window = SAMWindow.resolve(SAMArguments(sam_rho=0.05, **flags), max_steps=20)
    assert [step for step in range(25) if step in window] == list(steps)
    assert len(window) == len(list(steps))


@pytest.mark.parametrize(
    ("wanted", "available", "used"),
    [(None, 4, 4), (1, 4, 1), (3, 4, 3), (9, 4, 4), (0.25, 4, 1), (0.3, 4, 2), (0.01, 4, 1), (1, 1, 1)],
)
def test_ascent_uses_as_many_micro_batches_as_asked_for(wanted, available, used):
    assert ascent_count(wanted, available) == used


def test_a_share_of_steps_rounds_up_as_in_the_host():
    assert resolve_count(0.1, 25) == math.ceil(2.5)
    assert resolve_count(1, 25) == 1


@pytest.mark.parametrize("flags", [{"sam_start_steps": 2, "sam_end_steps": 5}, {"sam_interval": 2}])
def test_sam_acts_in_its_window_only(tmp_path, flags):
    run = trainer(tmp_path, sam_rho=0.05, **flags)
    run.train()
    window = SAMWindow.resolve(run.args, 6)
    assert [("sam/sharpness" in entry) for entry in step_logs(run)] == [step in window for step in range(6)]


def test_before_its_window_the_run_is_the_hosts(tmp_path):
    late = trainer(tmp_path, sam_rho=0.05, sam_start_steps=4)
    host = trainer(tmp_path, trainer_class=Trainer)
    late.train()
    host.train()
    mine, theirs = step_logs(late), step_logs(host)
    assert mine[:4] == theirs[:4]
    assert mine[4]["loss"] == theirs[4]["loss"]  # still the loss at the unperturbed weights
    assert mine[5]["loss"] != theirs[5]["loss"]


def shape(kind: str, progress: float) -> float:
    return {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "1-sqrt": 1 - math.sqrt(progress),
    }[kind]


@pytest.mark.parametrize("kind", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(("anneal", "steps"), [(4, 4), (0.35, 4)])
def test_learning_rate_is_constant_and_then_anneals(tmp_path, kind, anneal, steps):
    run = trainer(
        tmp_path,
        max_steps=10,
        warmup_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        anneal_steps=anneal,
        anneal_type=kind,
        anneal_min_lr_ratio=0.1,
        sam_rho=0.05,
        sam_phase="anneal",
    )
    run.train()
    logs = step_logs(run)
    expected = [0.1, 0.55] + [1.0] * (8 - steps) + [0.1 + 0.9 * shape(kind, i / steps) for i in range(steps)]
    assert [entry["learning_rate"] / 1e-3 for entry in logs] == pytest.approx(expected)
    # SAM acts in exactly the steps that decay.
    assert [("sam/sharpness" in entry) for entry in logs] == [False] * (10 - steps) + [True] * steps
    # What is saved with the model is what the user gave.
    assert run.args.lr_scheduler_kwargs is None


def test_warmup_and_annealing_must_fit_into_the_run(tmp_path):
    run = trainer(tmp_path, max_steps=10, warmup_steps=5, lr_scheduler_type="linear", anneal_steps=6)
    with pytest.raises(ValueError, match=r"anneal_steps=6 .*warmup of 5 steps.*10 steps"):
        run.train()


def test_annealing_and_a_scheduler_of_the_user_contradict(tmp_path):
    import torch
    from toy import arguments, olmo2, token_dataset

    from hf_sam import SAMTrainer

    model = olmo2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="scheduler was passed"):
        SAMTrainer(
            model=model,
            args=arguments(tmp_path, lr_scheduler_type="linear", anneal_steps=2),
            train_dataset=token_dataset(),
            optimizers=(optimizer, scheduler),
        )


def test_steps_of_an_interval_are_clipped_and_resume_as_in_a_plain_loop(tmp_path):
    """SAM in steps 0, 3 and 6 of 8, clipped to less than half, interrupted between two of them."""
    settings = {"sam_rho": 0.2, "sam_interval": 3, "max_grad_norm": 0.3, "max_steps": 8, "save_strategy": "steps"}
    # With its default epsilon, Adam turns rounding in gradients near 0 into steps of full size.
    settings |= {"save_steps": 5, "weight_decay": 0.0, "adam_epsilon": 1e-2}
    whole = trainer(tmp_path, **settings)
    whole.train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert all(torch.equal(weights(whole.model)[name], value) for name, value in weights(resumed.model).items())
    # The part of the perturbation that rounding keeps is measured in the first SAM step of each process.
    logs = [[{**entry, "sam/perturbation_kept": 1} for entry in step_logs(run)] for run in (whole, resumed)]
    assert logs[0] == logs[1]

    model = olmo2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-2)
    norms, rises = [], []
    for step, batch in enumerate(itertools.islice(trainer(tmp_path, **settings).get_train_dataloader(), 8)):
        rho = 0.2 if step % 3 == 0 else 0.0
        result = sam_step(model, [batch], lambda m, batch: m(**batch).loss, rho=rho)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
        optimizer.step()
        rises.append(result.perturbed_loss - result.loss)
    assert min(norms) > 0.6
    logs = step_logs(whole)
    assert [entry["grad_norm"] for entry in logs] == pytest.approx(norms, rel=1e-4)
    assert [entry.get("sam/sharpness", 0.0) for entry in logs] == pytest.approx(rises, rel=1e-3, abs=1e-6)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights(whole.model)[name], value, rtol=1e-4, atol=1e-5)
