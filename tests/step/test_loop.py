"""`SAMStep` in training loops without a `Trainer`."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from toy import Classifier, classification_rows, olmo2, token_dataset

from hf_sam import SAMStep
from hf_sam.step.reference import sam_step

STEPS, ACCUMULATION, SIZE = 4, 2, 4


def setup(rho=0.05, accumulation=ACCUMULATION, model=None, **kwargs):
    """Model, optimizer, batches and step of a loop that has prepared nothing."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = olmo2().train() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    batches = list(DataLoader(token_dataset(rows=STEPS * ACCUMULATION * SIZE), batch_size=SIZE))
    return accelerator, model, optimizer, batches, SAMStep(accelerator, model, rho, **kwargs)


def by_hand(rho=0.05, variant="sam", ascent=None):
    """The same run with the plain reference step."""
    model = olmo2().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    batches = list(DataLoader(token_dataset(rows=STEPS * ACCUMULATION * SIZE), batch_size=SIZE))
    losses = []
    for i in range(0, len(batches), ACCUMULATION):
        window = batches[i : i + ACCUMULATION]
        result = sam_step(model, window, lambda m, b: m(**b).loss / ACCUMULATION, rho, variant, ascent)
        optimizer.step()
        losses.append(result.loss)
    return losses, model


def distance(model, other) -> float:
    """Relative distance of the weights; Adam divides by small numbers, so single elements may differ by more."""
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    difference = sum((mine - theirs).square().sum() for mine, theirs in pairs)
    return (difference / sum(theirs.square().sum() for _, theirs in pairs)).sqrt().item()


@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        ({}, {}),
        ({"variant": "asam", "rho": 0.5}, {"variant": "asam", "rho": 0.5}),
        ({"ascent_micro_batches": 0.5}, {"ascent": 1}),
    ],
    ids=["sam", "asam", "half"],
)
def test_loop_over_micro_batches_follows_the_reference(settings, oracle):
    accelerator, model, optimizer, batches, sam = setup(**settings)

    def forward_backward(batch):
        loss = model(**batch).loss
        accelerator.backward(loss)
        return loss.detach() / ACCUMULATION

    losses = []
    for i, batch in enumerate(batches):
        accelerator.gradient_state._set_sync_gradients((i + 1) % ACCUMULATION == 0)
        losses.append(sam(forward_backward, batch).item())
        if accelerator.sync_gradients:
            optimizer.step()
            optimizer.zero_grad()
    expected, other = by_hand(**oracle)
    assert losses[::2] == [0.0] * STEPS
    scale = 2 if "ascent" in oracle else 1
    assert losses[1::2] == pytest.approx([loss * scale for loss in expected], abs=1e-5)
    assert distance(model, other) <= 1e-6
    assert sam.step == STEPS
    metrics = sam.pop_metrics()
    assert metrics["sam/sharpness"] > 0
    assert sam.pop_metrics() == {}


