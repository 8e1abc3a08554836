"""Cross-entropy with the z-loss that keeps the softmax normalizer near one (PaLM, arXiv 2204.02311, section 5)."""

from dataclasses import dataclass

import torch

from ..runtime.labels import IGNORE_INDEX


@dataclass(frozen=True)
class ZLoss:
    """A `compute_loss_func` of the host: cross-entropy plus `weight` times the mean of log(Z)^2.

    Both are means over the predicted tokens of the whole optimizer step. Where no gradient is taken (evaluation), the
    z-loss is left out, so that evaluation losses compare with those of other runs.

    Attributes:
        weight (`float`): 1e-5 in OLMo-2.
    """

    weight: float

    def __call__(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """The loss.

        Args:
            outputs (`ModelOutput`): with `logits` of shape `(batch, length, vocabulary)`.
            labels (`torch.Tensor` of shape `(batch, length)`): tokens, or -100 where none is predicted.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): predicted tokens of the optimizer step.
        """
        items = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        weight = self.weight if torch.is_grad_enabled() else 0.0
        # A sequence at a time: what is needed in between is a fraction of the logits of the batch.
        total = sum(_of_sequence(*pair, weight) for pair in zip(outputs.logits, labels, strict=True))
        return total / (items.to(total.device) if torch.is_tensor(items) else items)


def _of_sequence(logits: torch.Tensor, labels: torch.Tensor, weight: float) -> torch.Tensor:
    """Sum over the tokens of a sequence; one normalizer serves both terms."""
    logits, targets = logits[:-1].float(), labels[1:].to(logits.device)
    counted = targets != IGNORE_INDEX
    normalizer = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(counted, normalizer - chosen + weight * normalizer.square(), 0.0).sum()
