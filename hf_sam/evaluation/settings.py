# ruff: noqa: RUF009  (_flag makes a dataclass field)
"""What an evaluation is asked to do: the flags of `hf-sam evaluate`."""

import argparse
import dataclasses
from dataclasses import dataclass, field

from ..instruments import INSTRUMENTS, Instrument
from ..instruments.registry import groups
from ..quantizers import QUANTIZERS
from ..quantizers.registry import find_quantizer

_DTYPES = ("float32", "bfloat16", "float16")


def _flag(default, text: str, **metadata):
    metadata = {"help": text.replace("%", "%%"), **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class EvaluationArguments:
    """Settings of [`~hf_sam.evaluation.evaluate`] and flags of `hf-sam evaluate`.

    Besides the fields below, there is one list for each group of registered instruments (`sharpness=["kl"]`; `True`
    selects all of a group), and the settings of each instrument ([`~hf_sam.instruments.registry.Setting`]).

    Models are named `[NAME=]FOLDER` or `[NAME=]HUB/ID[@REVISION]`; folders of adapters are merged into their base.
    Data is named `[NAME=]FILE_OR_FOLDER` or `[NAME=]HUB/ID[:CONFIG][@REVISION]`.

    Raises:
        ValueError: for a value that is out of range or unknown.
    """

    base: str = _flag("", "The model before fine-tuning.")
    tuned: list[str] = _flag([], "Models that were made from it: one, or a sweep.")
    data: list[str] = _flag([], "Old data, on which forgetting is measured; the first one also for sharpness.")
    task_data: list[str] = _flag([], "Held-out fine-tuning data; runs are compared at equal loss on the first one.")
    output: str = _flag(
        "evaluation",
        "Folder of the results. The same evaluation again, also with more models, data or instruments, measures what "
        "is missing; a different one is refused.",
    )
    overwrite: bool = _flag(False, "Replace a different finished evaluation in the folder of --output.")
    name: str = _flag("", "Name of this run in reports, e.g. the method; the name of the output folder if omitted.")
    data_column: str = _flag("text", "Column of text; 'completion' (with 'prompt') or 'messages' are formatted.")
    task_column: str = _flag("", "The same for --task_data; that of --data_column if omitted.")
    data_split: str = _flag("", "Split of all data; if omitted, test, validation or train, the first that exists.")
    max_documents: int = _flag(1000, "How many documents of each dataset are used.")
    max_length: int = _flag(1024, "Tokens in a row; longer documents take several rows.")
    batch_size: int = _flag(8, "Rows in a batch. In float32 no result depends on it.")
    quantize: list[str] = _flag([], "Quantize each model.")
    quantized: list[str] = _flag(
        [],
        "Models that somebody else quantized, for the same tables: [MODEL/]NAME=PATH, where MODEL is the name of the "
        "model in full precision (the base if omitted) and PATH a folder, a Hub id, or a GGUF file (also "
        "HUB/ID/FILE.gguf), which llama.cpp evaluates.",
    )
    calibration_data: str = _flag("", "Data for the schemes that calibrate, of the kind of the training data.")
    wise_ft: list[float] = _flag([], "Interpolate from the base (0) to each tuned model (1), e.g. 0.25 0.5 0.75.")
    sharpness_documents: int = _flag(64, "Documents of the first dataset for sharpness, landscape and similarity.")
    dtype: str = _flag("float32", "Precision in which models are loaded.")
    device: str = _flag("", "Device, or 'auto' to spread each model over all; the accelerator if there is one.")
    seed: int = _flag(0, "Seed of noise and random vectors.")
    report_to: list[str] = _flag([], "Trackers for the results: wandb, trackio, tensorboard, or others of accelerate.")

    def __new__(cls, *args, **kwargs):
        # The fields of all instruments that are registered by now.
        return super().__new__(arguments_class() if cls is EvaluationArguments else cls)

    def __post_init__(self):
        for name, instruments in groups().items():
            self._check_group(name, instruments)
        for name, values in vars(self).items():
            if isinstance(values, list):
                setattr(self, name, list(dict.fromkeys(values)))
        if not self.base:
            raise ValueError("An evaluation needs --base: the model before fine-tuning or quantization.")
        if not self.data:
            raise ValueError("An evaluation needs --data: held-out text of the kind that the base was trained on.")
        for scheme in self.quantize:
            if find_quantizer(scheme).calibrated and not self.calibration_data:
                raise ValueError(f"--quantize {scheme} needs --calibration_data, which must not be held-out data.")
        if self.dtype not in _DTYPES:
            raise ValueError(f"--dtype {self.dtype} must be one of {', '.join(_DTYPES)}.")
        for name in ("max_documents", "batch_size", "sharpness_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be 1 or larger.")
        if any(not 0 <= alpha <= 1 for alpha in self.wise_ft):
            raise ValueError(f"--wise_ft {self.wise_ft} must be numbers from 0 (the base) to 1 (the tuned model).")
        if self.wise_ft and not self.tuned:
            raise ValueError("--wise_ft compares with a tuned model: give --tuned.")
        for instrument in INSTRUMENTS.values():
            for setting in instrument.settings:
                value = getattr(self, setting.name)
                if problem := setting.problem(value):
                    raise ValueError(f"--{setting.name} {value} {problem}.")
        for instrument in self.instruments:
            self._check_instrument(instrument)

    def _check_group(self, name: str, instruments: list[Instrument]):
        known = [instrument.name for instrument in instruments]
        chosen = getattr(self, name)
        if isinstance(chosen, bool):
            chosen = known if chosen else []
        elif isinstance(chosen, str):  # one name in a config file
            chosen = [chosen]
        setattr(self, name, chosen)
        for value in chosen:
            if value not in known:
                raise ValueError(f"--{name} {value} must be one of {', '.join(known)}.")

    def _check_instrument(self, instrument: Instrument):
        flag = instrument.flag
        if instrument.fp32 and self.dtype != "float32":
            raise ValueError(f"{flag} needs --dtype float32: 16-bit weights round away what it adds to them.")
        needed = {"pair": 1, "triple": 2}.get(instrument.subject, 0)
        if len(self.tuned) < needed:
            models = "a tuned model: give --tuned" if needed == 1 else "two tuned models: give two to --tuned"
            raise ValueError(f"{flag} needs {models}.")

    @property
    def instruments(self) -> list[Instrument]:
        """The instruments that these settings select."""
        return [instrument for instrument in INSTRUMENTS.values() if instrument.is_selected(self)]

    def to_dict(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self)


class _SelectInstruments(argparse.Action):
    """Takes names of instruments; without any, the flag selects all of its group."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "nargs": "*"})

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values or True)


def arguments_class() -> type[EvaluationArguments]:
    """[`EvaluationArguments`] with the fields of all registered instruments, e.g. for a parser of flags.

    Raises:
        ValueError: if an instrument adds a flag that exists.
    """
    fields: list[tuple] = []
    for name, instruments in groups().items():
        text = "; ".join(f"{instrument.name}: {instrument.help}" for instrument in instruments)
        text = f"Instruments of the group {name}, all of them if none is named. {text}."
        fields.append((name, list[str], _flag([], text, action=_SelectInstruments)))
    for instrument in INSTRUMENTS.values():
        for setting in instrument.settings:
            kind = list[str] if isinstance(setting.default, list) else type(setting.default)
            fields.append((setting.name, kind, _flag(setting.default, setting.help)))
    names = [one.name for one in dataclasses.fields(EvaluationArguments)] + [name for name, *_ in fields]
    text = "; ".join(f"{one.scheme}: {one.help}" for one in QUANTIZERS.values())
    fields.append(("quantize", list[str], _flag([], f"Quantize each model. {text}.")))
    if taken := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"Two flags of instruments or of the command are named --{taken[0]}; rename the newer one.")
    return dataclasses.make_dataclass(
        "EvaluationArguments", fields, bases=(EvaluationArguments,), namespace={"__doc__": EvaluationArguments.__doc__}
    )
