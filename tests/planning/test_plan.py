"""Plans against what runs really take."""

import pytest
import torch
from memory import peak_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sam.planning import Plan, measure_model
from hf_sam.planning.plan import flops, memory


def wider(dtype=torch.float32, tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=500,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=tied,
        ),
        dtype=dtype,
    )


def test_the_memory_of_a_step_is_that_of_the_plan():
    """Storages alive at the peak of forward and backward pass, beside the weights; temporaries make the difference."""
    size = measure_model(wider, batch=4, length=64, bf16=False)
    model = wider().train()
    ids = torch.zeros(4, 64, dtype=torch.long)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step()  # the gradients are there from now on, as in the middle of an accumulation
    measured = peak_bytes(step)
    parts = memory(size, "ddp", 1, 4, 64, sam=False)
    planned = parts["activations"] + parts["logits"]
    assert measured == pytest.approx(planned, rel=0.3)


def test_checkpointing_keeps_less_and_bf16_too():
    kept = {
        (bf16, checkpointing): measure_model(wider, 4, 64, bf16=bf16, gradient_checkpointing=checkpointing).activations
        for bf16 in (False, True)
        for checkpointing in (False, True)
    }
    assert kept[False, True] < 0.5 * kept[False, False]
    assert kept[True, False] < kept[False, False]


def test_weights_are_counted_once_and_untied_embeddings_take_no_arithmetic():
    for tied in (False, True):
        size = measure_model(lambda dtype, tied=tied: wider(dtype, tied), 1, 8, bf16=False)
        model = wider(tied=tied)
        assert size.parameters == sum(param.numel() for param in model.parameters())
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        norms = sum(param.numel() for name, param in model.named_parameters() if "norm" in name)
        assert size.multiplied == linear + norms
        assert (size.layers, size.hidden, size.vocabulary) == (3, 64, 500)
        assert flops(size, tokens=10, length=8) == 10 * (6 * size.multiplied + 6 * 3 * 64 * 8)


def test_sam_adds_a_copy_of_the_weights_but_under_zero():
    size = measure_model(wider, 1, 8)
    for strategy, copies in (("ddp", 1), ("fsdp2", 1 / 4), ("zero2", 0), ("zero3", 0)):
        plain, sam = (sum(memory(size, strategy, 4, 1, 8, sam=value).values()) for value in (False, True))
        assert sam - plain == pytest.approx(4 * size.trainable * copies, abs=1)


def test_states_are_shared_out_as_each_strategy_does():
    """Bytes a weight: 16 on one device; divided under FSDP2, but for the gradients; masters and moments under ZeRO."""
    size = measure_model(wider, 1, 8)
    states = {
        strategy: sum(
            memory(size, strategy, 4, 1, 8, sam=False)[part] for part in ("weights", "gradients", "optimizer")
        )
        for strategy in ("ddp", "fsdp2", "zero2", "zero3")
    }
    gathered = 4 * size.largest_unit
    assert states["ddp"] == (16 + 4) * size.parameters  # and the buckets
    assert states["fsdp2"] == pytest.approx((16 / 4 + 2) * size.parameters + gathered, abs=4)
    assert states["zero2"] == pytest.approx((2 + 14 / 4) * size.parameters, abs=4)
    assert states["zero3"] == pytest.approx(16 * size.parameters / 4 + gathered, abs=4)


def test_a_plan_tells_tokens_steps_memory_and_time():
    size = measure_model(wider, 2, 16)
    plan = Plan(tokens=12_800, steps=100, sequences=8, length=16, passes=1.5, size=size, batch=2, devices=4)
    assert plan.hours("A100", sam=True) == pytest.approx(1.5 * plan.hours("A100", sam=False))
    text = plan.text()
    assert "12,800 tokens" in text
    assert "100 optimizer steps of 8 x 16 tokens, on 4 devices with micro-batches of 2" in text
    assert "with SAM (1.5 x)" in text
    assert "less than a minute" in text


def test_a_moving_average_takes_the_memory_of_the_weights_where_it_works():
    size = measure_model(wider, 2, 16)
    for strategy, kept in (("ddp", 4 * size.parameters), ("fsdp2", size.parameters)):
        parts = [memory(size, strategy, 4, 2, 16, sam=True, average=average) for average in (True, False)]
        assert parts[0].pop("average") == pytest.approx(kept, abs=4)
        assert parts[1].pop("average") == 0
        assert parts[0] == parts[1]
    plan = Plan(12_800, 100, 8, 16, passes=1, size=size, batch=2, devices=4, average=True)
    assert "optimizer, average" in plan.text()
    assert "zero" not in plan.text()
