"""An evaluation from beginning to end: check everything, measure part by part, write the record.

Models are loaded one after the other and only if a part of theirs is missing. Nothing is measured before all models,
data, tasks and packages are known to be there.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..instruments.benchmarks import check_tasks, load_tasks, run_benchmarks
from ..instruments.data import HeldOutData
from ..instruments.hessian import hessian_spectrum
from ..instruments.landscape import loss_along_line, loss_on_plane, loss_on_random_plane
from ..instruments.loss import held_out_loss
from ..instruments.noise import noise_kl, noise_sensitivity
from ..instruments.quantization import is_rounding
from ..instruments.sharpness import sam_sharpness
from ..instruments.similarity import representation_similarity, weight_distance
from ..runtime.disk import write_json
from ..runtime.distributed import compute_on_first, rank_and_world
from ..runtime.environment import environment, versions
from ..runtime.errors import MeasurementError
from ..runtime.fingerprint import fingerprint_of_folder
from ..runtime.models import LocalModel, check_same_tokens, find_model
from ..runtime.packages import require
from ..runtime.progress import titled
from .finished import check_same_evaluation
from .inputs import check_same_shapes, load_held_out, with_distinct_names
from .models import Models
from .settings import EvaluationArguments
from .store import FAILURES, PartStore


def evaluate(settings: EvaluationArguments) -> dict:
    """Measure what the settings ask for; returns what `results.json` in the output folder holds.

    Under several processes (`accelerate launch`), batches are shared out between them, and the first one writes.

    In a folder that holds a finished evaluation, the same one may be asked for again, also with more models, data or
    measures; what is there already is not measured again. Another one is refused unless `settings.overwrite` is set.
    A measure that fails, e.g. since the training of a model diverged, leaves its reason in the record, and the others.

    Raises:
        ValueError, OSError, ImportError: before anything is measured, if something that it needs is not there, or the
            output folder holds another finished evaluation.
    """
    return Evaluation(settings).run()


class Evaluation:
    """One evaluation; see [`evaluate`]."""

    def __init__(self, settings: EvaluationArguments):
        self.settings = settings
        self.started = time.time()
        self._check_packages()
        self.store = PartStore(settings.output, versions())
        self.models = Models(getattr(torch, settings.dtype), settings.device)
        self.sources = with_distinct_names([find_model(spec) for spec in (settings.base, *settings.tuned)])
        self.base, *self.tuned = self.sources
        self.tokenizer = self.base.tokenizer()
        self._check_models()
        self.data = self._load(settings.data, settings.data_column, self.tokenizer)
        column = settings.task_column or settings.data_column
        # Fine-tuning brings chat templates and their markers along.
        chats = [source.tokenizer() for source in self.tuned] if column == "messages" else []
        self.task_data = self._load(settings.task_data, column, *chats[:1] or [self.tokenizer])
        if both := self.data.keys() & self.task_data.keys():
            raise ValueError(f"--data and --task_data both have a {both.pop()!r}; give them names: NAME=PATH.")
        first = next(iter(self.data.values()))
        self.sharpness_data = first.first(settings.sharpness_documents)
        if settings.tasks:
            check_tasks(settings.tasks, settings.task_folder or None)
            self._tasks = {
                "tasks": settings.tasks,
                "shots": settings.num_fewshot,
                "limit": settings.benchmark_limit,
                "folder": fingerprint_of_folder(settings.task_folder),
                "tokenizer": self.base.tokenizer_fingerprint(),
                "seed": settings.seed,
            }
        self._tasks_loaded = False
        if not settings.overwrite:
            compute_on_first(lambda: check_same_evaluation(settings.output, self.record()))

    def _check_models(self):
        settings = self.settings
        compared = settings.similarity or settings.wise_ft or {"line", "plane"} & {*settings.landscape}
        for source in self.tuned:
            check_same_tokens(self.tokenizer, source.tokenizer(), source.name)
            if source.base is not None and source.base.fingerprint != self.base.fingerprint:
                raise ValueError(
                    f"The adapter {source.name!r} belongs to {source.base.spec!r}, whose weights are not those of "
                    f"--base {self.base.spec!r}."
                )
            if compared:
                check_same_shapes(self.base, source)
        for source in self.sources:
            source.check_length(settings.max_length)
            if source.base is not None and not all(map(is_rounding, settings.quantize)):
                source.check_space(self.models.dtype)
        spread = settings.device == "auto" and torch.accelerator.device_count() > 1
        if spread and (settings.landscape or settings.similarity or {"sam", "hessian"} & {*settings.sharpness}):
            raise ValueError(
                "--device auto spreads a model over several devices, which --landscape, --similarity and --sharpness "
                "sam and hessian do not support. Leave them out, or take one device."
            )
        if settings.device == "auto" and rank_and_world()[1] > 1:
            raise ValueError("--device auto spreads each model over all devices; start one process.")

    def _check_packages(self):
        require("datasets", "An evaluation")
        require("scipy", "An evaluation")
        require("matplotlib", "The report of an evaluation")
        if not all(map(is_rounding, self.settings.quantize)):
            require("bitsandbytes", "--quantize")

    def _load(self, specs: list[str], column: str, tokenizer) -> dict[str, HeldOutData]:
        settings = self.settings
        loaded: dict[str, HeldOutData] = {}
        for spec in specs:
            name, data = load_held_out(
                spec,
                tokenizer,
                column=column,
                split=settings.data_split or None,
                max_documents=settings.max_documents,
                max_length=settings.max_length,
            )
            if name in loaded:
                raise ValueError(f"The data {name!r} is named twice; give the sets names: NAME=PATH.")
            loaded[name] = data
        return loaded

    def run(self) -> dict:
        """All parts, then the record."""
        for source in self.sources:
            self._measure(source)
        if "plane" in self.settings.landscape:
            self._plane()
        record = self.record()
        if rank_and_world()[0] == 0:
            write_json(Path(self.settings.output) / "results.json", record)
        return record

    def _measure(self, source: LocalModel):
        settings = self.settings
        about = {"model": source.name}
        with self.models.kept_inside():
            self._losses_and_benchmarks(about, source, "", {}, lambda: self.models.plain(source))
            for kind in settings.sharpness:
                self._sharpness(about, source, kind)
            if "random" in settings.landscape:
                self._part(
                    {"part": "random plane", **about},
                    {**_weights(source), **_documents(self.sharpness_data), "seed": settings.seed},
                    lambda: loss_on_random_plane(
                        self.models.get(source), self.sharpness_data, seed=settings.seed, batch_size=settings.batch_size
                    ).to_dict(),
                    [(source.name, "")],
                )
            if source is not self.base:
                self._compared_with_base(about, source)
                for alpha in settings.wise_ft:
                    variant, depends = f"wise-ft {alpha:g}", {"base": self.base.fingerprint}
                    opened = functools.partial(self.models.interpolated, self.base, source, alpha)
                    self._losses_and_benchmarks(about, source, variant, depends, opened)
            for scheme in settings.quantize:
                opened = functools.partial(self.models.quantized, source, scheme)
                self._losses_and_benchmarks(about, source, scheme, {}, opened)

    def _losses_and_benchmarks(self, about: dict, source: LocalModel, variant: str, extra: dict, opened: Callable):
        """Held-out losses and benchmarks of one variant of a model; `opened()` is the context to measure it in."""
        settings = self.settings
        about = {**about, "variant": variant}
        depends = {**_weights(source), **extra}
        measures: list[tuple[dict, dict, Callable]] = []
        if variant in settings.quantize:
            proof = lambda model, made_of: {**vars(made_of), "bits": made_of.bits}  # noqa: E731
            measures.append(({"part": "quantized", **about}, depends, proof))
        for name, data in (self.data | self.task_data).items():
            if data.largest_token >= source.vocabulary():
                continue  # tokens that were added for the fine-tuning, which the base cannot read
            loss = lambda model, made_of, data=data: self._loss(model, data)  # noqa: E731
            measures.append(({"part": "loss", **about, "data": name}, depends | _documents(data), loss))
        if settings.tasks:
            scores = lambda model, made_of: self._benchmarks(model)  # noqa: E731
            measures.append(({"part": "benchmarks", **about}, depends | self._tasks, scores))
        if all(self.store.has(*self._key(what, on)) for what, on, _ in measures):
            opened = lambda: contextlib.nullcontext((None, None))  # noqa: E731
        elif settings.tasks and not self._tasks_loaded:
            load_tasks(settings.tasks, settings.task_folder or None)
            self._tasks_loaded = True
        left = list(measures)
        try:
            with opened() as (model, made_of):
                for what, on, measure in measures:
                    needs = [(source.name, "")] if variant in settings.quantize else []
                    needs += [(source.name, variant)] if what["part"] == "benchmarks" else []
                    self._part(what, on, lambda measure=measure: measure(model, made_of), needs)
                    left.pop(0)
        except FAILURES as error:
            # The variant cannot be loaded, interpolated or quantized, e.g. since its training diverged.
            failed = functools.partial(_raise, error)
            for what, on, _ in left:
                self._part(what, on, failed)

    def _loss(self, model, data: HeldOutData) -> dict:
        return held_out_loss(model, data, batch_size=self.settings.batch_size).to_dict()

    def _benchmarks(self, model) -> dict:
        settings = self.settings
        results = run_benchmarks(
            model,
            self.tokenizer,
            settings.tasks,
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            limit=settings.benchmark_limit or None,
            include_path=settings.task_folder or None,
            seed=settings.seed,
        )
        return {task: result.to_dict() for task, result in results.items()}

    def _sharpness(self, about: dict, source: LocalModel, kind: str):
        settings = self.settings
        depends = {**_weights(source), **_documents(self.sharpness_data), "seed": settings.seed}
        common = {"batch_size": settings.batch_size}
        measures = {
            "kl": lambda model, data: noise_kl(model, data, seed=settings.seed, **common),
            "noise": lambda model, data: noise_sensitivity(model, data, seed=settings.seed, **common),
            "sam": lambda model, data: sam_sharpness(model, data, rho=settings.sam_rho, **common),
            "hessian": lambda model, data: hessian_spectrum(model, data, seed=settings.seed, **common),
        }
        if kind == "sam":
            depends["rho"] = settings.sam_rho
        self._part(
            {"part": kind, **about},
            depends,
            lambda: measures[kind](self.models.get(source), self.sharpness_data).to_dict(),
            [(source.name, "")],
        )

    def _compared_with_base(self, about: dict, source: LocalModel):
        settings = self.settings
        depends = {**_weights(source), "base": self.base.fingerprint, **_documents(self.sharpness_data)}
        common = {"batch_size": settings.batch_size}
        both = [(self.base.name, ""), (source.name, "")]
        if "line" in settings.landscape:
            self._part(
                {"part": "line", **about},
                depends,
                lambda: loss_along_line(
                    self.models.get(self.base), self.models.on_host(source), self.sharpness_data, **common
                ).to_dict(),
                both,
            )
        if settings.similarity:
            self._part({"part": "similarity", **about}, depends, lambda: self._similarity(source), both)

    def _similarity(self, source: LocalModel) -> dict:
        base, tuned = self.models.get(self.base), self.models.get(source)
        hidden = representation_similarity(base, tuned, self.sharpness_data, batch_size=self.settings.batch_size)
        return {**hidden.to_dict(), "weights": [vars(layer) for layer in weight_distance(base, tuned)]}

    def _plane(self):
        first, second = self.tuned[:2]
        names = (self.base.name, first.name, second.name)
        prints = [source.fingerprint for source in (self.base, first, second)]
        with self.models.kept_inside():
            self._part(
                {"part": "plane", "model": f"{first.name}, {second.name}"},
                {"weights": prints, **_documents(self.sharpness_data)},
                lambda: loss_on_plane(
                    self.models.get(self.base),
                    self.models.on_host(first),
                    self.models.on_host(second),
                    self.sharpness_data,
                    names=names,
                    batch_size=self.settings.batch_size,
                ).to_dict(),
                [(name, "") for name in names],
            )

    def _part(self, about: dict, depends: dict, compute: Callable[[], dict], needs: Sequence[tuple[str, str]] = ()):
        """Measure a part; `needs` are models, with their variants, without whose losses it would mean nothing.

        Where logits are not finite, sharpness is no number, and a harness scores the model as if it had answered.
        """

        def checked() -> dict:
            for part in self.store.records:
                if part["part"] == "loss" and part.get("error") and (part["model"], part["variant"]) in needs:
                    raise MeasurementError(f"{part['model']}: {part['error']}")
            return compute()

        with titled(f"{about['model']} {about.get('variant', '')}".strip()):
            return self.store.part(*self._key(about, depends), checked)

    def _key(self, about: dict, depends: dict) -> tuple[dict, dict]:
        return {"variant": "", "data": "", **about}, {**depends, "dtype": self.settings.dtype}

    def record(self) -> dict:
        """What `results.json` holds."""
        settings = self.settings
        return {
            "name": settings.name or Path(settings.output).resolve().name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "settings": settings.to_dict(),
            "environment": environment(),
            "models": [
                {"name": s.name, "spec": s.spec, "fingerprint": s.fingerprint, "adapter": s.base is not None}
                for s in self.sources
            ],
            "data": [
                {
                    "name": name,
                    "role": "old" if name in self.data else "task",
                    "fingerprint": data.fingerprint(),
                    "documents": data.documents,
                    "tokens": data.tokens,
                }
                for name, data in (self.data | self.task_data).items()
            ],
            "parts": self.store.records,
        }


def _raise(error: BaseException) -> dict:
    raise error


def _weights(source: LocalModel) -> dict:
    return {"weights": source.fingerprint}


def _documents(data: HeldOutData) -> dict:
    return {"documents": data.fingerprint()}
