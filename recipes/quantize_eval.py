"""What fine-tuning and few bits cost each base model, before and after, and what SAM saves against AdamW.

    python recipes/quantize_eval.py --config recipes/configs/eval/metamath.yaml \
        --runs adamw=outputs/olmo2_1b_mid/adamw,outputs/sft/adamw sam=outputs/olmo2_1b_mid/sam,outputs/sft/sam

A run is `NAME=BASE` or `NAME=BASE,FOLDER` with the `lr-*` folders of its sweep; the first is the reference. All other
flags are those of `hf-sam evaluate`. Parts that were measured are not measured again. A measure that fails, e.g. since
the training of a model diverged, is missing from the tables, and its reason is in the report of its run.
"""

import os
import sys
from pathlib import Path

from configuration import read_config

from hf_sam.commands.evaluate import EvaluateParser, tell_failures
from hf_sam.commands.reporting import command
from hf_sam.evaluation import EvaluationArguments, Results
from hf_sam.evaluation.run import Evaluation
from hf_sam.report import write_comparison, write_report
from hf_sam.report.document import Document
from hf_sam.runtime.disk import write_json
from hf_sam.runtime.distributed import join_processes, rank_and_world
from hf_sam.runtime.errors import UsageError, did_you_mean
from hf_sam.runtime.run_record import FINISHED, read_finished
from hf_sam.statistics import forgetting, forgetting_reduction

# arXiv 2605.02105, OLMo-2-1B: how much less SAM forgets than AdamW, in per cent.
PAPER = {"forgetting after fine-tuning": 31, "damage of 4 bits": 40}


class QuantizeEvalParser(EvaluateParser):
    """The flags of `hf-sam evaluate`, of all runs at once."""

    def __init__(self):
        super().__init__()
        self.prog = "quantize_eval.py"
        self.add_argument("--runs", nargs="+", default=[], metavar="NAME=BASE[,FOLDER]", help="what is compared")
        self.add_argument("--dry_run", action="store_true", help="tell what will be measured, and exit")

    def parse(self, argv: list[str]) -> dict:
        """The flags by name, those of `--config` below those of the command line."""
        config = self.parse_args(argv).config
        if config:
            unknown = self.set_defaults_with_config(**read_config(config))
            if unknown:
                name = unknown[0].removeprefix("--")
                near = did_you_mean(name, [action.dest for action in self._actions])
                raise UsageError(f"{config} sets {name!r}, which is no setting of {self.prog}{near}")
        return vars(self.parse_args(argv))


@command
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    flags = QuantizeEvalParser().parse(list(sys.argv[1:] if argv is None else argv))
    runs, dry_run = flags.pop("runs"), flags.pop("dry_run")
    flags.pop("config")
    output = Path(flags.pop("output"))
    if not runs:
        raise ValueError("Say what to compare: --runs NAME=BASE[,FOLDER] ..., the first of which is the reference.")
    settings = [_settings(run, flags, output) for run in runs]
    if len({one.name for one in settings}) < len(settings):
        raise ValueError(f"--runs {' '.join(runs)}: two runs have the same name.")
    if dry_run:
        print(_plan(settings))
        return 0
    join_processes()
    # All of them before any: what the last one lacks is told before the first one is measured.
    evaluations = [Evaluation(one) for one in settings]
    records = [one.run() for one in evaluations]
    if rank_and_world()[0] == 0:
        for one, record in zip(settings, records, strict=True):
            write_report(record, one.output)
            tell_failures(record)
        results = [Results(record) for record in records]
        if len(results) > 1:
            write_comparison([one.output for one in settings], output / "comparison")
            summary = summarize(results)
            write_json(output / "summary.json", summary)
            document = table(summary)
            document.write(output / "summary")
            print(document.markdown())
        print(f"Reports are in {output}.")
    return 0


def _settings(run: str, flags: dict, output: Path) -> EvaluationArguments:
    name, equals, places = run.partition("=")
    base, _, sweep = places.partition(",")
    if not (name and equals and base):
        raise ValueError(f"--runs {run!r} is not of the form NAME=BASE or NAME=BASE,FOLDER.")
    tuned = list(flags["tuned"])
    if sweep:
        found = sorted(Path(sweep).glob("lr-*"), key=lambda path: float(path.name.removeprefix("lr-")))
        tuned += [str(path) for path in found if (path / FINISHED).exists()]
        if not tuned:
            raise ValueError(f"--runs {run!r}: {sweep} holds no finished run lr-* of a sweep.")
    own = {"base": base, "tuned": tuned, "name": name, "output": str(output / name)}
    return EvaluationArguments(**{**flags, **own})


