"""`hf-sam suggest-rho MODEL --data ...`: the loss at w + e for many radii, and radii to start with."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging

from ..evaluation.inputs import load_held_out
from ..evaluation.models import Models
from ..instruments import RadiusProfile, radius_profile
from ..runtime.config import ConfigParser
from ..runtime.dataset_specs import parse_spec
from ..runtime.disk import check_writable, write_json
from ..runtime.markdown import markdown_table
from ..runtime.models import find_model


@dataclass(frozen=True)
class Start:
    """A way to perturb the weights, and the rises of the loss with which it was measured in docs/cost.md.

    Attributes:
        what (`str`): the way in words.
        cost (`float`): passes, relative to plain training.
        flags (`str`): flags, with the names of `rises` in place of the radii.
        rises (`dict[str, float]`): nats per token at w + e, by kind; see [`~hf_sam.instruments.radius_profile`].
    """

    what: str
    cost: float
    flags: str
    rises: dict[str, float]


# Measured at the start of the anneals of the preset `toy-cost`, at the radii that these used.
STARTS = (
    Start(
        "momentum and noise",
        1.0,
        "--sam_variant momentum --sam_rho {momentum} --sam_noise {noise}",
        {"momentum": 0.35, "noise": 0.15},
    ),
    Start("momentum", 1.0, "--sam_variant momentum --sam_rho {momentum}", {"momentum": 0.35}),
    Start("noise", 1.0, "--sam_noise {noise}", {"noise": 0.15}),
    Start("SAM in every 10th step", 1.1, "--sam_rho {sam} --sam_interval 10", {"sam": 2.75}),
    Start("ASAM in every 10th step", 1.1, "--sam_variant asam --sam_rho {asam} --sam_interval 10", {"asam": 2.75}),
    Start("SAM in every step", 2.0, "--sam_rho {sam}", {"sam": 0.6}),
)
KINDS = tuple(dict.fromkeys(kind for start in STARTS for kind in start.rises))


@dataclass
class SuggestRhoArguments:
    """Flags of `hf-sam suggest-rho`."""

    data: str = field(default="", metadata={"help": "Text like the training data: [NAME=]FILE, FOLDER or HUB/ID."})
    data_column: str = field(default="text", metadata={"help": "Column of text; 'completion' or 'messages'."})
    data_split: str = field(default="", metadata={"help": "Split; test, validation or train, the first that exists."})
    max_documents: int = field(default=1000, metadata={"help": "How many documents are read."})
    max_length: int = field(default=1024, metadata={"help": "Tokens in a row, as in training."})
    ascent_batch_size: int = field(
        default=16,
        metadata={
            "help": "Rows of one ascent gradient: those of an optimizer step on all devices, or with "
            "sam_ascent_micro_batches those of the ascent pass."
        },
    )
    batches: int = field(default=4, metadata={"help": "Batches to average over."})
    kinds: list[str] = field(
        default_factory=lambda: ["sam", "momentum", "noise"],
        metadata={"help": "What to measure: sam, asam, momentum (estimated, because a model has none), noise."},
    )
    rhos: list[float] = field(
        default_factory=list, metadata={"help": "Radii; if omitted, from a rise of 0.01 to one of 4 nats."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows in a forward pass."})
    device: str = field(default="", metadata={"help": "Device; the accelerator if there is one."})
    seed: int = field(default=0, metadata={"help": "Chooses the rows."})
    json: str = field(default="", metadata={"help": "File for the numbers."})

    def __post_init__(self):
        if not self.data:
            raise ValueError("A radius is measured on data: give --data, text of the kind that you will train on.")
        for name in ("max_documents", "ascent_batch_size", "batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be 1 or larger.")
        self.kinds = list(dict.fromkeys(self.kinds))
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"--kinds {unknown[0]} must be some of {', '.join(KINDS)}.")
        if self.device == "auto":
            raise ValueError("--device auto spreads the model over all devices; choose one.")


def make_parser() -> ConfigParser:
    """The parser of the command."""
    parser = ConfigParser(SuggestRhoArguments, prog="hf-sam suggest-rho", description=__doc__.split(": ", 1)[1])
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of the model that will be trained")
    return parser


def main(argv: list[str]) -> int:
    """Measure, print the table and the radii to start with; returns the exit status."""
    parser = make_parser()
    flags = vars(parser.parse_args(parser.prepare(argv)))
    place = flags.pop("model")
    flags.pop("config")
    settings = SuggestRhoArguments(**flags)
    logging.set_verbosity_error()
    if settings.json:
        check_writable(Path(settings.json).parent)
    source = find_model(place)
    source.check_length(settings.max_length)
    name, data = load_held_out(
        settings.data,
        source.tokenizer(),
        column=settings.data_column,
        split=settings.data_split or None,
        max_documents=settings.max_documents,
        max_length=settings.max_length,
    )
    model = Models(torch.float32, settings.device).get(source)
    parameters = sum(param.numel() for param in model.parameters())
    print(f"{source.name}, {parameters:,} parameters, on {name}: {settings.batches} batches of ", end="")
    print(f"{settings.ascent_batch_size} rows.")
    profiles = {}
    for kind in settings.kinds:
        profiles[kind] = radius_profile(
            model,
            data,
            kind=kind,
            rhos=settings.rhos or None,
            ascent_batch_size=settings.ascent_batch_size,
            batches=settings.batches,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        print(f"\n{kind}\n\n{profile_table(profiles[kind])}", flush=True)
    print("\n" + advice(profiles, settings, place))
    if settings.json:
        found = {kind: profile.to_dict() for kind, profile in profiles.items()}
        write_json(Path(settings.json), found)
    return 0


def profile_table(profile: RadiusProfile) -> str:
    """The rise of the loss against the radius, as a Markdown table."""
    loss = sum(profile.losses) / len(profile.losses)
    columns = zip(profile.rhos, profile.mean_rises, profile.standard_errors, profile.curvature_shares, strict=True)
    rows = [
        [f"{rho:.4g}", f"{loss + rise:.3f}", f"{rise:.4f}", f"{error:.4f}", f"{share:.0%}"]
        for rho, rise, error, share in columns
    ]
    header = ["rho", "loss at w + e", "loss rise (nats)", "standard error", "curvature share"]
    return markdown_table(header, rows, numeric=[True] * 5)


def advice(profiles: dict[str, RadiusProfile], settings: SuggestRhoArguments, place: str) -> str:
    """Where to start, and a command."""
    rows, command, uncertain = [], "", set()
    for start in STARTS:
        if not start.rises.keys() <= profiles.keys():
            continue
        radii = {kind: profiles[kind].radius_at(rise) for kind, rise in start.rises.items()}
        reached = None not in radii.values()
        uncertain |= {kind for kind, rho in radii.items() if rho is not None and profiles[kind].is_uncertain_at(rho)}
        flags = start.flags.format(**{kind: f"{radius:.2g}" for kind, radius in radii.items()}) if reached else ""
        rises = " + ".join(f"{rise:g}" for rise in start.rises.values())
        rows.append([start.what, f"{start.cost:g}x", rises, flags or "out of range"])
        command = command or (_command(place, settings, flags) if flags else "")
    lines = [
        "Start with one of these, the cheapest first. They raise the loss as much as the runs in docs/cost.md, which",
        "forgot less and lost less to few bits. Larger ones lose less of a higher loss.",
        "",
        markdown_table(["what", "passes", "loss rise (nats)", "flags"], rows),
    ]
    if uncertain:
        lines += [
            "",
            f"Batches differ much in the rise for {', '.join(sorted(uncertain))}: take more of them (--batches).",
        ]
    return "\n".join([*lines, *(["", command] if command else [])])


def _command(place: str, settings: SuggestRhoArguments, flags: str) -> str:
    """Training on the same data with one of the radii, on one device."""
    rows, length = settings.ascent_batch_size, settings.max_length
    per_pass = max(size for size in range(1, settings.batch_size + 1) if rows % size == 0)
    training = ["--per_device_train_batch_size", per_pass, "--gradient_accumulation_steps", rows // per_pass]
    data = ["--dataset_name", parse_spec(settings.data)[1], "--max_length", length, "--output_dir", "out"]
    name = "sft" if settings.data_column in ("completion", "messages") else "clm"
    if name == "clm" and settings.data_column != "text":
        data += ["--dataset_text_field", settings.data_column]
    return shlex.join(["hf-sam", name, "--model_name_or_path", place, *map(str, [*data, *training]), *flags.split()])
