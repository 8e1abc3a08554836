"""State that forward passes change outside of the trained weights: the same in both passes, and as plain training."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from stateful import ROWS, STATEFUL, Containers, OwnGenerators, PlainNumber, Stateful, Switch, momentum
from torch.utils._python_dispatch import TorchDispatchMode
from toy import trainer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from vanishing import assert_same_weights, loop_both, run_both

from hf_sam import SAMStep


@pytest.mark.parametrize("model", STATEFUL)
def test_state_of_modules_is_that_of_plain_training_and_the_same_in_both_passes(tmp_path, model):
    plain, sam = run_both(tmp_path, model, ROWS, gradient_accumulation_steps=3)
    assert_same_weights(plain.model, sam.model)
    assert sam.model.state() == plain.model.state()


@pytest.mark.parametrize("model", STATEFUL)
def test_without_a_trainer_too_and_in_modules_that_the_loop_names(model):
    owned = []

    def forward_backward_of(layer, accelerator):
        torch.manual_seed(1)
        outside = model().requires_grad_(False)
        owned.append(outside)

        def forward_backward(x):
            loss = outside(layer(x))["loss"]
            loss.backward()
            return loss.detach()

        return forward_backward

    def layer():
        torch.manual_seed(0)
        return torch.nn.Linear(6, 6)

    batches = [torch.stack([row["x"] for row in ROWS[i : i + 4]]) for i in range(0, 24, 4)]
    assert_same_weights(*loop_both(layer, forward_backward_of, lambda: batches))
    plain, sam = owned
    assert sam.state() == plain.state()


def test_a_large_frozen_model_that_forward_updates_is_reported_once_and_followed_from_then_on(tmp_path, caplog):
    class Large(momentum("through data")):
        """More frozen weights than there is room for copies of."""

        def __init__(self):
            super().__init__()
            self.teacher = torch.nn.Linear(6, 3_000_000, bias=False).requires_grad_(False)

        def advance(self, h):
            self.teacher.weight.data[:6].mul_(0.9).add_(self.layer.weight.data, alpha=0.1)
            self.teacher.weight.data[6:].mul_(0.9)
            return self.teacher.weight[:6].mean()

    with caplog.at_level("WARNING", logger="hf_sam"):
        _, sam = run_both(tmp_path, Large, ROWS, learning_rate=0.0, max_steps=2)
    assert caplog.text.count("too large to be copied") == 1
    expected = torch.nn.Linear(6, 3_000_000, bias=False)
    assert sam.model.teacher.weight.shape == expected.weight.shape


def test_frozen_weights_that_do_not_change_are_copied_once_at_most(tmp_path):
    class Adapted(Stateful):
        def __init__(self):
            super().__init__()
            self.base = torch.nn.Linear(2000, 2000).requires_grad_(False)

        def advance(self, h):
            return self.base.weight.mean()

    clones = []

    class Clones(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.clone.default and args[0].numel() == 2000 * 2000:
                clones.append(1)
            return func(*args, **(kwargs or {}))

    run = trainer(tmp_path, model=Adapted(), dataset=ROWS, sam_rho=0.1, max_steps=4, remove_unused_columns=False)
    with Clones():
        run.train()
    assert len(clones) == 1


def test_dynamic_rope_takes_each_length_as_it_came(tmp_path):
    # A buffer and two plain attributes that go together: the frequencies, and the lengths they were made for.
    def model():
        torch.manual_seed(0)
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            initializer_range=0.3,
            rope_parameters=rope,
        )
        return LlamaForCausalLM(config)

    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 64, (length,), generator=generator) for length in (24, 20, 8, 30, 8, 24)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    plain, sam = run_both(
        tmp_path, model, rows, per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=2
    )
    assert_same_weights(plain.model, sam.model)
    rotary, other = sam.model.model.rotary_emb, plain.model.model.rotary_emb
    assert rotary.max_seq_len_cached == other.max_seq_len_cached
    assert torch.equal(rotary.inv_freq, other.inv_freq)


class Draws(Trainer):
    """Noise from generators of its own, of its loss module, and of its collator, as diffusion trainers draw it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generator = torch.Generator().manual_seed(1)
        self.kept = {"rng": np.random.default_rng(1)}
        self.noise = OwnGenerators()
        self.data_collator = Collator()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x = self.data_collator.noised(inputs["x"])
        x = x + torch.randn(x.shape, generator=self.generator) * self.kept["rng"].random()
        return (model(x) * (1 + self.noise.advance(x))).square().mean()


class Collator:
    def __init__(self):
        self.rng = np.random.default_rng(2)

    def __call__(self, rows):
        return {"x": self.noised(torch.stack([row["x"] for row in rows]))}

    def noised(self, x):
        return x + torch.tensor(self.rng.standard_normal(x.shape), dtype=x.dtype)


def test_generators_of_the_trainer_its_modules_and_its_collator(tmp_path):
    def layer():
        torch.manual_seed(0)
        return torch.nn.Linear(6, 6)

    plain, sam = run_both(tmp_path, layer, ROWS, Draws)
    assert_same_weights(plain.model, sam.model)
    assert torch.equal(plain.generator.get_state(), sam.generator.get_state())
    assert plain.data_collator.rng.random() == sam.data_collator.rng.random()


def test_generators_that_a_function_of_the_loop_closes_over_or_names():
    def forward_backward_of(model, accelerator):
        generator = torch.Generator().manual_seed(1)

        def forward_backward(x):
            loss = model(_noised(x, generator) + _GLOBAL.random()).square().mean()
            loss.backward()
            return loss.detach()

        _GLOBAL.bit_generator.state = np.random.default_rng(5).bit_generator.state
        return forward_backward

    def layer():
        torch.manual_seed(0)
        return torch.nn.Linear(6, 6)

    assert_same_weights(*loop_both(layer, forward_backward_of, lambda: [torch.ones(4, 6)] * 4))


