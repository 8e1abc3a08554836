"""Benchmarks through EleutherAI's lm-evaluation-harness, by default the nine multiple-choice tasks of OLMES.

The tasks and metrics are the harness's own: OLMES (arXiv 2406.08446) prescribes curated examples and the better of two
formats, which the harness does not have, so figures are comparable with each other, not with published OLMES ones.
"""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..runtime.distributed import compute_on_first, default_device
from ..runtime.errors import MeasurementError
from ..runtime.fingerprint import fingerprint_of_folder
from ..runtime.packages import require
from .benchmark_scores import METRICS, BenchmarkResult, result_of_task
from .measuring import device_of, measuring
from .registry import Instrument, Setting, register

OLMES_CORE_9 = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "commonsense_qa",
    "hellaswag",
    "openbookqa",
    "piqa",
    "social_iqa",
    "winogrande",
)

# As in OLMES.
FEW_SHOT = 5

# Requests of a task whose tokens are counted in a dry run, and tokens that the harness generates by default.
_SAMPLE, _GENERATED = 200, 256

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def run_benchmarks(
    model: torch.nn.Module,
    tokenizer,
    tasks: Sequence[str] = OLMES_CORE_9,
    *,
    num_fewshot: int | None = FEW_SHOT,
    batch_size: int = 8,
    limit: int | None = None,
    include_path: str | Path | None = None,
    seed: int = 1234,
    dtype: torch.dtype | None = None,
) -> dict[str, BenchmarkResult]:
    """Run tasks of lm-evaluation-harness on a model in memory, also a quantized one.

    With several processes, each runs all tasks, because the harness distributes only models that it loads itself; all
    return the results of rank 0.

    Args:
        model (`torch.nn.Module`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        tasks (`Sequence[str]`): names of tasks or groups; the OLMES core set when omitted.
        num_fewshot (`int`, *optional*, defaults to 5): examples in the prompt; what the task says when `None`.
        batch_size (`int`, defaults to 8): requests a batch.
        limit (`int`, *optional*): use only the first examples of each task.
        include_path (`str` or `Path`, *optional*): folder with task files of one's own, found before the harness's.
        seed (`int`, defaults to 1234): seed of the choice of examples in the prompt.
        dtype (`torch.dtype`, *optional*): precision of the matrix products (autocast); that of the weights if omitted.

    Raises:
        ImportError: if the harness is missing.
        ValueError: for an unknown task, or one that reports no metric known here.
    """
    names = check_tasks(tasks, include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with measuring(model) as inner:
        wrapped = HFLM(
            pretrained=inner,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            device=str(device_of(inner)),
            dtype=None,
            mixed_precision_dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        )
        output = simple_evaluate(
            model=wrapped,
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=_manager(*_where(tasks, include_path)),
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    # The harness returns results on the first process of a machine only.
    results = compute_on_first(lambda: None if output is None else _results(output))
    if results is None:
        raise MeasurementError("The harness returned no results: is LOCAL_RANK set in a run of one process?")
    return results


def check_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> list[str]:
    """Check that tasks exist; returns their names.

    Raises:
        ImportError: if the harness is missing.
        ValueError: for an unknown task.
    """
    require("lm_eval", "Running benchmarks")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"There is no folder {str(include_path)!r} with task files.")
    known = set(_manager(*_where(tasks, include_path)).all_tasks)
    missing = [task for task in tasks if task not in known]
    if missing or not tasks:
        raise ValueError(
            f"The harness has no task {', '.join(map(repr, missing))}. `lm-eval ls tasks` lists them; a folder with "
            "task files of your own is given as include_path (on the command line: --task_folder)."
        )
    return list(tasks)


def load_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> None:
    """Load the data of the tasks, so that missing data is reported before the long work.

    Raises:
        ValueError: if the data of a task cannot be loaded, or it has no metric that is known here.
    """
    from lm_eval.tasks import get_task_dict

    for task in tasks:
        try:
            loaded = _flat(get_task_dict([task], _manager(*_where(tasks, include_path))))
        except Exception as error:  # of datasets, of the hub, of the task's own code
            raise ValueError(
                f"The data of the task {task!r} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        for name, one in loaded.items():
            means = [metric for metric, how in one.aggregation().items() if getattr(how, "__name__", "") == "mean"]
            if not set(one.aggregation()) & set(METRICS) and not means:
                raise ValueError(
                    f"The task {name!r} is judged by {', '.join(one.aggregation())}, none of which is known here: "
                    f"{', '.join(METRICS)}, or any mean over examples."
                )


def benchmark_tokens(settings, tokenizer) -> int:
    """How many tokens a model reads and generates in `--benchmarks`, about, from a sample of the requests of each task.

    Raises:
        ValueError: if the data of a task cannot be loaded.
    """
    from lm_eval.tasks import get_task_dict

    names, folder = expand_tasks(settings.benchmarks), settings.task_folder or None
    load_tasks(names, folder)
    total = 0
    for task in _flat(get_task_dict(names, _manager(*_where(names, folder)))).values():
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
        task.set_fewshot_seed(seed=settings.seed)
        task.build_all_requests(limit=settings.benchmark_limit or None)
        texts = ["".join(one for one in request.args if isinstance(one, str)) for request in task.instances]
        sample = texts[:: max(1, len(texts) // _SAMPLE)]
        read = sum(len(ids) for ids in tokenizer(sample, verbose=False)["input_ids"]) / len(sample)
        written = sum(_written(request) for request in task.instances) / len(texts)
        total += round((read + written) * len(texts))
    return total


def _written(request) -> int:
    """Tokens that a request generates at most."""
    options = next((one for one in request.args if isinstance(one, dict)), {})
    return options.get("max_gen_toks", _GENERATED) if request.request_type == "generate_until" else 0


def _flat(tasks: dict) -> dict:
    """Tasks by name, without their groups."""
    flat = {}
    for name, task in tasks.items():
        flat |= _flat(task) if isinstance(task, dict) else {name: task}
    return flat


def _where(tasks: Sequence[str], include_path: str | Path | None) -> tuple[str | None, bool]:
    """The folder of the user's tasks, and whether tasks of the harness are needed, which take seconds to index."""
    folder = None if include_path is None else str(include_path)
    return folder, folder is None or not set(tasks) <= set(_manager(folder, False).all_tasks)


@functools.cache
def _manager(folder: str | None, with_defaults: bool):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=with_defaults)


def _results(output: dict) -> dict[str, BenchmarkResult]:
    results = {task: result_of_task(task, output) for task in output["samples"]}
    # A group is scored by all examples of its tasks together.
    for group, tasks in (output.get("group_subtasks") or {}).items():
        parts = [results[task] for task in tasks if task in results]
        shares = {part.metric for part in parts if not part.weights}
        if len(shares) == 1 and len({part.metric for part in parts}) == 1 and group not in results:
            scores = {f"{part.task} {example}": score for part in parts for example, score in part.scores.items()}
            mean = float(np.mean(list(scores.values())))
            results[group] = BenchmarkResult(
                group, parts[0].metric, scores, mean, parts[0].higher_is_better, group=True
            )
    return results


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Names of tasks, with `olmes` replaced by the OLMES core set, each once."""
    return list(dict.fromkeys(task for name in names for task in (OLMES_CORE_9 if name == "olmes" else [name])))


def _not_negative(value: int) -> str | None:
    return None if value >= 0 else "must not be negative"


def benchmark_dtype(settings, on_gpu: bool | None = None) -> str:
    """The precision of benchmarks: bf16 on a GPU, where fp32 takes many times as long; elsewhere that of weights.

    Args:
        settings: those of an evaluation.
        on_gpu (`bool`, *optional*): whether it runs on a GPU; by default, whether it would here.
    """
    if settings.benchmark_dtype != "auto":
        return settings.benchmark_dtype
    if on_gpu is None:
        named = settings.device not in ("", "auto")
        on_gpu = (torch.device(settings.device) if named else default_device()).type != "cpu"
    return "bfloat16" if on_gpu and settings.dtype == "float32" else settings.dtype


def _options(settings) -> dict:
    return {
        "tasks": expand_tasks(settings.benchmarks),
        "num_fewshot": settings.num_fewshot,
        "limit": settings.benchmark_limit or None,
        "include_path": settings.task_folder or None,
        "seed": settings.seed,
        "dtype": getattr(torch, benchmark_dtype(settings)) if benchmark_dtype(settings) != settings.dtype else None,
    }


register(
    Instrument(
        name="benchmarks",
        help="scores on tasks of lm-evaluation-harness",
        measure=lambda model, data, *, tokenizer, **options: {
            task: result.to_dict() for task, result in run_benchmarks(model, tokenizer, **options).items()
        },
        selected=lambda settings: bool(settings.benchmarks),
        subject="variant",
        settings=(
            Setting("benchmarks", [], f"Tasks of lm-evaluation-harness; 'olmes' is {', '.join(OLMES_CORE_9)}."),
            Setting("task_folder", "", "Folder with task files of your own for --benchmarks."),
            Setting("num_fewshot", FEW_SHOT, "Examples in the prompts of --benchmarks.", _not_negative),
            Setting(
                "benchmark_dtype",
                "auto",
                "Precision of the matrix products of --benchmarks: float32, bfloat16 or float16; auto takes bfloat16 "
                "on a GPU, and otherwise that of --dtype.",
                lambda value: None if value in _DTYPES else f"must be one of {', '.join(_DTYPES)}",
            ),
            Setting("benchmark_limit", 0, "Use only the first examples of each benchmark; 0 uses all.", _not_negative),
        ),
        depends_on=("seed",),
        options=_options,
        facts=lambda settings: {
            "task_folder": fingerprint_of_folder(settings.task_folder),
            "computed in": benchmark_dtype(settings),
        },
        check=lambda settings: check_tasks(expand_tasks(settings.benchmarks), settings.task_folder or None),
        fetch=lambda settings: load_tasks(expand_tasks(settings.benchmarks), settings.task_folder or None),
    )
)
