"""Errors, Ctrl-C and running out of memory in the second pass leave the original weights."""

import pytest
import torch
from toy import olmo2, step_logs, token_dataset, trainer

from hf_sam import SAMTrainer


class FailsInBackward(SAMTrainer):
    """Raises `error` in the backward of the descent pass of the second step."""

    error: BaseException = RuntimeError("broken")
    passes = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.passes += 1
        if self.passes == 4:
            self.perturbed_weights = [p.detach().clone() for p in self.model.parameters()]

            def fail(grad):
                raise self.error

            self.model.model.layers[0].mlp.up_proj.weight.register_hook(fail)
        return loss


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError()])
def test_weights_and_gradients_are_those_of_before_the_step(tmp_path, error):
    failing = type("Failing", (FailsInBackward,), {"error": error})
    run = trainer(tmp_path, model=olmo2(), trainer_class=failing, sam_rho=0.5)
    with pytest.raises(type(error)):
        run.train()
    one_step = trainer(tmp_path, sam_rho=0.5, max_steps=1)
    one_step.train()
    weights = list(run.model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(run.perturbed_weights, weights, strict=True))
    for mine, expected in zip(weights, one_step.model.parameters(), strict=True):
        assert torch.equal(mine, expected)
        assert mine.grad is None


def test_running_out_of_memory_starts_over_with_a_smaller_batch(tmp_path):
    class RunsOutOfMemory(SAMTrainer):
        sizes = ()
        weights_at_retry = None

        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            rows = inputs["input_ids"].shape[0]
            if rows != (self.sizes or [None])[-1]:
                self.weights_at_retry = [p.detach().clone() for p in model.parameters()]
                self.sizes = (*self.sizes, rows)
                self.passes = 0
            self.passes += 1
            if rows > 4 and self.passes == 2:
                raise RuntimeError("CUDA out of memory.")
            return loss

    run = trainer(
        tmp_path,
        trainer_class=RunsOutOfMemory,
        sam_rho=0.5,
        max_steps=2,
        auto_find_batch_size=True,
        per_device_train_batch_size=16,
    )
    run.train()
    assert run.sizes[0] == 16
    assert run.sizes[-1] <= 4
    # Every attempt failed in its first step, at w + e; the last one must start from the weights of the beginning.
    for mine, original in zip(run.weights_at_retry, olmo2().parameters(), strict=True):
        assert torch.equal(mine, original)
    assert len(step_logs(run)) == 2


def test_training_resumes_after_an_interrupt(tmp_path):
    run = trainer(tmp_path, trainer_class=FailsInBackward, sam_rho=0.5)
    with pytest.raises(RuntimeError, match="broken"):
        run.train()
    run.model.model.layers[0].mlp.up_proj.weight._backward_hooks.clear()
    # The window of the failed step is gone: six whole steps, each with a loss of its own.
    run.train()
    assert len([entry for entry in step_logs(run) if entry["step"] <= 6]) == 6
    assert all(entry["sam/perturbed_loss"] < 6 for entry in step_logs(run))


def test_stop_and_resume_is_bitwise_the_uninterrupted_run_in_bf16(tmp_path):
    # Stochastic rounding draws random numbers; a resumed run must draw the same ones.
    settings = {"sam_rho": 0.5, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    rows = token_dataset()
    whole = trainer(tmp_path, model=olmo2(dropout=0.1, dtype=torch.bfloat16), dataset=rows, **settings)
    whole.train()
    again = trainer(tmp_path, model=olmo2(dropout=0.1, dtype=torch.bfloat16), dataset=rows, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
