"""DeepSpeed ZeRO stages 1 and 2: whole weights on every rank, fp32 masters and gradients in one partition a rank.

Each rank writes cast(master + e) into its partition of the flat weights and an all-gather spreads it, which is what
the optimizer's own step does with the updated masters. No copy of the weights is made.
"""

import torch.distributed as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

from ..parameters import plain_name
from ..perturbation import Fragment
from .zero import ZeroBackend


class Zero12Backend(ZeroBackend):
    """Backend for DeepSpeed ZeRO stages 1 and 2, with or without optimizer offload to the CPU."""

    private_names = (
        "averaged_gradients",
        "all_grad_tensors",
        "bit16_groups",
        "bit16_groups_flat",
        "parallel_partitioned_bit16_groups",
        "single_partition_of_fp32_groups",
        "real_dp_process_group",
        "dp_process_group",
        "nccl_start_alignment_factor",
        "allgather_bucket_size",
        "cpu_offload",
        "micro_step_id",
        "update_lp_params",
        "reset_cpu_buffers",
        "master_weights_and_grads_dtype",
    )

    def __init__(self, accelerator, model, **kwargs):
        super().__init__(accelerator, model, **kwargs)
        self._names = {id(param): plain_name(name) for name, param in model.named_parameters()}

    def _fragments(self):
        optimizer = self.optimizer
        fragments = []
        for group, params in enumerate(optimizer.bit16_groups):
            rank = dist.get_rank(group=optimizer.real_dp_process_group[group])
            weights = optimizer.parallel_partitioned_bit16_groups[group][rank]
            masters = optimizer.single_partition_of_fp32_groups[group]
            grads = self._partition_gradients(group)
            for param in params:
                name = self._names[id(param)]
                # A parameter without mapping lies wholly in the partitions of other ranks.
                if name not in self.selected or param._hp_mapping is None:
                    continue
                address = param._hp_mapping.get_hp_fragment_address()
                grad = grads.get(address.start)
                if grad is None:
                    continue
                fragments.append(
                    Fragment(
                        name=name,
                        weight=weights.narrow(0, address.start, address.numel),
                        master=masters.detach().narrow(0, address.start, address.numel),
                        grad=grad.reshape(-1).narrow(0, 0, address.numel),
                    )
                )
        return fragments

    def _partition_gradients(self, group):
        """Reduced gradients of this rank's partition, by where in the partition they start."""
        if self.optimizer.cpu_offload:
            flat = self.optimizer.single_partition_of_fp32_groups[group].grad
            starts = [
                param._hp_mapping.get_hp_fragment_address()
                for param in self.optimizer.bit16_groups[group]
                if param._hp_mapping is not None
            ]
            return {address.start: flat.narrow(0, address.start, address.numel) for address in starts}
        grads, start = {}, 0
        for grad in self.optimizer.averaged_gradients[group]:
            grads[start] = grad
            start += grad.numel()
        return grads

    def _hold(self, fragments):
        self._perturbed = True
        return fragments

    def _publish(self):
        optimizer = self.optimizer
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )

    def _put_back(self):
        self.optimizer.update_lp_params()

    def _reset_accumulation(self):
        optimizer = self.optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            for masters in optimizer.single_partition_of_fp32_groups:
                # Parameters without gradient in the descent pass must not step on their ascent gradient.
                masters.grad.zero_()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
