"""Variants: registered by name, held against their plain version, and all that one has to bring."""

import pytest
import torch
from accelerate import Accelerator
from toy import step_logs, trainer
from transformers import HfArgumentParser

from hf_sam import SAMStep, SAMTrainingArguments
from hf_sam.step.backends import select_backend
from hf_sam.step.reference import PERTURBATIONS, sam_step
from hf_sam.step.variants import VARIANTS, Variant, get_variant, register

RHO = 0.3


@pytest.fixture
def registered():
    """Variants that a test registers are forgotten after it."""
    before = dict(VARIANTS)
    yield register
    VARIANTS.clear()
    VARIANTS.update(before)


def model_with_gradients(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(dtype)
    model(torch.randn(8, 6, dtype=dtype)).square().sum().backward()
    return model


def test_each_variant_has_a_plain_version_and_says_what_it_is():
    assert VARIANTS.keys() == PERTURBATIONS.keys()
    for name, variant in VARIANTS.items():
        assert variant.name == name
        assert variant.equation.startswith("e = ")
        assert "arXiv" in variant.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_moves_the_weights_as_its_plain_version_says(name, dtype):
    model = model_with_gradients(dtype)
    w = {key: param.detach().clone() for key, param in model.named_parameters()}
    g = {key: param.grad.clone() for key, param in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    optimizer.step()
    moments = {
        kind: {key: optimizer.state[param][state].clone() for key, param in model.named_parameters()}
        for kind, state in (("first", "exp_avg"), ("second", "exp_avg_sq"))
    }
    e, norm = PERTURBATIONS[name](w, g, RHO, moments)
    backend = select_backend(Accelerator(cpu=True), model, variant=get_variant(name), optimizers=lambda: [optimizer])
    done = backend.perturb(RHO)
    assert done.norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for key, param in model.named_parameters():
        # Weights below 1 are rounded by 3e-8, and so are the factors of e.
        torch.testing.assert_close(param.detach(), w[key] + e[key], rtol=0, atol=2e-7)


def test_unknown_variants_are_refused_with_what_there_is(tmp_path):
    with pytest.raises(
        ValueError, match=r"sam_variant='asm' must be one of 'sam', 'asam', 'momentum'. Did you mean a?sam\?"
    ):
        SAMTrainingArguments(output_dir=str(tmp_path), sam_variant="asm")
    with pytest.raises(ValueError, match="variant='nothing' must be one of 'sam', 'asam'"):
        SAMStep(Accelerator(cpu=True), torch.nn.Linear(2, 2), 0.1, variant="nothing")
    with pytest.raises(ValueError, match="sam_variant=None"):
        SAMTrainingArguments(output_dir=str(tmp_path), sam_variant=None)


class SignSAM(Variant):
    """e = rho * sign(g) / sqrt(number of weights): a made-up variant, with a count of its steps as state."""

    name = "sign"
    equation = "e = rho * sign(g) / ||sign(g)||"
    source = "made up"

    def __init__(self):
        self.turned = 0

    def norms(self, pieces):
        return [piece.gradient.sign().norm() for piece in pieces]

    def to_direction(self, pieces):
        self.turned += 1
        for piece in pieces:
            piece.gradient.sign_()

    def state_dict(self):
        return {"turned": self.turned}

    def load_state_dict(self, state):
        self.turned = state["turned"]


def sign(w, g, rho, moments):
    norm = torch.sqrt(sum(value.sign().square().sum() for value in g.values()))
    return {name: rho * value.sign() / norm for name, value in g.items()}, norm


def test_a_variant_of_the_user_trains_by_its_name(registered, monkeypatch, tmp_path):
    registered(SignSAM)
    monkeypatch.setitem(PERTURBATIONS, "sign", sign)
    flags = f"--output_dir {tmp_path} --sam_rho 0.3 --sam_variant sign".split()
    (args,) = HfArgumentParser(SAMTrainingArguments).parse_args_into_dataclasses(flags)
    assert args.sam_variant == "sign"
    run = trainer(tmp_path / "run", sam_rho=0.3, sam_variant="sign", max_steps=2)
    other = trainer(tmp_path / "other", sam_rho=0.3, sam_variant="sam", max_steps=2)
    size = sum(param.numel() for param in run.model.parameters() if param.requires_grad)
    run.train()
    other.train()
    assert not all(torch.equal(a, b) for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True))
    assert all(0 < log["sam/ascent_grad_norm"] <= size**0.5 for log in step_logs(run))


def test_the_state_of_a_variant_is_that_of_the_step(registered, monkeypatch):
    registered(SignSAM)
    monkeypatch.setitem(PERTURBATIONS, "sign", sign)
    torch.manual_seed(0)
    layer, plain = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4)

    def forward_backward(x):
        loss = layer(x).square().mean()
        loss.backward()
        return loss.detach()

    step = SAMStep(Accelerator(cpu=True), layer, 0.1, variant="sign")
    loss = step(forward_backward, x)
    expected = sam_step(plain, [x], lambda model, x: model(x).square().mean(), 0.1, variant="sign")
    assert loss.item() == pytest.approx(expected.loss, rel=1e-6)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    state = step.state_dict()
    assert state["variant"] == {"turned": 1}
    again = SAMStep(Accelerator(cpu=True), layer, 0.1, variant="sign")
    again.load_state_dict(state)
    assert again.backend.variant.turned == 1


def test_registering_twice_under_one_name_or_with_other_passes_is_refused(registered):
    with pytest.raises(ValueError, match="already a variant 'sam'"):
        registered(type("Other", (SignSAM,), {"name": "sam"}))
    with pytest.raises(ValueError, match="passes=3, but a step has 2"):
        registered(type("ThreePasses", (SignSAM,), {"name": "three", "passes": 3}))
    registered(VARIANTS["sam"])  # the same class again is no conflict
