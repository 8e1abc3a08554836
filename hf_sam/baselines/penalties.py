"""Penalties on the distance to the initial weights, for any trainer.

    L2-to-base:  lambda / 2 * sum_i (w_i - b_i)^2            (L2-SP, arXiv 1802.01483)
    EWC:         lambda / 2 * sum_i F_i (w_i - b_i)^2        (Kirkpatrick 2017, arXiv 1612.00796, eq. 3)

The gradient of the penalty is added to that of the loss once per optimizer step, after the last micro-batch. So it
needs no autograd graph, does not depend on gradient accumulation, is clipped together with the gradient of the loss,
and works on the shards of FSDP2.

With the penalty before SAM, `class T(EWCMixin, SAMTrainer)`, its gradient is computed at w. With the penalty after SAM,
`class T(SAMMixin, EWCMixin, Trainer)`, both passes use the penalized loss.
"""

import math
from dataclasses import dataclass, field

import torch
from transformers import Trainer, TrainingArguments

from ..runtime.distributed import all_reduce_max
from ..runtime.sharding import check_gradients_accessible, is_sharded, local_shard, shard_like
from ..step.parameters import plain_name
from ..trainer import SAMMixin, check_in_front, once_per_step
from .fisher import load_fisher


@dataclass(repr=False)
class L2Arguments:
    """Arguments of [`L2Mixin`]: a mixin for any subclass of [`~transformers.TrainingArguments`].

    Args:
        l2_lambda (`float`, defaults to 0.0): strength of the penalty.
    """

    l2_lambda: float = field(
        default=0.0, metadata={"help": "[penalty] lambda of lambda / 2 * ||w - w_base||^2. 0 turns it off."}
    )

    def __post_init__(self):
        _check_strength("l2_lambda", self.l2_lambda)
        super().__post_init__()


@dataclass(repr=False)
class EWCArguments:
    """Arguments of [`EWCMixin`]: a mixin for any subclass of [`~transformers.TrainingArguments`].

    Args:
        ewc_lambda (`float`, defaults to 0.0): strength of the penalty.
        ewc_fisher (`str`, *optional*): file with the Fisher information of the base model.
    """

    ewc_lambda: float = field(
        default=0.0,
        metadata={
            "help": "[penalty] lambda of lambda / 2 * sum F (w - w_base)^2. 0 turns it off; arXiv 2605.02105 uses "
            "1e3 to 1e5 with the F of batch gradients: estimate_fisher(batch_size=...)."
        },
    )
    ewc_fisher: str | None = field(
        default=None, metadata={"help": "[penalty] File of hf_sam.baselines.save_fisher with F of the base model."}
    )

    def __post_init__(self):
        _check_strength("ewc_lambda", self.ewc_lambda)
        if self.ewc_lambda > 0 and self.ewc_fisher is None:
            raise ValueError(
                "ewc_lambda needs ewc_fisher: the file that hf_sam.baselines.save_fisher wrote for the base model."
            )
        super().__post_init__()


