"""Modules with a state that each forward pass advances, in all the forms that modules keep one in."""

import itertools
import random
from collections import Counter, defaultdict, deque

import numpy as np
import torch

ROWS = [{"x": x} for x in torch.randn(24, 6, generator=torch.Generator().manual_seed(2))]


class Meter:
    def __init__(self):
        self.total, self.count = 0.0, 0


class Stateful(torch.nn.Module):
    """A layer whose output depends on a state that each forward pass advances."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 6)

    def forward(self, x):
        h = self.layer(x)
        return {"loss": (h * (1 + self.advance(h))).square().mean()}


class PlainNumber(Stateful):
    def __init__(self):
        super().__init__()
        self.longest = 0

    def advance(self, h):
        self.longest += 1
        return self.longest % 3

    def state(self):
        return self.longest


class CreatedLate(Stateful):
    """An attribute that the first forward pass makes."""

    def advance(self, h):
        self.seen = getattr(self, "seen", 0.0) + 0.5
        return self.seen

    def state(self):
        return self.seen


class AttributeTensor(Stateful):
    def __init__(self):
        super().__init__()
        self.running = torch.zeros(6)

    def advance(self, h):
        self.running.mul_(0.5).add_(h.detach().mean(0))
        return self.running

    def state(self):
        return self.running.tolist()


class MadeThenChanged(Stateful):
    """A hidden state that the first forward pass makes and the next ones change in place."""

    def __init__(self):
        super().__init__()
        self.hidden = None

    def advance(self, h):
        if self.hidden is None:
            self.hidden = {"state": torch.zeros(6)}
        self.hidden["state"].mul_(0.5).add_(h.detach().mean(0))
        return self.hidden["state"]

    def state(self):
        return self.hidden["state"].tolist()


class LargeQueue(AttributeTensor):
    """A queue of keys in a buffer, too large to be copied in each pass without a need."""

    def __init__(self):
        super().__init__()
        del self.running
        self.register_buffer("running", torch.zeros(20000, 6))
        self.register_buffer("labels", torch.zeros(20000, dtype=torch.long))
        self.position = 0

    def advance(self, h):
        size = h.shape[0]
        self.running[self.position : self.position + size] = h.detach()
        self.labels[self.position : self.position + size] = 1
        self.position += size
        return self.running[: self.position].mean() + self.labels.sum()


class QueueOfTensors(Stateful):
    def __init__(self):
        super().__init__()
        self.queue = deque(maxlen=3)

    def advance(self, h):
        self.queue.append(h.detach().mean(0))
        return sum(self.queue)

    def state(self):
        return [entry.tolist() for entry in self.queue]


class Containers(Stateful):
    def __init__(self):
        super().__init__()
        self.nested, self.counts, self.seen = defaultdict(list), Counter(), set()
        self.array, self.meter, self.ids = np.zeros(2), Meter(), itertools.count(1)

    def advance(self, h):
        self.nested["norms"].append(h.norm().item())
        self.counts.update(["calls"])
        self.seen.add(next(self.ids))
        self.array += len(self.seen)
        self.meter.total += self.array.sum()
        self.meter.count += 1
        return len(self.nested["norms"]) + self.counts["calls"] % 2 + self.meter.total / self.meter.count

    def state(self):
        return dict(self.nested), self.counts, self.seen, self.array.tolist(), vars(self.meter), next(self.ids)


class MomentumEncoder(Stateful):
    """A frozen copy that follows the trained layer (MoCo, BYOL), updated in each of the usual ways."""

    update = "in place"

    def __init__(self):
        super().__init__()
        self.teacher = torch.nn.Linear(6, 6).requires_grad_(False)
        self.teacher.load_state_dict({name: value + 0.3 for name, value in self.layer.state_dict().items()})

    def advance(self, h):
        for theirs, mine in zip(self.teacher.parameters(), self.layer.parameters(), strict=True):
            if self.update == "in place":
                with torch.no_grad():
                    theirs.lerp_(mine, 0.1)
            elif self.update == "through data":
                theirs.data.mul_(0.9).add_(mine.data, alpha=0.1)
            else:
                theirs.data = theirs.data * 0.9 + mine.data * 0.1
        return self.teacher(h.detach())

    def state(self):
        return [param.tolist() for param in self.teacher.parameters()]


def momentum(how):
    return type(f"Momentum_{how.replace(' ', '_')}", (MomentumEncoder,), {"update": how})


class Switch(Stateful):
    """Goes to and fro."""

    def __init__(self):
        super().__init__()
        self.left = False

    def advance(self, h):
        self.left = not self.left
        return float(self.left)

    def state(self):
        return self.left


class OwnGenerators(Stateful):
    def __init__(self):
        super().__init__()
        self.generators = {"torch": torch.Generator().manual_seed(1), "numpy": np.random.default_rng(1)}
        self.legacy, self.python = np.random.RandomState(1), random.Random(1)

    def advance(self, h):
        noise = torch.rand(6, generator=self.generators["torch"]) + self.generators["numpy"].random()
        return noise + self.legacy.rand() + self.python.random()

    def state(self):
        return self.advance(None).tolist()


STATEFUL = [
    PlainNumber,
    CreatedLate,
    AttributeTensor,
    MadeThenChanged,
    LargeQueue,
    QueueOfTensors,
    Containers,
    momentum("in place"),
    momentum("through data"),
    momentum("by a new tensor"),
    OwnGenerators,
]
