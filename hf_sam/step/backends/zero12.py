"""DeepSpeed ZeRO stages 1 and 2: whole weights on every rank; fp32 masters and gradients partitioned over the ranks.

Each rank writes cast(master + e) into its partition of the flat weights, followed by an all-gather, as in the step of
DeepSpeed's optimizer. No copy of the weights is needed.
"""

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

from ..moments import moments_of
from ..perturbation import Fragment
from .zero import ZeroBackend


class Zero12Backend(ZeroBackend):
    """Backend for DeepSpeed ZeRO stages 1 and 2, with or without optimizer offload to the CPU."""

    private_names = (
        "averaged_gradients",
        "all_grad_tensors",
        "bit16_groups",
        "bit16_groups_flat",
        "params_in_partition",
        "grad_partition_insertion_offset",
        "grad_start_offset",
        "get_param_id",
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

    def parameters_of(self, optimizer):
        # The groups of DeepSpeed's optimizer hold its flat partitions.
        return [param for group in self.optimizer.bit16_groups for param in group]

    def _fragments(self, variant, noise):
        optimizer = self.optimizer
        names = {id(param): name for name, param in self.selected.items()}
        if optimizer.cpu_offload:
            # Gradients are copied to the CPU asynchronously.
            get_accelerator().synchronize()
        fragments = []
        ascends = variant.passes == 2
        for group, params in enumerate(optimizer.params_in_partition):
            rank = dist.get_rank(group=optimizer.real_dp_process_group[group])
            weights = optimizer.parallel_partitioned_bit16_groups[group][rank].detach()
            flat = optimizer.single_partition_of_fp32_groups[group]
            masters = flat.detach()
            grads = self._partition_gradients(group) if ascends else None
            moments = moments_of(flat, [optimizer.optimizer], variant.moments)
            for param in params:
                if id(param) not in names:
                    continue
                # Offset of the parameter in the partition. Its first elements may be in the previous partition.
                key = optimizer.get_param_id(param)
                start = int(optimizer.grad_partition_insertion_offset[group][rank][key])
                skipped = int(optimizer.grad_start_offset[group][rank][key])
                numel = min(param.numel() - skipped, masters.numel() - start)
                fragments.append(
                    Fragment(
                        name=names[id(param)],
                        place=f"{rank}.{skipped}",
                        first=skipped,
                        weight=weights.narrow(0, start, numel),
                        master=masters.narrow(0, start, numel),
                        grad=grads(start, numel) if ascends else None,
                        moments={kind: moment.narrow(0, start, numel) for kind, moment in moments.items()},
                    )
                )
        return fragments

    def _partition_gradients(self, group):
        """Return a function that takes start and length and returns reduced gradients of this rank's partition."""
        if self.optimizer.cpu_offload:
            flat = self.optimizer.single_partition_of_fp32_groups[group].grad
            return lambda start, numel: flat.narrow(0, start, numel)
        pieces, start = {}, 0
        for piece in self.optimizer.averaged_gradients[group]:
            pieces[start] = piece
            start += piece.numel()
        return lambda start, numel: pieces[start].detach().reshape(-1).narrow(0, 0, numel)

    def _save_weights(self, fragments):
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

    def _rewrite_weights(self):
        self.optimizer.update_lp_params()

    def _reset_accumulation(self):
        optimizer = self.optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            for masters in optimizer.single_partition_of_fp32_groups:
                # Parameters without gradient in the descent pass must not be updated with their ascent gradient.
                masters.grad.zero_()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
