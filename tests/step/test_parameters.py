"""Choosing parameters by name."""

import pytest
import torch
from toy import olmo2

from hf_sam.step.parameters import plain_name, select_names, trainable_parameters


def test_everything_is_selected_by_default():
    names = trainable_parameters(olmo2())
    assert select_names(names) == set(names)


def test_patterns_select_and_exclude():
    names = trainable_parameters(olmo2())
    norms = select_names(names, target=["norm"])
    assert norms
    assert all("norm" in name for name in norms)
    assert select_names(names, target=["norm"], exclude=[r"layers\.0"]) == {n for n in norms if "layers.0" not in n}


def test_a_pattern_without_match_lists_near_names():
    names = trainable_parameters(olmo2())
    with pytest.raises(ValueError, match=r"sam_target_modules: 'mlp.gate_prj' matches none.*mlp\.gate_proj"):
        select_names(names, target=["mlp.gate_prj"])
    with pytest.raises(ValueError, match=r"sam_exclude_modules.*lm_head"):
        select_names(names, exclude=["lmhead"])


def test_a_broken_pattern_is_refused():
    with pytest.raises(ValueError, match="not a regular expression"):
        select_names(["a.weight"], target=["(a"])


def test_nothing_left_is_refused():
    with pytest.raises(ValueError, match="leave no parameter"):
        select_names(["a.weight"], target=["a"], exclude=["weight"])
    with pytest.raises(ValueError, match="no trainable parameter"):
        select_names([])


def test_frozen_parameters_are_left_out_and_tied_ones_appear_once():
    model = olmo2(tie_word_embeddings=True)
    model.model.norm.weight.requires_grad_(False)
    parameters = trainable_parameters(model)
    assert "model.norm.weight" not in parameters
    assert "model.embed_tokens.weight" in parameters
    assert "lm_head.weight" not in parameters


def test_names_are_those_of_the_unwrapped_model():
    assert plain_name("module._orig_mod.layers.0._checkpoint_wrapped_module.w") == "layers.0.w"
    assert plain_name("block.module.w") == "block.module.w"
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    assert set(trainable_parameters(compiled)) == {"weight", "bias"}
