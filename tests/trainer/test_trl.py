"""TRL's trainers with the SAM step: right steps, TRL's own metrics counted once, reference models left alone."""

import contextlib
import copy
import importlib
import pkgutil

import pytest
import torch
import trl.experimental
import trl.trainer
from toy import olmo2, step_logs
from toy_trl import build, reference, rows, tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer
from trl import DPOConfig, SFTTrainer

from hf_sam import SAMMixin, SAMSFTConfig, SAMSFTTrainer, SAMTrainingArguments, with_sam

KINDS = ("sft", "dpo", "reward", "kto")
# What a plain run logs beside the metrics, and what differs between two runs.
TIMES = {"epoch", "step", "learning_rate", "total_flos"}


def lora(**overrides):
    from peft import LoraConfig

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return LoraConfig(**settings, **overrides)


def assert_follows(sam, host, rho=0.05, **kwargs):
    """Train `sam`; its logs and weights are those of SAM by hand with the untouched `host`."""
    expected = reference(host, rho, **kwargs)
    sam.train()
    logs = step_logs(sam)
    assert len(logs) == len(expected)
    for mine, theirs in zip(logs, expected, strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
        assert set(mine) - set(theirs) - TIMES == {"sam/sharpness", "sam/perturbation_kept", "sam/skipped"}
        difference = mine["sam/perturbed_loss"] - mine["loss"]
        assert mine["sam/sharpness"] == pytest.approx(difference, abs=1e-5) != 0
    for (name, mine), theirs in zip(sam.model.named_parameters(), host.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_follows_sam_by_hand_and_counts_the_metrics_once(tmp_path, kind):
    assert_follows(build(kind, tmp_path, with_sam, sam_rho=0.05), build(kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_rho_zero_is_bitwise_the_host(tmp_path, kind):
    mine, host = build(kind, tmp_path, with_sam, sam_rho=0.0), build(kind, tmp_path)
    mine.train()
    host.train()
    assert step_logs(mine) == step_logs(host)
    assert all(torch.equal(a, b) for a, b in zip(mine.model.parameters(), host.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        pytest.param("text", {"packing": True}, id="packing"),
        pytest.param("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 12}, id="wrapped"),
        pytest.param("text", {"padding_free": True, "max_length": None}, id="padding-free"),
        pytest.param("completion", {"completion_only_loss": True}, id="completion-only"),
        pytest.param("chat", {"assistant_only_loss": True}, id="assistant-only"),
        pytest.param("text", {"loss_type": "dft"}, id="dft"),
        pytest.param("text", {"label_smoothing_factor": 0.1}, id="label-smoothing"),
        pytest.param("text", {"gradient_checkpointing": False}, id="no-checkpointing"),
        pytest.param("text", {"gradient_accumulation_steps": 3}, id="accumulation"),
        pytest.param("stream", {}, id="streaming"),
    ],
)
def test_what_sft_can_do_keeps_working(tmp_path, data, settings):
    dataset = rows("text").to_iterable_dataset() if data == "stream" else rows(data)
    plain = build("sft", tmp_path, data=dataset, **settings)
    assert_follows(build("sft", tmp_path, with_sam, data=dataset, sam_rho=0.05, **settings), plain)


def test_asam_follows_sam_by_hand(tmp_path):
    sam = build("sft", tmp_path, with_sam, sam_rho=0.5, sam_variant="asam")
    assert_follows(sam, build("sft", tmp_path), rho=0.5, variant="asam")


def test_metrics_of_the_first_step_are_bitwise_those_of_plain_sft(tmp_path):
    sam, host = build("sft", tmp_path, with_sam, sam_rho=0.05), build("sft", tmp_path)
    sam.train()
    host.train()
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert step_logs(sam)[0][name] == step_logs(host)[0][name], name
    assert [entry["num_tokens"] for entry in step_logs(sam)] == [entry["num_tokens"] for entry in step_logs(host)]


def test_with_a_partial_ascent_tokens_count_once_and_means_are_over_the_ascent_micro_batches(tmp_path):
    settings = {"gradient_accumulation_steps": 4, "max_steps": 1}
    sam = build("sft", tmp_path, with_sam, sam_rho=0.05, sam_ascent_micro_batches=1, **settings)
    sam.train()
    host = build("sft", tmp_path, **settings)
    host.train()
    first = build("sft", tmp_path, gradient_accumulation_steps=1, max_steps=1)
    first.train()
    (mine,), (whole,), (part,) = step_logs(sam), step_logs(host), step_logs(first)
    assert mine["num_tokens"] == whole["num_tokens"] > part["num_tokens"]
    assert (mine["entropy"], mine["mean_token_accuracy"]) == (part["entropy"], part["mean_token_accuracy"])


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_reference_model_is_never_perturbed(tmp_path, kind):
    run = build(kind, tmp_path, with_sam, sam_rho=0.5)
    before = [param.detach().clone() for param in run.ref_model.parameters()]
    calls = []

    def unchanged(module, args):
        calls.append(all(torch.equal(a, b) for a, b in zip(run.ref_model.parameters(), before, strict=True)))

    run.ref_model.get_decoder().register_forward_pre_hook(unchanged)
    run.train()
    # Two passes over two micro-batches in four steps, or more where the trainer estimates a KL term too.
    assert len(calls) >= 16
    assert all(calls)


def test_precomputed_reference_log_probabilities_are_those_of_plain_dpo(tmp_path):
    sam = build("dpo", tmp_path, with_sam, sam_rho=0.05, precompute_ref_log_probs=True)
    plain = build("dpo", tmp_path, precompute_ref_log_probs=True)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert sam.train_dataset[name] == plain.train_dataset[name]
    assert_follows(sam, plain)


@pytest.mark.parametrize("loss_type", ["ipo", "hinge", "robust", "sppo_hard"])
def test_other_losses_of_dpo_follow_sam_by_hand(tmp_path, loss_type):
    settings = {"loss_type": loss_type, "label_smoothing": 0.1 if loss_type == "robust" else 0.0}
    assert_follows(build("dpo", tmp_path, with_sam, sam_rho=0.05, **settings), build("dpo", tmp_path, **settings))


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_adapters_follow_sam_by_hand_and_the_base_is_bitwise_unchanged(tmp_path, kind):
    torch.manual_seed(11)
    sam = build(kind, tmp_path, with_sam, sam_rho=0.05, peft_config=lora())
    torch.manual_seed(11)
    host = build(kind, tmp_path, peft_config=lora())
    frozen = {name: copy.deepcopy(p) for name, p in sam.model.named_parameters() if not p.requires_grad}
    assert_follows(sam, host)
    after = dict(sam.model.named_parameters())
    assert frozen
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_adapters_on_a_quantized_base_are_perturbed_exactly_and_the_base_stays(tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    olmo2().save_pretrained(tmp_path / "base")

    def model():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32, device_map="cpu"
        )

    run = build(kind, tmp_path, with_sam, sam_rho=1e-4, model=model(), peft_config=lora())
    adapters = [param for param in run.model.parameters() if param.requires_grad]
    base = {name: param.detach().clone() for name, param in run.model.named_parameters() if not param.requires_grad}
    assert any(param.dtype == torch.uint8 for param in base.values())
    assert {param.dtype for param in adapters} == {torch.float32}
    run.train()
    assert all(entry["sam/perturbation_kept"] == pytest.approx(1.0, abs=1e-2) for entry in step_logs(run))
    after = dict(run.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in base.items())
    # Without SAM, TRL's own choice stands.
    plain = build(kind, tmp_path, with_sam, sam_rho=0.0, model=model(), peft_config=lora())
    assert {param.dtype for param in plain.model.parameters() if param.requires_grad} == {torch.bfloat16}


def test_dropout_masks_and_neftune_noise_are_the_same_in_both_passes(tmp_path):
    # With next to no perturbation, the second pass must give the loss of the first one.
    run = build("sft", tmp_path, with_sam, sam_rho=1e-6, neftune_noise_alpha=5.0, model=olmo2(dropout=0.3))
    run.train()
    assert all(abs(entry["sam/sharpness"]) < 1e-4 for entry in step_logs(run))
    noisier = build("sft", tmp_path, model=olmo2(dropout=0.3), neftune_noise_alpha=5.0, seed=5)
    noisier.train()
    assert abs(step_logs(noisier)[0]["loss"] - step_logs(run)[0]["loss"]) > 1e-3


def test_activation_offloading_surrounds_each_micro_batch_of_both_passes(tmp_path):
    # TRL's own context needs an accelerator; another one in its place counts how often the host's step enters it.
    entered = []

    class Counts(contextlib.nullcontext):
        def __enter__(self):
            entered.append(1)

    run = build("sft", tmp_path, with_sam, sam_rho=0.05, max_steps=1)
    run.maybe_activation_offload_context = Counts()
    run.train()
    assert len(entered) == 2 * run.args.gradient_accumulation_steps


def test_ready_made_classes_are_those_that_with_sam_gives(tmp_path):
    assert with_sam(SFTTrainer) is SAMSFTTrainer
    assert SAMSFTTrainer.__mro__[1:3] == (SAMMixin, SFTTrainer)


def test_arguments_of_another_trainer_are_refused_before_the_data_is_prepared(tmp_path):
    calls = []
    data = rows("text")
    settings = {"model": olmo2(), "train_dataset": data, "processing_class": tokenizer()}
    with pytest.raises(ValueError, match=r"needs hf_sam\.SAMSFTConfig, but got SAMTrainingArguments"):
        SAMSFTTrainer(args=SAMTrainingArguments(output_dir=str(tmp_path), use_cpu=True), **settings)
    with pytest.raises(ValueError, match=r"got SFTConfig.*with_sam\(SFTConfig\)"):
        SAMSFTTrainer(args=SAMSFTConfig.__mro__[2](output_dir=str(tmp_path), bf16=False, use_cpu=True), **settings)
    settings["formatting_func"] = lambda row: calls.append(row) or row["text"]
    with pytest.raises(ValueError, match="got DPOConfig"):
        SAMSFTTrainer(args=DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True), **settings)
    assert not calls


def test_evaluation_is_that_of_plain_sft(tmp_path):
    sam, host = build("sft", tmp_path, with_sam, sam_rho=0.05), build("sft", tmp_path)
    evaluated = [trainer.evaluate(rows("text", count=10)) for trainer in (sam, host)]
    for metrics in evaluated:
        for name in list(metrics):
            if "runtime" in name or "per_second" in name or name.endswith("_time"):
                del metrics[name]
    assert evaluated[0] == evaluated[1]
    assert {"eval_loss", "eval_entropy"} <= set(evaluated[0])


# TRL's trainers that learn from a fixed dataset; all others generate in the step.
OFFLINE = {"SFTTrainer", "DPOTrainer", "RewardTrainer", "KTOTrainer", "CPOTrainer", "ORPOTrainer", "TPOTrainer"}


def trainers_of_trl():
    """Every trainer class that TRL ships, as far as its own dependencies are installed."""
    found = {}
    for package in (trl.trainer, trl.experimental):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                module = importlib.import_module(info.name)
            except Exception:  # a dependency that is not installed, or an environment that it insists on
                continue
            for value in vars(module).values():
                public = isinstance(value, type) and issubclass(value, Trainer) and not value.__name__.startswith("_")
                if public and value.__module__.startswith("trl."):
                    found[value.__name__] = value
    return found


def test_exactly_the_trainers_that_generate_their_data_are_refused():
    refused, accepted = set(), set()
    for name, cls in trainers_of_trl().items():
        sam = with_sam(cls)
        try:
            sam._check_on_policy(sam.__new__(sam))
            accepted.add(name)
        except ValueError as error:
            assert "generates its training data" in str(error)  # noqa: PT017
            refused.add(name)
    assert accepted <= OFFLINE
    assert not refused & OFFLINE
    assert {"GRPOTrainer", "RLOOTrainer", "DistillationTrainer"} <= refused
    assert {"SFTTrainer", "DPOTrainer", "RewardTrainer", "KTOTrainer"} <= accepted


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_on_policy_trainers_are_refused_with_the_reason(name, tmp_path):
    trainer_class, config_class = getattr(trl, name), getattr(trl, name.replace("Trainer", "Config"))
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    args = with_sam(config_class)(sam_rho=0.05, per_device_train_batch_size=8, **settings)
    # Told before a reference model is loaded, which here would fail in another way.
    with pytest.raises(ValueError, match="generates its training data"):
        with_sam(trainer_class)(
            model=olmo2(),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=args,
            train_dataset=rows("completion").select_columns(["prompt"]),
            processing_class=tokenizer(),
        )
