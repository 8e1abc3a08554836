"""What a step costs, counted: passes, collectives and bytes under every strategy."""

from collections import Counter

import pytest
from distributed.counts import KINDS, MICRO_BATCHES
from distributed.strategies import DISTRIBUTED, STRATEGIES

# Micro-batches of the ascent pass.
ASCENT = {"sam": 2, "some": 1, "loss_rise": 2, "sam_and_noise": 2}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_passes(results, strategy, kind):
    counted = results(strategy, "counted")[kind]
    assert counted["forwards"] == counted["backwards"] == MICRO_BATCHES + ASCENT.get(kind, 0)


def test_a_single_process_sends_nothing(results):
    counted = results("single", "counted")
    assert all(not counted[kind]["large"] and not counted[kind]["small"] for kind in KINDS)


@pytest.mark.parametrize("strategy", DISTRIBUTED)
@pytest.mark.parametrize("kind", ["sam", "loss_rise", "sam_and_noise"])
def test_two_passes_send_twice_what_one_does_and_two_messages_more(results, strategy, kind):
    counted, plain = results(strategy, "counted")[kind], results(strategy, "counted")["plain"]
    assert Counter(counted["large"]) == Counter({message: 2 * n for message, n in Counter(plain["large"]).items()})
    added = Counter(counted["small"])
    added.subtract(plain["small"])
    # The metrics, in one reduction; DDP also broadcasts the buffers of the model in each pass. The norm of the ascent
    # gradient is reduced where it is sharded.
    metrics, buffers, norm = 24, 32, 4
    assert +added == Counter([metrics, buffers] if strategy == "ddp" else [metrics, norm])
    assert min(added.values()) >= 0


@pytest.mark.parametrize("strategy", DISTRIBUTED)
@pytest.mark.parametrize("kind", ["momentum", "noise", "momentum_and_noise"])
def test_one_pass_sends_what_plain_training_does(results, strategy, kind):
    counted, plain = results(strategy, "counted")[kind], results(strategy, "counted")["plain"]
    added = Counter(counted["large"]) - Counter(plain["large"])
    assert not Counter(plain["large"]) - Counter(counted["large"])
    if strategy in ("zero1", "zero2"):
        # Whole weights on every rank: those of each partition are gathered after they were moved.
        gathers = {message: n for message, n in Counter(plain["large"]).items() if "gather" in message[0]}
        assert added == Counter(gathers)
    elif strategy == "zero3":
        # The parameters that DeepSpeed keeps gathered.
        assert all("gather" in name for name, _ in added)
        assert sum(size * n for (_, size), n in added.items()) < 0.1 * sum(size for _, size in plain["large"])
    else:
        assert not added
    # The norm of the momentum, where it is sharded.
    norms = 0 if kind == "noise" or strategy == "ddp" else 1
    assert len(counted["small"]) - len(plain["small"]) == norms
