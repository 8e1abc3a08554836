"""Weights in ordinary parameters: one device, DDP, and FSDP2, whose DTensors hold this rank's shard.

The trainable weights (or shards) are copied aside, e is added in place, and the copy is copied back into the same
storage, which FSDP2, compiled graphs and views of it go on using. Cost: one copy of the trainable weights while the
descent pass runs.
"""

import contextlib
import dataclasses

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..perturbation import Fragment
from .base import Backend


class LocalBackend(Backend):
    """Backend for one device, DDP and FSDP2, with or without PEFT adapters."""

    def __init__(self, accelerator, model, **kwargs):
        super().__init__(accelerator, model, **kwargs)
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._fsdp_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def begin_step(self):
        super().begin_step()
        if any(param.grad is not None for param in self._trainable.values()):
            raise RuntimeError(
                "SAM found gradients from before its step, which would turn the ascent direction and then be lost. "
                "After each optimizer step call `model.zero_grad()`, or freeze the parameters that the optimizer does "
                "not train; accumulate micro-batches under `accelerator.accumulate(model)`, not by hand; add penalties "
                "to the loss of the step."
            )

    def ascent_pass(self):
        no_sync = getattr(self.model, "no_sync", None)
        if self.ascent_sync == "local" and no_sync is not None:
            return no_sync()
        return contextlib.nullcontext()

    @torch.no_grad()
    def restore(self, after_error: bool = False) -> None:
        if not self._saved:
            return
        weights, copies = map(list, zip(*self._saved, strict=True))
        try:
            torch._foreach_copy_(weights, copies)
        except BaseException:
            # A second Ctrl-C here must not leave half of the weights perturbed: copying twice does no harm.
            torch._foreach_copy_(weights, copies)
            raise
        finally:
            self._saved = []
            if after_error:
                self._abandon_iteration()
            self._reshard()

    def _fragments(self):
        fragments = []
        for name, param in self.selected.items():
            if param.grad is None:
                continue
            grad = param.grad.to_dense() if param.grad.is_sparse else param.grad
            weight = _local(param)
            fragments.append(Fragment(name=name, weight=weight, master=weight, grad=_local(grad)))
        return fragments

    def _hold(self, fragments):
        copies = [torch.empty_like(fragment.weight) for fragment in fragments]
        if fragments:
            torch._foreach_copy_(copies, [fragment.weight for fragment in fragments])
        # Registered before the first weight changes, so that an interrupt at any point can be undone.
        self._saved = [(fragment.weight, copy) for fragment, copy in zip(fragments, copies, strict=True)]
        return [dataclasses.replace(fragment, master=copy) for fragment, copy in zip(fragments, copies, strict=True)]

    def _publish(self):
        self._reshard()

    def _reshard(self):
        # FSDP2 may be told to keep gathered weights after the backward; those would hide a change of the shards.
        for module in self._fsdp_modules:
            module.reshard()

    def _abandon_iteration(self):
        # An error leaves gathered, perturbed weights behind, and gradients that were not reduced yet.
        for module in self._fsdp_modules[:1]:
            if hasattr(module, "reset_iter_state"):  # torch 2.13
                module.reset_iter_state()
        for module in self._fsdp_modules:
            group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None)
            for param in group.fsdp_params if group is not None else ():
                param.unsharded_accumulated_grad = None
                if hasattr(param, "_unsharded_param"):
                    param._unsharded_param.grad = None

    def _total(self, fragments, values):
        if not any(isinstance(param, DTensor) for param in self.selected.values()):
            return super()._total(fragments, values)
        by_name = {fragment.name: value for fragment, value in zip(fragments, values, strict=True)}
        device = self.accelerator.device
        zero = torch.zeros((), device=device)
        # One sum per set of mesh dimensions that shards a parameter; replicated dimensions hold the same values and
        # are not summed over. All ranks walk all selected parameters, with or without gradient, in the same order.
        sums: dict[tuple, torch.Tensor] = {}
        for name, param in self.selected.items():
            key = _shard_groups(param)
            sums[key] = sums.get(key, zero) + by_name.get(name, zero).to(device)
        total = zero
        for groups, value in sums.items():
            for group in groups:
                dist.all_reduce(value, group=group)
            total = total + value
        return total

    def _agree(self, finite):
        if self.ascent_sync == "global" or self.accelerator.num_processes == 1:
            return finite
        verdict = finite.to(torch.int32)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
        return verdict.bool()

    def _noise_rank(self):
        sharded = any(_shard_groups(param) for param in self.selected.values())
        return self.accelerator.process_index if sharded else 0


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The piece of `tensor` on this rank, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_groups(param: torch.Tensor) -> tuple:
    """Process groups over which `param` is cut into disjoint shards."""
    if not isinstance(param, DTensor):
        return ()
    mesh = param.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(param.placements) if not placement.is_replicate())
