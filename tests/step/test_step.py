"""The two-pass step inside the host's loop: exact, invisible to callbacks, and leaving no trace in random streams."""

import numpy as np
import pytest
import torch
from toy import Classifier, arguments, classification_rows, olmo2, step_logs, token_dataset, trainer, weights
from transformers import Trainer, TrainerCallback

from hf_sam import SAMMixin, SAMTrainer
from hf_sam.step.reference import sam_gradient, sam_step


class RandomStateAtFirstStep(TrainerCallback):
    """The global stream as the first forward pass finds it."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.state = torch.get_rng_state()


def test_same_run_as_a_hand_written_loop_with_batchnorm_and_dropout(tmp_path):
    steps, accumulation, size = 5, 2, 8
    rows = classification_rows(steps * accumulation * size)
    model, recorder = Classifier(), RandomStateAtFirstStep()
    run = SAMTrainer(
        model=model,
        args=arguments(
            tmp_path,
            sam_rho=0.1,
            max_steps=steps,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
        ),
        train_dataset=rows,
        callbacks=[recorder],
    )
    run.train()

    # The plain step and AdamW: dropout masks by rewinding the stream, BatchNorm by freezing it in the second pass.
    other = Classifier().train()
    batchnorm = other.layers[1]
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    torch.set_rng_state(recorder.state)
    losses = []
    for step in range(steps):
        batches = []
        for i in range(accumulation):
            part = rows[(step * accumulation + i) * size :][:size]
            batches.append([torch.stack([row[key] for row in part]) for key in ("features", "labels")])
        start, counted = torch.get_rng_state(), batchnorm.num_batches_tracked.clone()

        def forward_backward(batches, start=start):
            torch.set_rng_state(start)
            loss = sum(other(*batch)["loss"] for batch in batches) / accumulation
            loss.backward()
            batchnorm.momentum = 0.0  # in the second pass
            return loss.detach()

        result = sam_gradient(dict(other.named_parameters()), [batches], forward_backward, rho=0.1)
        batchnorm.momentum = 0.1
        batchnorm.num_batches_tracked.copy_(counted + accumulation)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        losses.append((result.loss, result.perturbed_loss))

    logged = [(entry["loss"], entry["sam/perturbed_loss"]) for entry in step_logs(run)]
    np.testing.assert_allclose(logged, losses, atol=1e-5)
    for name, value in other.state_dict().items():
        # Adam divides by the root of tiny second moments; the sums above run in another order than the trainer's.
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert model.layers[1].num_batches_tracked == steps * accumulation


def test_last_shorter_window_of_an_epoch_is_a_step_of_its_own(tmp_path):
    # 20 rows in micro-batches of 4 and windows of 2: two windows of two and one of one.
    rows = token_dataset(rows=20)
    run = trainer(
        tmp_path,
        dataset=rows,
        sam_rho=0.05,
        max_steps=-1,
        num_train_epochs=1,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
    )
    run.train()
    logs = step_logs(run)
    assert len(logs) == 3

    model = olmo2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for window, entry in zip(([0, 4], [8, 12], [16]), logs, strict=True):
        batches = [{key: torch.stack([row[key] for row in rows[i : i + 4]]) for key in rows[0]} for i in window]
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)

        def loss_of(model, batch, tokens=tokens):
            return model(**batch, num_items_in_batch=tokens).loss

        expected = sam_step(model, batches, loss_of, rho=0.05)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert entry["loss"] == pytest.approx(expected.loss, abs=1e-5)
        assert entry["sam/perturbed_loss"] == pytest.approx(expected.perturbed_loss, abs=1e-5)


class WeightsWatcher(TrainerCallback):
    """Copies the weights at every event that a callback can see."""

    def __init__(self):
        self.seen = []

    def _look(self, args, state, control, model=None, **kwargs):
        self.seen.append((state.global_step, [p.detach().clone() for p in model.parameters()]))

    on_step_begin = on_substep_end = on_pre_optimizer_step = _look


def test_callbacks_never_see_perturbed_weights_or_mixed_gradients(tmp_path):
    watcher = WeightsWatcher()
    run = trainer(tmp_path, sam_rho=0.5, gradient_accumulation_steps=3, max_steps=2, sam_ascent_micro_batches=2)
    run.add_callback(watcher)
    run.train()
    for step in (0, 1):
        copies = [copy for seen_step, copy in watcher.seen if seen_step == step]
        assert len(copies) == 4  # one at the start, two between micro-batches, one before the optimizer steps
        for copy in copies[1:]:
            assert all(torch.equal(a, b) for a, b in zip(copies[0], copy, strict=True))


class StopEpochOnce(TrainerCallback):
    """Ends the first epoch after the first micro-batch of a step."""

    stopped = False

    def on_substep_end(self, args, state, control, **kwargs):
        if not self.stopped:
            self.stopped = True
            control.should_epoch_stop = True
        return control


class Stream(torch.utils.data.IterableDataset):
    """Data without a length, which ends in the middle of a step."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("ascent", [None, 1, 2])
