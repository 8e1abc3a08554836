"""Instruments, callbacks and penalties give the same under every strategy, and change no run."""

import math

import numpy as np
import pytest
import torch
from distributed.checks import assert_bitwise, assert_ran, relative_distance
from distributed.measures import MEASURED, NOISY, PENALIZED
from distributed.strategies import WORLD_SIZE


@pytest.mark.parametrize("strategy", MEASURED)
def test_callbacks_leave_the_run_as_it_is(results, strategy):
    outcome = results(strategy, "measured")
    assert_ran(outcome, strategy)
    assert_bitwise(outcome["measured"]["weights"], outcome["plain"]["weights"])
    assert torch.equal(outcome["measured"]["random_state"], outcome["plain"]["random_state"])


@pytest.mark.parametrize("strategy", MEASURED[1:])
def test_callbacks_measure_the_same_before_training(results, strategy):
    """(Afterwards the runs differ: dropout has other masks on other processes.)"""

    def first(strategy, key):
        return next((entry[key] for entry in results(strategy, "measured")["logs"] if key in entry), None)

    assert first(strategy, "forgetting/before") == pytest.approx(first("single", "forgetting/before"), rel=1e-6)
    if strategy in NOISY:
        assert first(strategy, "sharpness/kl") == pytest.approx(first("single", "sharpness/kl"), rel=1e-4)
    else:
        assert "ZeRO-3 partitions" in results(strategy, "measured")["refusal"]


@pytest.mark.parametrize("strategy", MEASURED)
def test_forgetting_is_logged_at_the_end(results, strategy):
    logs = results(strategy, "measured")["logs"]
    (before,) = [entry["forgetting/before"] for entry in logs if "forgetting/before" in entry]
    (end,) = [entry for entry in logs if "forgetting/forgetting" in entry]
    assert end["forgetting/forgetting"] == end["forgetting/held_out_loss"] - before != 0


@pytest.mark.parametrize("strategy", PENALIZED)
def test_penalties_are_those_of_one_process(results, strategy):
    outcome, reference = results(strategy, "penalized"), results("single", "penalized")
    assert_ran(outcome, strategy)
    assert relative_distance(outcome["weights"], reference["weights"]) <= 1e-5
    penalties = [[entry["l2/penalty"] for entry in run["logs"]] for run in (outcome, reference)]
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-3)
    assert penalties[0][-1] > 0


@pytest.mark.parametrize("strategy", [name for name in MEASURED if name not in PENALIZED])
def test_penalties_are_refused_where_gradients_are_out_of_reach(results, strategy):
    assert "DeepSpeed" in results(strategy, "penalized")["refusal"]


def test_a_penalty_is_refused_on_all_ranks_if_one_has_no_weights(results):
    assert results("single", "instruments")["refused"] == 1
    assert results("ddp", "instruments")["refused"] == WORLD_SIZE


def test_instruments_do_not_depend_on_the_number_of_processes(results):
    alone, shared = results("single", "instruments"), results("ddp", "instruments")
    assert (alone["world"], shared["world"]) == (1, WORLD_SIZE)
    assert alone["unchanged"]
    assert shared["unchanged"]
    # The batches are the same, only added up in another order.
    for name in ("losses", "loader", "alone", "cut", "sensitivity", "angles", "similar alone"):
        np.testing.assert_allclose(shared[name], alone[name], rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(shared["kl"], alone["kl"], rtol=1e-9)
    np.testing.assert_allclose(shared["relative kl"], alone["relative kl"], rtol=1e-9)
    assert shared["relative trace"] == pytest.approx(alone["relative trace"], rel=1e-3)
    # Gradients are summed in fp32.
    assert shared["sam"] == pytest.approx(alone["sam"], rel=1e-6)
    np.testing.assert_allclose(shared["line"], alone["line"], rtol=1e-4)
    torch.testing.assert_close(shared["fisher"], alone["fisher"], rtol=1e-5, atol=1e-12)
    assert shared["hessian"]["eigenvalues"] == pytest.approx(alone["hessian"]["eigenvalues"], rel=1e-4)
    assert shared["hessian"]["trace"] == pytest.approx(alone["hessian"]["trace"], rel=1e-3)
    assert math.isfinite(alone["hessian"]["trace_standard_error"])
