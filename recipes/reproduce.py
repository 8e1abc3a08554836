"""The whole experiment in one command: pretrain, anneal in several ways, fine-tune over a sweep, quantize, report.

    python recipes/reproduce.py --preset toy            # two CPU cores, some minutes, real text
    python recipes/reproduce.py --preset olmo2-1b       # a node of GPUs: the paper's headline
    python recipes/reproduce.py --preset 20m --dry_run  # what it will take

A preset is a YAML file (recipes/configs/presets) that names the configs of its stages and the runs of each. What is
done is not done again, and a chain that was interrupted goes on when the same command is given. Stages that do not need
each other run side by side on the GPUs that there are.
"""

import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from configuration import RecipeParser, merged, read_config
from stages import Stage, Stages, python

from hf_sam.commands.reporting import command
from hf_sam.planning import parse_tokens
from hf_sam.runtime.checkpoints import last_complete

HERE = Path(__file__).resolve().parent
PRESETS = HERE / "configs" / "presets"
PLACE = "{output}"

_KEYS = {"device", "accelerate_config", "model", "data", "pretrain", "anneal", "sft", "evaluate"}


@dataclass
class ReproduceArguments:
    """Which experiment, and where."""

    preset: str = field(default="toy", metadata={"help": "Name of a preset, or a YAML file."})
    output_dir: str | None = field(default=None, metadata={"help": "Where all goes; default: outputs/PRESET."})
    workers: int = field(
        default=0, metadata={"help": "Stages side by side on the CPU; default: a core each. On GPUs, one each."}
    )