@pytest.mark.parametrize("unfinished", ["stream", "callback"])
@pytest.mark.parametrize("model_class", [Classifier, "olmo2"])
def test_what_an_unfinished_step_accumulated_goes_into_the_next_as_in_the_host(
    tmp_path, unfinished, ascent, model_class
):
    def run(**sam):
        if model_class is Classifier:
            # Its loss is a mean a micro-batch, which the host divides by the length of the step it belongs to.
            model, rows = Classifier(), classification_rows(24)
            model.layers[3].p = 0.0
        else:
            model, rows = olmo2(), token_dataset(rows=24)
        run = trainer(
            tmp_path,
            model=model,
            dataset=Stream(rows) if unfinished == "stream" else rows,
            gradient_accumulation_steps=4 if unfinished == "stream" else 2,
            max_steps=3,
            max_grad_norm=100.0,
            learning_rate=0.0,
            train_sampling_strategy="sequential",
            **sam,
        )
        if unfinished == "callback":
            run.add_callback(StopEpochOnce())
        run.train()
        return step_logs(run)

    plain, sam = run(), run(sam_rho=1e-7, sam_ascent_micro_batches=ascent)
    assert len(plain) == len(sam)
    for theirs, mine in zip(plain, sam, strict=True):
        # With next to no perturbation the descent gradient is the plain one, and so is an ascent gradient over all.
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        if ascent is None:
            assert mine["sam/ascent_grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_layer_that_is_unfrozen_during_training_joins_in(tmp_path):
    class Unfreeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.requires_grad_(True)

    def run(sam_rho):
        model = olmo2()
        model.model.layers[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        run = SAMTrainer(
            model=model,
            args=arguments(tmp_path, sam_rho=sam_rho, max_steps=2, max_grad_norm=100.0),
            train_dataset=token_dataset(),
            optimizers=(optimizer, None),
            callbacks=[Unfreeze()],
        )
        run.train()
        return [(entry["grad_norm"], entry.get("sam/ascent_grad_norm")) for entry in step_logs(run)]

    plain, sam = run(0.0), run(1e-7)
    assert [norm for norm, _ in sam] == pytest.approx([norm for norm, _ in plain], rel=1e-4)
    assert sam[1][1] == pytest.approx(plain[1][0], rel=1e-4)


def test_without_a_training_loop_the_step_returns_the_clean_loss(tmp_path):
    run = trainer(tmp_path, sam_rho=0.5)
    batch = {key: torch.stack([row[key] for row in token_dataset(rows=4)]) for key in token_dataset(rows=1)[0]}
    plain = olmo2()
    expected = plain.train()(**batch).loss
    expected.backward()
    tokens = (batch["labels"][:, 1:] != -100).sum()
    assert run.training_step(run.model, dict(batch), tokens).item() == pytest.approx(expected.item(), abs=1e-6)
    for mine, theirs in zip(run.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_inputs_that_the_hosts_step_takes_apart_are_whole_in_the_second_pass(tmp_path):
    class TakesLabels(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, {"labels": inputs.pop("labels"), **inputs}, num_items_in_batch)

    class SAMTakesLabels(SAMMixin, TakesLabels):
        pass

    run = trainer(tmp_path, trainer_class=SAMTakesLabels, sam_rho=0.05, max_steps=2)
    run.train()
    plain = trainer(tmp_path, sam_rho=0.05, max_steps=2)
    plain.train()
    assert step_logs(run) == step_logs(plain)


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_and_tied_parameters_follow_the_reference(tmp_path, tied):
    def build():
        model = olmo2(tie_word_embeddings=tied)
        model.model.layers[0].requires_grad_(False)
        return model

    rows = token_dataset(rows=4)
    run = trainer(tmp_path, model=build(), dataset=rows, sam_rho=0.2, max_steps=1, optim="sgd", learning_rate=0.1)
    run.train()
    model = build()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    sam_step(model, [batch], lambda m, b: m(**b).loss, rho=0.2)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name, value in weights(model).items():
        torch.testing.assert_close(weights(run.model)[name], value, rtol=0, atol=2e-7, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    plain = trainer(tmp_path, model=olmo2(dropout=0.1), sam_rho=0.05)
    plain.train()
    checkpointed = trainer(
        tmp_path,
        model=olmo2(dropout=0.1),
        sam_rho=0.05,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    checkpointed.train()
    for mine, theirs in zip(step_logs(checkpointed), step_logs(plain), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["sam/perturbed_loss"] == pytest.approx(theirs["sam/perturbed_loss"], abs=1e-5)


def test_compiled_model_is_not_compiled_again_between_the_passes(tmp_path):
    torch._dynamo.reset()
    rows = [{**row, "attention_mask": torch.ones(16, dtype=torch.long)} for row in token_dataset()]
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = trainer(
            tmp_path, dataset=rows, sam_rho=0.05, max_steps=4, torch_compile=True, torch_compile_backend="aot_eager"
        )
        compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    eager = trainer(tmp_path, dataset=rows, sam_rho=0.05, max_steps=4)
    eager.train()
    for mine, theirs in zip(step_logs(compiled), step_logs(eager), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert mine["sam/perturbed_loss"] == pytest.approx(theirs["sam/perturbed_loss"], abs=1e-4)


def test_rho_zero_is_bitwise_the_host_on_a_model_with_dropout(tmp_path):
    mine = trainer(tmp_path, model=olmo2(dropout=0.2), sam_rho=0.0, gradient_accumulation_steps=2)
    mine.train()
    state = torch.get_rng_state()
    host = trainer(tmp_path, model=olmo2(dropout=0.2), trainer_class=Trainer, gradient_accumulation_steps=2)
    host.train()
    assert torch.equal(state, torch.get_rng_state())
    assert step_logs(mine) == step_logs(host)
    assert all(torch.equal(a, b) for a, b in zip(mine.model.parameters(), host.model.parameters(), strict=True))
