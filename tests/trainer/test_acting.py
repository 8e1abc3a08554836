"""Nothing is silent: settings without effect, runs in which SAM never acts, and what a run says that it did."""

from dataclasses import dataclass

import pytest
import torch
import trl
from huggingface_hub import ModelCard
from toy import arguments, olmo2, step_logs, token_dataset, trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sam import SAMArguments, SAMStep, SAMTrainer, SAMTrainingArguments, with_sam
from hf_sam.history import SAMHistory
from hf_sam.schedule import SAMWindow


def warnings_of(caplog, run) -> str:
    with caplog.at_level("WARNING", logger="hf_sam"):
        run()
    return caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sam_start_steps": 10}, "SAM never acts in this run: its window of steps 10 to 4"),
        ({"sam_start_steps": 10, "sam_end_steps": 20}, "SAM never acts in this run"),
        ({"sam_interval": 8}, "SAM acts in only one step of this run: sam_interval=8 is too large"),
        (
            {"sam_rho": 0.0, "sam_interval": 2},
            "SAM is off: sam_rho, sam_loss_rise and sam_noise are 0, so sam_interval has no effect",
        ),
        ({"sam_rho": 0.0, "sam_variant": "asam", "sam_end_steps": 2}, "sam_variant, sam_end_steps have no effect"),
    ],
)
def test_settings_without_effect_are_reported_once(tmp_path, caplog, settings, message):
    run = trainer(tmp_path, **{"sam_rho": 0.05, "max_steps": 4, **settings})
    text = warnings_of(caplog, run.train)
    assert text.count("WARNING") == 1
    assert message in text


@pytest.mark.parametrize(
    "settings",
    [
        {"sam_rho": 0.05},
        {"sam_rho": 0.05, "sam_interval": 2},
        {"sam_rho": 0.05, "sam_start_steps": 3},
        {"sam_rho": 0.0},
        {"sam_rho": 0.05, "anneal_steps": 2, "sam_phase": "anneal", "lr_scheduler_type": "linear"},
    ],
)
def test_settings_that_take_effect_are_not_warned_about(tmp_path, caplog, settings):
    assert not warnings_of(caplog, trainer(tmp_path, max_steps=4, **settings).train)


def test_a_sam_config_in_a_plain_trainer_is_reported(tmp_path, caplog):
    def plain():
        args = arguments(tmp_path, sam_rho=0.05, max_steps=1)
        Trainer(model=olmo2(), args=args, train_dataset=token_dataset()).train()

    text = warnings_of(caplog, plain)
    assert text.count("SAMTrainingArguments sets sam_rho=0.05") == 1
    assert "hf_sam.SAMTrainer" in text


def test_the_end_of_training_says_in_how_many_steps_sam_acted(tmp_path, capsys):
    trainer(tmp_path, sam_rho=0.05, max_steps=6, sam_interval=2, sam_start_steps=1).train()
    assert capsys.readouterr().out.splitlines()[-1] == "SAM acted in 3 of 6 steps."
    trainer(tmp_path, max_steps=2).train()
    assert "SAM acted" not in capsys.readouterr().out


def history_of(run) -> SAMHistory:
    return next(callback for callback in run.callback_handler.callbacks if isinstance(callback, SAMHistory))


@pytest.mark.parametrize("restore", [True, False])
def test_the_count_resumes_in_a_resumed_run(tmp_path, restore):
    settings = {
        "sam_rho": 0.05,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 4,
        "gradient_accumulation_steps": 4,
        "sam_ascent_micro_batches": 1,
        "restore_callback_states_from_checkpoint": restore,
    }
    trainer(tmp_path, **settings).train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    history = history_of(resumed)
    assert (history.acted, history.steps) == (6, 6)
    assert history.passes == pytest.approx(1.25)


def card_of(run) -> str:
    run.train()
    run.create_model_card()
    return ModelCard.load(run.args.output_dir + "/README.md", ignore_metadata_errors=True).content


def test_the_model_card_states_what_happened(tmp_path):
    acted = card_of(trainer(tmp_path / "a", sam_rho=0.05, max_steps=4, sam_interval=2))
    assert "SAM acted in 2 of 4 steps. In these steps, the gradient was computed at the worst weights nearby." in acted
    noisy = card_of(trainer(tmp_path / "c", sam_noise=0.1, max_steps=2))
    assert "The gradient was computed with random noise on the weights in 2 of 2 steps." in noisy
    both = card_of(trainer(tmp_path / "d", sam_rho=0.05, sam_interval=2, sam_noise=0.1, max_steps=4))
    assert "SAM acted in 2 of 4 steps; there was noise on the weights in 4. In these steps" in both
    momentum = card_of(trainer(tmp_path / "e", sam_rho=0.05, sam_variant="momentum", max_steps=2))
    assert "SAM acted in 2 of 2 steps. In these steps, the gradient was computed at perturbed weights." in momentum
    never = card_of(trainer(tmp_path / "b", sam_rho=0.05, max_steps=2, sam_start_steps=10))
    assert "SAM acted in 0 of 2 steps." in never
    assert "computed at the unperturbed weights, as in plain training" in never
    assert "worst weights nearby" not in never
    assert "sharpness-aware-minimization" not in never
    assert "sharpness-aware-minimization" in acted


