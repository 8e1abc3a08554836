"""Instruments during training: callbacks for any [`~transformers.Trainer`].

They measure at each evaluation of the host and at the end of training, log next to its metrics, and leave the run as it
is: weights, gradients, random streams and modes are the same with and without them. What they measure can choose the
best model: `metric_for_best_model="forgetting/forgetting"`.
"""

from collections.abc import Mapping, Sequence

from transformers import Trainer, TrainerCallback

from .loss import held_out_loss
from .registry import INSTRUMENTS


class _MeasuringCallback(TrainerCallback):
    def __init__(self, trainer: Trainer, batch_size: int | None):
        self.trainer = trainer
        self.batch_size = trainer.args.per_device_eval_batch_size if batch_size is None else batch_size
        self._measured_at = -1

    @property
    def model(self):
        return self.trainer.model_wrapped

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._measured_at = state.global_step
        values = self.measure()
        self._log(values)
        if metrics is not None:
            # `metric_for_best_model` looks for names with this prefix.
            metrics.update({f"eval_{name}": value for name, value in values.items()})

    def on_train_end(self, args, state, control, **kwargs):
        # `Trainer` has loaded other weights if it restored the best model.
        if state.global_step != self._measured_at or args.load_best_model_at_end:
            self._log(self.measure())

    def measure(self) -> dict[str, float]:
        raise NotImplementedError

    def _log(self, values: dict[str, float]):
        # Trainers that override `log` add their own averaged metrics to the next entry, which must not be this one.
        Trainer.log(self.trainer, values)


class ForgettingCallback(_MeasuringCallback):
    """Logs held-out loss on old data before, during and after training, and how much was forgotten.

    ```python
    trainer.add_callback(ForgettingCallback(trainer, HeldOutData.from_dataset(old, tokenizer)))
    ```

    Logged, in nats per token: `forgetting/before` when training begins, `forgetting/held_out_loss` and
    `forgetting/forgetting` at each evaluation and at the end; with several datasets, behind `forgetting/<name>/`. A
    resumed run compares with the value that the first run logged.

    Args:
        trainer (`transformers.Trainer`): the trainer that the callback is added to.
        data ([`HeldOutData`] or `Mapping` of names to them): old data, or anything else [`held_out_loss`] takes.
        batch_size (`int`, *optional*): rows a batch; that of the trainer's evaluation when omitted.
    """

    def __init__(self, trainer: Trainer, data, *, batch_size: int | None = None):
        super().__init__(trainer, batch_size)
        self.data = {f"forgetting/{name}": one for name, one in data.items()} if isinstance(data, Mapping) else {}
        self.data = self.data or {"forgetting": data}
        self._before: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._measured_at = -1
        names = [f"{prefix}/before" for prefix in self.data]
        logged = [entry for entry in state.log_history if all(name in entry for name in names)]
        if logged:
            self._before = {name: logged[0][name] for name in names}
        else:
            self._before = {f"{prefix}/before": self._loss(data) for prefix, data in self.data.items()}
            self._log(dict(self._before))

    def measure(self) -> dict[str, float]:
        """Held-out loss and forgetting by name; no forgetting before training begins."""
        values = {}
        for prefix, data in self.data.items():
            values[f"{prefix}/held_out_loss"] = loss = self._loss(data)
            if f"{prefix}/before" in self._before:
                values[f"{prefix}/forgetting"] = loss - self._before[f"{prefix}/before"]
        return values

    def _loss(self, data) -> float:
        return held_out_loss(self.model, data, batch_size=self.batch_size).loss


class SharpnessCallback(_MeasuringCallback):
    """Logs instruments before training, at each evaluation and after training, as `GROUP/NAME`, e.g. `sharpness/kl`.

    Args:
        trainer (`transformers.Trainer`): the trainer that the callback is added to.
        data ([`HeldOutData`]): held-out data, or anything else [`held_out_loss`] accepts. Some tens of documents are
            enough.
        measures (`Sequence[str]`, defaults to `("kl",)`): names of registered instruments that can be logged during
            training. `"kl"` logs `sharpness/kl` of [`noise_kl`]; `"sam"` logs `sharpness/sam` of [`sam_sharpness`];
            `"hessian"` logs `sharpness/hessian_top` and `sharpness/hessian_trace` of [`hessian_spectrum`]. For sharded
            models only `"kl"` works.
        batch_size (`int`, *optional*): rows per batch; that of the trainer's evaluation when omitted.
        options: arguments of the instruments by their names, e.g. `kl={"samples": 3}`.

    Raises:
        ValueError: for an unknown instrument; when training begins, if the model cannot be measured.
    """

    def __init__(
        self,
        trainer: Trainer,
        data,
        measures: Sequence[str] = ("kl",),
        *,
        batch_size: int | None = None,
        **options: dict,
    ):
        super().__init__(trainer, batch_size)
        known = [name for name, instrument in INSTRUMENTS.items() if instrument.scalars is not None]
        unknown = [name for name in (*measures, *options) if name not in known]
        if unknown:
            raise ValueError(f"There is no sharpness measure {unknown[0]!r}; choose from {', '.join(known)}.")
        self.data = data
        self.measures = tuple(measures)
        self.options = options

    def on_train_begin(self, args, state, control, **kwargs):
        # Fails now, and not at the first evaluation, if the model cannot be measured.
        self._measured_at = state.global_step
        self._log(self.measure())

    def measure(self) -> dict[str, float]:
        """The values by the names under which they are logged."""
        values = {}
        for name in self.measures:
            instrument = INSTRUMENTS[name]
            settings = {"batch_size": self.batch_size, **self.options.get(name, {})}
            found = instrument.scalars(instrument.measure(self.model, self.data, **settings))
            values.update({f"{instrument.group or name}/{key}": value for key, value in found.items()})
        return values