@dataclass
class Experiment:
    """A preset with its stages.

    Args:
        preset (`dict`): what the YAML file holds.
        output (`Path`): where all goes.
        devices (`int`): number of devices.
    """

    preset: dict
    output: Path
    devices: int

    def stages(self) -> list[Stage]:
        """All stages of the experiment."""
        stages = []
        if "data" in self.preset:
            stages.append(self._stage("data", HERE / "toy_data.py", self.preset["data"]))
        first = tuple(stage.name for stage in stages)
        for name in self.runs("pretrain"):
            stages.append(self._trained("pretrain", name, first))
        for name, run in self.runs("anneal").items():
            source = self.source(run)
            stages.append(self._trained("anneal", name, (f"pretrain/{source}",) if source else first))
            sweep = [self._sweep(name, rates) for rates in self._shares_of_sweep()] if "sft" in self.preset else []
            stages += sweep
            needs = tuple(stage.name for stage in sweep) or (f"anneal/{name}",)
            stages.append(self._evaluated(f"evaluate/{name}", [name], needs))
        names = list(self.runs("anneal"))
        stages.append(self._evaluated("report", names, tuple(f"evaluate/{name}" for name in names)))
        return stages

    def runs(self, kind: str) -> dict[str, dict]:
        """Runs of a kind of stage, with what they change."""
        return {name: run or {} for name, run in self.preset.get(kind, {}).get("runs", {}).items()}

    def source(self, run: dict) -> str | None:
        """The pretraining run that an annealing run begins with; none if it begins with a model."""
        pretraining = list(self.runs("pretrain"))
        return run.get("from", pretraining[0] if pretraining else None)

    def settings(self, kind: str, run: dict | None = None) -> dict:
        """Settings of a stage: those of its config, of the preset, and of the run."""
        part = self.preset.get(kind, {})
        own = {key: value for key, value in (run or {}).items() if key != "from"}
        config = {"extends": os.path.abspath(part["config"])} if "config" in part else {}
        return self._placed(config | merged(part.get("settings", {}), own))

    def _placed(self, value):
        if isinstance(value, dict):
            return {name: self._placed(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._placed(one) for one in value]
        return value.replace(PLACE, str(self.output)) if isinstance(value, str) else value

    def _trained(self, kind: str, name: str, needs: tuple[str, ...]) -> Stage:
        run = self.runs(kind)[name]
        settings = {**self.settings(kind, run), "output_dir": str(self.output / kind / name)}
        source = self.source(run) if kind == "anneal" else None

        def late() -> dict:
            if source is None:
                return {}
            folder = self.output / "pretrain" / source
            checkpoint = last_complete(folder)
            if checkpoint is None:
                raise ValueError(f"{folder} holds no checkpoint to anneal from. Let the preset save one (save_steps).")
            return {"anneal_from": checkpoint}

        return self._stage(f"{kind}/{name}", HERE / "olmo_mid_sam.py", settings, needs, late, wide=True)

    def _shares_of_sweep(self) -> list[list[float]]:
        """The learning rates of each stage: all in one, or one each where there are devices for that."""
        rates = _whole(self.settings("sft"))["learning_rates"]
        return [[rate] for rate in rates] if self.devices > len(self.runs("anneal")) else [rates]

    def _sweep(self, name: str, rates: list[float]) -> Stage:
        settings = {
            **self.settings("sft"),
            "model_name_or_path": str(self.output / "anneal" / name),
            "output_dir": str(self.output / "sft" / name),
            "learning_rates": rates,
        }
        label = f"sft/{name}" + (f"/lr-{float(rates[0]):g}" if len(rates) == 1 else "")
        return self._stage(label, HERE / "metamath_sft.py", settings, (f"anneal/{name}",))

    def _evaluated(self, label: str, names: list[str], needs: tuple[str, ...]) -> Stage:
        settings = {**self.settings("evaluate"), "output": str(self.output / "evaluation")}
        sweep = f",{self.output / 'sft'}/" if "sft" in self.preset else ""
        settings["runs"] = [f"{n}={self.output / 'anneal' / n}" + (f"{sweep}{n}" if sweep else "") for n in names]
        if sweep:
            first = next(iter(self.runs("anneal")))
            settings["task_data"] = [f"task={self.output / 'sft' / first / 'held_out.jsonl'}"]
        # What is there is from before a stage was run again.
        return self._stage(label, HERE / "quantize_eval.py", settings, needs, late=lambda: {"overwrite": True})

    def _stage(self, name, script, settings, needs=(), late=dict, wide=False) -> Stage:
        settings = self._placed(settings)
        depends = {name: value for name, value in _whole(settings).items() if name != "extends"}
        wide = wide and self.devices > 1 and self.preset.get("device") != "cpu"

        def command() -> list[str]:
            config = self.output / "configs" / f"{name.replace('/', '-')}.yaml"
            config.parent.mkdir(parents=True, exist_ok=True)
            config.write_text(yaml.safe_dump({**settings, **late()}, sort_keys=False), encoding="utf-8")
            return python(script, config, self.devices if wide else 1, self.preset.get("accelerate_config"))

        return Stage(name, command, depends, tuple(needs), wide)

    def plan(self) -> str:
        """What the training stages will take."""
        import metamath_sft
        import olmo_mid_sam

        text = [f"{len(self.stages())} stages: {', '.join(stage.name for stage in self.stages())}."]
        for kind in ("pretrain", "anneal"):
            for name, run in self.runs(kind).items():
                settings = self.settings(kind, run)
                if kind == "anneal" and (source := self.source(run)):
                    settings = self._annealing(settings, source)
                text += [f"\n{kind}/{name}\n", self._plan_of(olmo_mid_sam, settings)]
        if "sft" in self.preset:
            text += ["\nsft\n", self._plan_of(metamath_sft, self.settings("sft"))]
        return "\n".join(text)

    def _annealing(self, settings: dict, source: str) -> dict:
        """Settings without the checkpoint that is not there yet: its share of the budget as tokens."""
        pretraining = self.settings("pretrain", self.runs("pretrain")[source])
        before = parse_tokens(_whole(pretraining)["train_tokens"])
        share = str(_whole(settings)["train_tokens"])
        tokens = round(before * float(share[:-1]) / 100) if share.endswith("%") else share
        return {**settings, "train_tokens": str(tokens), "warmup_steps": 0}

    def _plan_of(self, recipe, settings: dict) -> str:
        import contextlib
        import io
        import tempfile

        # The model that a stage starts from is not there yet; its configuration is.
        shape = self.preset.get("model") or self.settings("anneal").get("config_name")
        # A run of the sweep takes one device.
        devices = 1 if recipe.__name__ == "metamath_sft" else self.devices
        settings = {**settings, "output_dir": str(self.output), "dry_run_gpus": devices}
        if shape:
            settings["model_name_or_path" if recipe.__name__ == "metamath_sft" else "config_name"] = shape
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(settings, file)
            file.flush()
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                status = recipe.main(["--config", file.name, "--dry_run"])
        if status:
            raise ValueError("The plan cannot be made; see above.")
        return printed.getvalue().rstrip()


def _whole(settings: dict) -> dict:
    """Settings with those that they extend."""
    return merged(read_config(settings["extends"]), settings) if "extends" in settings else settings


def read_preset(name: str) -> dict:
    """The preset of that name, or in that file.

    Raises:
        ValueError: if there is none, or it holds unknown keys.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise ValueError(f"There is no preset {name!r}; there are {known}, or name a YAML file.")
    preset = read_config(path)
    if unknown := sorted(preset.keys() - _KEYS):
        raise ValueError(f"{path} sets {unknown[0]!r}; a preset has {', '.join(sorted(_KEYS))}.")
    for key in ("anneal", "evaluate"):
        if key not in preset:
            raise ValueError(f"{path} has no {key!r}: a preset anneals or mid-trains, and evaluates.")
    return preset


def find_devices(preset: dict, workers: int) -> list[str]:
    """Names of the devices that stages run on: GPUs, or nothing for each worker on the CPU.

    Raises:
        ValueError: if the preset needs GPUs and there are none.
    """
    if preset.get("device") == "cpu":
        return [""] * (workers or os.cpu_count() or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.accelerator.device_count())]
    if not torch.accelerator.is_available():
        raise ValueError(
            "This preset needs GPUs, and there are none. --preset toy runs on the CPU; --dry_run anywhere."
        )
    return names


@command
def main(argv: list[str] | None = None) -> int:
    """Run the experiment; returns the exit status."""
    parser = RecipeParser(ReproduceArguments, prog="reproduce.py", description=__doc__.split("\n", 1)[0])
    settings, dry_run = parser.parse(argv)
    preset = read_preset(settings.preset)
    output = Path(settings.output_dir or f"outputs/{Path(settings.preset).stem}")
    if dry_run:
        print(Experiment(preset, output, devices=1 if preset.get("device") == "cpu" else 8).plan())
        return 0
    devices = find_devices(preset, settings.workers)
    # Asked to end (by a scheduler, by timeout), end the stages, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stages = Experiment(preset, output, len(devices)).stages()
    if not Stages(stages, output, devices).run():
        print("Not all stages are done; give the same command again to go on.", file=sys.stderr)
        return 1
    print((output / "evaluation" / "summary" / "report.md").read_text(encoding="utf-8"))
    print(f"All that was measured is in {output / 'evaluation' / 'comparison' / 'report.html'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
