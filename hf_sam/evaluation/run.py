"""An evaluation from beginning to end: check everything, measure part by part, write the record.

A part is the result of one instrument on one model (or pair of models), variant and dataset. Models are loaded one
after the other, and only if a part of theirs is missing. Nothing is measured before all models, data, tasks and
packages are known to be there.
"""

import contextlib
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from ..instruments import HeldOutData, Instrument
from ..quantizers import QUANTIZERS
from ..quantizers.loading import check_runnable, device_type
from ..quantizers.ready_made import ReadyMade
from ..runtime.disk import write_json
from ..runtime.distributed import compute_on_first, rank_and_world
from ..runtime.environment import PACKAGES, environment, versions
from ..runtime.errors import MeasurementError
from ..runtime.models import LocalModel, check_same_tokens, find_model
from ..runtime.packages import require
from ..runtime.run_record import read_finished
from .finished import check_same_evaluation
from .inputs import check_same_shapes, find_quantized, load_held_out, with_distinct_names
from .models import Models, Variant
from .settings import EvaluationArguments
from .store import FAILURES, PartStore

# Schemes that round activations by the largest of a batch.
_BATCH_DEPENDENT = ("int8",)


def evaluate(settings: EvaluationArguments) -> dict:
    """Measure what the settings ask for; returns what `results.json` in the output folder holds.

    Under several processes (`accelerate launch`), they share the batches, and rank 0 writes.

    In a folder that holds a finished evaluation, the same one may be repeated, also with more models, data or
    instruments; existing results are not measured again. A different one is refused unless `settings.overwrite` is
    set. If an instrument fails, e.g. because the training of a model diverged, the record holds the reason, and the
    others are measured.

    Raises:
        ValueError, OSError, ImportError: before anything is measured, if something that it needs is missing, or the
            output folder holds a different finished evaluation.
    """
    return Evaluation(settings).run()


