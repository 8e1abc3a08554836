"""Measures during training: they log, and change nothing."""

import pytest
import toy
from toy import step_logs, weights
from toy_evaluation import held_out
from toy_trl import build

from hf_sam import SAMTrainer
from hf_sam.instruments import ForgettingCallback, SharpnessCallback, held_out_loss, hessian_spectrum, noise_kl

MEASURES = ("kl", "sam", "hessian")
OPTIONS = {"kl": {"samples": 2}, "hessian": {"probes": 1, "parameters": "norm"}}


def trainer(tmp_path, callbacks=True, **overrides):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, **overrides}
    host = SAMTrainer(
        model=toy.olmo2(dropout=0.1),
        args=toy.arguments(tmp_path, **settings),
        train_dataset=toy.token_dataset(),
        eval_dataset=toy.token_dataset(rows=8, seed=9),
    )
    if callbacks:
        host.add_callback(ForgettingCallback(host, held_out()))
        host.add_callback(SharpnessCallback(host, held_out(4), MEASURES, **OPTIONS))
    return host


def logged(host, key):
    return [entry[key] for entry in host.state.log_history if key in entry]


@pytest.mark.parametrize("sam", [{}, {"sam_rho": 0.05, "gradient_accumulation_steps": 2}], ids=["plain", "SAM"])
def test_training_is_bitwise_the_same_with_and_without(tmp_path, sam):
    runs = []
    for callbacks in (False, True):
        runs.append(trainer(tmp_path / str(callbacks), callbacks, **sam))  # sets the seed
        runs[-1].train()
    assert step_logs(runs[0]) == [
        {key: value for key, value in entry.items() if not key.startswith(("forgetting/", "sharpness/"))}
        for entry in step_logs(runs[1])
    ]
    first, second = (weights(run.model) for run in runs)
    assert all((first[name] == second[name]).all() for name in first)


def test_what_is_logged_is_what_the_functions_measure(tmp_path):
    host = trainer(tmp_path)
    before = held_out_loss(host.model, held_out()).loss
    host.train()
    after = held_out_loss(host.model, held_out()).loss
    assert logged(host, "forgetting/before") == [before]
    # At steps 2 and 4; the end of training is step 4 again.
    assert len(logged(host, "forgetting/held_out_loss")) == 2
    assert logged(host, "forgetting/held_out_loss")[-1] == after
    assert logged(host, "forgetting/forgetting")[-1] == after - before
    assert logged(host, "sharpness/kl")[-1] == noise_kl(host.model, held_out(4), samples=2).value
    spectrum = hessian_spectrum(host.model, held_out(4), **OPTIONS["hessian"])
    assert logged(host, "sharpness/hessian_top")[-1] == pytest.approx(spectrum.eigenvalues[0], rel=1e-4)
    assert logged(host, "sharpness/hessian_trace")[-1] == pytest.approx(spectrum.trace, rel=1e-4)
    assert len(logged(host, "sharpness/sam")) == 3  # before training, too


def test_without_evaluation_the_end_of_training_is_measured(tmp_path):
    host = trainer(tmp_path, eval_strategy="no")
    host.train()
    assert len(logged(host, "forgetting/forgetting")) == 1


def test_the_best_model_can_be_the_one_that_forgot_least(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "max_steps": 6}
    host = trainer(tmp_path, metric_for_best_model="forgetting/held_out_loss", greater_is_better=False, **settings)
    host.train()
    losses = logged(host, "forgetting/held_out_loss")
    assert host.state.best_metric == min(losses[:3])
    # The last entry is of the model that was put in place, whichever that is.
    assert losses[3] == min(losses[:3]) == held_out_loss(host.model, held_out()).loss


def test_what_cannot_be_measured_is_told_before_training(tmp_path):
    host = trainer(tmp_path, callbacks=False)
    host.add_callback(SharpnessCallback(host, held_out(), kl={"parameters": "nothing"}))
    with pytest.raises(ValueError, match="'nothing' matches none"):
        host.train()
    assert host.state.global_step == 0


def test_several_datasets_by_name(tmp_path):
    host = trainer(tmp_path, callbacks=False)
    host.add_callback(ForgettingCallback(host, {"prose": held_out(), "code": held_out(seed=5)}, batch_size=3))
    host.train()
    assert len(logged(host, "forgetting/prose/forgetting")) == len(logged(host, "forgetting/code/forgetting")) == 2


def test_a_resumed_run_compares_with_the_base(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "run", save_strategy="steps", save_steps=2)
    first.train()
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logged(resumed, "forgetting/before") == logged(whole, "forgetting/before")
    assert logged(resumed, "forgetting/forgetting") == logged(whole, "forgetting/forgetting")


def test_metrics_of_trl_are_not_swept_up(tmp_path):
    """TRL joins its averages to whatever is logged next."""
    plain, measured = (build("sft", tmp_path / str(i)) for i in range(2))
    measured.add_callback(ForgettingCallback(measured, held_out(4)))
    for host in (plain, measured):
        host.train()
    assert [sorted(e) for e in step_logs(plain)] == [sorted(e) for e in step_logs(measured)]
    own = [entry for entry in measured.state.log_history if "forgetting/before" in entry]
    assert [set(entry) - {"epoch", "step"} for entry in own] == [{"forgetting/before"}]


def test_unknown_measures_are_refused(tmp_path):
    host = trainer(tmp_path, callbacks=False)
    for arguments, options in ((("kl", "flat"), {}), (("kl",), {"flat": {}})):
        with pytest.raises(ValueError, match="no sharpness measure 'flat'"):
            SharpnessCallback(host, held_out(), arguments, **options)