class Explodes(TrainerCallback):
    """Makes the gradients of one step infinite."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))


def test_skipped_steps_are_distinguished(tmp_path, capsys):
    run = SAMTrainer(
        model=olmo2(),
        args=arguments(tmp_path, sam_rho=0.05, max_steps=2, max_grad_norm=0.0, learning_rate=0.0),
        train_dataset=token_dataset(),
        callbacks=[Explodes()],
    )
    run.train()
    assert "SAM acted in 2 of 2 steps, of which 1 were skipped (gradient not finite)." in capsys.readouterr().out


# Arguments that nobody gave.


def test_without_arguments_the_host_makes_them_and_sam_is_off(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = {}
    with caplog.at_level("WARNING", logger="hf_sam"):
        for cls in (SAMTrainer, with_sam(Trainer), Trainer):
            runs[cls] = cls(model=olmo2(), train_dataset=token_dataset())
    assert caplog.text.count("got no arguments, so SAM is off") == 2
    assert "hf_sam.with_sam(TrainingArguments)(output_dir=..., sam_rho=0.05)" in caplog.text
    args, plain = runs[SAMTrainer].args, runs[Trainer].args
    assert isinstance(args, SAMTrainingArguments)
    assert args.sam_rho == 0
    given = {name: value for name, value in args.to_dict().items() if name not in SAMArguments.__dataclass_fields__}
    assert given == plain.to_dict()


@dataclass
class OnCPU(trl.SFTConfig):
    """TRL's default arguments ask for bf16 on a GPU."""

    use_cpu: bool = True
    report_to: str = "none"
    max_steps: int = 2


def test_without_arguments_sft_trains_as_trl_does(tmp_path, caplog, monkeypatch):
    from toy_trl import rows, tokenizer

    from hf_sam import SAMSFTTrainer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl.trainer.sft_trainer, "SFTConfig", OnCPU)
    models = []
    with caplog.at_level("WARNING", logger="hf_sam"):
        for cls in (SAMSFTTrainer, trl.SFTTrainer):
            run = cls(olmo2(), train_dataset=rows("text"), processing_class=tokenizer())
            run.train()
            models.append(run.model)
            assert isinstance(run.args, SAMArguments) == (cls is SAMSFTTrainer)
    assert caplog.text.count("got no arguments, so SAM is off") == 1
    assert "hf_sam.with_sam(OnCPU)" in caplog.text
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_plain_arguments_are_refused_before_the_host_prepares_anything(tmp_path):
    class Prepares(Trainer):
        prepared = False

        def __init__(self, *args, **kwargs):
            Prepares.prepared = True
            super().__init__(*args, **kwargs)

    with pytest.raises(ValueError, match="needs arguments with SAM fields, but got TrainingArguments"):
        with_sam(Prepares)(model=olmo2(), args=TrainingArguments(output_dir=str(tmp_path)))
    assert not Prepares.prepared


# Shares of a run.


class Annealing(SAMArguments):
    """Arguments of a run that begins with step 40 of another one."""

    first_step = 40


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"sam_start_steps": 0.75}, (55, 60)),
        ({"sam_start_steps": 5}, (45, 60)),
        ({"sam_end_steps": 0.5}, (40, 50)),
        ({"sam_start_steps": 0.25, "sam_end_steps": 15}, (45, 55)),
        ({}, (40, 60)),
        ({"sam_phase": "anneal", "anneal_steps": 20}, (40, 60)),
    ],
)
def test_a_run_that_begins_with_anothers_checkpoint_counts_its_own_steps(settings, window):
    resolved = SAMWindow.resolve(Annealing(sam_rho=0.05, **settings), max_steps=60)
    assert (resolved.start, resolved.end) == window


# Mistakes in a loop of one's own.


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        (lambda acc, model: SAMStep(model, acc, 0.1), "accelerator must be a Accelerator, but got a Linear"),
        (lambda acc, model: SAMStep(acc, 0.1, model), "model must be a Module, but got 0.1"),
        (lambda acc, model: SAMStep(acc, model, model), "rho is the radius of the perturbation, a number, but got a"),
        (lambda acc, model: SAMStep(acc, model, "0.1"), "a number, but got '0.1'"),
        (lambda acc, model: SAMStep(acc, model, 0.1, optimizer=model), "optimizer must be an optimizer or a list"),
        (lambda acc, model: SAMStep(acc, model, 0.1)({}, lambda batch: None), "got a dict first"),
        (lambda acc, model: SAMStep(acc, model, 0.1)(lambda batch: None, {}), r"a tensor of shape \(\), but returned"),
        (
            lambda acc, model: SAMStep(acc, model, 0.1)(lambda batch: torch.ones(3), {}),
            r"but returned a tensor of shape \(3,\)",
        ),
    ],
)
def test_swapped_arguments_are_distinguished(swap, message):
    from accelerate import Accelerator

    with pytest.raises(TypeError, match=message):
        swap(Accelerator(cpu=True), torch.nn.Linear(2, 2))


def test_logs_hold_the_share_that_was_kept_also_between_its_measurements(tmp_path):
    run = trainer(tmp_path, sam_rho=0.05, max_steps=5)
    run.train()
    assert all(entry["sam/perturbation_kept"] == pytest.approx(1, abs=1e-4) for entry in step_logs(run))
