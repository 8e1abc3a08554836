"""Every strategy takes the same steps as the plain reference, and keeps its promises when something goes wrong."""

import functools
import importlib
import inspect

import pytest
import torch
import transformers.trainer
from distributed import oracle
from distributed.cases import CASES, cases_of
from distributed.checks import assert_bitwise, assert_ran, relative_distance
from distributed.strategies import STRATEGIES, WORLD_SIZE

from hf_sam.step.backends import Backend
from hf_sam.step.reference import ONE_PASS

# fp32 sums in another order differ by 1e-7; Adam divides by small numbers, which costs up to one more digit.
FP32_TOLERANCE = 1e-5
# bf16 has 8 bits: losses and norms agree to a few parts in a thousand, and so do weights after six steps that each
# move a weight by at most a tenth of its size.
BF16_LOSS_TOLERANCE = 5e-3
# FSDP2 even rounds losses to bf16: those of two micro-batches, near 2, by 2^-7 each, and their sum, near 4, by 2^-6.
BF16_ROUNDED_LOSS_TOLERANCE = BF16_LOSS_TOLERANCE + 2.0**-5
BF16_NORM_TOLERANCE = 5e-2
BF16_WEIGHT_TOLERANCE = 1e-2

# Older hosts clip with the norm of all shards, but log the norm of this rank's.
HOST_REPORTS_WHOLE_NORMS = "full_tensor" in inspect.getsource(transformers.trainer)

METRICS = ("loss", "grad_norm", "sam/perturbed_loss", "sam/ascent_grad_norm")


@pytest.fixture(scope="session")
def expected():
    return functools.cache(lambda case: oracle.trajectory(case, WORLD_SIZE if case.name == "local_ascent" else 1))


def largest_difference(logs, reference, name) -> float:
    return max(abs(mine[name] - theirs[name]) for mine, theirs in zip(logs, reference, strict=True))


def ascends_in_each_step(case) -> bool:
    one_pass = case.sam.get("sam_variant", "sam") in ONE_PASS
    return case.sam["sam_rho"] > 0 and not one_pass and case.sam.get("sam_interval", 1) == 1


