"""What a user does around training works as with `Trainer`: evaluation, search, early stopping, the card, the hub."""

import types

import numpy as np
import pytest
import torch
from toy import arguments, olmo2, step_logs, token_dataset, trainer, weights
from toy_trl import build
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from hf_sam import SAMArguments, SAMMixin, SAMTrainer, SAMTrainingArguments, with_sam
from hf_sam.step.reference import sam_gradient

TIMES = ("runtime", "per_second", "_time", "jit")


def without_times(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if not any(part in name for part in TIMES)}


def evaluating(tmp_path, trainer_class, **overrides):
    return trainer_class(
        model=olmo2(),
        args=arguments(tmp_path, **overrides),
        train_dataset=token_dataset(),
        eval_dataset=token_dataset(rows=8, seed=9),
        compute_metrics=lambda prediction: {"mean_logit": float(np.mean(prediction.predictions))},
    )


def test_evaluate_and_predict_are_bitwise_the_hosts(tmp_path):
    sam, host = (evaluating(tmp_path, cls, sam_rho=0.05) for cls in (SAMTrainer, Trainer))
    assert without_times(sam.evaluate()) == without_times(host.evaluate())
    mine, theirs = (run.predict(token_dataset(rows=6)) for run in (sam, host))
    assert np.array_equal(mine.predictions, theirs.predictions)
    assert without_times(mine.metrics) == without_times(theirs.metrics)


def test_evaluation_during_training_sees_the_weights_between_steps(tmp_path):
    run = evaluating(tmp_path, SAMTrainer, sam_rho=0.5, eval_strategy="steps", eval_steps=2, max_steps=4)
    run.train()
    logged = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2
    assert run.evaluate()["eval_loss"] == logged[-1]


def test_early_stopping_and_the_best_model(tmp_path):
    # Learning at this rate diverges, so the first evaluation is the best.
    run = evaluating(
        tmp_path,
        SAMTrainer,
        sam_rho=0.05,
        learning_rate=5.0,
        optim="sgd",
        max_grad_norm=100.0,
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=2,
    )
    run.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = int(np.argmin(losses))
    assert run.state.global_step == best + 3 < 20
    assert run.state.best_global_step == best + 1
    assert run.evaluate()["eval_loss"] == losses[best]


def olmo2_of_trial(trial=None):
    return olmo2()


def test_hyperparameter_search_over_rho(tmp_path):
    pytest.importorskip("optuna")
    run = SAMTrainer(
        model_init=olmo2_of_trial,
        args=arguments(tmp_path, sam_rho=0, max_steps=2, eval_strategy="steps", eval_steps=2),
        train_dataset=token_dataset(),
        eval_dataset=token_dataset(rows=8, seed=9),
    )
    import optuna

    best = run.hyperparameter_search(
        hp_space=lambda trial: {"sam_rho": trial.suggest_float("sam_rho", 0.0, 1.0)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=3,
        backend="optuna",
        direction="minimize",
        sampler=optuna.samplers.GridSampler({"sam_rho": [0.0, 0.1, 0.5]}, seed=0),
    )
    # What the search found for each rho is what a run of its own gives.
    alone = {}
    for rho in (0.0, 0.1, 0.5):
        single = SAMTrainer(
            model_init=olmo2_of_trial,
            args=arguments(tmp_path, sam_rho=rho, max_steps=2),
            train_dataset=token_dataset(),
            eval_dataset=token_dataset(rows=8, seed=9),
        )
        single.train()
        alone[rho] = single.evaluate()["eval_loss"]
    assert len(set(alone.values())) == 3
    assert alone[best.hyperparameters["sam_rho"]] == pytest.approx(best.objective, abs=1e-6)
    assert best.objective == pytest.approx(min(alone.values()), abs=1e-6)


def test_a_scheduler_that_was_passed_and_annealing_that_is_set_later_contradict(tmp_path):
    model = olmo2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    run = SAMTrainer(
        model=model,
        args=arguments(tmp_path, lr_scheduler_type="linear"),
        train_dataset=token_dataset(),
        optimizers=(optimizer, scheduler),
    )
    run.args.anneal_steps = 2.0
    with pytest.raises(ValueError, match=r"optimizers=\(optimizer, None\)"):
        run.train()


def seq2seq(tmp_path, wrap=lambda cls: cls, **overrides):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0
    )
    config.decoder_start_token_id = 0
    rows = [{"input_ids": torch.arange(3 + i % 7, 15 + i % 7), "labels": torch.arange(5, 11)} for i in range(32)]
    settings = {
        **vars_of(arguments(tmp_path)),
        "predict_with_generate": True,
        "max_steps": 3,
        **overrides,
    }
    return wrap(Seq2SeqTrainer)(
        model=T5ForConditionalGeneration(config),
        args=wrap(Seq2SeqTrainingArguments)(**settings),
        train_dataset=rows,
        eval_dataset=rows[:4],
    )


