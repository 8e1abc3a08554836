"""What the tests of all strategies check in the same way."""

import torch


def relative_distance(weights, reference) -> float:
    assert set(weights) == set(reference)
    difference = sum((weights[name].float() - reference[name].float()).square().sum() for name in reference)
    return (difference / sum(value.float().square().sum() for value in reference.values())).sqrt().item()


def assert_ran(outcome, strategy, offload=False, precision="no"):
    """The strategy that was asked for is the one that ran: accelerate falls back to another without an error."""
    ran = outcome["ran"]
    names = {"single": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP"}
    assert ran["kind"] == names.get(strategy, "DEEPSPEED")
    assert (ran["sharded"] > 1) == (strategy == "fsdp2")
    assert ran["stage"] == (int(strategy[-1]) if strategy.startswith("zero") else 0)
    assert ran["offload"] == offload
    assert ran["precision"] == precision


def assert_bitwise(weights, reference):
    assert set(weights) == set(reference)
    for name, value in reference.items():
        assert torch.equal(weights[name], value), name
