"""An oracle for what a replay must not disturb: at a radius that vanishes in rounding, SAM is plain training, bitwise.

Unless the second pass saw other inputs, other random numbers or another state than the first.
"""

import torch
from accelerate import Accelerator
from toy import arguments, weights
from transformers import Trainer, TrainingArguments

from hf_sam import SAMStep, SAMTrainingArguments, with_sam

# w + e is w in fp32, whatever the size of a weight; a weight of 0 becomes one that no sum notices.
VANISHING = 1e-30


def run_both(tmp_path, model, rows, trainer_class=Trainer, mixed=with_sam, **settings):
    """A plain run and one with SAM and a vanishing radius: the same model and data, SGD, several micro-batches a step.

    Args:
        model (`Callable[[], torch.nn.Module]`): makes the model.
        rows (`list`): the dataset.
        trainer_class (`type`): the plain trainer.
        mixed (`Callable[[type], type]`): makes the SAM version of it.
    """
    settings = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
    } | settings
    runs = []
    for cls, config, sam in (
        (trainer_class, TrainingArguments, {}),
        (mixed(trainer_class), SAMTrainingArguments, {"sam_rho": VANISHING}),
    ):
        torch.manual_seed(3)
        run = cls(model=model(), args=arguments(tmp_path, config, **settings, **sam), train_dataset=rows)
        run.train()
        runs.append(run)
    return runs


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Bitwise the same parameters and buffers."""
    for (name, mine), theirs in zip(weights(one).items(), weights(other).values(), strict=True):
        assert torch.equal(mine, theirs), name


def loop_both(model, forward_backward_of, batches, optimizer_of=None, accumulation: int = 2):
    """The same for a loop of one's own: the models of a plain run and of one with `SAMStep`.

    Args:
        model (`Callable[[], torch.nn.Module]`): makes the model.
        forward_backward_of (`Callable`): takes model and accelerator, returns the function for a micro-batch.
        batches (`Callable[[], list]`): makes the micro-batches.
        optimizer_of (`Callable`, *optional*): takes the model, returns the optimizer.
    """
    results = []
    for sam_rho in (0.0, VANISHING):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1) if optimizer_of is None else optimizer_of(net)
        sam = SAMStep(accelerator, net, sam_rho, optimizer=optimizer)
        forward_backward = forward_backward_of(net, accelerator)
        torch.manual_seed(3)
        for i, batch in enumerate(batches()):
            accelerator.gradient_state._set_sync_gradients((i + 1) % accumulation == 0)
            sam(forward_backward, batch)
            if accelerator.sync_gradients:
                optimizer.step()
                optimizer.zero_grad()
        results.append(net)
    return results
