# ruff: noqa: RUF009  (_flag makes a dataclass field)
"""What an evaluation is asked to do: the flags of `hf-sam evaluate`."""

import dataclasses
from dataclasses import dataclass, field

from ..instruments.benchmarks import FEW_SHOT, OLMES_CORE_9
from ..instruments.quantization import SCHEMES, check_scheme

SHARPNESS = ("kl", "noise", "sam", "hessian")
LANDSCAPES = ("line", "plane", "random")
_DTYPES = ("float32", "bfloat16", "float16")


def _flag(default, text: str):
    metadata = {"help": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class EvaluationArguments:
    """Settings of [`~hf_sam.report.evaluate`] and flags of `hf-sam evaluate`.

    Models are named `[NAME=]FOLDER` or `[NAME=]HUB/ID[@REVISION]`; folders of adapters are merged into their base.
    Data is named `[NAME=]FILE_OR_FOLDER` or `[NAME=]HUB/ID[:CONFIG][@REVISION]`.

    Raises:
        ValueError: for a value that is out of range or unknown.
    """

    base: str = _flag("", "The model before fine-tuning.")
    tuned: list[str] = _flag([], "Models that were made from it: one, or a sweep.")
    data: list[str] = _flag([], "Old data, on which forgetting is measured; the first one also for sharpness.")
    task_data: list[str] = _flag([], "Held-out fine-tuning data; the first one is compared at equal loss.")
    output: str = _flag(
        "evaluation",
        "Folder of the results. The same evaluation again, also with more models, data or measures, goes on with what "
        "is missing; another one is refused.",
    )
    overwrite: bool = _flag(False, "Replace another finished evaluation in the folder of --output.")
    name: str = _flag("", "What reports call this run, e.g. the method; the name of the output folder if omitted.")
    data_column: str = _flag("text", "Column of text; 'completion' (with 'prompt') or 'messages' are formatted.")
    task_column: str = _flag("", "The same for --task_data; that of --data_column if omitted.")
    data_split: str = _flag("", "Split of all data; test, validation or train, whichever there is, if omitted.")
    max_documents: int = _flag(1000, "How many documents of each dataset are used.")
    max_length: int = _flag(1024, "Tokens in a row; longer documents take several rows.")
    batch_size: int = _flag(8, "Rows in a batch. In float32 no result depends on it.")
    quantize: list[str] = _flag([], f"Quantize each model: {', '.join(SCHEMES)}.")
    wise_ft: list[float] = _flag([], "Interpolate from the base (0) to each tuned model (1), e.g. 0.25 0.5 0.75.")
    sharpness: list[str] = _flag(
        [],
        "Sharpness of each model: kl (Gaussian noise of 1e-5), noise (in proportion to each layer at "
        "initialization), sam (loss at w + e), hessian (top eigenvalue and trace).",
    )
    sharpness_documents: int = _flag(64, "Documents of the first dataset that sharpness and landscapes are taken on.")
    sam_rho: float = _flag(0.05, "Radius of --sharpness sam.")
    landscape: list[str] = _flag(
        [], "Loss along the line to each tuned model, on the plane through the first two, on random directions."
    )
    similarity: bool = _flag(False, "Principal angles and CKA of hidden states, distance of weights, by layer.")
    benchmarks: list[str] = _flag([], f"Tasks of lm-evaluation-harness; 'olmes' is {', '.join(OLMES_CORE_9)}.")
    task_folder: str = _flag("", "Folder with task files of your own for --benchmarks.")
    num_fewshot: int = _flag(FEW_SHOT, "Examples in the prompts of --benchmarks.")
    benchmark_limit: int = _flag(0, "Use only the first examples of each benchmark; 0 uses all.")
    dtype: str = _flag("float32", "Precision in which models are loaded; sharpness needs float32.")
    device: str = _flag("", "Device, or 'auto' to spread each model over all; the accelerator if there is one.")
    seed: int = _flag(0, "Seed of noise, random vectors and bootstrap.")

    def __post_init__(self):
        for name, values in vars(self).items():
            if isinstance(values, list):
                setattr(self, name, list(dict.fromkeys(values)))
        if not self.base:
            raise ValueError("An evaluation needs --base: the model before fine-tuning or quantization.")
        if not self.data:
            raise ValueError("An evaluation needs --data: held-out text of the kind that the base was trained on.")
        for name, known in (("sharpness", SHARPNESS), ("landscape", LANDSCAPES)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"--{name} {value} is none of {', '.join(known)}.")
        for scheme in self.quantize:
            check_scheme(scheme)
        if self.dtype not in _DTYPES:
            raise ValueError(f"--dtype {self.dtype} is none of {', '.join(_DTYPES)}.")
        if self.dtype != "float32" and (self.sharpness or self.landscape):
            raise ValueError(
                "--sharpness and --landscape need --dtype float32: 16-bit weights round away what they add."
            )
        for name in ("max_documents", "batch_size", "sharpness_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be 1 or larger.")
        for name in ("num_fewshot", "benchmark_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative.")
        if any(not 0 <= alpha <= 1 for alpha in self.wise_ft):
            raise ValueError(f"--wise_ft {self.wise_ft} must be numbers from 0 (the base) to 1 (the tuned model).")
        for name in ("wise_ft", "similarity"):
            if getattr(self, name) and not self.tuned:
                raise ValueError(f"--{name} compares with a tuned model: give --tuned.")
        if "line" in self.landscape and not self.tuned:
            raise ValueError("--landscape line leads to a tuned model: give --tuned.")
        if "plane" in self.landscape and len(self.tuned) < 2:
            raise ValueError("--landscape plane goes through two tuned models: give two to --tuned.")

    @property
    def tasks(self) -> list[str]:
        """Benchmarks, with `olmes` written out."""
        names = []
        for name in self.benchmarks:
            names += OLMES_CORE_9 if name == "olmes" else [name]
        return list(dict.fromkeys(names))

    def to_dict(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self)
