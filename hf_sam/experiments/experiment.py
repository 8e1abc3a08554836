"""A preset as stages: pretrain, anneal in several ways, fine-tune each over sweeps, evaluate each, compare all."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..planning import parse_tokens
from ..runtime.checkpoints import complete, last_complete
from ..runtime.config import merge, read_config
from .stages import Stage

# Settings of the fine-tuning that decide which examples are held out.
HELD_OUT_SETTINGS = (
    "dataset",
    "dataset_split",
    "dataset_format",
    "prompt_column",
    "completion_column",
    "prompt_template",
    "completion_template",
    "content_column",
    "stream_examples",
    "held_out_examples",
    "data_seed",
)
# Stands for the output folder in the paths of a preset.
PLACEHOLDER = "{output}"


@dataclass(frozen=True)
class Run:
    """A run with one seed: of a pretraining, an annealing, or a fine-tuning of an annealed model.

    Attributes:
        name (`str`): its name in the preset; ANNEALING/FINE-TUNING if the preset names runs of the fine-tuning.
        seed (`int` or `None`): its training seed; None for that of the settings.
    """

    name: str
    seed: int | None

    @property
    def place(self) -> str:
        """Its part of the names of stages and folders."""
        return self.name if self.seed is None else f"{self.name}/seed-{self.seed}"

    @property
    def label(self) -> str:
        """Name of its evaluation, which reports group by seed."""
        return self.place.replace("/", "-")

    @property
    def settings(self) -> dict:
        """What the seed changes in the settings of a stage."""
        return {} if self.seed is None else {"seed": self.seed}


@dataclass(frozen=True)
class Comparison:
    """Runs that are compared with each other.

    Attributes:
        name (`str`): name of the comparison in the preset, and of the dataset that the runs are fine-tuned on; empty
            if there is only one.
        bases (`list[str]`): names of the runs of the annealing, the reference first.
        tunings (`list[str]`): names of the runs of the fine-tuning; one that is empty if the preset names none.
        folder (`Path`): folder of the evaluations and of their comparison.
    """

    name: str
    bases: list[str]
    tunings: list[str]
    folder: Path


@dataclass
class Experiment:
    """A preset with an output folder.

    The names of the stages depend on the preset alone, so that every machine and every scheduler can run any of them.

    Args:
        preset (`dict`): see [`read_preset`].
        output (`Path`): the output folder.
        devices (`int`): number of GPUs of the machine; 1 on the CPU.
    """

    preset: dict
    output: Path
    devices: int

    @property
    def on_cpu(self) -> bool:
        """Whether the preset runs on the CPU."""
        return self.preset.get("device") == "cpu"

    def stages(self) -> list[Stage]:
        """All stages of the experiment."""
        stages = []
        if "data" in self.preset:
            stages.append(Stage("data", "toy-data", self._with_output(self.preset["data"])))
        first = tuple(stage.name for stage in stages)
        stages += [self._training("pretrain", run, first) for run in self.with_seeds("pretrain")]
        for base in self.with_seeds("anneal"):
            source = self._source(base)
            stages.append(self._training("anneal", base, (f"pretrain/{source[0].place}",) if source else first))
            for comparison in self.comparisons():
                for tuning in comparison.tunings if base.name in comparison.bases else ():
                    sweep = self._sweep(base, tuning)
                    stages += sweep
                    needs = tuple(stage.name for stage in sweep) or (f"anneal/{base.place}",)
                    place = self.tuned(base, tuning).place
                    stages.append(self._comparison(f"evaluate/{place}", comparison, [(base, tuning)], needs))
        for comparison in self.comparisons():
            runs = self._runs_of(comparison)
            needs = tuple(f"evaluate/{self.tuned(*run).place}" for run in runs)
            name = f"report/{comparison.name}" if comparison.name else "report"
            # Two presets that share runs may share a folder: each compares its own runs.
            stages.append(replace(self._comparison(name, comparison, runs, needs), replaceable=True))
        return stages

    def comparisons(self) -> list[Comparison]:
        """What is compared: the runs of each of the preset's comparisons that are fine-tuned on the same data."""
        by_task = self._tunings_by_task()
        groups = self.preset.get("comparisons") or {"": list(self.runs("anneal"))}
        found = []
        for group, bases in groups.items():
            for task, tunings in by_task.items():
                parts = [str(part) for part in (group, task) if part]
                found.append(Comparison("/".join(parts), bases, tunings, Path(self.output, "evaluation", *parts)))
        return found

    def _tunings_by_task(self) -> dict[str, list[str]]:
        """Names of the runs of the fine-tuning that hold out the same examples, by the name of their dataset."""
        found: dict[str, tuple[dict, list[str]]] = {}
        for tuning, run in self.runs("sft").items():
            settings = self.settings("sft", run)
            data = {name: settings.get(name) for name in HELD_OUT_SETTINGS}
            first, tunings = found.setdefault(Path(data["dataset"]).stem, (data, []))
            if first != data:
                raise ValueError(
                    f"The runs {tunings[0]!r} and {tuning!r} of sft have a dataset of one name, "
                    f"{Path(data['dataset']).stem!r}, but do not hold out the same examples. Use the same settings of "
                    "the data, or another file name."
                )
            tunings.append(tuning)
        if len(found) <= 1:
            return {"": next((tunings for _, tunings in found.values()), [""])}
        return {task: tunings for task, (_, tunings) in found.items()}

    def _runs_of(self, comparison: Comparison) -> list[tuple[Run, str]]:
        seeds = self.preset.get("seeds") or [None]
        return [(Run(name, seed), one) for name in comparison.bases for seed in seeds for one in comparison.tunings]

    @staticmethod
    def tuned(base: Run, tuning: str) -> Run:
        """The fine-tuning of an annealed model; `tuning` is empty if the preset names no runs of the fine-tuning."""
        return Run(f"{base.name}/{tuning}", base.seed) if tuning else base

    def labels(self, comparison: Comparison) -> list[str]:
        """Names of the evaluations of a comparison."""
        return [self._label(comparison, *run) for run in self._runs_of(comparison)]

    def _label(self, comparison: Comparison, base: Run, tuning: str) -> str:
        return (self.tuned(base, tuning) if len(comparison.tunings) > 1 else base).label

    def with_seeds(self, kind: str) -> list[Run]:
        """Runs of a kind of stage, each with each seed of the preset."""
        return [Run(name, seed) for name in self.runs(kind) for seed in self.preset.get("seeds") or [None]]

    def runs(self, kind: str) -> dict[str, dict]:
        """Runs of a kind of stage, and what each changes in the settings."""
        return {name: run or {} for name, run in self.preset.get(kind, {}).get("runs", {}).items()}

    def source(self, run: dict) -> tuple[str, int | None] | None:
        """The pretraining run that an annealing run begins with, and the step of its checkpoint; None for a model.

        `from: stable` in a preset means its last checkpoint, `from: stable/checkpoint-500` an earlier one.

        Raises:
            ValueError: if `from` has another form.
        """
        pretraining = list(self.runs("pretrain"))
        place = run.get("from", pretraining[0] if pretraining else None)
        if place is None:
            return None
        found = re.fullmatch(r"([^/]+)(?:/checkpoint-(\d+))?", str(place))
        if found is None:
            raise ValueError(
                f"from: {place!r} must be the name of a pretraining run or one of its checkpoints: NAME/checkpoint-500."
            )
        name, step = found[1], int(found[2]) if found[2] else None
        if name not in pretraining:
            raise ValueError(
                f"from: {str(place)!r} is no run of pretrain, which has {', '.join(pretraining) or 'none'}."
            )
        every = self.settings("pretrain", self.runs("pretrain")[name]).get("save_steps")
        if step is not None and isinstance(every, int) and step % every:
            raise ValueError(f"from: {place!r} will not be saved, because save_steps is {every}.")
        return name, step

    def _source(self, run: Run) -> tuple[Run, int | None] | None:
        """The pretraining run with the same seed that an annealing run begins with, and the step of its checkpoint."""
        found = self.source(self.runs("anneal")[run.name])
        return None if found is None else (Run(found[0], run.seed), found[1])

    def settings(self, kind: str, run: dict | None = None) -> dict:
        """Settings of a stage: those of its config file, changed by the preset, changed by the run."""
        part = self.preset.get(kind, {})
        own = {key: value for key, value in (run or {}).items() if key != "from"}
        config = read_config(part["config"]) if "config" in part else {}
        return self._with_output(merge(config, merge(part.get("settings", {}), own)))

    def _with_output(self, value):
        if isinstance(value, dict):
            return {name: self._with_output(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._with_output(one) for one in value]
        return value.replace(PLACEHOLDER, str(self.output)) if isinstance(value, str) else value

    def _training(self, kind: str, run: Run, needs: tuple[str, ...]) -> Stage:
        own = {**run.settings, "output_dir": str(self.output / kind / run.place)}
        settings = {**self.settings(kind, self.runs(kind)[run.name]), **own}
        source = self._source(run) if kind == "anneal" else None
        if source is not None and source[1] is not None:
            # Also before it exists, so that another step is another setting.
            settings["anneal_from"] = str(self.output / "pretrain" / source[0].place / f"checkpoint-{source[1]}")

        def checkpoint_of_source() -> dict:
            if source is None:
                return {}
            before, step = source
            folder = self.output / "pretrain" / before.place
            name = "checkpoint" if step is None else f"checkpoint-{step}"
            found = last_complete(folder) if step is None else complete(folder / name)
            if found is None:
                raise ValueError(
                    f"{folder} holds no {name} to anneal from. Set save_steps and save_total_limit in the preset."
                )
            return {"anneal_from": found}

        # A CPU is shared by stages, but while the only pretraining runs, no other stage does.
        alone = kind == "pretrain" and len(self.with_seeds("pretrain")) == 1
        wide = self.devices > 1 and (alone or not self.on_cpu)
        return Stage(f"{kind}/{run.place}", "pretrain", settings, needs, wide, checkpoint_of_source)

    def _sweep(self, base: Run, tuning: str) -> list[Stage]:
        """The stages of a sweep: one for each learning rate on GPUs, one for all on the CPU."""
        if "sft" not in self.preset:
            return []
        run = self.tuned(base, tuning)
        settings = {
            **self.settings("sft", self.runs("sft").get(tuning)),
            **run.settings,
            "model_name_or_path": str(self.output / "anneal" / base.place),
            "output_dir": str(self.output / "sft" / run.place),
        }
        needs, rates = (f"anneal/{base.place}",), settings["learning_rates"]
        if self.on_cpu:
            return [Stage(f"sft/{run.place}", "sweep", settings, needs)]
        return [
            Stage(f"sft/{run.place}/lr-{float(rate):g}", "sweep", {**settings, "learning_rates": [rate]}, needs)
            for rate in rates
        ]

    def _comparison(
        self, name: str, comparison: Comparison, runs: list[tuple[Run, str]], needs: tuple[str, ...]
    ) -> Stage:
        settings = {**self.settings("evaluate"), "output": str(comparison.folder), "runs": []}
        for base, tuning in runs:
            sweep = f",{self.output / 'sft' / self.tuned(base, tuning).place}" if "sft" in self.preset else ""
            label = self._label(comparison, base, tuning)
            settings["runs"].append(f"{label}={self.output / 'anneal' / base.place}{sweep}")
        if "sft" in self.preset:
            # All sweeps hold out the same examples; those of another one may not be written yet.
            held_out = self.output / "sft" / self.tuned(*runs[0]).place / "held_out.jsonl"
            settings["task_data"] = [f"task={held_out}"]
        # The folder may hold the evaluation of an earlier run of a stage.
        return Stage(name, "compare", settings, needs, late_settings=lambda: {"overwrite": True})

    def plan(self, plan_command: Callable[[str, dict], str]) -> str:
        """What the training stages need: tokens, steps, memory and time.

        Args:
            plan_command (`Callable[[str, dict], str]`): the plan of a sub-command with its settings.
        """
        names = [stage.name for stage in self.stages()]
        text = [f"{len(names)} stages: {', '.join(names)}."]
        for kind in ("pretrain", "anneal"):
            for name, run in self.runs(kind).items():
                settings = self.settings(kind, run)
                if kind == "anneal" and (source := self.source(run)):
                    settings = self._with_budget(settings, source)
                text += [f"\n{kind}/{name}\n", self._plan_of("pretrain", settings, plan_command)]
        if "sft" in self.preset:
            for tuning, run in (self.runs("sft") or {"": {}}).items():
                title = f"sft/{tuning}" if tuning else "sft"
                text += [f"\n{title}\n", self._plan_of("sweep", self.settings("sft", run), plan_command)]
        return "\n".join(text)

    def _with_budget(self, settings: dict, source: tuple[str, int | None]) -> dict:
        """Settings of an annealing without its checkpoint, which does not exist yet: the budget in tokens."""
        pretraining = self.settings("pretrain", self.runs("pretrain")[source[0]])
        before = parse_tokens(pretraining["train_tokens"])
        if source[1] is not None:
            batch = pretraining.get("global_batch_size") or pretraining["per_device_train_batch_size"]
            before = source[1] * batch * pretraining["sequence_length"]
        share = str(settings["train_tokens"])
        tokens = round(before * float(share[:-1]) / 100) if share.endswith("%") else share
        return {**settings, "train_tokens": str(tokens), "warmup_steps": 0}

    def _plan_of(self, command: str, settings: dict, plan_command: Callable[[str, dict], str]) -> str:
        # The model that a stage starts from does not exist yet; its configuration does.
        shape = settings.get("config_name") or self.preset.get("model") or self.settings("anneal").get("config_name")
        # A run of the sweep uses one device.
        devices = 1 if command == "sweep" else self.devices
        settings = {**settings, "output_dir": str(self.output), "dry_run_gpus": devices}
        if shape:
            settings["model_name_or_path" if command == "sweep" else "config_name"] = shape
        return plan_command(command, settings)
