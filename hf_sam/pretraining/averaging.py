"""An exponential moving average of the weights, which replaces them at the end of a run.

Averaging the weights of a phase at a constant learning rate is an alternative to annealing (arXiv 2507.17634).
"""

from pathlib import Path

import torch
from transformers import TrainerCallback

from ..runtime.sharding import gathered, local_shard, reshard, shard_like

_FILE = "weight_average.pt"


class WeightAverage(TrainerCallback):
    """Keeps average = decay * average + (1 - decay) * w after each step, and puts it in the place of w in the end.

    Each rank keeps the average of its own shards, which takes as much memory as the weights. Checkpoints hold it once.

    Args:
        decay (`float`): between 0 and 1.
    """

    def __init__(self, decay: float):
        self._decay = decay
        self._average: dict[str, torch.Tensor] = {}

    def reset(self) -> None:
        """Begin a new average."""
        self._average = {}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, param in _trained(model).items():
            weight = local_shard(param.detach())
            if name in self._average:
                local_shard(self._average[name]).lerp_(weight, 1 - self._decay)
            else:
                self._average[name] = param.detach().clone()

    @torch.no_grad()
    def on_train_end(self, args, state, control, model=None, **kwargs):
        for name, param in _trained(model).items():
            if name in self._average:
                local_shard(param.detach()).copy_(local_shard(self._average[name]))

    def save(self, checkpoint: str, write: bool) -> None:
        """Write the average into a checkpoint. All ranks call it; one of them writes."""
        whole = {name: gathered(value) for name, value in self._average.items()}
        if write:
            Path(checkpoint).mkdir(parents=True, exist_ok=True)
            torch.save({name: value.cpu() for name, value in whole.items()}, Path(checkpoint) / _FILE)

    def load(self, checkpoint: str, model: torch.nn.Module) -> None:
        """Continue the average of a checkpoint, on any number of ranks.

        Raises:
            ValueError: if the checkpoint holds none.
        """
        file = Path(checkpoint) / _FILE
        if not file.exists():
            raise ValueError(f"{checkpoint} holds no average of the weights: it was saved without ema_decay.")
        found = torch.load(file, map_location="cpu", weights_only=True)
        self.reset()
        for name, param in _trained(model).items():
            if name in found:
                self._average[name] = param.detach().clone()
                local_shard(self._average[name]).copy_(shard_like(found[name], param))


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name, sharded as in training: an evaluation may leave them gathered."""
    reshard(model)
    return {name: param for name, param in model.named_parameters() if param.requires_grad}
