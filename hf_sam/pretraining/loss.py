"""Cross-entropy with z-loss, which keeps the softmax normalizer Z close to 1 (PaLM, arXiv 2204.02311, section 5)."""

from dataclasses import dataclass

import torch

from ..runtime.labels import IGNORE_INDEX


@dataclass(frozen=True)
class ZLoss:
    """A `compute_loss_func` for `Trainer`: cross-entropy plus `weight` times the mean of log(Z)^2.

    Both are means over the predicted tokens of the optimizer step. Without gradients (in evaluation), the z-loss is
    omitted, so that evaluation losses can be compared with those of other runs.

    Attributes:
        weight (`float`): 1e-5 in OLMo-2.
    """

    weight: float

    def __call__(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Compute the loss.

        Args:
            outputs (`ModelOutput`): model output with `logits` of shape `(batch, length, vocabulary)`.
            labels (`torch.Tensor` of shape `(batch, length)`): token ids, or -100 for tokens that are not predicted.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): number of predicted tokens of the optimizer step.

        Returns:
            `torch.Tensor`: the loss in nats per token, shape `()`.
        """
        items = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        weight = self.weight if torch.is_grad_enabled() else 0.0
        # One sequence at a time, so that temporary tensors are a fraction of the logits of the batch.
        total = sum(_of_sequence(*pair, weight) for pair in zip(outputs.logits, labels, strict=True))
        return total / (items.to(total.device) if torch.is_tensor(items) else items)


def _of_sequence(logits: torch.Tensor, labels: torch.Tensor, weight: float) -> torch.Tensor:
    """Sum of both losses over the tokens of a sequence, with a shared normalizer."""
    logits, targets = logits[:-1].float(), labels[1:].to(logits.device)
    counted = targets != IGNORE_INDEX
    normalizer = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(counted, normalizer - chosen + weight * normalizer.square(), 0.0).sum()
