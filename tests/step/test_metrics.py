"""What SAM logs, what it costs to log it, and what the host counts."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from toy import Branches, arguments, olmo2, step_logs, token_dataset, trainer
from transformers import Trainer, TrainerCallback

from hf_sam import SAMTrainer
from hf_sam.commands.suggest_rho import STARTS
from hf_sam.step.metrics import SAMMetrics
from hf_sam.step.perturbation import Perturbation

SAM_METRICS = {"sam/perturbed_loss", "sam/sharpness", "sam/ascent_grad_norm", "sam/perturbation_kept", "sam/skipped"}


def test_metrics_join_the_hosts_logs_and_reach_the_callbacks(tmp_path):
    class Reporter(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(dict(logs))

    run = trainer(tmp_path, sam_rho=0.05, max_steps=4, logging_steps=2)
    reporter = Reporter()
    run.add_callback(reporter)
    run.train()
    assert len(step_logs(run)) == 2
    for entry in (*step_logs(run), *reporter.logs[:2]):
        assert set(entry) >= SAM_METRICS
        assert entry["sam/sharpness"] > 0
        assert entry["sam/sharpness"] == pytest.approx(entry["sam/perturbed_loss"] - entry["loss"], abs=1e-5)
        assert entry["sam/skipped"] == 0


def test_logged_means_are_the_means_of_the_steps(tmp_path):
    every, third = (trainer(tmp_path, sam_rho=0.05, max_steps=6, logging_steps=n) for n in (1, 3))
    every.train()
    third.train()
    for name in ("loss", "sam/perturbed_loss", "sam/sharpness", "sam/ascent_grad_norm"):
        steps = [entry[name] for entry in step_logs(every)]
        means = [sum(steps[:3]) / 3, sum(steps[3:]) / 3]
        assert [entry[name] for entry in step_logs(third)] == pytest.approx(means, abs=1e-5)


def test_means_are_over_the_steps_in_which_sam_acted(tmp_path):
    some = trainer(tmp_path, sam_rho=0.05, max_steps=4, logging_steps=4, sam_start_steps=3)
    some.train()
    every = trainer(tmp_path, sam_rho=0.05, max_steps=4, logging_steps=1, sam_start_steps=3)
    every.train()
    assert step_logs(some)[0]["sam/sharpness"] == pytest.approx(step_logs(every)[-1]["sam/sharpness"], abs=1e-6)


def test_no_sam_metrics_without_sam_steps(tmp_path):
    run = trainer(tmp_path, sam_rho=0.05, sam_end_steps=2, max_steps=4)
    run.train()
    assert [bool(SAM_METRICS & set(entry)) for entry in step_logs(run)] == [True, True, False, False]


def test_evaluation_logs_do_not_swallow_the_metrics(tmp_path):
    run = SAMTrainer(
        model=olmo2(),
        args=arguments(tmp_path, sam_rho=0.05, max_steps=4, logging_steps=4, eval_strategy="steps", eval_steps=2),
        train_dataset=token_dataset(),
        eval_dataset=token_dataset(rows=8),
    )
    run.train()
    assert set(step_logs(run)[0]) >= SAM_METRICS
    assert not any(SAM_METRICS & set(entry) for entry in run.state.log_history if "eval_loss" in entry)


class ReadsFromDevice(TorchDispatchMode):
    """Counts the operations that would make the process wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


class KeepsANumber(Branches):
    """Replaces a tensor of one element in each forward pass, as routers keep their loss."""

    def forward(self, input_ids, labels=None, num_items_in_batch=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids, labels, num_items_in_batch)
        self.spread = output["logits"].std().detach()
        return output


@pytest.mark.parametrize("model", [Branches, KeepsANumber])
def test_sam_steps_never_wait_for_the_device(tmp_path, monkeypatch, model):
    copies = []
    for name in ("tolist", "cpu", "numpy"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, read=read, **k: [copies.append(1), read(self, *a, **k)][1]
        )

    def reads(sam_rho):
        # Not the OLMo-2, which looks at its masks in every forward pass.
        run = trainer(
            tmp_path,
            model=model(),
            sam_rho=sam_rho,
            logging_steps=100,
            logging_nan_inf_filter=False,
            max_grad_norm=0.0,
        )
        copies.clear()
        with ReadsFromDevice() as mode:
            run.train()
        return mode.count + len(copies)

    assert reads(0.05) == reads(0.0)


def test_floating_point_operations_count_both_passes(tmp_path):
    def operations(trainer_class=None, **sam):
        kwargs = {"trainer_class": trainer_class} if trainer_class else {}
        run = trainer(tmp_path, max_steps=4, gradient_accumulation_steps=4, **kwargs, **sam)
        run.train()
        return run.state.total_flos

    plain = operations(Trainer)
    assert operations(sam_rho=0.05) == pytest.approx(2 * plain)
    assert operations(sam_rho=0.05, sam_ascent_micro_batches=1) == pytest.approx(1.25 * plain)
    assert operations(sam_rho=0.05, sam_interval=2) == pytest.approx(1.5 * plain)


def test_tokens_seen_are_counted_once(tmp_path):
    counts = []
    for sam_rho in (0.0, 0.05):
        run = trainer(tmp_path, sam_rho=sam_rho, max_steps=3, include_num_input_tokens_seen="all")
        run.train()
        counts.append(run.state.num_input_tokens_seen)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("rise", [*(rise for start in STARTS for rise in start.rises.values()), 20.0])
def test_the_radii_that_suggest_rho_gives_raise_no_warning(rise, caplog):
    metrics = SAMMetrics(Accelerator(cpu=True))
    clean = torch.tensor(2.2)
    whole = Perturbation(torch.tensor(0.4), torch.tensor(3.2), torch.tensor(True), moved=None)
    with caplog.at_level("WARNING", logger="hf_sam"):
        metrics.update(clean, clean + rise, whole, rho=3.2)
        metrics.pop()
    assert caplog.text.count("sam_rho=3.2 is too large: the loss is 22.2") == (rise == 20.0)
    assert caplog.text.count("WARNING") == (rise == 20.0)
