"""The registry of instruments: what `hf-sam evaluate`, the report, the comparison and the callbacks can measure.

An instrument stands in one file, which ends with `register(Instrument(...))`. Flags, results, tables, plots and
callbacks follow from its fields; no other file names it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# What an instrument measures. "variant": each model, also interpolated and quantized. "model": each model in full
# precision. "pair": each tuned model against the base. "triple": the base and the first two tuned models.
Subject = Literal["variant", "model", "pair", "triple"]

# Headings of groups in reports; others are called by their name.
TITLES = {"landscape": "Loss landscape", "similarity": "Distance from the base"}

# Settings of an evaluation that any instrument may depend on.
COMMON = ("seed", "sharpness_documents")


@dataclass(frozen=True)
class Setting:
    """A flag of an instrument.

    Attributes:
        name (`str`): of the flag and of the setting.
        default (`int`, `float`, `str`, `bool` or `list[str]`): its value when omitted, which also gives its type.
        help (`str`): for `--help`.
        problem (`Callable[[Any], str | None]`): says what is wrong with a value, e.g. "must be positive"; None if
            nothing is.
    """

    name: str
    default: Any
    help: str
    problem: Callable[[Any], str | None] = lambda value: None


@dataclass(frozen=True)
class Column:
    """A column of the tables of an instrument.

    Attributes:
        title (`str`): its heading, e.g. `"Hessian trace"`.
        cell (`Callable[[dict], str]`): the text of a cell, from the result as `results.json` holds it, where numbers
            that are not finite are None.
        compared (`bool`, defaults to `True`): whether the comparison of several evaluations shows it.
    """

    title: str
    cell: Callable[[dict], str]
    compared: bool = True


@dataclass(frozen=True)
class Plot:
    """A picture of the report.

    Attributes:
        name (`str`): of its file, without suffix.
        caption (`str`): below it.
        png (`bytes`): the picture.
    """

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Instrument:
    """One thing that can be measured.

    Attributes:
        name (`str`): value of the flag that selects it, and name of its results.
        help (`str`): what it measures, in a few words, for `--help`.
        measure (`Callable[..., dict]`): measures: `measure(*models, data, batch_size=..., **options)` with the models
            of the subject (the base first), held-out data, and the options below; returns the result for JSON. For the
            subject "variant" also with `tokenizer`, that of the base; for "triple" with `names`, those of the models.
        group (`str` or `None`): the flag of `hf-sam evaluate` that selects it, and its section of the report, e.g.
            `"sharpness"`; None for an instrument that `selected` turns on.
        selected (`Callable[[settings], bool]`, *optional*): whether an evaluation measures it; when omitted, whether
            the flag of its group names it.
        subject (`str`): see `Subject`.
        settings (`tuple[Setting, ...]`): its own flags.
        depends_on (`tuple[str, ...]`): common settings that its result depends on, of `COMMON`.
        options (`Callable[[settings], dict]`): keyword arguments of `measure` from the settings of an evaluation.
        columns (`tuple[Column, ...]`): its columns in the table of its group, a row for each model.
        note (`str`): a sentence about its columns, for the report.
        plots (`Callable[[Mapping[str, dict]], Sequence[Plot]]`): pictures, from the results by model.
        tables (`Callable[[Mapping[str, dict]], Sequence[tuple[list[str], list[list[str]]]]]`): more tables, each a
            header and rows, from the results by model.
        scalars (`Callable[[dict], dict[str, float]]` or `None`): numbers to log during training, by name, from a
            result; None if it cannot be measured then.
        facts (`Callable[[settings], dict]`): anything else that its result depends on, for JSON.
        per_dataset (`bool`): whether it measures on each dataset of an evaluation; on the first documents of the first
            one when False, and for the subject "variant" on none.
        fp32 (`bool`): whether it needs weights in fp32.
        whole (`bool`): whether it needs each model whole on one device.
        passes (`float`): forward passes over its documents, roughly, for dry runs; a backward pass counts as two.
        others_on_host (`bool`): whether it takes the weights only of all models but the first, which may stay on the
            CPU.
        packages (`tuple[str, ...]`): optional packages that it needs.
        check (`Callable[[settings], None]`): raises ValueError or ImportError before anything is measured, if something
            that it needs is missing.
        fetch (`Callable[[settings], None]`): loads what it needs, before it measures for the first time.
    """

    name: str
    help: str
    measure: Callable[..., dict]
    group: str | None = None
    selected: Callable[[Any], bool] | None = None
    subject: Subject = "model"
    settings: tuple[Setting, ...] = ()
    depends_on: tuple[str, ...] = COMMON
    options: Callable[[Any], dict] = lambda settings: {}
    columns: tuple[Column, ...] = ()
    note: str = ""
    plots: Callable[[Mapping[str, dict]], Sequence[Plot]] = lambda results: ()
    tables: Callable[[Mapping[str, dict]], Sequence[tuple[list[str], list[list[str]]]]] = lambda results: ()
    scalars: Callable[[dict], dict[str, float]] | None = None
    facts: Callable[[Any], dict] = lambda settings: {}
    per_dataset: bool = False
    fp32: bool = False
    whole: bool = False
    passes: float = 1.0
    others_on_host: bool = False
    packages: tuple[str, ...] = ()
    check: Callable[[Any], None] = lambda settings: None
    fetch: Callable[[Any], None] = lambda settings: None

    @property
    def flag(self) -> str:
        """How messages name it: the flag that selects it."""
        return f"--{self.group} {self.name}" if self.group else f"--{self.name}"

    def is_selected(self, settings) -> bool:
        """Whether an evaluation with these settings measures it."""
        if self.selected is not None:
            return self.selected(settings)
        return self.name in getattr(settings, self.group)

    def decisive(self, settings) -> dict:
        """All that its result depends on besides models and data, by name."""
        return {name: getattr(settings, name) for name in self.setting_names} | self.facts(settings)

    @property
    def setting_names(self) -> tuple[str, ...]:
        """Names of the settings that its result depends on."""
        return (*self.depends_on, *(own.name for own in self.settings))


INSTRUMENTS: dict[str, Instrument] = {}


def register(instrument: Instrument) -> Instrument:
    """Make an instrument known by its name; returns it.

    Raises:
        ValueError: if another instrument has that name, or nothing can select this one.
    """
    if instrument.group is None and instrument.selected is None:
        raise ValueError(f"The instrument {instrument.name!r} needs a group, or a function `selected`.")
    if INSTRUMENTS.get(instrument.name, instrument) is not instrument:
        raise ValueError(f"There is already an instrument {instrument.name!r}.")
    INSTRUMENTS[instrument.name] = instrument
    return instrument


def groups() -> dict[str, list[Instrument]]:
    """The instruments by the flag that selects them, in the order in which they were registered."""
    found: dict[str, list[Instrument]] = {}
    for instrument in INSTRUMENTS.values():
        if instrument.group is not None:
            found.setdefault(instrument.group, []).append(instrument)
    return found


def group_title(group: str) -> str:
    """Heading of a group in reports."""
    return TITLES.get(group, group.replace("_", " ").capitalize())


def with_error(value: float | None, error: float | None) -> str:
    """A number with its error bar as a cell of a table; `unknown` for an error that is not known."""
    return f"{number(value)} ± {'unknown' if error is None else f'{error:.1e}'}"


def number(value: float | None) -> str:
    """A number as a cell of a table."""
    return "not finite" if value is None else f"{value:.4g}"
