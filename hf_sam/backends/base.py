"""The contract of a backend, and all of it that does not depend on where the weights live.

A SAM step drives its backend in this order, alike on every rank:

    backend.begin_step()
    with backend.ascent_pass():         afterwards the gradients hold g
        with backend.micro_batch(last): each forward and backward of the ascent pass
            ...
    with backend.descent_pass():
        backend.perturb(rho, ...)       weights become w + e, gradients are cleared
        with backend.micro_batch(last): each forward and backward of the descent pass
            ...
    backend.restore()                   weights are w again, bit for bit; safe at any point, and more than once

A subclass says where weights, exact copies and gradients are, and how to add a number up over the ranks that share
the weights out between them.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable

import torch

from .. import perturbation
from ..parameters import select_names, trainable_parameters
from ..perturbation import Fragment, Perturbation
from ..rounding import is_low_precision


class Backend:
    """Perturbs and restores the trainable weights of one prepared model.

    Args:
        accelerator (`accelerate.Accelerator`): the accelerator that prepared `model`.
        model (`torch.nn.Module`): the prepared model, as the training loop calls it.
        adaptive (`bool`, defaults to `False`): ASAM instead of SAM.
        ascent_sync (`str`, defaults to `"global"`): `"global"`, or `"local"` where each replica climbs on its own
            gradient (m-sharpness).
        target (`list[str]`, *optional*): regular expressions of the parameters to perturb; all when omitted.
        exclude (`list[str]`, *optional*): regular expressions of the parameters not to perturb.
        seed (`int`, defaults to 0): seed of the stochastic rounding of 16-bit weights.
        stochastic_rounding (`bool`, defaults to `True`): `False` rounds the perturbation of 16-bit weights to
            nearest, which swallows it; only good for showing that it does.

    Raises:
        ValueError: if a pattern in `target` or `exclude` matches no trainable parameter.
    """

    def __init__(
        self,
        accelerator,
        model: torch.nn.Module,
        *,
        adaptive: bool = False,
        ascent_sync: str = "global",
        target: list[str] | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
        stochastic_rounding: bool = True,
    ):
        self.accelerator = accelerator
        self.model = model
        self.adaptive = adaptive
        self.ascent_sync = ascent_sync
        self.seed = seed
        self.stochastic_rounding = stochastic_rounding
        self._target = target
        self._exclude = exclude
        self._trainable: dict[str, torch.nn.Parameter] = {}
        self._select()
        # Devices whose random streams a forward pass may draw from.
        replicas = [torch.device(accelerator.device.type, i) for i in getattr(model, "device_ids", None) or ()]
        self.devices = {accelerator.device, *replicas, *(param.device for param in model.parameters())}

    def _select(self) -> None:
        trainable = trainable_parameters(self.model)
        if trainable.keys() != self._trainable.keys():
            self._trainable = trainable
            names = select_names(trainable, self._target, self._exclude)
            self.selected = {name: param for name, param in trainable.items() if name in names}

    def begin_step(self) -> None:
        """Before the ascent pass: parameters may have been frozen or unfrozen since the last step."""
        self._select()

    def ascent_pass(self) -> contextlib.AbstractContextManager:
        """Around all forwards and backwards of the ascent pass."""
        return contextlib.nullcontext()

    def descent_pass(self) -> contextlib.AbstractContextManager:
        """Around the perturbation and all forwards and backwards at the perturbed weights."""
        return contextlib.nullcontext()

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        """Around one micro-batch of a pass: gradients are synchronized over the ranks in the last one only."""
        if last or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model=self.model)

    @torch.no_grad()
    def perturb(self, rho: float, *, step: int = 0, measure: bool = False) -> Perturbation:
        """Move the weights from w to w + e along the gradients that are there, then clear the gradients.

        Args:
            rho (`float`): radius of the perturbation.
            step (`int`, defaults to 0): optimizer step; part of the seed of stochastic rounding.
            measure (`bool`, defaults to `False`): whether to measure what of e the weights kept.

        Returns:
            [`~hf_sam.perturbation.Perturbation`]: norm and checks, as tensors on the device.
        """
        fragments = self._fragments()
        norm = self._total(fragments, perturbation.squared_norms(fragments, self.adaptive)).sqrt()
        finite = self._agree(torch.isfinite(norm))
        fragments = self._hold(fragments)
        moved = perturbation.apply(
            fragments,
            perturbation.ascent_scale(rho, norm, finite),
            finite,
            self.adaptive,
            self._noise(step) if self.stochastic_rounding else None,
            measure,
        )
        self._publish()
        kept = None
        if measure:
            kept = self._total(fragments, [along for along, _ in moved])
            kept = kept / self._total(fragments, [length for _, length in moved])
        self.clear_gradients()
        return Perturbation(norm=norm, finite=finite, kept=kept)

    def restore(self, after_error: bool = False) -> None:
        """Give the weights their unperturbed values back, bit for bit; does nothing if they have them.

        Args:
            after_error (`bool`, defaults to `False`): whether an exception is on its way out, so that other ranks
                may not be here.
        """
        raise NotImplementedError

    def clear_gradients(self) -> None:
        """Drop every gradient of the model, also those kept outside of the parameters."""
        for param in self.model.parameters():
            param.grad = None

    def loss_scale(self) -> torch.Tensor | float:
        """Factor by which fp16 training multiplies the loss, and so the ascent gradient (1 elsewhere)."""
        scaler = self.accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return 1.0
        # `get_scale()` would wait for the device; scaling a one does not.
        return scaler.scale(torch.ones((), device=self.accelerator.device))

    def has_coarse_weights(self) -> bool:
        """Whether some perturbed weight exists in 16 bits only, so that e reaches it dithered instead of exactly."""
        return any(is_low_precision(param.dtype) for param in self.selected.values())

    # What a subclass has to say.

    def _fragments(self) -> list[Fragment]:
        """The selected weights on this rank that have a gradient; `master` may still be the weight itself."""
        raise NotImplementedError

    def _hold(self, fragments: list[Fragment]) -> list[Fragment]:
        """The same fragments with masters that keep w while the weights are perturbed."""
        return fragments

    def _publish(self) -> None:
        """Bring perturbed shards to whoever computes with them."""

    def _total(self, fragments: list[Fragment], values: list[torch.Tensor]) -> torch.Tensor:
        """Sum of one fp32 number per fragment over this rank and all ranks that hold other shards."""
        device = self.accelerator.device
        return torch.stack([value.to(device) for value in values]).sum() if values else torch.zeros((), device=device)

    def _agree(self, finite: torch.Tensor) -> torch.Tensor:
        """The verdict that all ranks share; a norm over all shards is shared already."""
        return finite

    def _noise_rank(self) -> int:
        """Ranks with the same weights must draw the same noise, ranks with different shards must not."""
        return 0

    def _noise(self, step: int) -> Callable[[torch.device], torch.Generator]:
        # A stream of its own, a pure function of seed and step: the global one stays as in plain training, and a
        # resumed run draws what the uninterrupted one would have drawn.
        # Hashed, because a small seed would repeat the numbers that initialized the weights.
        key = f"hf-sam stochastic rounding {self.seed} {step} {self._noise_rank()}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:7], "big")
        return functools.cache(lambda device: torch.Generator(device=device).manual_seed(seed))
