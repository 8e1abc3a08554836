"""The second pass sees the inputs that the first was given, whatever the first did to them."""

import dataclasses
import itertools
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import BatchFeature, Trainer
from transformers.modeling_outputs import BaseModelOutput
from vanishing import assert_same_weights, loop_both, run_both

from hf_sam import SAMStep
from hf_sam.step.replay import KeptInputs


def linear(width=6):
    torch.manual_seed(0)
    return torch.nn.Linear(width, 3)


def rows(count=24):
    generator = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(6, generator=generator), "y": torch.tensor(i % 3)} for i in range(count)]


class Mixup(Trainer):
    """Mixes the rows of a batch in place, as timm's Mixup does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x, share = inputs["x"], float(np.random.beta(0.8, 0.8))
        x.mul_(share).add_(x.flip(0).mul(1 - share))
        inputs["y"] += 1
        inputs["y"] %= 3
        return torch.nn.functional.cross_entropy(model(x), inputs.pop("y"))


def test_inputs_that_compute_loss_changes_in_place(tmp_path):
    plain, sam = run_both(tmp_path, linear, rows(), Mixup)
    assert_same_weights(plain.model, sam.model)


def test_inputs_that_forward_changes_in_place(tmp_path):
    class Clamps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, x, y):
            x.clamp_(max=0.5)
            x.add_(1)
            return {"loss": torch.nn.functional.cross_entropy(self.layer(x), y)}

    plain, sam = run_both(tmp_path, Clamps, rows())
    assert_same_weights(plain.model, sam.model)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Graph:
    """An object of the user's with a nested store, as graph libraries have."""

    def __init__(self, x):
        self.store = {"nodes": [x]}
        self.itself = self

    @property
    def x(self):
        return self.store["nodes"][0]


Named = namedtuple("Named", ["x"])

CONTAINERS = {
    "tensor": (lambda x: x, lambda held: held),
    "dict": (lambda x: {"x": x}, lambda held: held["x"]),
    "nested": (lambda x: {"a": [({"b": (x,)},)]}, lambda held: held["a"][0][0]["b"][0]),
    "namedtuple": (Named, lambda held: held.x),
    "frozen dataclass": (Frozen, lambda held: held.x),
    "slots": (Slotted, lambda held: held.x),
    "object": (Graph, lambda held: held.x),
    "UserDict": (lambda x: UserDict({"x": x}), lambda held: held["x"]),
    "BatchFeature": (lambda x: BatchFeature({"x": x}), lambda held: held["x"]),
    "ModelOutput": (lambda x: BaseModelOutput(last_hidden_state=x), lambda held: held.last_hidden_state),
    "packed": (
        lambda x: torch.nn.utils.rnn.PackedSequence(x, torch.tensor([x.shape[0]])),
        lambda held: held.data,
    ),
    "return type": (lambda x: torch.return_types.max((x, x)), lambda held: held.values),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_of_any_kind_are_copied_to_the_last_tensor(container):
    pack, unpack = CONTAINERS[container]
    given = pack(torch.ones(4, 6))
    kept = KeptInputs(given)
    assert kept.for_ascent(last=True) is given
    unpack(given).zero_()
    copied = kept.for_descent()
    assert type(copied) is type(given)
    assert torch.equal(unpack(copied), torch.ones(4, 6))


@pytest.mark.parametrize("container", [name for name in CONTAINERS if name not in ("packed", "return type")])
def test_a_loop_whose_inputs_change_in_place_is_plain_training_at_a_vanishing_radius(container):
    pack, unpack = CONTAINERS[container]

    def forward_backward_of(model, accelerator):
        def forward_backward(held):
            x = unpack(held)
            x.mul_(2).add_(1)
            loss = model(x).square().mean()
            loss.backward()
            return loss.detach()

        return forward_backward

    def batches():
        generator = torch.Generator().manual_seed(4)
        return [pack(torch.randn(4, 6, generator=generator)) for _ in range(4)]

    assert_same_weights(*loop_both(linear, forward_backward_of, batches))


def test_tensors_that_share_memory_share_it_in_the_copy():
    base = torch.arange(12.0).reshape(3, 4)
    given = {"whole": base, "again": base, "part": base[:, 1:], "turned": base.T}
    copied = KeptInputs(given).for_descent()
    copied["whole"].zero_()
    assert copied["again"] is copied["whole"]
    assert not copied["part"].any()
    assert not copied["turned"].any()
    assert copied["turned"].stride() == base.T.stride()
    assert base.any()


def test_a_piece_of_a_large_tensor_is_copied_without_the_rest():
    memory = torch.zeros(1 << 20)
    copied = KeptInputs([memory[:8]]).for_descent()[0]
    assert copied.untyped_storage().nbytes() < 1024


def test_what_is_no_data_is_shared():
    model, graph = linear(), torch.ones(3, requires_grad=True) * 2
    given = {"model": model, "weight": model.weight, "in a graph": graph, "function": linear, "text": "a"}
    copied = KeptInputs(given).for_descent()
    assert copied is not given
    assert all(copied[name] is value for name, value in given.items())


def test_arrays_generators_and_counters_are_copied():
    given = {
        "array": np.ones(3),
        "objects": np.array([[1], [2]], dtype=object),
        "torch": torch.Generator().manual_seed(1),
        "numpy": np.random.default_rng(1),
        "count": itertools.count(),
    }
    kept = KeptInputs(given)

    def draw(inputs):
        return (
            inputs["array"].tolist(),
            torch.rand(1, generator=inputs["torch"]).item(),
            inputs["numpy"].random(),
            next(inputs["count"]),
        )

    first = draw(given)
    given["array"] += 1
    assert draw(kept.for_descent()) == first


def test_an_iterator_that_can_be_read_once_is_refused():
    model = linear()
    sam = SAMStep(Accelerator(cpu=True), model, 0.1)
    before = model.weight.detach().clone()
    with pytest.raises(TypeError, match="can be read only once"):
        sam(lambda batch: None, {"parts": (part for part in range(3))})
    assert torch.equal(model.weight, before)


def test_a_buffer_that_the_loop_fills_anew_for_each_micro_batch():
    batches = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def run(rho, reuse):
        accelerator = Accelerator(cpu=True)
        model = linear()
        sam, static = SAMStep(accelerator, model, rho), torch.empty(4, 6)

        def forward_backward(x):
            loss = model(x).square().mean()
            loss.backward()
            return loss.detach()

        for i, batch in enumerate(batches):
            accelerator.gradient_state._set_sync_gradients(i % 2 == 1)
            sam(forward_backward, static.copy_(batch) if reuse else batch)
            if i % 2:
                with torch.no_grad():
                    for param in model.parameters():
                        param -= 0.1 * param.grad
                model.zero_grad()
        return model

    assert_same_weights(run(0.3, reuse=True), run(0.3, reuse=False))
    assert_same_weights(run(1e-30, reuse=True), run(0.0, reuse=True))
