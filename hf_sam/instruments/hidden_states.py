"""How far the hidden states of two models differ, by layer: mean principal angle and linear CKA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..runtime.distributed import all_reduce_sum
from ..runtime.figure import figure, styles
from ..runtime.labels import IGNORE_INDEX
from ..runtime.packages import require
from .batches import model_inputs, shared_batches
from .measuring import device_of, measuring
from .registry import Instrument, Plot, register


@dataclass(frozen=True)
class RepresentationSimilarity:
    """Comparison of hidden states, one entry a layer: the embeddings first, then the output of each layer.

    Attributes:
        mean_principal_angles (`tuple[float, ...]`): degrees; 0 where both span the same subspace.
        cka (`tuple[float, ...]`): linear CKA, from 0 to 1; 1 where both are equal up to rotation and scale.
        rank (`int`): dimensions of the compared subspaces.
        tokens (`int`): hidden states of each layer.
    """

    mean_principal_angles: tuple[float, ...]
    cka: tuple[float, ...]
    rank: int
    tokens: int

    def to_dict(self) -> dict:
        """For JSON."""
        return dict(vars(self))


@torch.no_grad()
def representation_similarity(
    model: torch.nn.Module, other: torch.nn.Module, data, *, rank: int = 10, batch_size: int = 8
) -> RepresentationSimilarity:
    """Mean principal angle and linear CKA between the hidden states of two models, by layer.

    The mean principal angle (arXiv 2604.13627; Bjorck and Golub 1973) is taken between the subspaces of the `rank`
    largest principal components of the hidden states; it sees a rotation of the representation. Linear CKA (Kornblith
    2019, arXiv 1905.00414, eq. 3) does not: rotated representations count as the same. Hidden states are those
    from which counted tokens are predicted. Memory: three square matrices of the hidden size for each layer, in fp64.

    Args:
        model, other (`torch.nn.Module`): models of the same depth that return hidden states of the same size.
        data: what to measure on; see [`held_out_loss`].
        rank (`int`, defaults to 10): dimensions of the compared subspaces.
        batch_size (`int`, defaults to 8): rows a batch.

    Raises:
        ValueError: if the models differ in depth or hidden size, or there are too few tokens for the rank.
    """
    require("scipy", "The mean principal angle")
    if rank < 1:
        raise ValueError(f"rank={rank} must be 1 or larger.")
    layers: list[_Moments] = []
    with measuring(model) as first, measuring(other) as second:
        for batch, counts in shared_batches(data, batch_size, "hidden states"):
            states = _hidden_states(first, batch), _hidden_states(second, batch)
            if len(states[0]) != len(states[1]):
                raise ValueError(
                    f"The models differ in depth: {len(states[0]) - 1} and {len(states[1]) - 1} layers. Only models of "
                    "one architecture can be compared by layer."
                )
            pairs = list(zip(*states, strict=True))
            layers = layers or [_Moments() for _ in pairs]
            for moments, (x, y) in zip(layers, pairs, strict=True):
                # What does not count adds zeros, so that there is something to share on every process.
                moments.add(*((x, y) if counts else (x[:0], y[:0])))
    for moments in layers:
        moments.share()
    tokens = layers[0].count
    if tokens <= rank or layers[0].width < rank:
        raise ValueError(
            f"Subspaces of rank {rank} need more than {rank} tokens and hidden dimensions, but there are {tokens} "
            f"tokens and {layers[0].width} dimensions. Lower rank, or measure on more data."
        )
    return RepresentationSimilarity(
        tuple(moments.mean_principal_angle(rank) for moments in layers),
        tuple(moments.cka() for moments in layers),
        rank,
        tokens,
    )


class _Moments:
    """Sums over tokens from which the centered second moments of two representations follow."""

    def __init__(self):
        self.sums = None

    def add(self, x: torch.Tensor, y: torch.Tensor):
        if x.shape != y.shape:
            raise ValueError(
                f"The hidden states have {x.shape[-1]} and {y.shape[-1]} dimensions; only models of one size can be "
                "compared."
            )
        x, y = _double(x), _double(y)
        new = [x.new_tensor(float(len(x))), x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y]
        self.sums = new if self.sums is None else [old + value for old, value in zip(self.sums, new, strict=True)]

    def share(self):
        self.sums = [all_reduce_sum(value) for value in self.sums]
        self.count = int(self.sums[0].item())
        self.width = len(self.sums[1])

    def centered(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n, x, y, xx, yy, xy = self.sums
        return xx - torch.outer(x, x) / n, yy - torch.outer(y, y) / n, xy - torch.outer(x, y) / n

    def cka(self) -> float:
        xx, yy, xy = self.centered()
        return (xy.square().sum() / (xx.norm() * yy.norm())).item()

    def mean_principal_angle(self, rank: int) -> float:
        from scipy.linalg import subspace_angles

        xx, yy, _ = self.centered()
        bases = [torch.linalg.eigh(moments).eigenvectors[:, -rank:].cpu().numpy() for moments in (xx, yy)]
        return float(np.degrees(subspace_angles(*bases)).mean())


def _double(x: torch.Tensor) -> torch.Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()


def _hidden_states(model, batch) -> list[torch.Tensor]:
    output = model(**model_inputs(model, batch, device_of(model)), output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if states is None:
        raise ValueError(f"{type(model).__name__} returns no hidden states.")
    counted = batch.labels[:, 1:] != IGNORE_INDEX
    return [state[:, :-1][counted.to(state.device)] for state in states]


def plot_layers(series: Mapping[str, Sequence[float]], label: str) -> bytes:
    """A number for each layer, one curve for each model.

    Args:
        series (`Mapping[str, Sequence[float]]`): the numbers by name, the embeddings first.
        label (`str`): what they are.
    """
    with figure("layer (0: embeddings)", label, "Hidden states against those of the base") as (render, axes):
        for name, style in styles(series).items():
            axes.plot(range(len(series[name])), series[name], **style)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        return render()


def _plots(results: Mapping[str, dict]) -> list[Plot]:
    angles = {name: found["mean_principal_angles"] for name, found in results.items()}
    cka = {name: found["cka"] for name, found in results.items()}
    return [
        Plot("principal_angles", "Hidden states by layer", plot_layers(angles, "mean principal angle (degrees)")),
        Plot("cka", "Hidden states by layer: 1 is equal up to rotation", plot_layers(cka, "linear CKA")),
    ]


register(
    Instrument(
        name="hidden_states",
        passes=2,
        group="similarity",
        help="principal angles and CKA of hidden states, by layer",
        measure=lambda base, tuned, data, **options: representation_similarity(base, tuned, data, **options).to_dict(),
        subject="pair",
        depends_on=("sharpness_documents",),
        plots=_plots,
        whole=True,
        packages=("scipy",),
    )
)
