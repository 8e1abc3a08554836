"""Curvature of the held-out loss: its largest Hessian eigenvalues and the trace, each with an error estimate.

The Hessian is only ever multiplied with vectors, exactly, by differentiating twice (Pearlmutter 1994), over all of the
data and all processes. Eigenvalues come from SciPy's `eigsh` (implicitly restarted Lanczos), or from power iteration
where its vectors do not fit; the trace from Hutchinson's estimator on what the eigenvectors leave over, as in Hutch++
(arXiv 2010.09649).
"""

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from ..runtime.distributed import all_reduce_max, all_reduce_sum, rank_and_world
from ..runtime.errors import MeasurementError
from ..runtime.packages import require
from ..runtime.progress import progress
from ..runtime.sharding import check_unsharded
from ..statistics.estimate import standard_error
from .batches import batches_of, shared_batches
from .displacement import floating_parameters
from .gradients import check_precise, only_trainable
from .loss import count_tokens, summed_loss
from .measuring import differentiable_twice, measuring
from .registry import Column, Instrument, register, with_error

# ARPACK counts in 32 bits.
_LARGEST = 1 << 29
# Products of a power iteration.
_ITERATIONS = 300


@dataclass(frozen=True)
class HessianSpectrum:
    """Largest eigenvalues and trace of the Hessian of the loss per token.

    Attributes:
        eigenvalues (`tuple[float, ...]`): the algebraically largest, in descending order.
        residuals (`tuple[float, ...]`): ||H v - lambda v|| of each; some eigenvalue lies within it.
        trace (`float`): estimate of the trace.
        trace_standard_error (`float`): of the trace; nan for fewer than two probes.
        parameters (`int`): number of weights.
        products (`int`): Hessian-vector products that were taken.
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    trace: float
    trace_standard_error: float
    parameters: int
    products: int

    def to_dict(self) -> dict:
        """For JSON."""
        return {**vars(self), "eigenvalues": list(self.eigenvalues), "residuals": list(self.residuals)}


class Hessian:
    """The Hessian of the held-out loss per token, as products with vectors. Use as a context.

    Args:
        model (`torch.nn.Module`): a causal language model with fp32 or fp64 weights, whole on each process.
        data: what to measure on; see [`held_out_loss`].
        batch_size (`int`, defaults to 8): rows a batch.
        parameters (`str`, *optional*): regular expression of the weights to differentiate by. When omitted, those
            that are trainable: all of a plain model, the adapters of a PEFT model.

    Raises:
        ValueError: if weights are quantized, in 16 bits or sharded, or checkpointing is reentrant.
    """

    def __init__(self, model: torch.nn.Module, data, *, batch_size: int = 8, parameters: str | None = None):
        self.model = model
        self.data = list(batches_of(data, batch_size))
        self.batch_size = batch_size
        self.pattern = parameters
        self.products = 0

    def __enter__(self) -> "Hessian":
        with contextlib.ExitStack() as stack:
            self._inner = stack.enter_context(measuring(self.model, exact=True))
            self.params = floating_parameters(self._inner, self.pattern, "The Hessian", trainable=True)
            check_precise(self.params, "The Hessian")
            check_unsharded(self.params, "The Hessian")
            self.size = sum(param.numel() for param in self.params.values())
            self.device = next(iter(self.params.values())).device
            self.dtype = next(iter(self.params.values())).dtype
            self._tokens = count_tokens(self.data, self.batch_size)
            stack.enter_context(only_trainable(self._inner, self.params))
            stack.enter_context(differentiable_twice(self._inner))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def __matmul__(self, vector: torch.Tensor) -> torch.Tensor:
        """H v; both have shape `(size,)`, all parameters concatenated."""
        self.products += 1
        params = list(self.params.values())
        pieces = self.split(vector)
        result = torch.zeros_like(vector)
        for batch, counts in shared_batches(self.data, self.batch_size, "Hessian-vector product"):
            if not counts:
                continue
            loss = summed_loss(self._inner, batch) / self._tokens
            gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
            # A gradient that does not depend on the weights (of a linear loss) has no graph, and no curvature.
            along = [(g, v) for g, v in zip(gradients, pieces, strict=True) if g.requires_grad]
            if along:
                products = torch.autograd.grad(
                    [g for g, _ in along], params, [v for _, v in along], materialize_grads=True
                )
                result += torch.cat([product.flatten() for product in products])
        return all_reduce_sum(result)

    def gradient(self) -> torch.Tensor:
        """The gradient of the loss per token, shape `(size,)`."""
        params = list(self.params.values())
        result = torch.zeros(self.size, device=self.device, dtype=self.dtype)
        for batch, counts in shared_batches(self.data, self.batch_size, "gradient"):
            if counts:
                loss = summed_loss(self._inner, batch) / self._tokens
                result += torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, materialize_grads=True)])
        return all_reduce_sum(result)

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Split a vector into the shapes of the parameters."""
        sizes = [param.numel() for param in self.params.values()]
        pieces = zip(vector.split(sizes), self.params.values(), strict=True)
        return [piece.view_as(param) for piece, param in pieces]


