"""What ranks must agree on besides a strategy's ordinary run, on two ranks: the whole file is one launch.

torchrun --standalone --nproc_per_node 2 ranks.py OUT
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hf_sam import SAMStep
from hf_sam.runtime.distributed import leave_processes
from hf_sam.step.backends.local import _fragment as fragment_of
from hf_sam.step.noise import uniform_noise

RHO = 0.3


def fresh_accelerator() -> Accelerator:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=True)


def network(seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


def batches(steps: int = 6) -> torch.Tensor:
    """Steps x ranks x rows x width."""
    return torch.randn(steps, 2, 4, 16, generator=torch.Generator().manual_seed(3))


def loss_of(model, x) -> torch.Tensor:
    return (model(x) - x.sum(-1, keepdim=True)).square().mean()


def step_function(accelerator, model):
    def forward_backward(x):
        loss = loss_of(model, x)
        accelerator.backward(loss)
        return loss.detach()

    return forward_backward


def same_on_ranks(tensors) -> bool:
    """Whether all ranks hold the same, bitwise."""
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    return torch.equal(*both)


def train(rho: float, register=None, steps: int = 6, accelerator=None, **ddp):
    """SGD under DDP; the weights, the metrics of each step, and the accelerator."""
    accelerator = accelerator or fresh_accelerator()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    if register is not None:
        register(model)
    sam = SAMStep(accelerator, model, rho, **ddp)
    forward_backward, metrics = step_function(accelerator, model), []
    for x in batches(steps):
        sam(forward_backward, x[accelerator.process_index])
        metrics.append(sam.pop_metrics())
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters()), metrics


def communication_hooks() -> dict:
    """PowerSGD, whose error feedback is what the last gradient left out, and a hook without a state."""
    results = {}
    for name, hook, state_of in (
        (
            "PowerSGD",
            powersgd.powerSGD_hook,
            lambda: powersgd.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2),
        ),
        ("fp16", default_hooks.fp16_compress_hook, lambda: None),
    ):
        weights, states = [], []
        for rho in (0.0, 1e-30):
            state = state_of()
            params, _ = train(rho, lambda model, hook=hook, state=state: model.register_comm_hook(state, hook))
            weights.append(params)
            states.append(state)
        results[name] = {
            "same": all(torch.equal(mine, theirs) for mine, theirs in zip(*weights, strict=True)),
            "iterations": [getattr(state, "iter", None) for state in states],
            "errors": [
                torch.cat([error.flatten() for error in state.error_dict.values()]) if state is not None else None
                for state in states
            ],
        }
    return results


def hook_with_a_state_that_cannot_be_kept() -> str:
    import threading

    def register(model):
        model.register_comm_hook(threading.Lock(), default_hooks.allreduce_hook)

    try:
        train(RHO, register, steps=1)
    except ValueError as error:
        return str(error)
    return "accepted"


def uneven_inputs() -> dict:
    """Rank 0 has one batch more than rank 1; plain training and SAM with a radius that vanishes."""
    results = {}
    for rho in (0.0, 1e-30, RHO):
        accelerator = fresh_accelerator()
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
        sam = SAMStep(accelerator, model, rho)
        forward_backward = step_function(accelerator, model)
        with Join([model]):
            for x in batches(3 - accelerator.process_index):
                sam(forward_backward, x[accelerator.process_index])
                optimizer.step()
                optimizer.zero_grad()
        results[rho] = [param.detach().clone() for param in model.parameters()]
        results[f"same {rho}"] = same_on_ranks(results[rho])
        results["metrics"] = sam.pop_metrics()
    return results


def static_graph() -> dict:
    accelerator = fresh_accelerator()
    model = DistributedDataParallel(network(), static_graph=True)
    sam = SAMStep(accelerator, model, 1e-30)
    forward_backward = step_function(accelerator, model)
    for x in batches(3):
        model.zero_grad()
        sam(forward_backward, x[accelerator.process_index])
    gradients = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    loss_of(model, batches(3)[2, accelerator.process_index]).backward()
    results = {"same": all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))}
    try:
        SAMStep(accelerator, model, RHO, ascent_sync="local")
    except ValueError as error:
        results["local"] = str(error)
    return results


def partial_gradients() -> dict:
    """A LayerNorm under sequence parallelism, whose gradients are sums that nobody has taken yet."""
    accelerator = fresh_accelerator()
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 6, 4, generator=generator)

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x)

    model, other = Norm(), Norm()
    parallelize_module(model, mesh, {"norm": SequenceParallel(use_local_output=False)})
    sam = SAMStep(accelerator, model, RHO)

    def forward_backward(_):
        shards = [distribute_tensor(value, mesh, [Shard(1)]) for value in (x, target)]
        loss = (model(shards[0]) - shards[1]).square().mean()
        loss = loss.redistribute(placements=[Replicate()]).to_local()
        loss.backward()
        return loss.detach()

    sam(forward_backward, None)
    from hf_sam.step.reference import sam_step

    expected = sam_step(other, [None], lambda m, _: (m(x) - target).square().mean(), RHO)
    metrics = sam.pop_metrics()
    return {
        "placements": [str(param.grad.placements) for param in model.parameters()],
        "norm": (metrics["sam/ascent_grad_norm"], expected.ascent_grad_norm),
        "perturbed": (metrics["sam/perturbed_loss"], expected.perturbed_loss),
        "gradients": [param.grad.full_tensor() for param in model.parameters()],
        "expected": [param.grad for param in other.parameters()],
    }


def replicas_of_a_shard() -> dict:
    """HSDP with 16-bit weights: replicas draw the same noise, different shards do not."""
    results = {}
    for name, shape in (("replicated", (2, 1)), ("sharded", (1, 2))):
        accelerator = fresh_accelerator()
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        torch.manual_seed(0)
        # Two halves with the same weights and the same gradient, which differ in their noise alone.
        model = torch.nn.Linear(64, 2, bias=False)
        with torch.no_grad():
            model.weight[1] = model.weight[0]
        model.to(torch.bfloat16)
        fully_shard(model, mesh=mesh)
        sam = SAMStep(accelerator, model, 1e-3)
        seen = []

        def forward_backward(x, model=model, seen=seen):
            seen.append(model.weight.to_local().detach().clone())
            loss = model(x).float().sum()
            loss.backward()
            return loss.detach()

        sam(forward_backward, torch.ones(1, 64, dtype=torch.bfloat16))
        moved = seen[1].float() - seen[0].float()
        results[name] = {"same": same_on_ranks([moved]), "moved": moved.ne(0).sum().item()}
    return results


def states_of_sharded_modules() -> dict:
    """FSDP2 gives the modules of the user classes of its own; their attributes are the user's all the same."""

    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.calls, self.seen = torch.nn.Linear(16, 1), 0, []

        def forward(self, x):
            self.calls += 1
            self.seen.append(self.calls)
            return self.layer(x) * (1 + self.calls % 3) * len(self.seen)

    results = {}
    for rho in (0.0, 1e-30):
        accelerator = fresh_accelerator()
        model = Counts()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        sam = SAMStep(accelerator, model, rho, optimizer=optimizer)
        for x in batches(3):
            sam(step_function(accelerator, model), x[accelerator.process_index])
            optimizer.step()
            optimizer.zero_grad()
        results[rho] = (model.calls, model.seen, [param.full_tensor().detach() for param in model.parameters()])
    return results


