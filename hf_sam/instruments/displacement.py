"""Move the weights of a model and restore them bitwise, for instruments that look around a minimum.

One copy of the moved weights is kept, and copied back into the same storage.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from transformers.pytorch_utils import Conv1D

from ..runtime.fingerprint import seed_of
from ..runtime.sharding import check_not_zero3, compute_dtype, local_shard, reshard, shard_like

# Noise is drawn in pieces of this many numbers, to save memory.
_CHUNK = 1 << 20

# A model, or its weights by name.
Weights = torch.nn.Module | Mapping[str, torch.Tensor]


def floating_parameters(
    model: torch.nn.Module, pattern: str | None, what: str, *, trainable: bool = False
) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, without duplicates, that match `pattern`; all (trainable) ones without a pattern.

    Raises:
        ValueError: if there are none, or some are quantized, or out of reach.
    """
    everything = dict(model.named_parameters())
    if pattern:
        chosen = {name: param for name, param in everything.items() if re.search(pattern, name)}
    else:
        chosen = {name: param for name, param in everything.items() if param.requires_grad or not trainable}
    if not chosen:
        names = f"{len(everything)} parameters, such as {next(iter(everything), None)!r}"
        problem = f"{pattern!r} matches none of them" if pattern else "none of them is trainable"
        raise ValueError(f"{what} has no weights to look at: of {names}, {problem}. Choose some with parameters=...")
    elsewhere = [name for name, param in chosen.items() if param.is_meta]
    if elsewhere:
        raise ValueError(
            f"{what} changes the weights in place, but {elsewhere[0]!r} ({len(elsewhere)} in all) is offloaded. "
            "Load the whole model on one device."
        )
    quantized = [name for name, param in chosen.items() if not param.is_floating_point()]
    if quantized:
        raise ValueError(
            f"{what} needs floating-point weights, but {quantized[0]!r} ({len(quantized)} in all) is quantized. "
            "Measure the model before quantization, or name other parameters with parameters=..."
        )
    check_not_zero3(chosen, what)
    return chosen


def transposed_weights(model: torch.nn.Module) -> set[str]:
    """Names of the weights that are stored as `(inputs, outputs)`, as in the `Conv1D` layers of GPT-2."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def difference(end: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """end - weight, on the device and in the dtype of `weight`."""
    return end.to(weight) - weight.detach()


def weights_like(other: Weights, params: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """The weights of another model of the same shapes, by the names in `params`.

    Raises:
        ValueError: if one is missing or has another shape.
    """
    weights = dict(other.named_parameters()) if isinstance(other, torch.nn.Module) else dict(other)
    for name, param in params.items():
        if name not in weights:
            raise ValueError(
                f"The other model has no {name!r}. Merge adapters, and compare models of one architecture."
            )
        if weights[name].shape != param.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(param.shape)} in one model and {tuple(weights[name].shape)} in the other; "
                "models with resized embeddings do not lie in one weight space."
            )
    return {name: weights[name].detach() for name in params}


class Displacement:
    """Context manager within which weights can be moved; restores them at its end, also after errors.

    Args:
        model (`torch.nn.Module`): the model whose weights are moved.
        params (`dict[str, torch.nn.Parameter]`): the weights that may be moved.

    Attributes:
        origin (`dict[str, torch.Tensor]`): w, this rank's shards.
    """

    def __init__(self, model: torch.nn.Module, params: dict[str, torch.nn.Parameter]):
        self.model = model
        self.params = params
        self.origin: dict[str, torch.Tensor] = {}

    def __enter__(self) -> "Displacement":
        self.origin = {name: local_shard(param).detach().clone() for name, param in self.params.items()}
        return self

    @torch.no_grad()
    def move(self, place: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Set each weight to `place(name, w)`, which has the shape of w (of this rank's shard)."""
        for name, param in self.params.items():
            local_shard(param).copy_(place(name, self.origin[name]))
        reshard(self.model)

    def add_noise(self, noise: "GaussianNoise") -> None:
        """Set each weight to w plus its noise."""
        for name, param in self.params.items():
            noise.add(name, self.origin[name], local_shard(param))
        reshard(self.model)

    @torch.no_grad()
    def back(self) -> None:
        """Set all weights to w."""
        for name, origin in self.origin.items():
            local_shard(self.params[name]).copy_(origin)
        reshard(self.model)

    def __exit__(self, *error) -> None:
        try:
            self.back()
        except BaseException:
            self.back()  # a second interrupt must not leave some weights moved
            raise
        finally:
            self.origin = {}


