"""An exponential moving average of the weights, which replaces them at the end of a run.

Averaging the weights of a phase at a constant learning rate is an alternative to annealing (arXiv 2507.17634).
"""

from pathlib import Path

import torch
from transformers import TrainerCallback

from ..runtime.sharding import local_shard


class WeightAverage(TrainerCallback):
    """Keeps average = decay * average + (1 - decay) * w after each step, and puts it in the place of w in the end.

    Each rank keeps the average of its own shards, which takes as much memory as the weights. Checkpoints hold it.

    Args:
        decay (`float`): between 0 and 1.
    """

    def __init__(self, decay: float):
        self._decay = decay
        self._average: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, weight in _trained(model).items():
            if name in self._average:
                self._average[name].lerp_(weight, 1 - self._decay)
            else:
                self._average[name] = weight.clone()

    @torch.no_grad()
    def on_train_end(self, args, state, control, model=None, **kwargs):
        for name, weight in _trained(model).items():
            if name in self._average:
                weight.copy_(self._average[name])

    def save(self, checkpoint: str, rank: int) -> None:
        """Write the average of this rank into a checkpoint."""
        file = self._file(checkpoint, rank)
        file.parent.mkdir(parents=True, exist_ok=True)  # rank 0, which makes the folder, may come later
        torch.save(self._average, file)

    def load(self, checkpoint: str, rank: int, model: torch.nn.Module) -> None:
        """Continue the average of a checkpoint; one without an average begins with the weights after the next step."""
        file = self._file(checkpoint, rank)
        if not file.exists():
            return
        devices = {name: weight.device for name, weight in _trained(model).items()}
        found = torch.load(file, map_location="cpu", weights_only=True)
        self._average = {name: value.to(devices[name]) for name, value in found.items()}

    @staticmethod
    def _file(checkpoint: str, rank: int) -> Path:
        return Path(checkpoint) / f"weight_average_{rank}.pt"


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parts of the trained parameters on this rank, by name."""
    return {name: local_shard(param.detach()) for name, param in model.named_parameters() if param.requires_grad}
