"""Wise-FT: interpolated weights, and the base put back."""

import pytest
import torch
from toy_evaluation import busy, held_out, moved, sharp_olmo2, unchanged

from hf_sam.baselines import interpolate, wise_ft
from hf_sam.instruments import held_out_loss, loss_along_line


def test_weights_between_base_and_tuned():
    base = busy(sharp_olmo2())
    tuned = moved(base)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    with unchanged(base, tuned):
        for alpha, model in wise_ft(base, tuned, (0.0, 0.3, 1.0)):
            for name, value in model.state_dict().items():
                expected = start[name] + alpha * (tuned.state_dict()[name] - start[name])
                if alpha in (0.0, 1.0):
                    assert torch.equal(value, start[name] if alpha == 0 else tuned.state_dict()[name])
                else:
                    torch.testing.assert_close(value, expected)


def test_base_is_put_back_when_the_loop_is_left():
    base = sharp_olmo2()
    tuned = moved(base)
    with unchanged(base, tuned):
        for _ in wise_ft(base, tuned):
            break
        sweep = wise_ft(base, tuned)
        next(sweep)
        with pytest.raises(KeyboardInterrupt):
            sweep.throw(KeyboardInterrupt)


def test_losses_are_those_along_the_line():
    base = sharp_olmo2()
    tuned, data = moved(base), held_out()
    line = loss_along_line(base, tuned, data, positions=(0, 0.5, 1), quadratic=False)
    assert [held_out_loss(model, data).loss for _, model in wise_ft(base, tuned, (0, 0.5, 1))] == list(line.losses)


def test_one_of_them_for_good(tmp_path):
    base = sharp_olmo2()
    tuned = moved(base)
    for _, model in wise_ft(base, tuned, (0.4,)):
        between = {name: value.clone() for name, value in model.state_dict().items()}
    kept = interpolate(base, dict(tuned.state_dict()), 0.4)
    assert kept is base
    assert all(torch.equal(value, between[name]) for name, value in kept.state_dict().items())


def test_other_models_are_refused():
    base = sharp_olmo2()
    with pytest.raises(ValueError, match="one weight space"):
        next(wise_ft(base, sharp_olmo2(vocab_size=80)))
