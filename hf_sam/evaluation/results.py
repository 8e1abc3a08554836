"""Reading the record of an evaluation."""

import json
from pathlib import Path

from ..instruments.benchmark_scores import BenchmarkResult
from ..statistics import HeldOutLoss, TunedRun


class Results:
    """The record of one evaluation.

    Args:
        record (`dict`): what `evaluate` returned, or `results.json` holds.
    """

    def __init__(self, record: dict):
        self.record = record
        self.name: str = record["name"]
        self.models: list[str] = [model["name"] for model in record["models"]]
        self.base, *self.tuned = self.models
        self.old = [data["name"] for data in record["data"] if data["role"] == "old"]
        self.tasks = [data["name"] for data in record["data"] if data["role"] == "task"]

    def schemes(self, model: str | None = None) -> list[str]:
        """Schemes that a model (the base if omitted) was quantized to, here or by somebody else."""
        made = [one["scheme"] for one in self.record["quantized"] if one["model"] == (model or self.base)]
        return [*self.record["settings"]["quantize"], *made]

    @property
    def training(self) -> dict | None:
        """What the training of the base took: `own_steps`, `sam_steps`, `passes`; None if it was trained elsewhere."""
        return self.record["models"][0].get("training")

    @classmethod
    def read(cls, folder: str | Path) -> "Results":
        """The results of an evaluation in a folder.

        Raises:
            ValueError: if there are none, or they are not from this library.
        """
        path = Path(folder) / "results.json"
        if not path.is_file():
            raise ValueError(f"There is no {str(path)!r}: `hf-sam evaluate --output {folder}` writes it at its end.")
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is not the record of an evaluation: {error!r}.") from error

    def find(self, part: str, model: str | None = None, variant: str = "", data: str | None = None) -> list[dict]:
        """Records of a part, of one model and dataset or of all."""
        return [
            record
            for record in self.record["parts"]
            if record["part"] == part
            and record["variant"] == variant
            and model in (None, record["model"])
            and data in (None, record["data"])
        ]

    def result(self, part: str, model: str) -> dict | None:
        """Result of a part for a model; None if it was not measured or failed."""
        found = self.find(part, model)
        return found[0]["result"] if found else None

    def by_model(self, part: str) -> dict[str, dict | None]:
        """Results of a part by model; None for a model on which it failed."""
        return {record["model"]: record["result"] for record in self.find(part)}

    def selected(self, group: str) -> list[str]:
        """Names of the selected instruments of a group."""
        return self.record["settings"].get(group) or []

    def readable(self, model: str, data: str) -> bool:
        """Whether a model has embeddings for all tokens of a dataset; the base lacks those that fine-tuning added."""
        return bool(self.find("loss", model, "", data))

    def loss(self, model: str, data: str, variant: str = "") -> HeldOutLoss | None:
        """Held-out loss of a model on a dataset; None if it could not be measured."""
        found = [record["result"] for record in self.find("loss", model, variant, data)]
        return HeldOutLoss.from_dict(found[0]) if found and found[0] is not None else None

    def benchmarks(self, model: str, variant: str = "") -> dict[str, BenchmarkResult]:
        """Benchmark results of a model by task; empty if they were not measured or failed."""
        found = self.find("benchmarks", model, variant)
        if not found or found[0]["result"] is None:
            return {}
        return {task: BenchmarkResult.from_dict(values) for task, values in found[0]["result"].items()}

    def sweep(self, variant: str = "") -> list[TunedRun]:
        """The tuned models as runs of a sweep, on the first old and the first task data; empty without the latter.

        A model whose losses could not be measured, e.g. because its training diverged, is left out.

        Args:
            variant (`str`): the scheme that the tuned models are quantized to. The base that they are compared with is
                not quantized, so that forgetting includes the damage of the scheme.
        """
        before = self.loss(self.base, self.old[0])
        if not self.tasks or before is None:
            return []
        losses = {name: self._tuned_losses(name, variant) for name in self.tuned}
        return [TunedRun(name, before, *pair) for name, pair in losses.items() if None not in pair]

    def interpolations(self) -> list[TunedRun]:
        """The tuned model with the lowest task loss, and those between it and the base (Wise-FT), as a sweep.

        Empty if fewer than two of them were measured.
        """
        sweep = self.sweep()
        if not sweep:
            return []
        tuned = min(sweep, key=lambda run: run.task.loss)
        runs = []
        for alpha in self.record["settings"].get("wise_ft", []):
            pair = self._tuned_losses(tuned.name, f"wise-ft {alpha:g}")
            # At 0 it is the base, at 1 the tuned model.
            if 0 < alpha < 1 and None not in pair:
                runs.append(TunedRun(f"{tuned.name}, wise-ft {alpha:g}", tuned.before, *pair))
        return [*runs, tuned] if runs else []

    def _tuned_losses(self, name: str, variant: str) -> tuple[HeldOutLoss | None, HeldOutLoss | None]:
        """Losses of a tuned model on the first old and the first task data."""
        return self.loss(name, self.old[0], variant), self.loss(name, self.tasks[0], variant)
