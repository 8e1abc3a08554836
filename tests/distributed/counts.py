"""What a step of each kind computes and communicates, counted under every strategy."""

import sys
from pathlib import Path

from distributed.cases import Case
from transformers import Trainer, TrainerCallback

from hf_sam import SAMTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from collectives import CollectiveCounter

MICRO_BATCHES = 2
KINDS = {
    "plain": None,
    "sam": {"sam_rho": 0.05},
    "some": {"sam_rho": 0.05, "sam_ascent_micro_batches": 1},
    "loss_rise": {"sam_loss_rise": 0.01},
    "momentum": {"sam_rho": 0.05, "sam_variant": "momentum"},
    "noise": {"sam_noise": 0.1},
    "sam_and_noise": {"sam_rho": 0.05, "sam_noise": 0.1},
    "momentum_and_noise": {"sam_rho": 0.05, "sam_noise": 0.1, "sam_variant": "momentum"},
}


class _Counting(TrainerCallback):
    """Counts in the last step: the first one also sets up buckets, and measures what the weights keep."""

    def __init__(self):
        self.forwards, self.backwards = [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.register_forward_hook(lambda *args: self.forwards.append(1))
        model.lm_head.register_full_backward_hook(lambda *args: self.backwards.append(1))

    def on_step_begin(self, *args, **kwargs):
        self.forwards.clear()
        self.backwards.clear()
        self.counter = CollectiveCounter()
        self.counter.__enter__()

    def on_step_end(self, *args, **kwargs):
        self.counter.__exit__(None, None, None)


def counted(strategy: str, output_dir: Path) -> None:
    """Forward and backward passes and messages of one step of each kind."""
    from distributed import worker

    results = {}
    for name, sam in KINDS.items():
        case = Case("counted", accumulation=MICRO_BATCHES, sam=sam or {})
        kind = Trainer if sam is None else SAMTrainer
        trainer = worker.build_trainer(strategy, case, output_dir, trainer_class=kind, max_steps=2)
        counting = _Counting()
        trainer.add_callback(counting)
        trainer.train()
        results[name] = {
            "forwards": len(counting.forwards),
            "backwards": len(counting.backwards),
            "large": counting.counter.large(),
            "small": counting.counter.small(),
        }
    worker.save(trainer, output_dir / "counted.pt", **results)
