"""`PretrainingTrainer`: SAM, z-loss, weight decay by name, and exact resumption of the data."""

import re

from transformers import TrainerCallback

from ..runtime.checkpoints import CheckpointRecord
from ..runtime.sharding import check_weights_in_model
from ..trainer import SAMTrainer
from .averaging import WeightAverage
from .data import TrainingData
from .loss import ZLoss
from .stream import PackedStream


class PretrainingTrainer(SAMTrainer):
    """[`SAMTrainer`] for [`PretrainingArguments`].

    Args:
        data ([`TrainingData`]): the rows to train on, in order.
        kwargs: arguments of [`~transformers.Trainer`], except `train_dataset`.
    """

    def __init__(self, model=None, args=None, *, data: TrainingData, **kwargs):
        if args.z_loss > 0:
            kwargs.setdefault("compute_loss_func", ZLoss(args.z_loss))
        self._streams = isinstance(data.dataset, PackedStream)
        if self._streams:
            # The stream starts at the position of the run. One process reads for all ranks, so the order is fixed.
            args.ignore_data_skip = True
            args.accelerator_config.dispatch_batches = True
            args.dataloader_num_workers = 0
        self._resumed_from: str | None = None
        super().__init__(model=model, args=args, train_dataset=data.dataset, **kwargs)
        self.add_callback(CheckpointRecord(args.world_size, lambda: data.position(self.state.global_step)))
        self.add_callback(_ScheduleCheck())
        self._average = None if args.ema_decay is None else WeightAverage(args.ema_decay)
        if self._average is not None:
            check_weights_in_model(self.accelerator, "ema_decay")
            self.add_callback(self._average)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._resumed_from = resume_from_checkpoint if self._streams else None
        if self._average is not None:
            self._average.reset()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        batches = super().get_batch_samples(*args, **kwargs)
        if self._resumed_from is not None:
            # Creating a dataloader iterator draws a random number, which the interrupted run had drawn already.
            self._load_rng_state(self._resumed_from)
            self._resumed_from = None
        return batches

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None:
            self._average.save(output_dir, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._average is not None and checkpoint not in (None, self.args.anneal_from):
            self._average.load(checkpoint, self.model)

    def get_decay_parameter_names(self, model) -> list[str]:
        patterns = self.args.no_weight_decay
        if patterns is None:
            return super().get_decay_parameter_names(model)
        names = [name for name, _ in model.named_parameters()]
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"no_weight_decay={pattern!r} matches no parameter of {type(model).__name__}. Its parameters have "
                    f"names such as {names[0]!r}."
                )
        return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


class _ScheduleCheck(TrainerCallback):
    """Raises for a checkpoint without matching optimizer and scheduler states, which `Trainer` ignores silently."""

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        if not state.global_step or lr_scheduler is None:
            return
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
        # fp16 skips steps without advancing the scheduler, and schedulers without `lr_lambdas` may not count steps.
        counted = hasattr(schedule, "lr_lambdas") and not args.fp16
        if counted and schedule.last_epoch != state.global_step:
            raise ValueError(
                f"The checkpoint has no optimizer and scheduler state of step {state.global_step} that this run can "
                "load: it was saved with save_only_model, or with another strategy (DeepSpeed, FSDP). Resume with the "
                "same strategy, or from a complete checkpoint."
            )
        rates = getattr(schedule, "base_lrs", None)
        if args.anneal_from is not None and rates and abs(rates[0] - args.learning_rate) > 1e-6 * args.learning_rate:
            raise ValueError(
                f"The checkpoint anneal_from was trained at a learning rate of {rates[0]:g}, from which the annealing "
                f"continues, so learning_rate={args.learning_rate:g} has no effect. Set learning_rate={rates[0]:g}."
            )