def vars_of(args) -> dict:
    """The settings that differ from the defaults, for another config class."""
    names = ("output_dir", "per_device_train_batch_size", "logging_steps", "report_to", "use_cpu", "seed")
    return {name: getattr(args, name) for name in names} | {
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }


def test_seq2seq_trainer_follows_sam_by_hand(tmp_path):
    sam = seq2seq(tmp_path, with_sam, sam_rho=0.05)
    sam.train()
    host = seq2seq(tmp_path)
    model, optimizer = host.model.train(), torch.optim.AdamW(host.model.parameters(), lr=1e-2, weight_decay=0.0)
    trainable = dict(model.named_parameters())
    batches = iter(host.get_train_dataloader())
    host.current_gradient_accumulation_steps = 1
    for entry in step_logs(sam):
        (batch,), items = host.get_batch_samples(batches, 1, host.args.device)
        expected = sam_gradient(
            trainable, [batch], lambda batch, items=items: host.training_step(model, dict(batch), items), rho=0.05
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert entry["loss"] == pytest.approx(expected.loss, abs=1e-5)
        assert entry["sam/perturbed_loss"] == pytest.approx(expected.perturbed_loss, abs=1e-5)
    # Generation is the host's: the same tokens from the same weights.
    host.model.load_state_dict(sam.model.state_dict())
    mine, theirs = (run.predict(run.eval_dataset) for run in (sam, host))
    assert np.array_equal(mine.predictions, theirs.predictions)
    assert without_times(mine.metrics) == without_times(theirs.metrics)


class PenalizesLogits(Trainer):
    """A user's trainer with a loss of its own, which also counts its calls."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + 1e-3 * outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss


class RecordsLosses(Trainer):
    """A user's trainer that looks at what its step returns."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def test_own_loss_is_the_one_that_sam_climbs(tmp_path):
    class SAMPenalizes(SAMMixin, PenalizesLogits):
        sam_recorded = (*SAMMixin.sam_recorded, "calls")

    run = trainer(tmp_path, trainer_class=SAMPenalizes, sam_rho=0.05, max_steps=3, learning_rate=0.0)
    run.train()
    plain = trainer(tmp_path, trainer_class=PenalizesLogits, max_steps=3, learning_rate=0.0)
    plain.train()
    other = trainer(tmp_path, sam_rho=0.05, max_steps=3, learning_rate=0.0)
    other.train()
    for mine, theirs, without in zip(step_logs(run), step_logs(plain), step_logs(other), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert mine["sam/ascent_grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert mine["loss"] > without["loss"]
    assert run.calls == plain.calls == 3


def recorder_in_front():
    class Mine(SAMTrainer):
        losses = ()

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses = [*self.losses, loss.item()]
            return loss

    return Mine


def test_own_training_step_is_called_for_each_micro_batch_in_both_passes_wherever_it_stands(tmp_path):
    expected = trainer(tmp_path, sam_rho=0.05, max_steps=3, gradient_accumulation_steps=2)
    expected.train()
    for cls in (recorder_in_front(), with_sam(RecordsLosses)):
        run = trainer(tmp_path, trainer_class=cls, sam_rho=0.05, max_steps=3, gradient_accumulation_steps=2)
        run.train()
        assert step_logs(run) == step_logs(expected)
        assert len(run.losses) == 12
        steps = [run.losses[i : i + 4] for i in range(0, 12, 4)]
        assert [sum(step[:2]) for step in steps] == pytest.approx([log["loss"] for log in step_logs(run)], abs=1e-6)
        perturbed = [log["sam/perturbed_loss"] for log in step_logs(run)]
        assert [sum(step[2:]) for step in steps] == pytest.approx(perturbed, abs=1e-6)


def test_a_training_step_that_calls_none_of_its_bases_takes_both_passes_too(tmp_path):
    class Replaces(SAMTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return Trainer.training_step(self, model, inputs, num_items_in_batch)

    run, expected = (trainer(tmp_path, trainer_class=cls, sam_rho=0.05, max_steps=2) for cls in (Replaces, SAMTrainer))
    run.train()
    expected.train()
    assert step_logs(run) == step_logs(expected)


class ClipsValues(TrainerCallback):
    """Clips gradients after each micro-batch."""

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        for param in model.parameters():
            param.grad.clamp_(-1e-3, 1e-3)


class CountsMicroBatches(TrainerCallback):
    count = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.count += 1


def test_callbacks_that_change_gradients_between_micro_batches_are_refused(tmp_path):
    run = trainer(tmp_path, sam_rho=0.05, max_steps=2, gradient_accumulation_steps=2)
    run.add_callback(ClipsValues())
    before = weights(run.model)
    with pytest.raises(ValueError, match=r"ClipsValues\.on_substep_end uses gradients.*on_pre_optimizer_step"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(run.model).items())
    # There is nothing between the micro-batches of a step of one; and others are welcome.
    trainer(tmp_path, sam_rho=0.05, max_steps=1).train()
    counts = CountsMicroBatches()
    run = trainer(tmp_path, sam_rho=0.05, max_steps=2, gradient_accumulation_steps=2)
    run.add_callback(counts)
    run.train()
    assert counts.count == 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_that_a_training_step_changes_are_changed_in_both_passes_wherever_it_stands(tmp_path, accumulation):
    # The usual way to train new tokens only: old rows of the embedding never get a gradient.
    def frozen_rows(host):
        class FreezesRows(host):
            def training_step(self, model, inputs, num_items_in_batch=None):
                loss = super().training_step(model, inputs, num_items_in_batch)
                model.get_input_embeddings().weight.grad[:40] = 0
                return loss

        return FreezesRows

    results = []
    for cls in (frozen_rows(SAMTrainer), with_sam(frozen_rows(Trainer))):
        settings = {"sam_rho": 0.1, "max_steps": 2, "gradient_accumulation_steps": accumulation, "weight_decay": 0.0}
        run = trainer(tmp_path, trainer_class=cls, **settings)
        before = run.model.get_input_embeddings().weight.detach().clone()
        run.train()
        after = run.model.get_input_embeddings().weight
        assert torch.equal(after[:40], before[:40])
        assert not torch.equal(after[40:], before[40:])
        results.append((step_logs(run), weights(run.model)))
    (logs, first), (other_logs, second) = results
    assert logs == other_logs
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_step_that_never_reaches_the_mixin_is_warned_about(tmp_path, caplog):
    run = trainer(tmp_path, sam_rho=0.05, max_steps=2)
    run.training_step = types.MethodType(Trainer.training_step, run)
    with caplog.at_level("WARNING", logger="hf_sam"):
        run.train()
    assert caplog.text.count("SAM did not act") == 1


# The card, the saved arguments, and the hub.


def test_arguments_are_readable_back_from_the_checkpoint(tmp_path):
    settings = {"sam_rho": 0.07, "anneal_steps": 2, "lr_scheduler_type": "linear"}
    run = trainer(tmp_path, **settings, save_strategy="steps", save_steps=2, max_steps=2)
    run.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert type(saved) is SAMTrainingArguments
    assert (saved.sam_rho, saved.anneal_steps) == (0.07, 2)


def test_arguments_of_a_class_made_at_run_time_are_readable_back(tmp_path):
    run = build("dpo", tmp_path, with_sam, sam_rho=0.07, max_steps=1)
    run.save_model(tmp_path / "saved")
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert type(saved) is type(run.args)
    assert isinstance(saved, SAMArguments)
    assert (saved.sam_rho, saved.beta) == (0.07, run.args.beta)
    assert saved.to_dict() == run.args.to_dict()