class GaussianNoise:
    """Independent Gaussian noise that depends only on its seed, the names of the weights, and the device type.

    So it is the same for all batches, and a sharded model gets the noise that the whole one would get.

    Args:
        params (`dict[str, torch.nn.Parameter]`): the weights.
        deviations (`float` or `dict[str, float]`): standard deviation, for all weights or by name.
        seed (`int`): another one for each sample.
    """

    def __init__(self, params: dict[str, torch.nn.Parameter], deviations: float | dict[str, float], seed: int):
        self.params = params
        self.deviations = deviations
        self.seed = seed

    def deviation(self, name: str) -> float:
        """Standard deviation of the noise of one weight tensor."""
        return self.deviations if isinstance(self.deviations, float) else self.deviations.get(name, 0.0)

    def chunks(self, name: str, device: torch.device, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The noise of one whole weight tensor, flattened, in pieces of at most `_CHUNK` numbers."""
        generator = torch.Generator(device=device).manual_seed(seed_of(f"hf-sam noise {self.seed} {name}"))
        left, deviation = self.params[name].numel(), self.deviation(name)
        while left:
            count = min(left, _CHUNK)
            yield torch.randn(count, generator=generator, device=device, dtype=dtype).mul_(deviation)
            left -= count

    @torch.no_grad()
    def add(self, name: str, origin: torch.Tensor, weight: torch.Tensor) -> None:
        """`weight` = `origin` + noise, both this rank's shard of the parameter."""
        dtype = torch.promote_types(origin.dtype, torch.float32)
        if self.deviation(name) == 0:
            weight.copy_(origin)
            return
        chunks = self.chunks(name, origin.device, dtype)
        param = self.params[name]
        if local_shard(param) is param and weight.is_contiguous() and origin.is_contiguous():
            start = 0
            for chunk in chunks:
                piece = slice(start, start + len(chunk))
                weight.view(-1)[piece] = chunk.add_(origin.view(-1)[piece])
                start += len(chunk)
        else:
            weight.copy_(shard_like(torch.cat(list(chunks)).view(param.shape), param).add(origin))


def sample_seed(seed: int, sample: int) -> int:
    """A different seed for each noise sample."""
    return (seed << 20) + sample


def check_noise_survives(model: torch.nn.Module, params: dict[str, torch.nn.Parameter], noise: GaussianNoise) -> None:
    """Raises ValueError if the weights are too coarse to hold the noise, which would then measure rounding instead.

    Noise that is well below the spacing of 16-bit numbers mostly vanishes, and what remains is larger than it should
    be; the share of its squared length that arrives is far from 1 then.
    """
    name, param = max(params.items(), key=lambda item: item[1].numel())
    origin = local_shard(param).detach().flatten()[:_CHUNK]
    dtype = compute_dtype(model, param)
    if dtype not in (torch.bfloat16, torch.float16) or not len(origin) or noise.deviation(name) == 0:
        return
    moved = next(noise.chunks(name, origin.device, torch.float32))[: len(origin)]
    arrived = ((origin.float() + moved).to(dtype).float() - origin.to(dtype).float()).double()
    wanted = moved.double().square().sum()
    kept = (arrived.square().sum() / wanted).item()
    along = ((arrived * moved).sum() / wanted).item()
    if not (0.9 < kept < 1.1 and 0.9 < along < 1.1):
        raise ValueError(
            f"Noise of standard deviation {noise.deviation(name):.1e} does not survive in {dtype}: of {name!r}, "
            f"rounding keeps {along:.2f} of it with {kept:.2f} of its squared length. Measure the model in fp32, "
            "e.g. loaded with dtype=torch.float32."
        )
