"""What a trainer writes down in `compute_loss` is what plain training writes down, each micro-batch once."""

import array
import dataclasses
import threading
from collections import Counter, OrderedDict, deque

import numpy as np
import pytest
import torch
from toy import arguments, trainer
from transformers import Trainer, TrainerCallback
from vanishing import run_both

from hf_sam import SAMMixin

ROWS = [
    {"x": x, "y": torch.tensor(i % 3)}
    for i, x in enumerate(torch.randn(24, 6, generator=torch.Generator().manual_seed(2)))
]
RHO = 0.5


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 3)


@dataclasses.dataclass
class Meter:
    total: float = 0.0
    values: list = dataclasses.field(default_factory=list)

    def update(self, value):
        self.total += value
        self.values.append(value)


class Centre(torch.nn.Module):
    """The centre of DINO's loss: a buffer that each loss moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, logits):
        with torch.no_grad():
            self.centre.mul_(0.9).add_(logits.mean(0), alpha=0.1)
        return (logits - self.centre).square().mean()


class Recording(Trainer):
    """Records of every kind."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.history, self.recent, self.confusion = [], deque(maxlen=3), np.zeros(3)
        self.meter, self.centre, self.counts, self.seen = Meter(), Centre(), Counter(), set()
        self.raw, self.total, self.calls = array.array("d"), torch.zeros(()), 0
        self.nested = OrderedDict(train={"losses": []})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(inputs["x"])
        loss = torch.nn.functional.cross_entropy(logits, inputs["y"])
        value = loss.item()
        self.history.append(value)
        self.recent.append(value)
        self.confusion += np.bincount(logits.argmax(1), minlength=3)
        self.meter.update(value)
        self.counts.update(inputs["y"].tolist())
        self.seen.add(value)
        self.raw.append(value)
        self.total += loss.detach()
        self.calls += 1
        self.nested["train"]["losses"].append(value)
        self.nested["train"].setdefault("late", []).append(value)
        self.late = getattr(self, "late", 0) + value
        return loss + 0.1 * self.centre(logits)

    def records(self):
        return {
            "history": self.history,
            "recent": list(self.recent),
            "confusion": self.confusion.tolist(),
            "meter": dataclasses.asdict(self.meter),
            "centre": self.centre.centre.tolist(),
            "counts": self.counts,
            "seen": self.seen,
            "raw": self.raw.tolist(),
            "total": self.total.item(),
            "calls": self.calls,
            "nested": self.nested,
            "late": self.late,
        }


NAMES = ("history", "recent", "confusion", "meter", "counts", "seen", "raw", "total", "calls", "nested", "late")


def named(cls):
    return type(f"SAM{cls.__name__}", (SAMMixin, cls), {"sam_recorded": (*SAMMixin.sam_recorded, *NAMES, "centre")})


def test_records_of_any_type_are_those_of_plain_training(tmp_path):
    # At learning rate 0 both runs see the same weights, so that values agree whatever the radius.
    plain, _ = run_both(tmp_path, linear, ROWS, Recording, named, learning_rate=0.0)
    sam = named(Recording)(
        model=linear(),
        args=trainer_args(tmp_path, sam_rho=RHO),
        train_dataset=ROWS,
    )
    recent = sam.recent
    sam.train()
    assert sam.records() == plain.records()
    assert sam.recent is recent


def trainer_args(tmp_path, **settings):
    return arguments(
        tmp_path,
        **{
            "optim": "sgd",
            "learning_rate": 0.0,
            "max_steps": 3,
            "gradient_accumulation_steps": 2,
            "remove_unused_columns": False,
            "train_sampling_strategy": "sequential",
        }
        | settings,
    )


def test_with_fewer_micro_batches_in_the_ascent_counters_resume_and_values_at_w_plus_e_stay_out(tmp_path):
    args = trainer_args(tmp_path, sam_rho=RHO, gradient_accumulation_steps=3, max_steps=2, sam_ascent_micro_batches=1)
    sam = named(Recording)(model=linear(), args=args, train_dataset=ROWS)
    sam.train()
    plain = Recording(
        model=linear(), args=trainer_args(tmp_path, gradient_accumulation_steps=3, max_steps=2), train_dataset=ROWS
    )
    plain.train()
    assert (sam.calls, sam.counts) == (plain.calls, plain.counts)
    assert sam.history == plain.history[::3]
    assert list(sam.nested["train"]["losses"]) == plain.history[::3]


