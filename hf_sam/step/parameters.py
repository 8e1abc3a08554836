"""Select the parameters that SAM perturbs, by regular expressions over their names in the unwrapped model."""

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from accelerate.logging import get_logger

from .replay.reach import reach
from .rounding import is_low_precision

logger = get_logger(__name__)

# Prefixes that torch.compile, activation checkpointing and FSDP insert into parameter names, at any depth.
_WRAPPER_PARTS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def plain_name(name: str) -> str:
    """The name of a parameter in the unwrapped model."""
    for part in _WRAPPER_PARTS:
        name = name.replace(part, "")
    # Prefix of DDP and DeepSpeed. Only at the front, since a model may have a submodule with this name.
    return name.removeprefix("module.")


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by plain name; a tied parameter appears only under its first name."""
    return {plain_name(name): param for name, param in model.named_parameters() if param.requires_grad}


def check_perturbable(trainable: dict[str, torch.Tensor]) -> None:
    """Check that the trainable parameters can be perturbed.

    Args:
        trainable (`dict[str, torch.Tensor]`): trainable parameters by name.

    Raises:
        ValueError: if a parameter has less than 16 bits, or a hook updates it inside the backward pass; the message
            names the remedy.
    """
    for name, param in trainable.items():
        if param.dtype.itemsize < 2:
            raise ValueError(
                f"SAM cannot perturb the trainable parameter {name!r}, which is stored as {param.dtype}. Freeze the "
                "quantized weights and train adapters on top of them, or load the model in 16 or 32 bits."
            )
        if steps_in_backward(param):
            raise ValueError(
                f"SAM does not support the hook of the parameter {name!r} that steps an optimizer in the backward "
                "pass: it would also update the weights in the ascent pass. Remove the hooks and call optimizer.step() "
                "after the backward pass."
            )


def count_hooks(params: Iterable[torch.Tensor]) -> int:
    """Number of hooks that the backward pass calls for `params`."""
    return sum(len(hooks) for param in params for hooks in _hooks(param))


def steps_in_backward(param: torch.Tensor) -> bool:
    """Whether a hook of `param` holds an optimizer, and therefore probably steps it."""
    if hasattr(param, "_in_backward_optimizers"):  # torch.distributed.optim._apply_optimizer_in_backward
        return True
    return any(
        isinstance(value, torch.optim.Optimizer)
        for hooks in _hooks(param)
        for hook in hooks.values()
        for _, value in reach(hook)
    )


def _hooks(param: torch.Tensor) -> list[dict]:
    found = (param._backward_hooks, getattr(param, "_post_accumulate_grad_hooks", None))
    return [hooks for hooks in found if hooks]


def keep_adapters_in_fp32(model: torch.nn.Module) -> None:
    """Cast the trainable adapters of a quantized model back to fp32, the dtype in which PEFT creates them.

    TRL casts them to bf16, whose rounding error would be larger than the perturbation. The memory cost is small.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    adapters = [param for param in model.parameters() if param.requires_grad and is_low_precision(param.dtype)]
    for param in adapters:
        param.data = param.data.float()
    if adapters:
        logger.info(f"Keeping {len(adapters)} adapter weights in float32 instead of 16 bits, so that SAM is exact.")


def select_names(
    names: Iterable[str], target: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> set[str]:
    """Names that match a `target` pattern and no `exclude` pattern (`re.search` for both).

    Args:
        names (`Iterable[str]`): names of the trainable parameters.
        target (`Sequence[str]`, *optional*): patterns of the parameters to perturb; all parameters when omitted.
        exclude (`Sequence[str]`, *optional*): patterns of the parameters not to perturb.

    Raises:
        ValueError: if there is no trainable parameter, a pattern is not a regular expression or matches nothing
            (the message lists similar names), or no parameter is left to perturb.
    """
    names = list(names)
    if not names:
        raise ValueError(
            "SAM found no trainable parameter to perturb. Unfreeze the parameters to be trained, or set sam_rho=0."
        )
    targeted = _matches(names, target, "sam_target_modules") if target else set(names)
    selected = targeted - (_matches(names, exclude, "sam_exclude_modules") if exclude else set())
    if not selected:
        raise ValueError(
            f"sam_target_modules={target} and sam_exclude_modules={exclude} together leave no parameter to perturb. "
            "Loosen one of them, or set sam_rho=0 to train without SAM."
        )
    return selected


def _matches(names: list[str], patterns: Sequence[str], field: str) -> set[str]:
    found = set()
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{field}: {pattern!r} is not a regular expression: {error}.") from error
        hits = {name for name in names if expression.search(name)}
        if not hits:
            raise ValueError(
                f"{field}: {pattern!r} matches none of the {len(names)} trainable parameters. "
                f"Similar names: {', '.join(_most_similar(names, pattern))}."
            )
        found |= hits
    return found


def _most_similar(names: list[str], pattern: str, count: int = 5) -> list[str]:
    """The names that are most similar to the pattern, as a whole or in one of their dotted parts."""
    wanted = re.sub(r"[\\^$*+?()|\[\]{}]", "", pattern).strip(".")

    def similarity(name: str) -> float:
        candidates = [name, *name.split(".")]
        return max(difflib.SequenceMatcher(None, wanted, candidate).ratio() for candidate in candidates)

    return sorted(names, key=similarity, reverse=True)[:count]
