"""Results of an evaluation in an experiment tracker: wandb, trackio, TensorBoard, or another that accelerate knows."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from ..evaluation.results import Results
from ..instruments import INSTRUMENTS
from ..runtime.packages import require
from ..statistics import forgetting

PROJECT = "hf-sam"


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known and installed.

    Raises:
        ValueError: for an unknown tracker.
        ImportError: if its package is missing.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"--report_to {name} must be one of {known}.")
        if name == "tensorboard" and importlib.util.find_spec("tensorboardX"):
            continue
        if LOGGER_TYPE_TO_CLASS[name].__module__.startswith("accelerate."):
            require(name, f"--report_to {name}")


def log_results(results: Results, names: Sequence[str], folder: str | Path) -> None:
    """Log the numbers of an evaluation as one step of a run, by name, in the project `hf-sam`.

    Args:
        results ([`Results`]): the evaluation.
        names (`Sequence[str]`): trackers.
        folder (`str` or `Path`): for trackers that write files.

    Raises:
        ValueError, ImportError: see [`check_trackers`].
    """
    check_trackers(names)
    if not names:
        return
    PartialState()  # the trackers ask it for the main process
    settings = {name: _plain(value) for name, value in results.record["settings"].items()}
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        if kind.requires_logging_directory:
            tracker = kind(results.name, str(folder))
        else:
            tracker = kind(PROJECT, **({"name": results.name} if name in ("wandb", "trackio") else {}))
        tracker.start()
        tracker.store_init_configuration(settings)
        tracker.log(scalars(results), step=0)
        tracker.finish()


def scalars(results: Results) -> dict[str, float]:
    """All numbers of an evaluation by name, e.g. `loss/prose/base` and `damage/prose/base/nf4`."""
    found = {}
    for part in results.record["parts"]:
        if part["result"] is None:
            continue
        place = "/".join(filter(None, (part["data"], part["model"], part["variant"])))
        if part["part"] == "loss":
            found[f"loss/{place}"] = results.loss(part["model"], part["data"], part["variant"]).loss
        elif part["part"] == "benchmarks":
            scores = results.benchmarks(part["model"], part["variant"])
            found |= {f"benchmarks/{task}/{place}": score.value for task, score in scores.items()}
        elif part["part"] in INSTRUMENTS and INSTRUMENTS[part["part"]].scalars is not None:
            instrument = INSTRUMENTS[part["part"]]
            values = instrument.scalars(part["result"])
            found |= {f"{instrument.group}/{name}/{place}": value for name, value in values.items()}
    for data in results.old:
        before = results.loss(results.base, data)
        for model in results.tuned:
            after = results.loss(model, data)
            if None not in (before, after):
                found[f"forgetting/{data}/{model}"] = forgetting(before, after).value
        for model in results.models:
            for scheme in results.schemes(model):
                pair = results.loss(model, data), results.loss(model, data, scheme)
                if None not in pair:
                    found[f"damage/{data}/{model}/{scheme}"] = forgetting(*pair).value
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _plain(value):
    """A setting as trackers take it."""
    return value if isinstance(value, str | int | float | bool) else ", ".join(map(str, value))
