"""`PretrainingTrainer`: SAM, z-loss, weight decay by name, and exact resumption of the data."""

import re

from ..trainer import SAMTrainer
from .checkpoints import DataPosition
from .data import TrainingData
from .loss import ZLoss
from .stream import PackedStream


class PretrainingTrainer(SAMTrainer):
    """[`SAMTrainer`] for [`PretrainingArguments`].

    Args:
        data ([`TrainingData`]): the rows to train on, in their order.
        others: those of [`~transformers.Trainer`], without `train_dataset`.
    """

    def __init__(self, model=None, args=None, *, data: TrainingData, **kwargs):
        if args.z_loss > 0:
            kwargs.setdefault("compute_loss_func", ZLoss(args.z_loss))
        self._streams = isinstance(data.dataset, PackedStream)
        if self._streams:
            # The stream begins where the run goes on. One process reads for all, so that there is one order.
            args.ignore_data_skip = True
            args.accelerator_config.dispatch_batches = True
            args.dataloader_num_workers = 0
        self._resumed_from: str | None = None
        super().__init__(model=model, args=args, train_dataset=data.dataset, **kwargs)
        self.add_callback(DataPosition(lambda: data.position(self.state.global_step)))

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._resumed_from = resume_from_checkpoint if self._streams else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        batches = super().get_batch_samples(*args, **kwargs)
        if self._resumed_from is not None:
            # Starting a dataloader draws a random number, which the run that was interrupted had drawn before.
            self._load_rng_state(self._resumed_from)
            self._resumed_from = None
        return batches

    def get_decay_parameter_names(self, model) -> list[str]:
        patterns = self.args.no_weight_decay
        if patterns is None:
            return super().get_decay_parameter_names(model)
        names = [name for name, _ in model.named_parameters()]
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"no_weight_decay={pattern!r} matches no parameter of {type(model).__name__}, such as {names[0]!r}."
                )
        return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