def summarize(results: list[Results]) -> dict:
    """The table of the paper: what each run lost, and how much less than the first.

    Args:
        results (`list[Results]`): the first is the reference.

    Returns:
        `dict`: for each run its losses, damage and forgetting, with the reductions against the reference in per cent;
        None for what could not be measured.
    """
    reference, *_ = results
    data = reference.old[0]
    environment = {name: value for name, value in reference.record["environment"].items() if name != "command"}
    summary = {"reference": reference.name, "data": data, "environment": environment, "runs": {}}
    schemes = reference.record["settings"]["quantize"]
    lost = {scheme: _damage(reference, data, scheme) for scheme in schemes}
    for one in results:
        before = one.loss(one.base, data)
        row = {"base loss": None if before is None else before.loss, "quantized": {}, "fine-tuned": None}
        # What was really done, not what was asked for; not known of a model that was trained elsewhere.
        row["training"] = read_finished(one.record["models"][0]["spec"])
        for scheme in schemes:
            own, after = _damage(one, data, scheme), one.loss(one.base, data, scheme)
            known = own is not None and lost[scheme] is not None and lost[scheme] > 0
            row["quantized"][scheme] = {
                "damage": own,
                "loss": None if after is None else after.loss,
                "reduction": 100 * (1 - own / lost[scheme]) if known else None,
            }
        row["sweep"] = [
            {"model": run.name, "task loss": run.task.loss, "forgetting": run.forgetting, "loss": run.after.loss}
            for run in one.sweep()
        ]
        if one is not reference and row["sweep"]:
            try:
                found = forgetting_reduction(reference.sweep(), one.sweep())
                row["fine-tuned"] = {
                    "task loss": found.task_loss,
                    "forgetting": found.method,
                    "of the reference": found.reference,
                    "reduction": 100 * found.relative.value,
                    "interval": [100 * found.relative.low, 100 * found.relative.high],
                    "loss": found.end_method,
                    "loss of the reference": found.end_reference,
                }
            except ValueError as error:
                row["fine-tuned"] = {"missing": str(error)}
        row["benchmarks"] = _benchmarks(one, schemes)
        summary["runs"][one.name] = row
    return summary


def _benchmarks(one: Results, schemes: list[str]) -> dict:
    """Mean accuracy over the tasks, in per cent, of the base, quantized, and of each tuned model."""

    def mean(model, variant=""):
        scores = one.benchmarks(model, variant)
        return 100 * sum(score.value for score in scores.values()) / len(scores) if scores else None

    found = {"base": mean(one.base)}
    if found["base"] is None:
        return {}
    return found | {scheme: mean(one.base, scheme) for scheme in schemes} | {name: mean(name) for name in one.tuned}


def _damage(one: Results, data: str, scheme: str) -> float | None:
    before, after = one.loss(one.base, data), one.loss(one.base, data, scheme)
    return None if before is None or after is None else forgetting(before, after).value


def table(summary: dict) -> Document:
    """The summary as tables, with the paper's figures."""
    document = Document("What was lost, and where it ended")
    reference = summary["reference"]
    document.text(
        f"Nats per token on `{summary['data']}`; reductions are against `{reference}`, more is better. The paper "
        f"(arXiv 2605.02105, OLMo-2-1B, SAM against AdamW) has {PAPER['forgetting after fine-tuning']}% less "
        f"forgetting after MetaMath and {PAPER['damage of 4 bits']}% less damage of 4 bits."
    )
    trained = [
        (name, run.get("training")) for name, run in summary["runs"].items() if "passes" in (run.get("training") or {})
    ]
    if trained:
        document.heading("What the training of the base models took")
        document.table(
            ["run", "steps", "of these with SAM", "passes over each batch"],
            [[name, str(t["own_steps"]), str(t["sam_steps"]), f"{t['passes']:.2f}"] for name, t in trained],
        )
    for scheme in summary["runs"][reference]["quantized"]:
        rows = []
        for name, run in summary["runs"].items():
            found = run["quantized"][scheme]
            change = "reference" if name == reference else _percent(found["reduction"])
            rows.append([name, _number(run["base loss"]), _number(found["damage"]), change, _number(found["loss"])])
        document.heading(f"Quantized to {scheme}")
        document.table(["run", "base loss", "damage", "reduction", "loss where it ended"], rows)
    rows = []
    for name, run in summary["runs"].items():
        found = run["fine-tuned"]
        if found is None:
            continue
        if "missing" in found:
            document.text(f"`{name}` at equal task loss: missing. {found['missing']}")
            continue
        low, high = found["interval"]
        rows.append(
            [
                name,
                f"{found['task loss']:.4f}",
                f"{found['of the reference']:.4f} -> {found['forgetting']:.4f}",
                f"{found['reduction']:.1f}% [{low:.1f}, {high:.1f}]",
                f"{found['loss of the reference']:.4f} -> {found['loss']:.4f}",
            ]
        )
    if rows:
        document.heading("Fine-tuned, at equal task loss")
        header = ["run", "task loss", "forgetting, reference -> run", "reduction [95%]", "loss where they ended"]
        document.table(header, rows)
    scores = {name: run["benchmarks"] for name, run in summary["runs"].items() if run["benchmarks"]}
    if scores:
        document.heading("Benchmarks, mean accuracy in per cent")
        document.table(
            ["run", "model", "accuracy", "change"],
            [
                [name, model, f"{value:.1f}", f"{value - found['base']:+.1f}"]
                for name, found in scores.items()
                for model, value in found.items()
                if value is not None
            ],
        )
    return document


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "missing" if value is None else f"{value:.0f}%"


def _plan(settings: list[EvaluationArguments]) -> str:
    lines = []
    for one in settings:
        models = 1 + len(one.tuned)
        losses = models * (1 + len(one.quantize)) * (len(one.data) + len(one.task_data))
        size = _bytes(one.base)
        weights = f"{size / 2**30:.1f} GiB of weights, and as much again while rounding" if size else "weights"
        lines.append(
            f"{one.name}: {models} models, {losses} held-out losses of up to {one.max_documents} documents, "
            f"{models * (1 + len(one.quantize)) * len(one.tasks)} benchmark runs; {weights}, on one device."
        )
    return "\n".join(lines)


def _bytes(base: str) -> int:
    if not os.path.isdir(base):
        return 0
    return sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
