"""Ranks agree where their histories, their shards, their data or their hooks differ."""

import pytest
import torch
from distributed.launch import run_on_ranks

RHO = 0.3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks("ranks.py", folder)
    return torch.load(folder / "ranks.pt", weights_only=False)


@pytest.mark.parametrize("hook", ["PowerSGD", "fp16"])
def test_communication_hooks_learn_nothing_from_the_ascent_pass(ranks, hook):
    outcome = ranks["communication_hooks"][hook]
    assert outcome["same"]
    assert outcome["iterations"][0] == outcome["iterations"][1]
    if hook == "PowerSGD":
        plain, sam = outcome["errors"]
        assert torch.equal(plain, sam)
        assert plain.any()


def test_a_hook_whose_state_cannot_be_kept_is_refused(ranks):
    assert (
        "cannot restore the state of DDP's communication hook, a lock"
        in (ranks["hook_with_a_state_that_cannot_be_kept"])
    )


def test_uneven_inputs_end_as_in_plain_training(ranks):
    outcome = ranks["uneven_inputs"]
    for mine, plain in zip(outcome[1e-30], outcome[0.0], strict=True):
        assert torch.equal(mine, plain)
    assert outcome[f"same {RHO}"]
    assert not torch.equal(outcome[RHO][0], outcome[0.0][0])
    assert outcome["metrics"]["sam/sharpness"] > 0


def test_a_static_graph_goes_with_the_global_ascent_and_not_with_a_local_one(ranks):
    assert ranks["static_graph"]["same"]
    assert "static_graph=False" in ranks["static_graph"]["local"]


def test_partial_gradients_are_summed_before_the_norm(ranks):
    outcome = ranks["partial_gradients"]
    assert all("Partial" in placements for placements in outcome["placements"])
    assert outcome["norm"][0] == pytest.approx(outcome["norm"][1], rel=1e-5)
    assert outcome["perturbed"][0] == pytest.approx(outcome["perturbed"][1], rel=1e-5)
    for mine, expected in zip(outcome["gradients"], outcome["expected"], strict=True):
        torch.testing.assert_close(mine, expected)


def test_replicas_of_a_16_bit_shard_draw_the_same_noise_and_other_shards_do_not(ranks):
    outcome = ranks["replicas_of_a_shard"]
    assert outcome["replicated"]["moved"] > 0
    assert outcome["replicated"]["same"]
    assert not outcome["sharded"]["same"]


def test_states_of_sharded_modules_are_those_of_plain_training(ranks):
    (calls, seen, weights), (plain_calls, plain_seen, plain) = (
        ranks["states_of_sharded_modules"][rho] for rho in (1e-30, 0.0)
    )
    assert calls == plain_calls == 3
    assert seen == plain_seen == [1, 2, 3]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights, plain, strict=True))


def test_ranks_divide_by_one_norm_also_for_weights_that_nobody_synchronizes(ranks):
    assert ranks["a_head_that_nobody_synchronizes"] == {"perturbed": True, "gradients": True}


def test_two_models_are_synchronized_as_in_plain_training(ranks):
    outcome = ranks["two_models"]
    for mine, plain in zip(outcome[1e-30], outcome[0.0], strict=True):
        assert torch.equal(mine, plain)


def test_ranks_with_different_radii_are_told(ranks):
    (told,) = ranks["ranks_with_different_radii"]
    assert "use different SAM radii: rho is 0.3 on this rank and 0.45 on average" in told


def test_random_numbers_do_not_depend_on_how_a_parameter_is_sharded(ranks):
    assert ranks["noise_of_shards"] == [True, True, True]