def test_log_in_compute_loss_states_each_micro_batch_once(tmp_path):
    class Logs(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = torch.nn.functional.cross_entropy(model(inputs["x"]), inputs["y"])
            self.log({"part": loss.item()})
            return loss

    class Events(TrainerCallback):
        def __init__(self):
            self.parts = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "part" in logs:
                self.parts.append(logs["part"])

    def parts(cls, **settings):
        events = Events()
        run = cls(model=linear(), args=trainer_args(tmp_path, **settings), train_dataset=ROWS, callbacks=[events])
        run.train()
        logged = [entry["part"] for entry in run.state.log_history if "part" in entry]
        assert logged == events.parts
        return logged

    class OwnLog(Logs):
        def log(self, logs, *args, **kwargs):
            return super().log(dict(logs), *args, **kwargs)

    expected = parts(Logs)
    assert len(expected) == 6
    sam_logs = type("SAMLogs", (SAMMixin, Logs), {})
    assert parts(sam_logs, sam_rho=RHO) == expected
    assert parts(type("SAMOwnLog", (SAMMixin, OwnLog), {}), sam_rho=RHO) == expected

    class InFront(sam_logs):
        told = ()

        def log(self, logs, *args, **kwargs):
            self.told = [*self.told, *([logs["part"]] if "part" in logs else [])]
            return super().log(logs, *args, **kwargs)

    run = InFront(model=linear(), args=trainer_args(tmp_path, sam_rho=RHO), train_dataset=ROWS)
    run.train()
    assert run.told == expected


def test_a_record_that_cannot_be_put_back_is_refused_in_the_first_step(tmp_path):
    class Locks(Recording):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.lock = threading.Lock()

    cls = type("SAMLocks", (SAMMixin, Locks), {"sam_recorded": ("lock",)})
    model = linear()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"sam_recorded names 'lock', a lock, .*sam_perturbed_context of SAMLocks"):
        cls(model=model, args=trainer_args(tmp_path, sam_rho=RHO), train_dataset=ROWS).train()
    assert torch.equal(model.weight, before)


def test_a_record_that_does_not_exist_is_refused_with_what_is_near(tmp_path):
    cls = type("Sam", (SAMMixin, Recording), {"sam_recorded": (*SAMMixin.sam_recorded, "histroy")})
    with pytest.raises(ValueError, match=r"names 'histroy', which Sam does not have.*Did you mean 'history'\?"):
        cls(model=linear(), args=trainer_args(tmp_path, sam_rho=RHO), train_dataset=ROWS).train()


def test_records_that_nobody_named_are_reported_once(tmp_path, caplog):
    cls = type("Sam", (SAMMixin, Recording), {"sam_recorded": (*SAMMixin.sam_recorded, "history")})
    with caplog.at_level("WARNING", logger="hf_sam"):
        cls(model=linear(), args=trainer_args(tmp_path, sam_rho=RHO), train_dataset=ROWS).train()
    assert caplog.text.count("may now count each micro-batch twice") == 1
    assert "'calls'" in caplog.text
    assert "'history'" not in caplog.text


def test_nothing_is_reported_of_a_trainer_that_records_nothing(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="hf_sam"):
        trainer(tmp_path, sam_rho=0.05, max_steps=2).train()
    assert not caplog.text


def test_sentence_transformers_parts_of_a_loss_are_counted_once(tmp_path):
    # What its trainer does with a loss that returns its parts.
    class Components(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.accum_loss_components = {"train": {}}

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = torch.nn.functional.cross_entropy(model(inputs["x"]), inputs["y"])
            parts = self.accum_loss_components["train"]
            parts["part"] = parts.get("part", 0) + loss.detach()
            parts.setdefault("steps", torch.tensor(0))
            parts["steps"] += 1
            return loss

    plain = Components(model=linear(), args=trainer_args(tmp_path), train_dataset=ROWS)
    plain.train()
    sam = type("Sam", (SAMMixin, Components), {})(
        model=linear(), args=trainer_args(tmp_path, sam_rho=RHO), train_dataset=ROWS
    )
    sam.train()
    assert sam.accum_loss_components == plain.accum_loss_components
