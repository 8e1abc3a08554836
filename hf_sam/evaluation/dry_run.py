"""The plan of an evaluation: what will be measured, how many tokens that takes, and how many hours on usual devices."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..instruments import HeldOutData
from ..instruments.benchmarks import benchmark_dtype, benchmark_tokens
from ..planning.plan import UTILIZATION, duration
from ..runtime.markdown import markdown_table
from ..runtime.models import model_without_weights
from .run import Evaluation

# Dense peak in FLOP/s from the data sheets of the vendor, by the precision of the matrix products. Held-out losses and
# sharpness are measured without TF32.
PEAKS = {
    "A100": {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
    "H100": {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12},
}


@dataclass(frozen=True)
class Work:
    """A part of an evaluation.

    Attributes:
        name (`str`): what is measured.
        tokens (`int`): tokens of all forward passes; a backward pass counts as two.
        dtype (`str`): precision of the matrix products.
    """

    name: str
    tokens: int
    dtype: str


def plan_text(evaluation: Evaluation) -> str:
    """The plan as text with a Markdown table."""
    settings = evaluation.settings
    parameters = _multiplied(evaluation)
    rows, totals = [], dict.fromkeys(PEAKS, 0.0)
    for work in _works(evaluation):
        hours = {device: _hours(work, parameters, peaks) for device, peaks in PEAKS.items()}
        totals = {device: total + hours[device] for device, total in totals.items()}
        times = [duration(hours[device]) for device in PEAKS]
        rows.append([work.name, f"{work.tokens:,}", work.dtype, *times])
    rows.append(["together", "", "", *(duration(total) for total in totals.values())])
    variants = sum(1 + len(_variants(evaluation, source)) for source in evaluation.sources)
    name = settings.name or settings.output
    return (
        f"{name}: {len(evaluation.sources)} models, {variants} with their quantized and interpolated variants, "
        f"{parameters:,} parameters in matrix multiplications.\n\n"
        + markdown_table(["measure", "tokens", "precision", *PEAKS], rows)
        + f"\n\nTimes on one device, at {UTILIZATION:.0%} of its peak in that precision, without loading and "
        "quantizing models."
    )


def _works(evaluation: Evaluation) -> Iterator[Work]:
    settings = evaluation.settings
    variants = sum(1 + len(_variants(evaluation, source)) for source in evaluation.sources)
    documents = _tokens(evaluation.first_documents)
    counts = {"model": len(evaluation.sources), "pair": len(evaluation.tuned), "triple": 1}
    for instrument in evaluation.instruments:
        if instrument.per_dataset:
            held_out = sum(map(_tokens, (evaluation.data | evaluation.task_data).values()))
            yield Work("held-out loss", variants * held_out, settings.dtype)
        elif instrument.subject == "variant":
            tokens = benchmark_tokens(settings, evaluation.tokenizer)
            yield Work(instrument.name, variants * tokens, benchmark_dtype(settings, on_gpu=True))
        else:
            passes = int(counts[instrument.subject] * instrument.passes * documents)
            yield Work(f"{instrument.group}: {instrument.name}", passes, settings.dtype)


def _variants(evaluation: Evaluation, source) -> list[str]:
    interpolated = [str(alpha) for alpha in evaluation.settings.wise_ft] if source is not evaluation.base else []
    return [*interpolated, *evaluation.quantized_variants(source)]


def _tokens(data: HeldOutData) -> int:
    return sum(len(row.input_ids) for row in data.rows)


def _hours(work: Work, parameters: int, peaks: dict[str, float]) -> float:
    return 2 * parameters * work.tokens / (peaks[work.dtype] * UTILIZATION) / 3600


def _multiplied(evaluation: Evaluation) -> int:
    """Parameters of the base in matrix multiplications: all but input embeddings that are not also the output layer."""
    model = model_without_weights((evaluation.base.base or evaluation.base).folder)
    total = sum(param.numel() for param in model.parameters())
    tied = model.get_output_embeddings() is None or (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    return total if tied else total - model.get_input_embeddings().weight.numel()
