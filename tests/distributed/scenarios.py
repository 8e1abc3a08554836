"""What can happen to a run besides going well, played through under every strategy."""

import itertools
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from distributed.cases import GLOBAL_BATCH, LEARNING_RATE, MAX_STEPS, Case
from distributed.strategies import accelerate_plugins
from torch.utils.data import DataLoader
from toy import step_logs, token_dataset
from transformers import Trainer, TrainerCallback

from hf_sam import SAMStep, SAMTrainer


class _FailsInDescentPass(SAMTrainer):
    """Raises after the second forward pass of the second descent pass of a step with two micro-batches."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.calls += 1
        if self.calls == 8:
            raise KeyboardInterrupt
        return loss


def interrupted(strategy: str, output_dir: Path) -> None:
    """Ctrl-C in the descent pass of the second step: the weights are those after the first step."""
    from distributed import worker

    case = Case("interrupted", accumulation=2)
    trainer = worker.build_trainer(strategy, case, output_dir, trainer_class=_FailsInDescentPass)
    recorder = _WeightsAfterSteps(worker, trainer)
    trainer.add_callback(recorder)
    raised = False
    try:
        trainer.train()
    except KeyboardInterrupt:
        raised = True
    worker.save(
        trainer,
        output_dir / "interrupted.pt",
        raised=raised,
        before=recorder.weights[0],
        after=worker.full_weights(trainer),
        gradients=[name for name, param in trainer.model.named_parameters() if param.grad is not None],
    )


class _WeightsAfterSteps(TrainerCallback):
    def __init__(self, worker, trainer):
        self._worker, self._trainer = worker, trainer
        self.weights = []

    def on_step_end(self, *args, **kwargs):
        self.weights.append(self._worker.full_weights(self._trainer))


def switched_off(strategy: str, output_dir: Path) -> None:
    """The host's own trainer, SAM with rho 0, and SAM outside of its window, with dropout."""
    from distributed import worker

    results = {}
    for name, trainer_class, sam in (
        ("host", Trainer, {}),
        ("rho_zero", SAMTrainer, {"sam_rho": 0.0}),
        ("outside", SAMTrainer, {"sam_rho": 0.05, "sam_start_steps": 100}),
    ):
        case = Case("switched_off", accumulation=2, sam=sam, dropout=0.1)
        trainer = worker.build_trainer(strategy, case, output_dir, trainer_class=trainer_class, max_steps=3)
        trainer.train()
        results[name] = {
            "logs": step_logs(trainer),
            "weights": worker.full_weights(trainer),
            "random_state": torch.get_rng_state(),
        }
    worker.save(trainer, output_dir / "switched_off.pt", **results)


class _OverflowsInAscentPass(SAMTrainer):
    """The loss of the last rank is infinite in the first pass of the second step."""

    calls = 0
    overflows = True

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.calls += 1
        last_rank = self.accelerator.process_index == self.accelerator.num_processes - 1
        return loss * float("inf") if self.overflows and self.calls == 3 and last_rank else loss


def overflow(strategy: str, output_dir: Path) -> None:
    """One rank's ascent gradient overflows in the second step: that step is a plain one on all ranks."""
    from distributed import worker

    case = Case("overflow")
    trainer = worker.build_trainer(strategy, case, output_dir, trainer_class=_OverflowsInAscentPass, max_steps=2)
    trainer.train()
    # The same two steps with SAM switched off in the second one.
    plain = worker.build_trainer(strategy, case, output_dir, max_steps=2, sam_end_steps=1)
    plain.train()
    worker.save(
        trainer,
        output_dir / "overflow.pt",
        logs=step_logs(trainer),
        weights=worker.full_weights(trainer),
        plain=worker.full_weights(plain),
    )


def resumed(strategy: str, output_dir: Path) -> None:
    """Save after two steps of four, with dropout; go on from there in a new trainer."""
    _resume(strategy, output_dir, "resumed", {"sam_rho": 0.05})


def resumed_momentum(strategy: str, output_dir: Path) -> None:
    """The same with a perturbation that follows from the state of the optimizer."""
    _resume(strategy, output_dir, "resumed_momentum", {"sam_rho": 0.5, "sam_variant": "momentum"})


