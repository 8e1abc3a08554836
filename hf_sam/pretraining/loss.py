"""Cross-entropy with the z-loss that keeps the softmax normalizer near one (PaLM, arXiv 2204.02311, section 5)."""

from dataclasses import dataclass

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from .packing import IGNORED


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
        logits = outputs.logits.float()
        loss = ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch)
        if not torch.is_grad_enabled():
            return loss
        counted = labels[:, 1:] != IGNORED
        normalizer = torch.logsumexp(logits[:, :-1], dim=-1).square()
        total = torch.where(counted.to(normalizer.device), normalizer, 0.0).sum()
        items = counted.sum() if num_items_in_batch is None else num_items_in_batch
        if torch.is_tensor(items):
            items = items.to(total.device)
        return loss + self.weight * total / items
