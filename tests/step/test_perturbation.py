"""The arithmetic of the ascent step against its formula, written out."""

import pytest
import torch
from accelerate import Accelerator

from hf_sam.step.backends import select_backend
from hf_sam.step.variants import get_variant

RHO = 0.3


def model_with_gradients(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(dtype)
    model(torch.randn(8, 6, dtype=dtype)).square().sum().backward()
    return model


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@pytest.mark.parametrize("variant", ["sam", "asam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_move_by_e_and_come_back(variant, dtype):
    model = model_with_gradients(dtype)
    w, g = flat(model.parameters()), flat(p.grad for p in model.parameters())
    norm = (w * g).norm() if variant == "asam" else g.norm()
    e = RHO * (w * w * g if variant == "asam" else g) / norm

    backend = select_backend(Accelerator(cpu=True), model, variant=get_variant(variant))
    done = backend.perturb(RHO, measure=True)
    # Weights below 1 are rounded by 3e-8, and so are the factors of e.
    torch.testing.assert_close(flat(model.parameters()), w + e, rtol=0, atol=2e-7)
    assert done.norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert done.kept.item() == pytest.approx(1.0, abs=1e-5)
    assert done.finite
    assert all(p.grad is None for p in model.parameters())
    backend.restore()
    assert torch.equal(flat(model.parameters()), w)


def test_restore_writes_into_the_same_storage_and_may_be_called_twice():
    model = model_with_gradients()
    addresses = [p.data_ptr() for p in model.parameters()]
    view = next(model.parameters()).detach().view(-1)
    before = view.clone()
    backend = select_backend(Accelerator(cpu=True), model)
    backend.perturb(RHO)
    assert not torch.equal(view, before)
    backend.restore()
    next(model.parameters()).data.add_(1.0)
    backend.restore()
    assert torch.equal(view, before + 1.0)
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_gradient_leaves_the_weights_alone(bad, dtype):
    model = model_with_gradients(dtype)
    next(model.parameters()).grad[0, 0] = bad
    w = flat(model.parameters())
    backend = select_backend(Accelerator(cpu=True), model)
    done = backend.perturb(RHO, measure=True)
    assert not done.finite
    assert torch.equal(flat(model.parameters()), w)
    assert all(p.grad is None for p in model.parameters())


def test_a_zero_gradient_is_no_perturbation():
    model = model_with_gradients()
    for param in model.parameters():
        param.grad.zero_()
    w = flat(model.parameters())
    backend = select_backend(Accelerator(cpu=True), model)
    assert backend.perturb(RHO).finite
    assert torch.equal(flat(model.parameters()), w)


def test_parameters_without_gradient_and_unselected_ones_stay():
    model = model_with_gradients()
    model[0].bias.grad = None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backend = select_backend(Accelerator(cpu=True), model, exclude=[r"2\.weight"])
    norm = torch.cat([model[0].weight.grad.flatten(), model[2].bias.grad]).norm()
    assert backend.perturb(RHO).norm == pytest.approx(norm.item(), rel=1e-6)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "2.bias"}


def test_sparse_gradients_perturb_the_rows_that_were_used():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 7, 7])).square().sum().backward()
    w, g = embedding.weight.detach().clone(), embedding.weight.grad.to_dense()
    backend = select_backend(Accelerator(cpu=True), embedding)
    backend.perturb(RHO)
    torch.testing.assert_close(embedding.weight.detach(), w + RHO * g / g.norm())
    backend.restore()
    assert torch.equal(embedding.weight.detach(), w)


def test_an_interrupted_perturbation_can_be_undone(monkeypatch):
    model = model_with_gradients()
    w = flat(model.parameters())
    backend = select_backend(Accelerator(cpu=True), model)

    def stop_half_way(weights, values):
        weights[0].add_(values[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "_foreach_add_", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        backend.perturb(RHO)
    assert not torch.equal(flat(model.parameters()), w)
    backend.restore(after_error=True)
    assert torch.equal(flat(model.parameters()), w)