def _resume(strategy: str, output_dir: Path, name: str, sam: dict) -> None:
    from distributed import worker

    case = Case(name, accumulation=2, dropout=0.1, sam=sam)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = worker.build_trainer(strategy, case, output_dir, **settings)
    recorder = _WeightsAfterSteps(worker, whole)
    whole.add_callback(recorder)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    results = {"whole": worker.full_weights(whole)}
    again = worker.build_trainer(strategy, case, output_dir, **settings)
    try:
        again.train(resume_from_checkpoint=str(checkpoint))
        results["again"] = worker.full_weights(again)
    except RuntimeError as error:
        # Older hosts load the optimizer onto "cpu:0" on all ranks, which torch refuses: nothing to compare then.
        if "restore data location" not in str(error):
            raise
        results["unsupported"] = f"this transformers cannot resume on several CPU processes: {error}"
    if whole.is_world_process_zero():
        results["at_save"] = recorder.weights[1]
        results["saved"] = _saved_weights(checkpoint)
        results["optimizer_keys"] = _optimizer_keys(checkpoint)
    worker.save(whole, output_dir / f"{name}.pt", **results)
    whole.accelerator.wait_for_everyone()
    if whole.is_world_process_zero():
        shutil.rmtree(whole.args.output_dir)


def _saved_weights(checkpoint: Path):
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors") if (checkpoint / "model.safetensors").exists() else None


def _optimizer_keys(checkpoint: Path) -> list[str] | None:
    """Names of the state that the saved optimizer keeps for each parameter."""
    path = checkpoint / "optimizer.pt"
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)["state"]
    return sorted({key for entry in state.values() for key in entry})


def one_rank_missing(strategy: str, output_dir: Path) -> None:
    """An error that only one rank meets: it must not wait for the others in a collective."""
    if not strategy.startswith("zero"):
        return
    from hf_sam.step.backends import zero

    timeout, zero._PEER_TIMEOUT_SECONDS = zero._PEER_TIMEOUT_SECONDS, 1.0
    rank = torch.distributed.get_rank()
    # The other rank skips the same number, as if it had met no error, and is far away meanwhile.
    alone = zero._all_ranks_arrive() if rank == 0 else next(zero._errors) < 0
    torch.distributed.barrier()
    zero._PEER_TIMEOUT_SECONDS = 60.0
    together = [zero._all_ranks_arrive() for _ in range(2)]
    zero._PEER_TIMEOUT_SECONDS = timeout
    if rank == 0:
        torch.save({"alone": alone, "together": together}, output_dir / "one_rank_missing.pt")


def hand_loop(strategy: str, output_dir: Path) -> None:
    """A loop written with Accelerate and without a trainer, with two micro-batches a step."""
    from distributed import worker

    accelerator = Accelerator(gradient_accumulation_steps=2, **accelerate_plugins(strategy, accumulation=2))
    model = worker.build_model(Case("hand_loop")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rows = token_dataset(rows=GLOBAL_BATCH * 2 * MAX_STEPS)
    loader = DataLoader(rows, batch_size=GLOBAL_BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sam = SAMStep(accelerator, model, rho=0.05)

    def forward_backward(batch):
        loss = model(**batch).loss
        accelerator.backward(loss)
        return loss.detach() / 2

    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            losses.append(accelerator.reduce(sam(forward_backward, batch), reduction="mean").item())
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.is_main_process:
                # Reading the metrics on one rank must not make the others wait.
                metrics = sam.pop_metrics()
    # Two more steps with both passes in the loop's own hands, of one micro-batch each.
    for batch in itertools.islice(iter(loader), 2):
        accelerator.gradient_state._set_sync_gradients(True)
        with sam.ascent():
            accelerator.backward(model(**batch).loss)
        with sam.perturbed():
            accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    refusal = None
    if strategy.startswith("zero"):
        try:
            with sam.ascent():
                accelerator.backward(model(**batch).loss)
                accelerator.backward(model(**batch).loss)
        except RuntimeError as error:
            refusal = str(error)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        torch.save(
            {
                "losses": losses,
                "weights": {name: value.cpu() for name, value in weights.items()},
                "metrics": metrics,
                "refusal": refusal,
                "backend": type(sam.backend).__name__,
                "ran": worker.what_ran(accelerator, model),
            },
            output_dir / "hand_loop.pt",
        )


ALL = (interrupted, switched_off, overflow, resumed, resumed_momentum, one_rank_missing)