def a_head_that_nobody_synchronizes() -> dict:
    """The model is under DDP, the head of the loss is not: all ranks must still divide by one norm."""
    accelerator = fresh_accelerator()
    torch.manual_seed(0)
    body, head = torch.nn.Linear(16, 8), torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1)
    body = accelerator.prepare(body)
    sam = SAMStep(accelerator, body, RHO, optimizer=optimizer)
    seen = []

    def forward_backward(x):
        seen.append([param.detach().clone() for param in body.parameters()])
        loss = (head(body(x)) - x.sum(-1, keepdim=True)).square().mean()
        accelerator.backward(loss)
        return loss.detach()

    sam(forward_backward, batches(1)[0, accelerator.process_index])
    gradients = [param.grad for param in body.parameters()]
    return {"perturbed": same_on_ranks(seen[1]), "gradients": same_on_ranks(gradients)}


def two_models() -> dict:
    """Two models under DDP with accumulation: gradients are synchronized in the last micro-batch only, for both."""
    results = {}
    for rho in (0.0, 1e-30):
        accelerator = fresh_accelerator()
        accelerator.gradient_accumulation_steps = 2
        torch.manual_seed(0)
        body, head = torch.nn.Linear(16, 8), torch.nn.Linear(8, 1)
        optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1)
        body, head, optimizer = accelerator.prepare(body, head, optimizer)
        sam = SAMStep(accelerator, body, rho)

        def forward_backward(x, accelerator=accelerator, body=body, head=head):
            loss = (head(body(x)) - x.sum(-1, keepdim=True)).square().mean()
            accelerator.backward(loss)
            return loss.detach() / 2

        for x in batches(4):
            with accelerator.accumulate(body, head):
                sam(forward_backward, x[accelerator.process_index])
                optimizer.step()
                optimizer.zero_grad()
        results[rho] = [param.detach().clone() for model in (body, head) for param in model.parameters()]
    return results


def ranks_with_different_radii() -> list[str]:
    import logging

    told = []

    class Keeps(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())

    logging.getLogger("hf_sam").addHandler(Keeps())
    accelerator = fresh_accelerator()
    model = accelerator.prepare(network())
    sam = SAMStep(accelerator, model, RHO * (1 + accelerator.process_index))
    sam(step_function(accelerator, model), batches(1)[0, accelerator.process_index])
    sam.pop_metrics()
    return told


def noise_of_shards() -> list[bool]:
    """Whether this rank's random numbers are those of its part of the whole parameter: rows, columns, complex rows."""
    mesh = init_device_mesh("cpu", (2,))
    right = []
    for placement, dtype in ((Shard(0), torch.float32), (Shard(1), torch.float32), (Shard(0), torch.complex64)):
        param = distribute_tensor(torch.ones(4, 6, dtype=dtype), mesh, [placement])
        drawn = fragment_of("weight", param, None, {}).whole("key").noise()
        shape = (4, 6, 2) if dtype.is_complex else (4, 6)
        whole = uniform_noise("key weight", 0, 48 if dtype.is_complex else 24, torch.device("cpu")).view(shape)
        mine = whole.chunk(2, dim=placement.dim)[dist.get_rank()]
        right.append(torch.equal(drawn, mine))
    return right


SCENARIOS = (
    noise_of_shards,
    communication_hooks,
    hook_with_a_state_that_cannot_be_kept,
    uneven_inputs,
    static_graph,
    partial_gradients,
    replicas_of_a_shard,
    states_of_sharded_modules,
    a_head_that_nobody_synchronizes,
    two_models,
    ranks_with_different_radii,
)


def main():
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    results = {}
    for scenario in SCENARIOS:
        results[scenario.__name__] = scenario()
        dist.barrier()
    if dist.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "ranks.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
    leave_processes()
