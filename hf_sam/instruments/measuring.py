"""Put a model into the state in which it is measured, and back."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..runtime.sharding import reshard
from ..step.replay import RandomState


@contextlib.contextmanager
def measuring(model: torch.nn.Module, *, exact: bool = False) -> Iterator[torch.nn.Module]:
    """Context manager: the model is in evaluation mode; modes and random streams are restored at the end.

    Args:
        model (`torch.nn.Module`): the model, also as accelerate prepared it.
        exact (`bool`, defaults to `False`): compute in the precision of the weights: without autocast, neither that
            of the caller nor the one that accelerate puts around a prepared model's forward pass, and without TF32.

    Yields:
        `torch.nn.Module`: the model without the containers that only matter in a backward pass (DDP, DeepSpeed).
    """
    # Compiled graphs would be recompiled for every shape, and hide the wrapper of accelerate.
    inner = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    reshard(inner)  # FSDP2 may have left gathered weights in place of its shards
    modes = [(module, module.training) for module in inner.modules()]
    state = RandomState.capture({param.device for param in inner.parameters()})
    wrapped = inner.__dict__.get("forward")
    try:
        inner.eval()
        with contextlib.ExitStack() as stack:
            if exact:
                if wrapped is not None and "_original_forward" in inner.__dict__:
                    inner.forward = inner._original_forward
                stack.enter_context(torch.autocast(device_of(inner).type, enabled=False))
                stack.enter_context(_full_fp32())
                _check_attention(inner)
            yield inner
    finally:
        if wrapped is not None:
            inner.forward = wrapped
        for module, training in modes:
            module.training = training
        reshard(inner)
        state.restore()


@contextlib.contextmanager
def _full_fp32() -> Iterator[None]:
    """Context manager: matrix products of fp32 numbers in fp32, because TF32 and bf16 round away small noise."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _check_attention(model: torch.nn.Module) -> None:
    """Raises ValueError for attention that exists in 16 bits only, if the weights are not."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    if attention.startswith("flash") and next(model.parameters()).dtype == torch.float32:
        raise ValueError(
            f"Measured in fp32, the model cannot use {attention!r}, which computes in 16 bits only. Call "
            "model.set_attn_implementation('sdpa')."
        )


@contextlib.contextmanager
def differentiable_twice(model: torch.nn.Module) -> Iterator[None]:
    """Context manager: allows second derivatives, with the gradient checkpointing of the model.

    Fused attention has no second derivative, so the plain one computes. Checkpointing acts in training mode only; the
    layers that do it are put in that mode, but not the modules in them, so that there is no dropout.

    Raises:
        ValueError: for reentrant checkpointing, which cannot be differentiated twice.
    """
    for module in model.modules():
        settings = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", None) or {}
        if getattr(module, "gradient_checkpointing", False):
            if settings.get("use_reentrant", False):
                raise ValueError(
                    "Second derivatives cannot pass through reentrant gradient checkpointing. Call "
                    "model.gradient_checkpointing_enable({'use_reentrant': False})."
                )
            if not _drops_out(module):
                module.training = True
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _drops_out(module: torch.nn.Module) -> bool:
    """Whether the module itself calls functional dropout in training mode."""
    return any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the inputs of the model."""
    return next(param.device for param in model.parameters())


def logits_of(output) -> torch.Tensor:
    """The logits of a model's output, shape `(rows, length, vocabulary)`.

    Raises:
        ValueError: if the model returns none.
    """
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"The model returned a {type(output).__name__} without logits; a language model is needed.")
    return logits
