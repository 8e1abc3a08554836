"""The contract of a backend, and all of it that does not depend on where the weights live.

A SAM step drives its backend in this order, alike on every rank:

    backend.begin_step(bystanders)
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

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

from ...runtime.fingerprint import seed_of
from .. import perturbation
from ..parameters import check_perturbable, count_hooks, select_names, trainable_parameters
from ..perturbation import Fragment, Perturbation
from ..rounding import is_low_precision
from ..variants import Variant, get_variant
from ..weight_caches import WeightCaches


class Backend(abc.ABC):
    """Perturbs and restores the trainable weights of one prepared model, and of what trains together with it.

    Args:
        accelerator (`accelerate.Accelerator`): the accelerator that prepared `model`.
        model (`torch.nn.Module`): the prepared model, as the training loop calls it.
        variant ([`~hf_sam.step.variants.Variant`], *optional*): what e is; SAM when omitted.
        ascent_sync (`str`, defaults to `"global"`): `"global"`, or `"local"` where each replica climbs on its own
            gradient (m-sharpness).
        target (`list[str]`, *optional*): regular expressions of the parameters to perturb; all when omitted.
        exclude (`list[str]`, *optional*): regular expressions of the parameters not to perturb.
        outside (`Callable[[Backend], dict[str, torch.Tensor]]`, *optional*): tells the parameters outside of `model`
            that train with it, by name.
        companions (`Callable[[], list[torch.nn.Module]]`, *optional*): tells the modules beside `model` that the loop
            calls.
        seed (`int`, defaults to 0): seed of the stochastic rounding of 16-bit weights.

    Attributes:
        models (`list[torch.nn.Module]`): `model`, and other models that own parameters of `outside`.
        selected (`dict[str, torch.Tensor]`): the parameters to perturb, by name.

    Raises:
        ValueError: if a pattern in `target` or `exclude` matches no trainable parameter, or a parameter cannot be
            perturbed.
    """

    def __init__(
        self,
        accelerator,
        model: torch.nn.Module,
        *,
        variant: Variant | None = None,
        ascent_sync: str = "global",
        target: list[str] | None = None,
        exclude: list[str] | None = None,
        outside: Callable[["Backend"], dict[str, torch.Tensor]] = lambda backend: {},
        companions: Callable[[], list[torch.nn.Module]] = list,
        seed: int = 0,
    ):
        self.accelerator = accelerator
        self.model = model
        self.models = [model]
        self.variant = get_variant() if variant is None else variant
        self.ascent_sync = ascent_sync
        self.seed = seed
        self._target = target
        self._exclude = exclude
        self._find_outside = outside
        self._companions = companions
        self._trainable: dict[str, torch.Tensor] = {}
        self._hooks = 0
        self._outside: dict[str, torch.Tensor] = {}
        self._bystanders: list[torch.Tensor] = []
        self._set_aside: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._select()

    def _select(self) -> None:
        """Bring the parameters to perturb up to date: some may have been frozen, unfrozen, or replaced."""
        trainable, outside = trainable_parameters(self.model), self._find_outside(self)
        for name, param in outside.items():
            trainable[f"outside {name}" if name in trainable else name] = param
        hooks = count_hooks(trainable.values())
        if _same_objects(trainable, self._trainable) and hooks == self._hooks:
            return
        check_perturbable(trainable)
        self._hooks = hooks
        self._trainable = trainable
        self._outside = outside
        names = select_names(trainable, self._target, self._exclude)
        self.selected = {name: param for name, param in trainable.items() if name in names}
        # As the loop calls them: accelerate keeps its models without what DDP wraps around them.
        owners = [model for model in (*self._companions(), *self.accelerator._models) if _owns(model, outside.values())]
        self.models = [self.model, *(model for model in owners if model is not self.model)]
        # Devices whose random streams a forward pass may draw from.
        replicas = [
            torch.device(self.accelerator.device.type, i)
            for model in self.models
            for i in getattr(model, "device_ids", None) or ()
        ]
        params = [*(param for model in self.models for param in model.parameters()), *outside.values()]
        self.devices = {self.accelerator.device, *replicas, *(param.device for param in params)}
        self.weight_caches = WeightCaches(self.models)

    def begin_step(self, bystanders: Iterable[torch.Tensor] = ()) -> None:
        """Before the ascent pass.

        Args:
            bystanders (`Iterable[torch.Tensor]`): parameters that the passes may reach but this step does not train.
        """
        self._set_aside = []  # of the step before
        self._select()
        inside = {id(param) for param in self._trainable.values()}
        self._bystanders = [param for param in bystanders if id(param) not in inside]
        # Their gradients are the loop's own: the ascent pass adds nothing to them, the descent pass what plain
        # training would.
        self._set_aside = [(param, param.grad) for param in (*self._outside.values(), *self._bystanders)]
        for param, _ in self._set_aside:
            param.grad = None

    def touched_bystanders(self) -> list[torch.Tensor]:
        """After the ascent pass: the parameters that got a gradient, but do not climb."""
        return [param for param in self._bystanders if param.grad is not None]

    def ascent_pass(self) -> contextlib.AbstractContextManager:
        """Around all forwards and backwards of the ascent pass."""
        return contextlib.nullcontext()

    def descent_pass(self) -> contextlib.AbstractContextManager:
        """Around the perturbation and all forwards and backwards at the perturbed weights."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around one micro-batch of a pass: gradients are synchronized over the ranks in the last one only."""
        with contextlib.ExitStack() as stack:
            if not last and not self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
                for model in self.models:
                    stack.enter_context(self.accelerator.no_sync(model=model))
            yield

    def parameters_of(self, optimizer) -> list[torch.Tensor]:
        """The parameters that a prepared optimizer trains."""
        return [param for group in optimizer.param_groups for param in group["params"]]

    def keeps_frozen_parameters(self) -> bool:
        """Whether frozen parameters are whole between passes, so that a forward pass could update them."""
        return True

    def is_own_attribute(self, name: str) -> bool:
        """Whether an attribute of a module belongs to what trains it, and is not to be put back."""
        return False

    def room_for_copies(self) -> int:
        """Bytes that the first step may hold in copies during the ascent pass without raising the peak of memory."""
        return 0

    def runs_uneven_inputs(self) -> bool:
        """Whether some ranks may have run out of data, so that there must be no collective but those of the model."""
        return False

    @torch.no_grad()
    def perturb(self, rho: float, *, step: int = 0, measure: bool = False) -> Perturbation:
        """Move the weights from w to w + e along the gradients that are there, then clear the gradients.

        Args:
            rho (`float`): radius of the perturbation.
            step (`int`, defaults to 0): optimizer step; part of the seed of stochastic rounding.
            measure (`bool`, defaults to `False`): whether to measure what of e the weights kept.

        Returns:
            [`~hf_sam.step.perturbation.Perturbation`]: norm and checks, as tensors on the device.
        """
        fragments = self._fragments()
        norm = self._total(fragments, perturbation.squared_norms(fragments, self.variant)).sqrt()
        finite = self._agree(torch.isfinite(norm))
        fragments = self._hold(fragments)
        moved = perturbation.apply(
            fragments,
            self.variant,
            perturbation.ascent_scale(rho, norm, finite),
            finite,
            self._noise(step),
            measure,
        )
        self._publish()
        self.weight_caches.clear()
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
        try:
            self._restore(after_error)
        finally:
            self.weight_caches.clear()

    def clear_gradients(self) -> None:
        """Drop every gradient of the step, also those kept outside of the parameters."""
        for param in self.model.parameters():
            param.grad = None
        for param, grad in self._set_aside:
            param.grad = grad

    def loss_scale(self, scalers: list[torch.amp.GradScaler]) -> torch.Tensor | float:
        """Factor by which fp16 training multiplies the loss, and so the ascent gradient (1 elsewhere).

        Args:
            scalers (`list[torch.amp.GradScaler]`): those that the ascent pass used.
        """
        if not scalers:
            return 1.0
        # `get_scale()` would wait for the device; scaling a one does not.
        return scalers[0].scale(torch.ones((), device=self.accelerator.device))

    def has_coarse_weights(self) -> bool:
        """Whether some perturbed weight exists in 16 bits only, so that e reaches it dithered instead of exactly."""
        return any(is_low_precision(param.dtype) for param in self.selected.values())

    # What a subclass has to say.

    @abc.abstractmethod
    def _fragments(self) -> list[Fragment]:
        """The selected weights on this rank that have a gradient; `master` may still be the weight itself."""

    @abc.abstractmethod
    def _restore(self, after_error: bool) -> None:
        """See [`Backend.restore`]."""

    def _hold(self, fragments: list[Fragment]) -> list[Fragment]:
        """The same fragments with masters that keep w while the weights are perturbed."""
        return fragments

    def _publish(self) -> None:  # noqa: B027  (nothing to do where no weight is sharded)
        """Bring perturbed shards to whoever computes with them."""

    def _total(self, fragments: list[Fragment], values: list[torch.Tensor]) -> torch.Tensor:
        """Sum of one fp32 number per fragment over this rank and all ranks that hold other shards."""
        device = self.accelerator.device
        return torch.stack([value.to(device) for value in values]).sum() if values else torch.zeros((), device=device)

    def _agree(self, finite: torch.Tensor) -> torch.Tensor:
        """The verdict that all ranks share; a norm over all shards is shared already."""
        return finite

    def _noise(self, step: int) -> Callable[[Fragment], torch.Generator]:
        """Random generators for stochastic rounding, one for each piece of a parameter.

        A pure function of seed, step, parameter and place in it: the global stream stays as in plain training, a
        resumed run draws what the uninterrupted one would have drawn, replicas of a piece draw the same, and different
        pieces do not.
        """
        generators: dict[torch.device, torch.Generator] = {}

        def noise(fragment: Fragment) -> torch.Generator:
            device = fragment.grad.device
            if device not in generators:
                generators[device] = torch.Generator(device=device)
            seed = seed_of(f"hf-sam stochastic rounding {self.seed} {step} {fragment.name} {fragment.place}")
            return generators[device].manual_seed(seed)

        return noise


def _same_objects(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(param is others[name] for name, param in some.items())


def _owns(model: torch.nn.Module, params: Iterable[torch.Tensor]) -> bool:
    wanted = {id(param) for param in params}
    return any(id(param) in wanted for param in model.parameters())