def _check_strength(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be a finite number, 0 or larger.")


class _Penalty:
    """lambda / 2 * sum F (w - b)^2 over the trainable weights of a model; F = 1 when omitted."""

    def __init__(self, model: torch.nn.Module, strength: float, importance: dict[str, torch.Tensor] | None):
        self.strength = strength
        trainable = {plain_name(name): param for name, param in model.named_parameters() if param.requires_grad}
        # On some ranks only, but all must fail: the others would wait for them.
        if all_reduce_max(sum(param.is_meta for param in trainable.values())):
            raise ValueError(
                "A penalty copies the initial weights, but some processes have none yet (they are on the meta device). "
                "Load the whole model on each process (fsdp_config: cpu_ram_efficient_loading false)."
            )
        if importance is not None:
            for name, param in trainable.items():
                if name not in importance or importance[name].shape != param.shape:
                    raise ValueError(
                        f"The Fisher information has no entry for {name!r} of shape {tuple(param.shape)}. Estimate it "
                        "on the model that you fine-tune."
                    )
        self.base = {name: param.detach().to("cpu", copy=True) for name, param in trainable.items()}
        self.importance = importance
        self._placed: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @torch.no_grad()
    def add_gradient(self, model: torch.nn.Module, scale: float) -> torch.Tensor:
        """Add `scale` times the gradient of the penalty to `.grad`; returns the penalty of this rank's shards.

        Returns:
            `torch.Tensor`: fp32, shape `()`.
        """
        total = None
        for name, param in model.named_parameters():
            if not param.requires_grad or (name := plain_name(name)) not in self.base:
                continue
            weight = local_shard(param)
            base, importance = self._place(name, param)
            moved = weight.float() - base
            pull = moved if importance is None else moved * importance
            value = (pull * moved).sum() * (self.strength / 2)
            total = value if total is None else total + value.to(total.device)
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            local_shard(param.grad).add_((pull * (self.strength * scale)).to(param.grad.dtype))
        return total if total is not None else torch.zeros(())

    def _place(self, name: str, param: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The shards of base and importance that correspond to this rank's shard of `param`, on its device."""
        if name not in self._placed:
            whole = [self.base[name], self.importance[name] if self.importance is not None else None]
            device = local_shard(param).device
            pieces = [
                None if value is None else shard_like(value, param).to(device, torch.float32, copy=True)
                for value in whole
            ]
            self._placed[name] = tuple(pieces)
            # Free the whole tensors, which would otherwise stay in the CPU memory of every rank.
            self.base[name] = torch.empty(0)
            if self.importance is not None:
                self.importance[name] = torch.empty(0)
        return self._placed[name]


class _PenaltyMixin:
    """Adds the gradient of a penalty once per optimizer step, and logs the penalty."""

    _penalty_name: str

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._penalties: dict[str, _Penalty] = {}
        self._penalty_values: dict[str, torch.Tensor] = {}
        self._penalty_step = -1
        # A trainer may combine several penalty mixins.
        for mixin in [cls for cls in type(self).__mro__ if "_penalty_name" in vars(cls)]:
            if (strength := mixin._penalty_strength(self)) > 0:
                self._check_penalty_backend()
                self._penalties[mixin._penalty_name] = _Penalty(self.model, strength, mixin._penalty_importance(self))

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        check_in_front(cls, _PenaltyMixin, "EWCMixin or L2Mixin")

    def _check_penalty_backend(self):
        name = type(self).__name__
        check_gradients_accessible(self.accelerator, name, optim=str(self.args.optim))
        order = type(self).__mro__
        after_sam = SAMMixin in order and order.index(SAMMixin) < order.index(_PenaltyMixin)
        if after_sam and getattr(self.args, "sam_ascent_micro_batches", None) is not None:
            raise ValueError(
                f"With sam_ascent_micro_batches, the ascent pass of {name} would use part of the loss but the whole "
                "penalty. List the penalty before SAM: class MyTrainer(EWCMixin, SAMTrainer)."
            )

    @once_per_step  # before SAM in the MRO, the penalty is computed at w
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._penalties and self.accelerator.sync_gradients:
            self._add_penalties(model)
        return loss

    def _add_penalties(self, model) -> None:
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        # After SAM in the MRO, this is called in both passes; only the first one is at w.
        first = self._penalty_step != self.state.global_step
        self._penalty_step = self.state.global_step
        for name, penalty in self._penalties.items():
            value = penalty.add_gradient(model, scale)
            if first and is_sharded(model):
                value = self.accelerator.reduce(value, reduction="sum")
            if first:
                self._penalty_values[name] = value

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs.update({f"{name}/penalty": value.item() for name, value in self._penalty_values.items()})
        super().log(logs, *args, **kwargs)


class L2Mixin(_PenaltyMixin):
    """L2-to-base for any [`~transformers.Trainer`]: `class MyTrainer(L2Mixin, Base)`.

    The arguments must have the fields of [`L2Arguments`]. The base is the model at construction of the trainer. Memory:
    one fp32 copy of the trainable weights (or shards). The logged `loss` does not include the penalty, which is logged
    as `l2/penalty`.

    Raises:
        ValueError: at construction, under DeepSpeed.
    """

    _penalty_name = "l2"

    def _penalty_strength(self) -> float:
        return _required(self.args, "l2_lambda", L2Arguments)

    def _penalty_importance(self):
        return None


class EWCMixin(_PenaltyMixin):
    """Elastic weight consolidation for any [`~transformers.Trainer`]: `class MyTrainer(EWCMixin, Base)`.

    The arguments must have the fields of [`EWCArguments`]. The base is the model at construction of the trainer.
    Memory: two fp32 copies of the trainable weights (or shards). The logged `loss` does not include the penalty, which
    is logged as `ewc/penalty`.

    Raises:
        ValueError: at construction, if the Fisher information does not match the model, or under DeepSpeed.
    """

    _penalty_name = "ewc"

    def _penalty_strength(self) -> float:
        return _required(self.args, "ewc_lambda", EWCArguments)

    def _penalty_importance(self):
        return load_fisher(self.args.ewc_fisher)


def _required(args, name: str, fields: type) -> float:
    if not hasattr(args, name):
        raise ValueError(
            f"{type(args).__name__} has no field {name!r}. Use class MyArguments({fields.__name__}, "
            f"{type(args).__name__})."
        )
    return getattr(args, name)


@dataclass(repr=False)
class L2TrainingArguments(L2Arguments, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the field of [`L2Mixin`]."""


@dataclass(repr=False)
class EWCTrainingArguments(EWCArguments, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the fields of [`EWCMixin`]."""


class L2Trainer(L2Mixin, Trainer):
    """[`~transformers.Trainer`] with the L2-to-base penalty."""


class EWCTrainer(EWCMixin, Trainer):
    """[`~transformers.Trainer`] with elastic weight consolidation."""
