"""Loops to compare the step with: plain PyTorch, SAM written by hand, and SAM of the package pytorch-optimizer."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

LEARNING_RATE = 1e-4


class HandLoop:
    """A training loop in plain PyTorch: AdamW, clipping at 1, no trainer."""

    def __init__(self, model: torch.nn.Module, device: torch.device, bf16: bool):
        self.model, self.device, self.bf16 = model.to(device), device, bf16
        self.optimizer = self.make_optimizer()

    def make_optimizer(self):
        return torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def accumulate(self, micro_batches: list[dict]) -> None:
        """Accumulate the gradient of the mean loss."""
        for batch in micro_batches:
            context = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
            with context:
                loss = self.model(**batch).loss / len(micro_batches)
            loss.backward()

    def step(self, micro_batches: list[dict]) -> None:
        """One optimizer step."""
        self.accumulate(micro_batches)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, batches: Iterator[list[dict]], steps: int, synchronize: Callable[[], None]) -> list[float]:
        """Seconds of each step."""
        seconds = []
        for _ in range(steps):
            micro_batches = [
                {name: tensor.to(self.device) for name, tensor in batch.items()} for batch in next(batches)
            ]
            synchronize()
            start = time.perf_counter()
            self.step(micro_batches)
            synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds


class HandSAM(HandLoop):
    """SAM as one writes it by hand: a copy of the weights, fused updates, no replay of random numbers."""

    rho = 0.05

    def step(self, micro_batches):
        self.accumulate(micro_batches)
        params = [param for param in self.model.parameters() if param.grad is not None]
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm([param.grad for param in params])
            kept = [param.detach().clone() for param in params]
            torch._foreach_add_(params, torch._foreach_mul([param.grad for param in params], self.rho / (norm + 1e-12)))
        self.optimizer.zero_grad()
        self.accumulate(micro_batches)
        with torch.no_grad():
            torch._foreach_copy_(params, kept)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class PytorchOptimizerSAM(HandLoop):
    """`pytorch_optimizer.SAM` with AdamW."""

    def make_optimizer(self):
        from pytorch_optimizer import SAM

        return SAM(self.model.parameters(), base_optimizer=torch.optim.AdamW, rho=HandSAM.rho, lr=LEARNING_RATE)

    def step(self, micro_batches):
        self.accumulate(micro_batches)
        self.optimizer.first_step(zero_grad=True)
        self.accumulate(micro_batches)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.second_step(zero_grad=True)