_GLOBAL = np.random.default_rng(5)


def _noised(x, generator):
    return x + torch.randn(x.shape, generator=generator)


class NamesAGlobal(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs["x"] + _GLOBAL.random())["loss"]


class DrawsFromAGlobal(Stateful):
    def advance(self, h):
        return torch.rand(6, generator=_GLOBAL_OF_TORCH)


def test_generators_that_methods_of_the_trainer_and_of_modules_name(tmp_path):
    def model():
        _GLOBAL.bit_generator.state = np.random.default_rng(5).bit_generator.state
        _GLOBAL_OF_TORCH.manual_seed(5)
        return DrawsFromAGlobal()

    plain, sam = run_both(tmp_path, model, ROWS, NamesAGlobal)
    assert_same_weights(plain.model, sam.model)


_GLOBAL_OF_TORCH = torch.Generator()


def test_an_error_in_the_second_pass_leaves_the_state_that_the_first_one_left():
    model, x = Containers(), torch.ones(4, 6)
    other = Containers()
    sam = SAMStep(Accelerator(cpu=True), model, 0.1)
    calls = []

    def fails_second(x):
        loss = model(x)["loss"]
        loss.backward()
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss.detach()

    with pytest.raises(KeyboardInterrupt):
        sam(fails_second, x)
    other(x)
    assert model.state() == other.state()
    assert torch.amp.GradScaler.scale.__module__ == "torch.amp.grad_scaler"


class ClampsItsWeight(torch.nn.Module):
    """A forward pass that changes trained weights, in their storage or by a new one."""

    how = "in place"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 6)
        self.table = torch.nn.Embedding(4, 6, max_norm=1.0)

    def forward(self, x):
        weight = self.layer.weight
        if self.how == "in place":
            with torch.no_grad():
                weight.clamp_(-0.2, 0.2)
        else:
            weight.data = weight.data.clamp(-0.2, 0.2)
        rows = self.table(torch.arange(len(x)) % 4)
        return {"loss": (self.layer(x) + rows).square().mean()}


@pytest.mark.parametrize("how", ["in place", "by a new tensor"])
def test_weights_that_forward_changes_are_those_of_plain_training(tmp_path, how):
    model = type("Clamps", (ClampsItsWeight,), {"how": how})
    plain, sam = run_both(tmp_path, model, ROWS, learning_rate=0.5)
    # The table is scaled to its norm in each pass, which is only nearly the same when it is done twice.
    for mine, theirs in zip(sam.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_contexts_give_states_back_too():
    results = []
    for perturbed in (False, True):
        model, x = PlainNumber(), torch.ones(4, 6)
        sam = SAMStep(Accelerator(cpu=True), model, 1e-30)
        for _ in range(2):
            with sam.ascent():
                model(x)["loss"].backward()
            gradient = model.layer.weight.grad.clone()
            with sam.perturbed():
                if perturbed:
                    model(x)["loss"].backward()
                    assert torch.equal(model.layer.weight.grad, gradient)
            model.zero_grad()
        results.append(model.longest)
    assert results == [2, 2]


def test_a_switch_is_a_state_from_when_it_goes_back(tmp_path):
    # Its first turn could be the mark of something that was set up, which must not be set up twice.
    plain, sam = run_both(tmp_path, Switch, ROWS, gradient_accumulation_steps=1, max_steps=5)
    assert sam.model.state() == plain.model.state()
    sam, plain = ([entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (sam, plain))
    assert sam[0] == plain[0]
    seen = []

    class Seen(Switch):
        def advance(self, h):
            seen.append(self.left)
            return super().advance(h)

    run_both(tmp_path, Seen, ROWS, gradient_accumulation_steps=1, max_steps=5)
    passes = seen[5:]
    assert passes[4::2] == passes[5::2] == [False, True, False]


def test_what_is_set_up_in_the_first_pass_is_not_set_up_again():
    calls = []

    class SetsUp(Stateful):
        ready = False

        def forward(self, x):
            if not self.ready:
                self.layer.register_forward_hook(lambda module, inputs, output: calls.append(1))
                self.ready = True
            return {"loss": self.layer(x).square().mean()}

    model, x = SetsUp(), torch.ones(4, 6)
    sam = SAMStep(Accelerator(cpu=True), model, 0.1)

    def forward_backward(x):
        loss = model(x)["loss"]
        loss.backward()
        return loss.detach()

    sam(forward_backward, x)
    assert len(calls) == 2
    assert model.ready


def test_library_state_is_left_alone():
    # An LSTM's private list of weights, hooks, and lazily made functions are no state of a forward pass.
    class Compiles(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.LSTM(6, 6)
            self.compiled = None

        def forward(self, x):
            if self.compiled is None:
                self.compiled = lambda h: h.square().mean()
            return self.compiled(self.rnn(x)[0])

    model = Compiles()
    flat = model.rnn._flat_weights
    sam = SAMStep(Accelerator(cpu=True), model, 0.1)

    def forward_backward(x):
        loss = model(x)
        loss.backward()
        return loss.detach()

    sam(forward_backward, torch.ones(3, 4, 6))
    made = model.compiled
    model.zero_grad()
    sam(forward_backward, torch.ones(3, 4, 6))
    assert model.compiled is made
    assert model.rnn._flat_weights is flat