def hessian_spectrum(
    model: torch.nn.Module,
    data,
    *,
    eigenvalues: int = 1,
    probes: int = 10,
    tolerance: float = 1e-3,
    batch_size: int = 8,
    parameters: str | None = None,
    seed: int = 0,
) -> HessianSpectrum:
    """Largest Hessian eigenvalues and Hessian trace of the loss per token.

    Memory: the graph of one batch with its first derivatives, and for Lanczos about 20 vectors of the size of the
    weights on the host. Where the host has no room for them, power iteration finds the eigenvalues with two vectors on
    the device, in more products. Gradient checkpointing (not reentrant) is used if the model is set to it.

    Args:
        model (`torch.nn.Module`): a causal language model with fp32 or fp64 weights, whole on each process.
        data: what to measure on; see [`held_out_loss`].
        eigenvalues (`int`, defaults to 1): how many; 0 for the trace alone.
        probes (`int`, defaults to 10): random vectors for the trace, one product each; 0 for eigenvalues alone.
        tolerance (`float`, defaults to 1e-3): relative accuracy at which an eigenvalue counts as found.
        batch_size (`int`, defaults to 8): rows a batch.
        parameters (`str`, *optional*): regular expression of the weights to differentiate by. When omitted, those
            that are trainable: all of a plain model, the adapters of a PEFT model.
        seed (`int`, defaults to 0): seed of the random vectors.

    Raises:
        ValueError: if weights are quantized, in 16 bits or sharded, or checkpointing is reentrant.
        MeasurementError: if an eigenvalue is not found to the tolerance.
    """
    if eigenvalues < 0 or probes < 0 or eigenvalues + probes == 0:
        raise ValueError(f"eigenvalues={eigenvalues} and probes={probes} must not be negative, nor both 0.")
    with Hessian(model, data, batch_size=batch_size, parameters=parameters) as hessian:
        values, vectors, residuals = _top(hessian, min(eigenvalues, hessian.size), tolerance, seed)
        trace, error = _trace(hessian, values, vectors, probes, seed)
        return HessianSpectrum(
            tuple(map(float, values)), tuple(map(float, residuals)), trace, error, hessian.size, hessian.products
        )


def _top(hessian: Hessian, count: int, tolerance: float, seed: int) -> tuple[np.ndarray, torch.Tensor, list[float]]:
    none = torch.zeros(hessian.size, 0, device=hessian.device, dtype=hessian.dtype)
    if count == 0:
        return np.zeros(0), none, []
    kind = torch.empty(0, dtype=hessian.dtype).numpy().dtype
    basis = min(hessian.size, max(2 * count + 1, 20))
    if not _fits(hessian.size * kind.itemsize * (basis + count + 3)) or hessian.size > _LARGEST:
        return _power(hessian, count, tolerance, seed)
    require("scipy", "Finding Hessian eigenvalues")
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    start = np.random.default_rng(seed).standard_normal(hessian.size).astype(kind)

    def multiply(vector: np.ndarray) -> np.ndarray:
        moved = torch.from_numpy(np.ascontiguousarray(vector.reshape(-1), dtype=kind)).to(hessian.device)
        return (hessian @ moved).cpu().numpy()

    if hessian.size <= basis:  # Lanczos needs fewer vectors than there are dimensions
        full = np.stack([multiply(row) for row in np.eye(hessian.size, dtype=kind)])
        values, vectors = np.linalg.eigh((full + full.T) / 2)
        values, vectors = values[-count:], vectors[:, -count:]
    else:
        operator = LinearOperator((hessian.size, hessian.size), matvec=multiply, dtype=kind)
        try:
            values, vectors = eigsh(operator, k=count, which="LA", ncv=basis, tol=tolerance, v0=start)
        except ArpackNoConvergence as error:
            raise MeasurementError(
                f"Only {len(error.eigenvalues)} of {count} Hessian eigenvalues were found to a tolerance of "
                f"{tolerance:g} in {hessian.products} products. Ask for fewer, or raise the tolerance."
            ) from error
    order = np.argsort(-values)
    found = torch.from_numpy(np.ascontiguousarray(vectors[:, order])).to(hessian.device)
    values = values[order]
    residuals = [
        (hessian @ found[:, i] - float(values[i]) * found[:, i]).double().norm().item() for i in range(len(values))
    ]
    return values, found, residuals


