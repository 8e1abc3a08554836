"""DeepSpeed ZeRO stage 3: each parameter has one flat shard per rank and is gathered for use.

Each rank writes cast(master + e) into its shards, and the forward pass gathers the perturbed weights. Small parameters
that DeepSpeed keeps gathered are partitioned before the change and gathered again after it. For fp32 weights, the
shards are the masters themselves; only these are cloned, and restored before the optimizer step.
"""

import dataclasses

import torch
from deepspeed.accelerator import get_accelerator

from ..moments import moments_of
from ..perturbation import Fragment
from .zero import ZeroBackend


class Zero3Backend(ZeroBackend):
    """Backend for DeepSpeed ZeRO stage 3, with or without offload to the CPU."""

    private_names = (
        "_get_fp32_grad_state_partition",
        "_get_fp32_opt_state_partition",
        "_partition_all_parameters",
        "persistent_parameters",
        "get_param_id",
        "grad_position",
        "grad_partitions_flat_buffer",
        "offload_optimizer",
        "fp32_partitioned_groups_flat",
        "reset_cpu_buffers",
        "dp_process_group",
        "master_weights_and_grads_dtype",
    )

    def __init__(self, accelerator, model, **kwargs):
        super().__init__(accelerator, model, **kwargs)
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keeps_frozen_parameters(self):
        return False  # gathered only for use, so a forward pass cannot update them

    def parameters_of(self, optimizer):
        return []  # DeepSpeed partitions nothing outside of the model

    def _select(self):
        super()._select()
        # DeepSpeed's optimizer does not train parameters that were frozen when it was created.
        positions, key = self.optimizer.grad_position, self.optimizer.get_param_id
        self.selected = {name: param for name, param in self.selected.items() if key(param) in positions}

    def _fragments(self, variant, noise):
        if self.optimizer.offload_optimizer:
            # Gradients are copied to the CPU asynchronously.
            get_accelerator().synchronize()
        fragments = []
        for name, param in self.selected.items():
            shard = param.ds_tensor.detach().view(-1)
            fragments.append(
                Fragment(
                    name=name,
                    place=str(self.accelerator.process_index),
                    first=self.accelerator.process_index * shard.numel(),
                    weight=shard,
                    master=self._master(param),
                    grad=self._gradient(param) if variant.passes == 2 else None,
                    moments=self._moments(param, variant.moments),
                )
            )
        return fragments

    def _gradient(self, param):
        return self.optimizer._get_fp32_grad_state_partition(param, release_swap_buffers=True)[0].view(-1)

    def _moments(self, param, wanted):
        group, start, numel = self.optimizer.grad_position[self.optimizer.get_param_id(param)]
        flat = self.optimizer.fp32_partitioned_groups_flat[group]
        # With partial offload, another optimizer steps the parameters that stay on the accelerator.
        optimizers = [self.optimizer.optimizer, getattr(self.optimizer, "backup_optimizer", None)]
        moments = moments_of(flat, filter(None, optimizers), wanted)
        return {kind: moment.narrow(0, start, numel) for kind, moment in moments.items()}

    def _master(self, param):
        # Not DeepSpeed's public accessors, which copy offloaded shards to the accelerator.
        return self.optimizer._get_fp32_opt_state_partition(param, release_swap_buffers=True)[0].detach().view(-1)

    def _save_weights(self, fragments):
        self._perturbed = True
        self.optimizer._partition_all_parameters()
        held = []
        for fragment in fragments:
            if fragment.master.data_ptr() == fragment.weight.data_ptr():
                fragment = dataclasses.replace(fragment, master=fragment.weight.clone())
                self._saved.append((fragment.weight, fragment.master))
            held.append(fragment)
        return held

    def _publish(self):
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        else:
            # The next forward pass gathers the shards on another stream, which does not wait for the current one.
            get_accelerator().synchronize()

    def _before_engine_step(self):
        for weight, copy in self._saved:
            weight.copy_(copy)
        self._saved = []

    def _rewrite_weights(self):
        self.optimizer._partition_all_parameters()
        self._before_engine_step()
        for param in self.selected.values():
            master = self._master(param)
            if master.data_ptr() != param.ds_tensor.data_ptr():
                param.ds_tensor.detach().view(-1).copy_(master)
        self._publish()

    def _reset_accumulation(self):
        optimizer = self.optimizer
        # Also resets the counters that decide whether the next backward pass starts a new accumulation.
        optimizer.zero_grad(set_to_none=True)
        # Parameters without gradient in the descent pass (e.g. unused experts) must have zeros here.
        optimizer.grad_partitions_flat_buffer.zero_()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
            for masters in optimizer.fp32_partitioned_groups_flat:
                masters.grad.zero_()
