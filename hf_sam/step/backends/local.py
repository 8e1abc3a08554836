"""Backend for weights in ordinary parameters: one device, DDP, and FSDP2 (DTensor shards).

The trainable weights (or shards) are cloned, e is added in place, and the clone is copied back into the same storage,
because FSDP2, compiled graphs and views keep referring to it. Cost: one copy of the trainable weights during the
descent pass.
"""

import contextlib
import dataclasses
import functools
import math

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ...runtime.sharding import flat_offset, local_shard, shard_like
from ..moments import moments_of
from ..noise import uniform_noise
from ..perturbation import Fragment, sum_on
from .base import Backend
from .ddp import check_replicas, is_in_join_context, replayed_hook_states


class LocalBackend(Backend):
    """Backend for one device, DDP and FSDP2, with or without PEFT adapters."""

    def __init__(self, accelerator, model, **kwargs):
        super().__init__(accelerator, model, **kwargs)
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _select(self):
        before = self._trainable
        super()._select()
        if self._trainable is not before:
            self._fsdp_modules = [m for model in self.models for m in model.modules() if isinstance(m, FSDPModule)]
            check_replicas(self.models, self.ascent_sync)

    def begin_step(self, bystanders=()):
        super().begin_step(bystanders)
        if any(param.grad is not None for param in self._trainable.values()):
            raise RuntimeError(
                "SAM found gradients from before its step, which would change the ascent direction and then be lost. "
                "Call `model.zero_grad()` after each optimizer step, or freeze the parameters that the optimizer does "
                "not train; accumulate micro-batches under `accelerator.accumulate(model)`, not by hand; add penalties "
                "to the loss of the step."
            )
        if self.ascent_sync == "local" and self.accelerator.num_processes > 1 and self.has_uneven_inputs():
            raise RuntimeError(
                "sam_ascent_sync='local' needs an all-reduce to check that gradients are finite, but under "
                "join_uneven_inputs some ranks may not take part. Use sam_ascent_sync='global', or even inputs."
            )

    @contextlib.contextmanager
    def ascent_pass(self):
        with contextlib.ExitStack() as stack:
            for model in self.models:
                if self.ascent_sync == "local" and hasattr(model, "no_sync"):
                    stack.enter_context(model.no_sync())
                stack.enter_context(replayed_hook_states(model))
            yield

    def keeps_frozen_parameters(self):
        # FSDP2 frees gathered parameters after use, so a forward pass cannot update them.
        return not self._fsdp_modules

    def copy_budget(self):
        # As much as the copy of the weights during the descent pass.
        return sum(local_shard(param).nbytes for param in self.selected.values())

    def has_uneven_inputs(self):
        return any(is_in_join_context(model) for model in self.models)

    @torch.no_grad()
    def _restore(self, after_error: bool) -> None:
        if not self._saved:
            return
        weights, copies = map(list, zip(*self._saved, strict=True))
        try:
            torch._foreach_copy_(weights, copies)
        except BaseException:
            # A second Ctrl-C must not leave some of the weights perturbed. Copying twice is safe.
            torch._foreach_copy_(weights, copies)
            raise
        finally:
            self._saved = []
            if after_error:
                self._abandon_iteration()
            self._reshard()

    def _fragments(self, variant, noise):
        fragments = []
        for name, param in self.selected.items():
            grad = self._gradient(param) if variant.passes == 2 else None
            if grad is None and variant.passes == 2 and noise:
                grad = torch.zeros_like(local_shard(param))
            if grad is not None or variant.passes == 1:
                fragments.append(_fragment(name, param, grad, self._moments(param, variant)))
        return fragments

    def _gradient(self, param) -> torch.Tensor | None:
        """This rank's part of the ascent gradient; None if there is none."""
        grad = param.grad
        if grad is None:
            return None
        if isinstance(param, DTensor):
            # Sequence parallelism leaves partial sums that must be reduced over the ranks.
            return grad.redistribute(param.device_mesh, param.placements).to_local()
        return grad.to_dense() if grad.is_sparse else grad

    def _moments(self, param, variant) -> dict[str, torch.Tensor]:
        """This rank's part of the moments that the variant uses."""
        moments = moments_of(param, self.optimizers(), variant.moments)
        return {kind: local_shard(moment) for kind, moment in moments.items()}

    def _save_weights(self, fragments):
        copies = [torch.empty_like(fragment.weight) for fragment in fragments]
        if fragments:
            torch._foreach_copy_(copies, [fragment.weight for fragment in fragments])
        # Assigned before any weight changes, so that an interrupt at any point can be undone.
        self._saved = [(fragment.weight, copy) for fragment, copy in zip(fragments, copies, strict=True)]
        return [dataclasses.replace(fragment, master=copy) for fragment, copy in zip(fragments, copies, strict=True)]

    def _publish(self):
        self._reshard()

    def _reshard(self):
        # With reshard_after_backward=False, FSDP2 keeps gathered weights, which would hide a change of the shards.
        for module in self._fsdp_modules:
            module.reshard()

    def _abandon_iteration(self):
        # An error may leave gathered perturbed weights and unreduced gradients behind.
        for module in self._fsdp_modules[:1]:
            if hasattr(module, "reset_iter_state"):  # torch 2.13
                module.reset_iter_state()
        for module in self._fsdp_modules:
            group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None)
            for param in group.fsdp_params if group is not None else ():
                param.unsharded_accumulated_grad = None
                if hasattr(param, "_unsharded_param"):
                    param._unsharded_param.grad = None

    def _sum_over_ranks(self, fragments, values):
        device = self.accelerator.device
        by_name = {fragment.name: value for fragment, value in zip(fragments, values, strict=True)}
        zero = torch.zeros((), device=device)
        # One sum per set of mesh dimensions that shard a parameter. Replicated dimensions hold the same values and are
        # not summed over. All ranks iterate over all selected parameters, with or without gradient, in the same order.
        unsynchronized = self._unsynchronized()
        sums: dict[tuple, list[torch.Tensor]] = {}
        for name, param in self.selected.items():
            if name not in unsynchronized:
                sums.setdefault(_shard_groups(param), []).append(by_name.get(name, zero))
        total = zero
        for groups, parts in sums.items():
            value = sum_on(device, parts)
            for group in groups:
                dist.all_reduce(value, group=group)
            total = total + value
        if unsynchronized:
            # Their gradients are not averaged over the ranks, but all ranks must divide by the same norm.
            value = sum_on(device, [by_name.get(name, zero) for name in self.selected if name in unsynchronized])
            total = total + self.accelerator.reduce(value, reduction="mean")
        return total

    def _unsynchronized(self) -> set[str]:
        """Selected parameters whose gradients DDP does not synchronize; empty with a single rank."""
        if not self._outside or self.accelerator.num_processes == 1:
            return set()
        if self.ascent_sync == "local" or self.has_uneven_inputs():
            return set()
        synchronized = [self.model, *(model for model in self.models if isinstance(model, DistributedDataParallel))]
        owned = {id(param) for model in synchronized for param in model.parameters()}
        return {
            name for name, param in self.selected.items() if id(param) not in owned and not isinstance(param, DTensor)
        }

    def _finite_on_all_ranks(self, finite):
        if self.ascent_sync == "global" or self.accelerator.num_processes == 1:
            return finite
        finite = finite.to(torch.int32)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return finite.bool()