@pytest.mark.parametrize(
    ("strategy", "case"),
    [pytest.param(s, c, id=f"{s}-{c.name}") for s in STRATEGIES for c in cases_of(s) if not c.bf16],
)
def test_trajectory_follows_the_reference(results, expected, strategy, case):
    trained, reference = results(strategy, case.name), expected(case)
    assert_ran(trained, strategy, offload=case.offload)
    metrics = METRICS if all("sam/sharpness" in log for log in trained["logs"]) else METRICS[:2]
    assert (metrics == METRICS) == ascends_in_each_step(case)
    if strategy == "fsdp2" and not HOST_REPORTS_WHOLE_NORMS:
        metrics = tuple(name for name in metrics if name != "grad_norm")
    if case.sft:
        metrics = (*metrics, "entropy", "mean_token_accuracy", "num_tokens")
    if "sam_loss_rise" in case.sam:
        metrics = (*metrics, "sam/radius")
        radii = [log["sam/radius"] for log in reference["logs"]]
        assert min(radii) < case.sam["sam_rho"] == max(radii)  # some steps are limited by one, some by the other
    for name in metrics:
        assert largest_difference(trained["logs"], reference["logs"], name) <= FP32_TOLERANCE, name
    assert relative_distance(trained["weights"], reference["weights"]) <= FP32_TOLERANCE


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.bf16])
def test_bf16_trajectory_stays_near_the_fp32_reference(results, expected, strategy, case):
    trained, reference = results(strategy, case.name), expected(case)
    assert_ran(trained, strategy, precision="bf16")
    tolerance = BF16_ROUNDED_LOSS_TOLERANCE if strategy == "fsdp2" else BF16_LOSS_TOLERANCE
    assert largest_difference(trained["logs"], reference["logs"], "loss") <= tolerance
    if ascends_in_each_step(case):
        assert largest_difference(trained["logs"], reference["logs"], "sam/perturbed_loss") <= tolerance
    if strategy != "fsdp2" or HOST_REPORTS_WHOLE_NORMS:
        assert largest_difference(trained["logs"], reference["logs"], "grad_norm") <= BF16_NORM_TOLERANCE
    assert relative_distance(trained["weights"], reference["weights"]) <= BF16_WEIGHT_TOLERANCE


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_keep_the_whole_perturbation(results, strategy):
    for name, tolerance in (("sam", 1e-5), ("bf16", 0.05)):
        kept = [entry["sam/perturbation_kept"] for entry in results(strategy, name)["logs"]]
        assert kept == pytest.approx([1.0] * len(kept), abs=tolerance), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_interrupt_in_the_descent_pass_leaves_the_original_weights(results, strategy):
    outcome = results(strategy, "interrupted")
    assert_ran(outcome, strategy)
    assert outcome["raised"]
    assert not outcome["gradients"]
    assert_bitwise(outcome["after"], outcome["before"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("variant", ["rho_zero", "outside"])
def test_without_sam_the_run_is_bitwise_the_hosts(results, strategy, variant):
    outcome = results(strategy, "switched_off")
    assert_ran(outcome, strategy)
    assert outcome[variant]["logs"] == outcome["host"]["logs"]
    assert_bitwise(outcome[variant]["weights"], outcome["host"]["weights"])
    assert torch.equal(outcome[variant]["random_state"], outcome["host"]["random_state"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_overflow_on_one_rank_is_a_plain_step_on_all(results, strategy):
    outcome = results(strategy, "overflow")
    assert_ran(outcome, strategy)
    assert [entry["sam/skipped"] for entry in outcome["logs"]] == [0, 1]
    assert_bitwise(outcome["weights"], outcome["plain"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["resumed", "resumed_momentum"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(results, strategy, name):
    outcome = results(strategy, name)
    assert_ran(outcome, strategy)
    if "again" not in outcome:
        pytest.skip(outcome["unsupported"])
    assert_bitwise(outcome["again"], outcome["whole"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoint_holds_unperturbed_weights_and_no_sam_state(results, strategy):
    outcome = results(strategy, "resumed")
    assert_ran(outcome, strategy)
    if outcome["saved"] is not None:
        assert_bitwise(outcome["saved"], outcome["at_save"])
    if outcome["optimizer_keys"] is not None:
        assert outcome["optimizer_keys"] == ["exp_avg", "exp_avg_sq", "step"]


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s.startswith("zero")])
def test_a_rank_that_fails_alone_does_not_wait_for_the_others_forever(results, strategy):
    outcome = results(strategy, "one_rank_missing")
    assert outcome == {"alone": False, "together": [True, True]}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loop_without_a_trainer_follows_the_reference(results, strategy):
    outcome = results(strategy, "hand_loop")
    losses, weights = oracle.hand_loop(1 if strategy == "single" else WORLD_SIZE)
    assert outcome["losses"][::2] == [0.0] * len(losses)
    assert outcome["losses"][1::2] == pytest.approx(losses, abs=FP32_TOLERANCE)
    assert relative_distance(outcome["weights"], weights) <= FP32_TOLERANCE
    assert outcome["metrics"]["sam/sharpness"] > 0
    assert_ran(outcome, strategy)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s.startswith("zero")])
def test_a_second_backward_pass_in_the_ascent_is_refused_where_each_one_steps(results, strategy):
    assert "reached the end of a step twice in one pass of SAM" in results(strategy, "hand_loop")["refusal"]


def concrete(cls: type) -> set[str]:
    """Names of a class and its subclasses that can be instantiated."""
    found = set() if inspect.isabstract(cls) else {cls.__name__}
    return found.union(*map(concrete, cls.__subclasses__()))


def test_every_backend_ran(results):
    importlib.import_module("hf_sam.step.backends.zero12")
    importlib.import_module("hf_sam.step.backends.zero3")
    assert {results(strategy, "hand_loop")["backend"] for strategy in STRATEGIES} == concrete(Backend)