def _trace(hessian: Hessian, values, vectors: torch.Tensor, probes: int, seed: int) -> tuple[float, float]:
    """Sum of the known eigenvalues, and Hutchinson's estimate of the trace on their orthogonal complement."""
    if probes == 0:
        return math.nan, math.nan
    estimates = []
    for probe in progress(range(probes), "Hessian trace", probes):
        signs = np.random.default_rng([seed, probe]).integers(0, 2, hessian.size, dtype=np.int8) * 2 - 1
        vector = torch.from_numpy(signs).to(device=hessian.device, dtype=hessian.dtype)
        vector = vector - vectors @ (vectors.T @ vector)
        estimates.append((vector.double() @ (hessian @ vector).double()).item())
    return float(np.sum(values, dtype=np.float64) + np.mean(estimates)), standard_error(estimates)


def _power(hessian: Hessian, count: int, tolerance: float, seed: int) -> tuple[np.ndarray, torch.Tensor, list[float]]:
    """Eigenvalues by power iteration on the device, if there is no memory for Lanczos.

    It finds what is largest in size. Where that is negative, the spectrum is shifted up by it, so that what is found
    next is the algebraically largest.
    """
    values: list[float] = []
    vectors = torch.zeros(hessian.size, 0, device=hessian.device, dtype=hessian.dtype)
    residuals: list[float] = []
    shift = 0.0
    while len(values) < count:
        draws = np.random.default_rng([seed, len(values)]).standard_normal(hessian.size)
        vector = torch.from_numpy(draws).to(device=hessian.device, dtype=hessian.dtype)
        for _ in range(_ITERATIONS):
            vector = vector - vectors @ (vectors.T @ vector)
            vector = vector / vector.norm()
            product = hessian @ vector
            value = (vector @ product).item()
            residual = (product - value * vector).norm().item()
            # Without the components along eigenvectors that were found before.
            rest = product - vectors @ (vectors.T @ product)
            if (rest - value * vector).norm().item() <= tolerance * max(abs(value), shift):
                break
            vector = rest + shift * vector
        else:
            raise MeasurementError(
                f"Power iteration came to {value:.4g} with a residual of {residual:.2g} in {_ITERATIONS} products, and "
                f"there is no memory for Lanczos. Raise the tolerance ({tolerance:g}), or name fewer weights with "
                "parameters=..."
            )
        if value < 0 and shift == 0:
            shift = -value
            continue
        values.append(value)
        residuals.append(residual)
        vectors = torch.cat([vectors, vector[:, None]], dim=1)
    order = sorted(range(count), key=lambda i: -values[i])
    return np.asarray([values[i] for i in order]), vectors[:, order], [residuals[i] for i in order]


def _fits(needed: int) -> bool:
    """Whether the host has that much free memory for each process; the same on all ranks."""
    needed *= rank_and_world()[1]  # most often on one host
    return not all_reduce_max(int(needed > psutil.virtual_memory().available))


def _scalars(found: dict) -> dict[str, float]:
    top = {"hessian_top": found["eigenvalues"][0]} if found["eigenvalues"] else {}
    return {"hessian_trace": found["trace"], **top}


register(
    Instrument(
        name="hessian",
        passes=240,
        group="sharpness",
        help="largest eigenvalue and trace of the Hessian",
        measure=lambda model, data, **options: hessian_spectrum(model, data, **options).to_dict(),
        options=lambda settings: {"seed": settings.seed},
        columns=(
            Column(
                "top Hessian eigenvalue",
                lambda found: with_error(found["eigenvalues"][0], found["residuals"][0]),
                compared=False,
            ),
            Column("Hessian trace", lambda found: with_error(found["trace"], found["trace_standard_error"])),
        ),
        note="The eigenvalue (± residual) and the trace (± standard error) are those of the Hessian of the loss.",
        scalars=_scalars,
        fp32=True,
        whole=True,
        packages=("scipy",),
    )
)
