"""The trajectory that every strategy has to follow: `reference.sam_step` and a torch optimizer, nothing else."""

import torch
from distributed.cases import GLOBAL_BATCH, LEARNING_RATE, MAX_STEPS, Case
from distributed.worker import build_model
from toy import token_dataset

from hf_sam.step.noise import uniform_noise
from hf_sam.step.parameters import select_names
from hf_sam.step.reference import sam_step

SEED = 7  # of `toy.arguments`


def trajectory(case: Case, replicas: int = 1) -> dict:
    """Losses, gradient norms and final weights of `case` on one process, in fp32.

    With `replicas` above 1, each of so many equal parts of every micro-batch climbs on its own gradient, and the
    gradients at the different w + e are averaged: `sam_ascent_sync="local"`.
    """
    model = build_model(case)
    rows = token_dataset(rows=GLOBAL_BATCH * case.accumulation * MAX_STEPS)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=LEARNING_RATE, weight_decay=0.0)
    names = select_names(trainable, case.sam.get("sam_target_modules"), case.sam.get("sam_exclude_modules"))
    logs = []
    for step in range(MAX_STEPS):
        first = step * case.accumulation * GLOBAL_BATCH
        micro_batches = [
            _stack(rows[first + i * GLOBAL_BATCH : first + (i + 1) * GLOBAL_BATCH]) for i in range(case.accumulation)
        ]
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        measured = [_outputs(model, batch) for batch in micro_batches] if case.sft else []
        results, gradients = [], []
        for replica in range(replicas):
            share = GLOBAL_BATCH // replicas
            parts = [{k: v[replica * share : (replica + 1) * share] for k, v in b.items()} for b in micro_batches]
            results.append(
                sam_step(
                    model,
                    parts,
                    lambda m, batch, tokens=tokens: _loss(m, batch) / tokens,
                    rho=case.sam["sam_rho"] if step % case.sam.get("sam_interval", 1) == 0 else 0.0,
                    variant=case.sam.get("sam_variant", "sam"),
                    ascent_micro_batches=case.sam.get("sam_ascent_micro_batches"),
                    perturbed_names=names,
                    loss_rise=case.sam.get("sam_loss_rise", 0.0),
                    moments=moments(optimizer, trainable),
                    noise=noise(case.sam.get("sam_noise", 0.0), step, trainable),
                )
            )
            gradients.append({name: param.grad for name, param in trainable.items() if param.grad is not None})
        for name, param in trainable.items():
            grads = [gradient[name] for gradient in gradients if name in gradient]
            param.grad = sum(grads) if grads else None
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0).item()
        optimizer.step()
        # With k of N micro-batches in the ascent pass, the logs are estimates for all N of them.
        scale = case.accumulation / case.sam.get("sam_ascent_micro_batches", case.accumulation)
        logs.append(
            {
                **(_trl_metrics(measured, logs) if case.sft else {}),
                "loss": sum(result.loss for result in results) * scale,
                "sam/perturbed_loss": sum(result.perturbed_loss for result in results) * scale,
                "sam/ascent_grad_norm": _mean_norm(results, replicas) * scale,
                "sam/radius": results[0].radius,
                "grad_norm": grad_norm,
            }
        )
    return {"logs": logs, "weights": {name: value.detach().clone() for name, value in model.state_dict().items()}}


def noise(size: float, step: int, trainable) -> dict | None:
    """Random numbers of the step for whole parameters, times `size`."""
    if not size:
        return None
    key = f"hf-sam perturbation {SEED} {step}"
    return {
        name: size * uniform_noise(f"{key} {name}", 0, p.numel(), p.device).view(p.shape)
        for name, p in trainable.items()
    }


def moments(optimizer, trainable) -> dict:
    """The moments of an AdamW, which are zero before its first step."""
    names = {"first": "exp_avg", "second": "exp_avg_sq"}
    return {
        kind: {name: optimizer.state[p].get(key, torch.zeros_like(p)) for name, p in trainable.items()}
        for kind, key in names.items()
    }


def hand_loop(replicas: int) -> tuple[list[float], dict]:
    """Losses and final weights of the loop without a trainer, whose loss is a mean over the tokens of a replica."""
    model = build_model(Case("hand_loop")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    share = GLOBAL_BATCH // replicas
    rows = token_dataset(rows=GLOBAL_BATCH * 2 * MAX_STEPS)
    parts = [_stack(rows[i : i + share]) for i in range(0, len(rows), share)]
    losses = []
    windows = [parts[i : i + 2 * replicas] for i in range(0, len(parts), 2 * replicas)]
    # Then two steps of one micro-batch, which accelerate still divides by the two that it was told of.
    windows += [parts[:replicas], parts[replicas : 2 * replicas]]
    for window in windows:
        result = sam_step(model, window, lambda m, batch: m(**batch).loss / (2 * replicas), rho=0.05)
        optimizer.step()
        losses.append(result.loss)
    return losses[:-2], {name: value.detach().clone() for name, value in model.state_dict().items()}


def _outputs(model, batch) -> tuple[float, float, int]:
    """Mean entropy and accuracy over the predicted tokens of a micro-batch of all ranks, and its number of tokens."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    valid = labels != -100
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)[valid].mean().item()
    return entropy, (logits.argmax(-1) == labels)[valid].float().mean().item(), int(batch["attention_mask"].sum())


def _trl_metrics(measured, logs) -> dict:
    entropies, accuracies, tokens = zip(*measured, strict=True)
    before = logs[-1]["num_tokens"] if logs else 0
    return {
        "entropy": sum(entropies) / len(entropies),
        "mean_token_accuracy": sum(accuracies) / len(accuracies),
        "num_tokens": before + sum(tokens),
    }


def _mean_norm(results, replicas) -> float:
    # Each replica's loss is normalized by the tokens of all of them, and the trainer scales that up again.
    return sum(result.ascent_grad_norm * replicas for result in results) / replicas


def _stack(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _loss(model, batch) -> torch.Tensor:
    """Summed next-token loss, from the logits: independent of how the host or the model normalizes."""
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **_extra(model, batch))
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def _extra(model, batch):
    # The model with branches insists on labels; what it makes of them is not used.
    return {"labels": batch["labels"], "num_items_in_batch": 1} if hasattr(model, "heads") else {}