def test_loop_in_the_style_of_accelerate_follows_the_reference():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model = olmo2().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    loader = DataLoader(token_dataset(rows=STEPS * ACCUMULATION * SIZE), batch_size=SIZE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sam = SAMStep(accelerator, model, rho=0.05)

    def forward_backward(batch):
        loss = model(**batch).loss
        accelerator.backward(loss)
        return loss.detach() / ACCUMULATION

    total = 0.0
    for batch in loader:
        with accelerator.accumulate(model):
            total += sam(forward_backward, batch).item()
            optimizer.step()
            optimizer.zero_grad()
    expected, other = by_hand()
    assert total == pytest.approx(sum(expected), abs=1e-4)
    assert distance(model, other) <= 1e-6


def test_contexts_around_both_passes_follow_the_reference():
    _, model, optimizer, batches, sam = setup(accumulation=1)
    for i in range(0, len(batches), ACCUMULATION):
        with sam.ascent():
            for batch in batches[i : i + ACCUMULATION]:
                (model(**batch).loss / ACCUMULATION).backward()
        with sam.perturbed() as perturbation:
            assert all(param.grad is None for param in model.parameters())
            for batch in batches[i : i + ACCUMULATION]:
                (model(**batch).loss / ACCUMULATION).backward()
        assert bool(perturbation.finite)
        optimizer.step()
        optimizer.zero_grad()
    assert distance(model, by_hand()[1]) <= 1e-6


def test_contexts_leave_random_streams_and_batchnorm_as_plain_training_does():
    rows = classification_rows(8)
    batch = [torch.stack([row[key] for row in rows]) for key in ("features", "labels")]
    plain, model = Classifier().train(), Classifier().train()
    torch.manual_seed(3)
    plain(*batch)["loss"].backward()
    expected = torch.get_rng_state()

    sam = SAMStep(Accelerator(cpu=True), model, rho=1e-7)
    torch.manual_seed(3)
    losses = []
    for context in (sam.ascent, sam.perturbed):
        with context():
            loss = model(*batch)["loss"]
            loss.backward()
            losses.append(loss.item())
    assert torch.equal(torch.get_rng_state(), expected)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # the same dropout masks
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_rho_zero_is_bitwise_the_plain_loop_and_rho_may_change_between_steps():
    def run(rhos):
        accelerator, model, optimizer, batches, sam = setup(rho=0.0)

        def forward_backward(batch):
            loss = model(**batch).loss
            accelerator.backward(loss)
            return loss.detach() / ACCUMULATION

        losses = []
        for i, batch in enumerate(batches):
            sam.rho = rhos[i // ACCUMULATION]
            accelerator.gradient_state._set_sync_gradients((i + 1) % ACCUMULATION == 0)
            losses.append(sam(forward_backward, batch).item())
            if accelerator.sync_gradients:
                optimizer.step()
                optimizer.zero_grad()
        return losses, model, sam

    losses, model, sam = run([0.0] * STEPS)
    accelerator, other, optimizer, batches, _ = setup(rho=0.0)
    for i, batch in enumerate(batches):
        loss = other(**batch).loss
        accelerator.backward(loss)
        assert losses[i] == (loss.detach() / ACCUMULATION).item()
        if i % ACCUMULATION == ACCUMULATION - 1:
            optimizer.step()
            optimizer.zero_grad()
    assert distance(model, other) == 0.0
    assert sam.step == STEPS
    late, _, sam = run([0.0, 0.0, 0.05, 0.05])
    assert late[:4] == losses[:4]
    assert late[4] == 0.0  # kept until the second micro-batch of the first SAM step
    assert sam.pop_metrics()["sam/sharpness"] > 0


def test_perturbed_needs_an_ascent():
    *_, sam = setup()
    with pytest.raises(RuntimeError, match=r"in ascent\(\) before"), sam.perturbed():
        pass


def test_an_ascent_that_failed_does_not_count():
    *_, sam = setup()

    def fails():
        with sam.ascent():
            raise MemoryError

    with pytest.raises(MemoryError):
        fails()
    with pytest.raises(RuntimeError, match=r"in ascent\(\) before"), sam.perturbed():
        pass


def test_contexts_between_the_micro_batches_of_a_step_are_refused():
    accelerator, *_, sam = setup()
    accelerator.gradient_state._set_sync_gradients(False)
    with pytest.raises(RuntimeError, match="a whole optimizer step"), sam.ascent():
        pass


def test_gradients_from_before_are_refused_and_the_weights_stay():
    _, model, _, batches, sam = setup(accumulation=1)
    before = [param.detach().clone() for param in model.parameters()]
    model(**batches[0]).loss.backward()

    def forward_backward(batch):
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    with pytest.raises(RuntimeError, match=r"model\.zero_grad.*accelerator\.accumulate"):
        sam(forward_backward, batches[1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    sam(forward_backward, batches[1])  # the error cleared them


@pytest.mark.parametrize("where", ["callable", "context"])
def test_weights_are_restored_after_an_error_in_the_second_pass(where):
    _, model, _, batches, sam = setup(rho=0.5, accumulation=1)
    before = [param.detach().clone() for param in model.parameters()]
    calls = []

    def fails_second(batch):
        loss = model(**batch).loss
        loss.backward()
        calls.append(1)
        if len(calls) == 2:
            assert not torch.equal(model.model.embed_tokens.weight, before[0])
            raise MemoryError
        return loss.detach()

    def step():
        if where == "callable":
            return sam(fails_second, batches[0])
        with sam.ascent():
            fails_second(batches[0])
        with sam.perturbed():
            fails_second(batches[0])

    with pytest.raises(MemoryError):
        step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(param.grad is None for param in model.parameters())


def test_the_step_count_travels_in_accelerates_checkpoints(tmp_path):
    accelerator, _, _, _, sam = setup()
    accelerator.register_for_checkpointing(sam)
    sam.step = 7
    accelerator.save_state(tmp_path / "state")
    sam.step = 0
    accelerator.load_state(tmp_path / "state")
    assert sam.step == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -0.1}, "rho=-0.1"),
        ({"rho": float("nan")}, "rho=nan"),
        ({"ascent_micro_batches": 0}, "ascent_micro_batches=0"),
        ({"ascent_sync": "globl"}, "'global' or 'local'"),
        ({"target_modules": ["q_prj"]}, "q_prj"),
    ],
)
def test_wrong_values_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        setup(**settings)