def _fragment(name, param, grad, moments) -> Fragment:
    weight, first, pairs = local_shard(param), flat_offset(param), param.is_complex()
    place = _place(param) if isinstance(param, DTensor) else ""
    draw = uniform_noise if first is not None else functools.partial(_draw_shard, param)
    if pairs:
        weight, grad = torch.view_as_real(weight), grad if grad is None else torch.view_as_real(grad.resolve_conj())
        moments = {kind: torch.view_as_real(moment) for kind, moment in moments.items()}
    first = (first or 0) * (2 if pairs else 1)
    return Fragment(name, weight, weight, grad, place, pairs, first, draw, moments)


def _draw_shard(param: DTensor, key: str, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Random numbers of a shard that does not consist of whole rows: cut out of those of the parameter."""
    shape = (*param.shape, 2) if param.is_complex() else param.shape
    whole = uniform_noise(key, 0, math.prod(shape), device).view(shape)
    return shard_like(whole, param).reshape(-1)[first : first + count]


def _shard_groups(param: torch.Tensor) -> tuple:
    """Process groups over which `param` is sharded."""
    if not isinstance(param, DTensor):
        return ()
    mesh = param.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(param.placements) if not placement.is_replicate())


def _place(param: DTensor) -> str:
    """Coordinates of this rank's shard in the mesh; the same on all ranks with a replica of the shard."""
    mesh = param.device_mesh
    return ".".join(
        str(mesh.get_local_rank(dim)) for dim, placement in enumerate(param.placements) if not placement.is_replicate()
    )
