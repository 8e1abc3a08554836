"""Plots of what the measures found, each as a PNG. They need matplotlib (extra `eval`)."""

import io
import itertools
from collections.abc import Mapping, Sequence

from ..runtime.packages import require
from ..statistics.frontier import pareto_frontier


def plot_line(lines: Mapping[str, dict]) -> bytes:
    """Loss along the way from the base to each tuned model, with its quadratic prediction.

    Args:
        lines (`Mapping[str, dict]`): [`LossLine`] as `to_dict` gives it, by name.
    """
    with _figure("way from base (0) to tuned model (1)", "held-out loss (nats per token)") as (figure, axes):
        highest = max(max(line["losses"]) for line in lines.values())
        lowest = min(min(line["losses"]) for line in lines.values())
        for name, line in lines.items():
            (drawn,) = axes.plot(line["positions"], line["losses"], marker="o", label=name)
            if line["quadratic"] is not None:
                axes.plot(
                    line["positions"], line["quadratic"], "--", color=drawn.get_color(), label=f"{name}, quadratic"
                )
        # A prediction that leaves the range of the losses must not flatten them.
        room = 0.25 * max(highest - lowest, 1e-6)
        axes.set_ylim(lowest - room, highest + room)
        axes.legend()
        return figure()


def plot_plane(plane: dict) -> bytes:
    """Contours of the loss on a plane, with the models on it.

    Args:
        plane (`dict`): [`LossPlane`] as `to_dict` gives it.
    """
    with _figure("distance in weight space", "distance in weight space") as (figure, axes):
        contours = axes.contourf(plane["x"], plane["y"], plane["losses"], levels=20, cmap="viridis")
        axes.figure.colorbar(contours, label="held-out loss (nats per token)")
        for name, (x, y) in plane["points"].items():
            axes.plot(x, y, "o", color="white", markeredgecolor="black")
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
            axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", bbox=box)
        if list(plane["points"]) == ["model"]:
            axes.set_xlabel("first random direction")
            axes.set_ylabel("second random direction")
        return figure()


def plot_layers(series: Mapping[str, Sequence[float]], label: str) -> bytes:
    """A number for each layer, one curve for each model.

    Args:
        series (`Mapping[str, Sequence[float]]`): the numbers by name, the embeddings first.
        label (`str`): what they are.
    """
    with _figure("layer (0: embeddings)", label) as (figure, axes):
        for (name, values), marker in zip(series.items(), _markers(), strict=False):
            axes.plot(range(len(values)), values, marker=marker, label=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        return figure()


def plot_frontier(sweeps: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """Learning against forgetting: one curve for each method along its frontier, one point for each run.

    Args:
        sweeps (`Mapping[str, Sequence[tuple[float, float]]]`): (task loss, forgetting) of the runs by method.
    """
    label = "held-out task loss after fine-tuning (nats per token; better to the right)"
    with _figure(label, "forgetting (nats per token; lower is better)") as (figure, axes):
        for (name, points), marker in zip(sweeps.items(), _markers(), strict=False):
            frontier = [points[i] for i in pareto_frontier(points)]
            (drawn,) = axes.plot(*zip(*frontier, strict=True), marker=marker, label=name)
            axes.plot(*zip(*points, strict=True), marker, color=drawn.get_color(), alpha=0.4)
        axes.invert_xaxis()
        axes.legend()
        return figure()


def plot_noise(measured: Mapping[str, dict]) -> bytes:
    """Growth of the loss with the strength of the noise.

    Args:
        measured (`Mapping[str, dict]`): [`NoiseSensitivity`] as `to_dict` gives it, by name.
    """
    with _figure("noise, in units of each layer's scale", "growth of held-out loss (nats per token)") as (figure, axes):
        for (name, values), marker in zip(measured.items(), _markers(), strict=False):
            errors = [error or 0.0 for error in values["standard_errors"]]
            axes.errorbar(values["strengths"], values["degradations"], yerr=errors, marker=marker, label=name)
        axes.set_xscale("log")
        axes.legend()
        return figure()


def _markers():
    return itertools.cycle("osD^v<>")


class _figure:
    """Context of one figure: yields a function that renders it to PNG, and its axes."""

    def __init__(self, x: str, y: str):
        self.labels = (x, y)

    def __enter__(self):
        require("matplotlib", "Plotting")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Not pyplot, which keeps figures and may want a screen.
        self.figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        FigureCanvasAgg(self.figure)
        axes = self.figure.subplots()
        axes.set_xlabel(self.labels[0])
        axes.set_ylabel(self.labels[1])
        axes.grid(alpha=0.3)
        return self._png, axes

    def _png(self) -> bytes:
        buffer = io.BytesIO()
        # Without the version of matplotlib in it, equal figures are equal files.
        self.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        return buffer.getvalue()

    def __exit__(self, *error):
        self.figure.clear()