class Evaluation:
    """One evaluation; see [`evaluate`].

    Args:
        settings ([`EvaluationArguments`]): what to measure.
        dry_run (`bool`, defaults to `False`): check everything, but write nothing.
    """

    def __init__(self, settings: EvaluationArguments, dry_run: bool = False):
        self.settings = settings
        self.instruments = settings.instruments
        self.started = time.time()
        self.models = Models(getattr(torch, settings.dtype), settings.device)
        self._check_packages()
        self.store = PartStore(settings.output, versions(), write=not dry_run)
        self.sources = with_distinct_names([find_model(spec) for spec in (settings.base, *settings.tuned)])
        self.base, *self.tuned = self.sources
        self.tokenizer = self.base.tokenizer()
        self.ready_made = find_quantized(settings.quantized, self.sources)
        self._check_models()
        self.data = self._load(settings.data, settings.data_column, self.tokenizer)
        column = settings.task_column or settings.data_column
        # Fine-tuning adds chat templates and their special tokens.
        chats = [source.tokenizer() for source in self.tuned] if column == "messages" else []
        self.task_data = self._load(settings.task_data, column, *chats[:1] or [self.tokenizer])
        if both := self.data.keys() & self.task_data.keys():
            raise ValueError(f"--data and --task_data both have a {both.pop()!r}; give them names: NAME=PATH.")
        self.calibration = self._load_calibration()
        first = next(iter(self.data.values()))
        self.first_documents = first.first(settings.sharpness_documents)
        for instrument in self.instruments:
            instrument.check(settings)
        self._fetched: set[str] = set()
        if not settings.overwrite:
            compute_on_first(lambda: check_same_evaluation(settings.output, self.record()))

    def _check_models(self):
        settings = self.settings
        compared = [i for i in self.instruments if i.subject in ("pair", "triple")]
        for source in self.tuned:
            check_same_tokens(self.tokenizer, source.tokenizer(), source.name)
            if source.base is not None and source.base.fingerprint != self.base.fingerprint:
                raise ValueError(
                    f"The adapter {source.name!r} belongs to {source.base.spec!r}, whose weights are not those of "
                    f"--base {self.base.spec!r}."
                )
            if compared or settings.wise_ft:
                check_same_shapes(self.base, source)
        for source in self.sources:
            source.check_length(settings.max_length)
            if source.base is not None and any(QUANTIZERS[scheme].through_disk for scheme in settings.quantize):
                source.check_space(self.models.dtype)
        whole = [i.flag for i in self.instruments if i.whole]
        if whole and settings.device == "auto" and torch.accelerator.device_count() > 1:
            raise ValueError(
                f"--device auto spreads a model over several devices, which {', '.join(whole)} cannot measure. Leave "
                "them out, or choose one device."
            )
        if settings.device == "auto" and rank_and_world()[1] > 1:
            raise ValueError("--device auto spreads each model over all devices; start one process.")

    def _check_packages(self):
        require("datasets", "An evaluation")
        require("scipy", "An evaluation")
        require("matplotlib", "The report of an evaluation")
        for instrument in self.instruments:
            for package in instrument.packages:
                require(package, instrument.flag)
        for scheme in self.settings.quantize:
            check_runnable(QUANTIZERS[scheme], device_type(self.models.device_map), self.settings.calibration_data)

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
                raise ValueError(f"Two datasets are named {name!r}; give them other names: NAME=PATH.")
            loaded[name] = data
        return loaded

    def _load_calibration(self) -> HeldOutData | None:
        settings = self.settings
        if not settings.calibration_data:
            return None
        (data,) = self._load([settings.calibration_data], settings.data_column, self.tokenizer).values()
        for name, held_out in (self.data | self.task_data).items():
            if held_out.fingerprint() == data.fingerprint():
                raise ValueError(f"--calibration_data are the held-out data {name!r}; calibrate on other documents.")
        return data

    def run(self) -> dict:
        """Measure all parts, and write and return the record."""
        for source in self.sources:
            self._measure_model(source)
        for instrument in self._of("triple"):
            self._measure_triple(instrument)
        record = self.record()
        if rank_and_world()[0] == 0:
            write_json(Path(self.settings.output) / "results.json", record)
        return record

    def _of(self, subject: str) -> list[Instrument]:
        return [instrument for instrument in self.instruments if instrument.subject == subject]

    def _measure_model(self, source: LocalModel):
        settings = self.settings
        with self.models.kept_inside():
            self._measure_variant(source, "", {}, lambda: self.models.plain(source))
            for instrument in self._of("model"):
                about = {"part": instrument.name, "model": source.name}
                self._part(instrument, about, [source], lambda: [self.models.get(source)])
            if source is not self.base:
                for instrument in self._of("pair"):
                    about = {"part": instrument.name, "model": source.name}
                    load = functools.partial(self._load_models, instrument, [self.base, source])
                    self._part(instrument, about, [self.base, source], load)
                for alpha in settings.wise_ft:
                    opened = functools.partial(self.models.interpolated, self.base, source, alpha)
                    self._measure_variant(source, f"wise-ft {alpha:g}", {"base": self.base.fingerprint}, opened)
            for scheme in settings.quantize:
                calibration = self.calibration if QUANTIZERS[scheme].calibrated else None
                depends = _quantizer(scheme) | ({} if calibration is None else _documents(calibration, "calibration"))
                opened = functools.partial(self.models.quantized, source, scheme, calibration)
                self._measure_variant(source, scheme, depends, opened)
            for made in self._ready_made(source):
                opened = functools.partial(self.models.ready_made, made)
                depends = {"quantized weights": made.fingerprint, **_versions(made.packages)}
                self._measure_variant(source, made.scheme, depends, opened)

    def _ready_made(self, source: LocalModel) -> list[ReadyMade]:
        return [made for made in self.ready_made if made.model is source]

    def quantized_variants(self, source: LocalModel) -> list[str]:
        """Names of the quantized variants of a model."""
        return [*self.settings.quantize, *(made.scheme for made in self._ready_made(source))]

    def _measure_triple(self, instrument: Instrument):
        sources = [self.base, *self.tuned[:2]]
        about = {"part": instrument.name, "model": ", ".join(source.name for source in sources[1:])}
        load = functools.partial(self._load_models, instrument, sources)
        with self.models.kept_inside():
            self._part(instrument, about, sources, load, names=tuple(source.name for source in sources))

    def _load_models(self, instrument: Instrument, sources: Sequence[LocalModel]) -> list[torch.nn.Module]:
        first, *others = sources
        load = self.models.on_host if instrument.others_on_host else self.models.get
        return [self.models.get(first), *map(load, others)]

    def _measure_variant(
        self, source: LocalModel, variant: str, extra: dict, opened: Callable[[], AbstractContextManager[Variant]]
    ):
        """All instruments for variants on one variant of a model; `opened()` is the context to measure it in."""
        parts = list(self._parts_of_variant(source, variant, {"weights": source.fingerprint, **extra}))
        if all(self.store.has(*self._key(about, depends)) for about, depends, _ in parts):
            opened = lambda: contextlib.nullcontext((None, None))  # noqa: E731
        else:
            self._fetch(self._of("variant"))
        left = list(parts)
        quantized = variant in self.quantized_variants(source)
        try:
            if quantized:
                self._check_losses([(source.name, "")])  # some packages fail in their own ways on broken weights
            with _opened(opened, quantized) as (model, made_of):
                for about, depends, measure in parts:
                    needs = [(source.name, "")] if quantized else []
                    needs += [(source.name, variant)] if about["part"] not in ("loss", "quantized") else []
                    self._store(about, depends, functools.partial(measure, model, made_of), needs)
                    left.pop(0)
        except FAILURES as error:
            # The variant cannot be loaded, interpolated or quantized, e.g. because its training diverged.
            failed = functools.partial(_raise, error)
            for about, depends, _ in left:
                self._store(about, depends, failed)

    def _parts_of_variant(
        self, source: LocalModel, variant: str, depends: dict
    ) -> Iterator[tuple[dict, dict, Callable]]:
        settings = self.settings
        common = {"model": source.name, "variant": variant}
        if variant in self.quantized_variants(source):
            proof = lambda model, made_of: made_of.to_dict()  # noqa: E731
            yield {"part": "quantized", **common}, depends, proof
        for instrument in self._of("variant"):
            options = {"batch_size": settings.batch_size, "tokenizer": self.tokenizer, **instrument.options(settings)}
            decisive = depends | instrument.decisive(settings)
            if not instrument.per_dataset:
                measure = lambda model, made_of, i=instrument, o=options: i.measure(model, None, **o)  # noqa: E731
                tokenizer = {"tokenizer": self.base.tokenizer_fingerprint()}
                yield {"part": instrument.name, **common}, decisive | tokenizer, measure
                continue
            for name, data in (self.data | self.task_data).items():
                if data.largest_token >= source.vocabulary():
                    continue  # tokens that fine-tuning added, and that the base has no embeddings for
                measure = lambda model, made_of, i=instrument, o=options, d=data: i.measure(model, d, **o)  # noqa: E731
                yield {"part": instrument.name, **common, "data": name}, decisive | _documents(data), measure

    def _part(
        self,
        instrument: Instrument,
        about: dict,
        sources: Sequence[LocalModel],
        load: Callable[[], list[torch.nn.Module]],
        **names,
    ):
        settings = self.settings
        depends = {
            "weights": [source.fingerprint for source in sources],
            **_documents(self.first_documents),
            **instrument.decisive(settings),
        }

        def compute() -> dict:
            self._fetch([instrument])
            options = {"batch_size": settings.batch_size, **instrument.options(settings), **names}
            return instrument.measure(*load(), self.first_documents, **options)

        self._store(about, depends, compute, [(source.name, "") for source in sources])

    def _fetch(self, instruments: Sequence[Instrument]) -> None:
        for instrument in instruments:
            if instrument.name not in self._fetched:
                instrument.fetch(self.settings)
                self._fetched.add(instrument.name)

    def _store(self, about: dict, depends: dict, compute: Callable[[], dict], needs: Sequence[tuple[str, str]] = ()):
        """Measure a part unless it is stored.

        Args:
            needs (`Sequence[tuple[str, str]]`): models, each with its variant, whose losses must be finite. Without
                finite logits sharpness is not a number, and a harness scores the model as if it had answered.
        """

        def checked() -> dict:
            self._check_losses(needs)
            return compute()

        return self.store.part(*self._key(about, depends), checked)

    def _check_losses(self, needs: Sequence[tuple[str, str]]) -> None:
        for part in self.store.records:
            if part["part"] == "loss" and part.get("error") and (part["model"], part["variant"]) in needs:
                raise MeasurementError(f"{part['model']}: {part['error']}")

    def _key(self, about: dict, depends: dict) -> tuple[dict, dict]:
        settings = self.settings
        depends = {**depends, "dtype": settings.dtype, "device": device_type(self.models.device_map)}
        if settings.dtype != "float32" or about.get("variant") in _BATCH_DEPENDENT:
            depends["batch_size"] = settings.batch_size
        return {"variant": "", "data": "", **about}, depends

    def record(self) -> dict:
        """What `results.json` holds."""
        settings = self.settings
        return {
            "name": settings.name or Path(settings.output).resolve().name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "settings": settings.to_dict(),
            "environment": environment(),
            "models": [
                {
                    "name": s.name,
                    "spec": s.spec,
                    "fingerprint": s.fingerprint,
                    "adapter": s.base is not None,
                    "training": read_finished(s.spec),  # None for a model that was trained elsewhere
                }
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
            "quantized": [
                {"scheme": made.scheme, "model": made.model.name, "spec": made.spec, "fingerprint": made.fingerprint}
                for made in self.ready_made
            ],
            "facts": {instrument.name: instrument.facts(settings) for instrument in self.instruments},
            "calibration": None if self.calibration is None else self.calibration.fingerprint(),
            "parts": self.store.records,
        }


@contextlib.contextmanager
def _opened(opened: Callable[[], AbstractContextManager[Variant]], quantized: bool) -> Iterator[Variant]:
    """The variant; any error of a package that quantizes it is a MeasurementError, which leaves the other parts."""
    with contextlib.ExitStack() as stack:
        try:
            variant = stack.enter_context(opened())
        except FAILURES:
            raise
        except Exception as error:
            if not quantized:
                raise
            raise MeasurementError(f"It could not be quantized or loaded: {type(error).__name__}: {error}") from error
        yield variant


def _raise(error: BaseException) -> dict:
    raise error


def _documents(data: HeldOutData, name: str = "documents") -> dict:
    return {name: data.fingerprint()}


def _quantizer(scheme: str) -> dict:
    """Versions of the packages that quantize, where they are not in the environment of every result."""
    return _versions([one for one in QUANTIZERS[scheme].packages if one not in PACKAGES])


def _versions(packages: Sequence[str]) -> dict:
    """Versions of packages by name, as far as they are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
