"""Whatever keeps copies of weights sees w + e in the second pass and w afterwards, and a pass that does not is told."""

import pytest
import torch
from accelerate import Accelerator
from torch.nn.utils import parametrize
from toy import trainer

from hf_sam import SAMStep
from hf_sam.step.reference import sam_step
from hf_sam.step.weight_caches import WeightCaches

RHO = 0.5


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))


def loss_of(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x).float(), y)


def gradient(model):
    return torch.cat([param.grad.flatten() for param in model.parameters()])


def step_in(context, model, batch, form="call", loss_of=loss_of):
    """One SAM step inside of `context()`, and the sharpness that it saw."""
    sam = SAMStep(Accelerator(cpu=True), model, RHO)

    def forward_backward(batch):
        loss = loss_of(model, batch)
        loss.backward()
        return loss.detach()

    with context():
        if form == "call":
            sam(forward_backward, batch)
        else:
            with sam.ascent():
                forward_backward(batch)
            with sam.perturbed():
                forward_backward(batch)
        after = loss_of(model, batch).item()
    return sam, after


@pytest.mark.parametrize("form", ["call", "contexts"])
def test_an_autocast_region_around_both_passes(form):
    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def loss_in_autocast(model, batch):
        with autocast():
            return loss_of(model, batch)

    model, other = network(), network()
    _, after = step_in(autocast, model, data(), form)
    expected = sam_step(other, [data()], loss_in_autocast, RHO)
    # The same casts and products in the same order: nothing but the order of sums in the norm may differ, which can
    # move single bf16 roundings of w + e.
    assert torch.nn.functional.cosine_similarity(gradient(model), gradient(other), dim=0) > 0.999
    at_w = network()
    loss_in_autocast(at_w, data()).backward()
    assert torch.nn.functional.cosine_similarity(gradient(model), gradient(at_w), dim=0) < 0.99
    # What follows in the region computes with w again.
    assert after == pytest.approx(expected.loss, abs=1e-6)


def test_the_caches_are_cleared_after_an_error_too():
    model, batch = network(), data()
    sam = SAMStep(Accelerator(cpu=True), model, RHO)
    calls = []

    def fails_late(batch):
        loss = loss_of(model, batch)
        loss.backward()
        calls.append(loss.item())
        if len(calls) == 2:
            raise MemoryError
        return loss.detach()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(MemoryError):
            sam(fails_late, batch)
        assert calls[1] != calls[0]
        assert loss_of(model, batch).item() == calls[0]


def test_cached_parametrizations():
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    def parametrized():
        model = network()
        parametrize.register_parametrization(model[0], "weight", Doubled())
        return model

    def loss_with_cache(model, batch):
        with parametrize.cached():
            model(batch[0])
            return loss_of(model, batch)

    model, other = parametrized(), parametrized()
    step_in(parametrize.cached, model, data(), loss_of=loss_with_cache)
    sam_step(other, [data()], loss_with_cache, RHO)
    torch.testing.assert_close(gradient(model), gradient(other))


def test_copies_in_eight_bits_and_scales_are_dropped_where_their_libraries_keep_them():
    # Their kernels need a GPU, so that what they leave behind in a forward pass is put there by hand.
    bnb = pytest.importorskip("bitsandbytes")

    class Weight(torch.Tensor):
        _precomputed_scale = torch.ones(())  # as torchao.float8 keeps it

    class TransformerEngineLayer(torch.nn.Linear):
        pass

    int8, fp8 = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True), TransformerEngineLayer(8, 8)
    frozen = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False)
    for layer in (int8, frozen):
        layer.state.CB = layer.state.SCB = torch.ones(8)
    fp8._fp8_workspaces = {"weight": torch.ones(8)}
    scaled = torch.nn.Linear(8, 8)
    scaled.weight = torch.nn.Parameter(torch.ones(8, 8).as_subclass(Weight))
    WeightCaches([torch.nn.ModuleList([int8, fp8, frozen, scaled])]).clear()
    assert int8.state.CB is None
    assert int8.state.SCB is None
    assert fp8._fp8_workspaces == {}
    assert scaled.weight._precomputed_scale is None
    # These are the weights themselves, not copies of them.
    assert frozen.state.CB is not None


class CachesWeight(torch.nn.Module):
    """A layer that keeps a transposed copy of its weight until it is told that the weight has changed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(4, 8) / 3)
        self.turned = None

    def forward(self, x):
        if self.turned is None:
            self.turned = self.weight.detach().t().contiguous()
        # The gradient reaches the weight as if it had been used.
        return x @ (self.turned + (self.weight - self.weight.detach()).t())


def test_a_copy_that_the_first_pass_of_a_step_made_is_made_again_for_the_second():
    model, batch = CachesWeight(), data()
    sam, _ = step_in(torch.enable_grad, model, batch)
    assert sam.pop_metrics()["sam/sharpness"] > 0


def test_a_pass_that_does_not_see_the_perturbation_is_reported_once(caplog):
    class Stale(CachesWeight):
        def forward(self, features, labels):
            return {"loss": torch.nn.functional.cross_entropy(super().forward(features), labels)}

    x, y = data()
    rows = [{"features": a, "labels": b} for a, b in zip(x, y, strict=True)]
    model = Stale()
    model(x, y)  # cached from before the run
    with caplog.at_level("WARNING", logger="hf_sam"):
        trainer_of(model, rows).train()
    assert caplog.text.count("does not see the perturbation") == 1
    assert "cached weights" in caplog.text


def trainer_of(model, rows, **settings):
    import tempfile

    return trainer(tempfile.mkdtemp(), model=model, dataset=rows, sam_rho=RHO, max_steps=4, **settings)


@pytest.mark.parametrize(("rho", "told"), [(1e-9, False), (0.05, False), (RHO, False), (300.0, True)])
def test_a_radius_that_explodes_is_reported_once_and_no_other_is(rho, told, caplog):
    model, batch = network(), data()
    sam = SAMStep(Accelerator(cpu=True), model, rho)

    def forward_backward(batch):
        loss = loss_of(model, batch)
        loss.backward()
        return loss.detach()

    with caplog.at_level("WARNING", logger="hf_sam"):
        for _ in range(3):
            sam(forward_backward, batch)
            model.zero_grad()
            sam.pop_metrics()
    assert caplog.text.count("is too large: the loss is") == int(told)
    assert "does not see" not in caplog.text
