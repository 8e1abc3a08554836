"""The interface of a backend, and all code that does not depend on where the weights are stored.

A SAM step calls its backend in this order, the same on every rank:

    backend.begin_step(bystanders)
    with backend.ascent_pass():         afterwards the gradients hold g
        with backend.micro_batch(last): each forward and backward of the ascent pass
            ...
    with backend.descent_pass():
        backend.perturb(rho, ...)       weights become w + e, gradients are cleared
        with backend.micro_batch(last): each forward and backward of the descent pass
            ...
    backend.restore()                   weights are bitwise w again; may be called at any point, and repeatedly

A subclass defines where weights, exact copies and gradients are stored, and how to sum a number over the ranks that
hold the shards.
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
from ..variants.still import Still
from ..weight_caches import WeightCaches


class Backend(abc.ABC):
    """Perturbs and restores the trainable weights of a prepared model, and of parameters that train together with it.

    Args:
        accelerator (`accelerate.Accelerator`): the accelerator that prepared `model`.
        model (`torch.nn.Module`): the prepared model that the training loop calls.
        variant ([`~hf_sam.step.variants.Variant`], *optional*): defines the perturbation; SAM when omitted.
        ascent_sync (`str`, defaults to `"global"`): `"global"`, or `"local"` if each replica uses its own ascent
            gradient (m-sharpness).
        target (`list[str]`, *optional*): regular expressions of the parameters to perturb; all when omitted.
        exclude (`list[str]`, *optional*): regular expressions of the parameters not to perturb.
        outside_parameters (`Callable[[Backend], dict[str, torch.Tensor]]`, *optional*): returns the parameters outside
            of `model` that train together with it, by name.
        outside_modules (`Callable[[], list[torch.nn.Module]]`, *optional*): returns the modules outside of `model` that
            the training loop calls.
        optimizers (`Callable[[], Iterable]`, *optional*): returns the optimizers, for variants that use their moments.
        seed (`int`, defaults to 0): seed of the stochastic rounding of 16-bit weights, and of random perturbations.

    Attributes:
        models (`list[torch.nn.Module]`): `model`, and the other models that own `outside_parameters`.
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
        outside_parameters: Callable[["Backend"], dict[str, torch.Tensor]] = lambda backend: {},
        outside_modules: Callable[[], list[torch.nn.Module]] = list,
        optimizers: Callable[[], Iterable] = list,
        seed: int = 0,
    ):
        self.accelerator = accelerator
        self.model = model
        self.models = [model]
        self.variant = get_variant() if variant is None else variant
        self.ascent_sync = ascent_sync
        self.optimizers = optimizers
        self.seed = seed
        self._target = target
        self._exclude = exclude
        self._find_outside_parameters = outside_parameters
        self._find_outside_modules = outside_modules
        self._trainable: dict[str, torch.Tensor] = {}
        self._hooks = 0
        self._outside: dict[str, torch.Tensor] = {}
        self._bystanders: list[torch.Tensor] = []
        self._saved_grads: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._select()

    def _select(self) -> None:
        """Update the parameters to perturb, since some may have been frozen, unfrozen or replaced."""
        trainable, outside = trainable_parameters(self.model), self._find_outside_parameters(self)
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
        # Modules that the loop calls come first, since accelerate may keep its models without their DDP wrapper.
        candidates = (*self._find_outside_modules(), *self.accelerator._models)
        owners = [model for model in candidates if _owns(model, outside.values())]
        self.models = [self.model, *(model for model in owners if model is not self.model)]
        # Devices whose random generators a forward pass may use.
        replicas = [
            torch.device(self.accelerator.device.type, i)
            for model in self.models
            for i in getattr(model, "device_ids", None) or ()
        ]
        params = [*(param for model in self.models for param in model.parameters()), *outside.values()]
        self.devices = {self.accelerator.device, *replicas, *(param.device for param in params)}
        self.weight_caches = WeightCaches(self.models)

    def begin_step(self, bystanders: Iterable[torch.Tensor] = ()) -> None:
        """Called before the ascent pass.

        Args:
            bystanders (`Iterable[torch.Tensor]`): trainable parameters that the passes may use but this step does not
                train.
        """
        self._saved_grads = []  # of the previous step
        self._select()
        inside = {id(param) for param in self._trainable.values()}
        self._bystanders = [param for param in bystanders if id(param) not in inside]
        # The loop owns the gradients of these parameters: the ascent pass must not change them, and the descent pass
        # adds the same as plain training.
        self._saved_grads = [(param, param.grad) for param in (*self._outside.values(), *self._bystanders)]
        for param, _ in self._saved_grads:
            param.grad = None

    def bystanders_with_gradient(self) -> list[torch.Tensor]:
        """After the ascent pass: the parameters that got a gradient but are not perturbed."""
        return [param for param in self._bystanders if param.grad is not None]

    def ascent_pass(self) -> contextlib.AbstractContextManager:
        """Context around all forward and backward passes of the ascent pass."""
        return contextlib.nullcontext()

    def descent_pass(self) -> contextlib.AbstractContextManager:
        """Context around the perturbation and all forward and backward passes at the perturbed weights."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Context around one micro-batch; only the last one synchronizes gradients over the ranks."""
        with contextlib.ExitStack() as stack:
            if not last and not self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
                for model in self.models:
                    stack.enter_context(self.accelerator.no_sync(model=model))
            yield

    def parameters_of(self, optimizer) -> list[torch.Tensor]:
        """The parameters that a prepared optimizer trains."""
        return [param for group in optimizer.param_groups for param in group["params"]]

    def keeps_frozen_parameters(self) -> bool:
        """Whether frozen parameters stay unsharded between passes, so that a forward pass could update them."""
        return True

    def is_engine_attribute(self, name: str) -> bool:
        """Whether a module attribute belongs to the training engine and must not be restored."""
        return False

    def copy_budget(self) -> int:
        """Bytes of copies that the ascent pass may hold in the first step without raising the peak memory."""
        return 0

    def has_uneven_inputs(self) -> bool:
        """Whether some ranks may have run out of data, so that only the collectives of the model are allowed."""
        return False

    @torch.no_grad()
    def perturb(
        self,
        rho: float,
        *,
        noise: float = 0.0,
        loss_rise: float = 0.0,
        gradient_scale: torch.Tensor | float = 1.0,
        step: int = 0,
        measure: bool = False,
    ) -> Perturbation:
        """Perturb the weights from w to w + e, then clear the gradients.

        Args:
            rho (`float`): radius of the perturbation; with `loss_rise` the largest radius; 0 for noise only.
            noise (`float`, defaults to 0): standard deviation of random noise, relative to each weight.
            loss_rise (`float`, defaults to 0): first-order rise of the loss that determines the radius, in nats; 0 for
                the radius `rho`.
            gradient_scale (`torch.Tensor` or `float`, defaults to 1): factor that makes the accumulated gradient that
                of the mean loss of the step.
            step (`int`, defaults to 0): optimizer step; part of the seed of stochastic rounding.
            measure (`bool`, defaults to `False`): whether to measure how much of e is left in the stored weights.

        Returns:
            [`~hf_sam.step.perturbation.Perturbation`]: norm and checks, as tensors on the device.
        """
        variant = self.variant if rho > 0 else Still()
        fragments = self._fragments(variant, noise > 0) if rho > 0 or noise > 0 else []
        key = f"hf-sam perturbation {self.seed} {step}"
        norm = torch.zeros((), device=self.accelerator.device)
        if rho > 0:
            norm = self._sum_over_ranks(fragments, perturbation.squared_norms(fragments, variant, key)).sqrt()
        finite = self._finite_on_all_ranks(torch.isfinite(norm))
        radius = perturbation.radius_of(rho, loss_rise, norm * gradient_scale)
        fragments = self._save_weights(fragments)
        moved = perturbation.apply(
            fragments,
            variant,
            perturbation.ascent_scale(radius, norm, finite),
            finite,
            self._noise(step),
            measure,
            key,
            noise,
        )
        self._publish()
        self.weight_caches.clear()
        self.clear_gradients()
        return Perturbation(norm=norm * gradient_scale, radius=radius, finite=finite, moved=moved)

    def restore(self, after_error: bool = False) -> None:
        """Restore the unperturbed weights bitwise; does nothing if they are not perturbed.

        Args:
            after_error (`bool`, defaults to `False`): whether an exception is propagating, so that other ranks may not
                call this method.
        """
        try:
            self._restore(after_error)
        finally:
            self.weight_caches.clear()

    def clear_gradients(self) -> None:
        """Clear all gradients of the step, including those stored outside of the parameters."""
        for param in self.model.parameters():
            param.grad = None
        for param, grad in self._saved_grads:
            param.grad = grad

    def loss_scale(self, scalers: list[torch.amp.GradScaler]) -> torch.Tensor | float:
        """Factor by which fp16 training scales the loss and the ascent gradient; 1 without fp16.

        Args:
            scalers (`list[torch.amp.GradScaler]`): the scalers that the ascent pass used.
        """
        if not scalers:
            return 1.0
        # `get_scale()` would wait for the device; scaling the number 1 does not.
        return scalers[0].scale(torch.ones((), device=self.accelerator.device))

    def has_low_precision_weights(self) -> bool:
        """Whether a perturbed weight exists only in 16 bits, so that e is rounded stochastically instead of exact."""
        return any(is_low_precision(param.dtype) for param in self.selected.values())

    # Interface of a subclass.

    @abc.abstractmethod
    def _fragments(self, variant: Variant, noise: bool) -> list[Fragment]:
        """The selected weights on this rank, with what the variant needs; `master` may be the weight itself.

        Weights without the gradient that the variant needs may be left out, unless there is noise.
        """

    @abc.abstractmethod
    def _restore(self, after_error: bool) -> None:
        """See [`Backend.restore`]."""

    def _save_weights(self, fragments: list[Fragment]) -> list[Fragment]:
        """Return the same fragments with masters that hold w exactly while the weights are perturbed."""
        return fragments

    def _publish(self) -> None:  # noqa: B027  (nothing to do where no weight is sharded)
        """Make changed shards visible to the next forward pass on all ranks."""

    def _sum_over_ranks(self, fragments: list[Fragment], values: list[torch.Tensor]) -> torch.Tensor:
        """Sum one fp32 number per fragment over this rank and all ranks with other shards; shape `()`."""
        return perturbation.sum_on(self.accelerator.device, values)

    def _finite_on_all_ranks(self, finite: torch.Tensor) -> torch.Tensor:
        """Whether the gradient is finite on all ranks. A norm over all shards is the same on all ranks already."""
        return finite

    def _noise(self, step: int) -> Callable[[Fragment], torch.Generator]:
        """Random generators for stochastic rounding, one per fragment.

        Each is a pure function of seed, step, parameter and place. So the global random state stays as in plain
        training, a resumed run draws the same numbers as an uninterrupted one, and only replicas of a fragment share
        their numbers.
        """
        generators: dict[torch.device, torch.Generator] = {}

        def noise(fragment: Fragment) -> torch.Generator:
            device = fragment.device
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
