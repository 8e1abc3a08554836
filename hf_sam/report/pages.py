"""The report of one evaluation. Everything comes from `results.json`.

Every comparison shows what was lost, and where it ended: a model that had less to lose may well end worse.
"""

from pathlib import Path

from ..evaluation.results import Results
from ..instruments.benchmarks import score_change
from ..instruments.plots import plot_layers, plot_line, plot_noise, plot_plane
from ..statistics.losses import HeldOutLoss, forgetting
from .document import Document

MISSING = "missing"


def write_report(record: dict, folder: str | Path) -> tuple[Path, Path]:
    """Write `report.md`, its pictures and the self-contained `report.html` of one evaluation.

    Returns:
        `tuple[Path, Path]`: the paths of the two reports.
    """
    return evaluation_report(Results(record)).write(folder)


def evaluation_report(results: Results) -> Document:
    """The report of one evaluation."""
    document = Document(f"Evaluation: {results.name}")
    setup(document, results)
    losses(document, results)
    interpolations(document, results)
    quantization(document, results)
    benchmarks(document, results)
    sharpness(document, results)
    landscapes(document, results)
    similarity(document, results)
    failures(document, results)
    return document


def setup(document: Document, results: Results) -> None:
    """What was measured on what, with which versions."""
    environment = dict(results.record["environment"])
    command = " ".join(environment.pop("command"))
    document.text(f"{results.record['created']}, by `{command}`.")
    document.table(
        ["model", "named as", "weights (hash)"],
        [[m["name"], m["spec"], m["fingerprint"]] for m in results.record["models"]],
    )
    document.table(
        ["data", "role", "documents", "tokens", "hash"],
        [
            [d["name"], d["role"], str(d["documents"]), str(d["tokens"]), d["fingerprint"]]
            for d in results.record["data"]
        ],
    )
    document.text("; ".join(f"{name} {_short(value)}" for name, value in environment.items()) + ".")


def losses(document: Document, results: Results) -> None:
    """Held-out losses and forgetting."""
    document.heading("Held-out loss and forgetting")
    if results.tuned:
        document.text(
            "Nats per token: the sum of the losses of all tokens over their number. Forgetting is the loss on old data "
            "after minus before; in brackets the 95% bootstrap interval over documents."
        )
    rows = []
    for data in (*results.old, *results.tasks):
        role = "old" if data in results.old else "task"
        before = results.loss(results.base, data)
        for name in results.models:
            if not results.readable(name, data):
                rows.append([data, role, name, "cannot read its tokens", "", ""])
                continue
            loss = results.loss(name, data)
            values = [MISSING, MISSING] if loss is None else [f"{loss.loss:.4f}", f"{loss.perplexity:.2f}"]
            change = "" if name == results.base or before is None else change_text(before, loss)
            rows.append([data, role, name, *values, change])
    document.table(["data", "role", "model", "loss", "perplexity", "change"], rows)


def interpolations(document: Document, results: Results) -> None:
    """Wise-FT."""
    alphas = results.record["settings"]["wise_ft"]
    if not alphas or not results.tuned:
        return
    document.heading("Wise-FT: part of the way from base to tuned model")
    document.text("Loss, and in brackets its change against the base with the 95% bootstrap interval.")
    sets = (*results.old, *results.tasks)
    rows = []
    for name in results.tuned:
        for alpha in alphas:
            row = [name, f"{alpha:g}"]
            for data in sets:
                loss = results.loss(name, data, f"wise-ft {alpha:g}")
                change = change_text(results.loss(results.base, data), loss)
                row.append(MISSING if loss is None else f"{loss.loss:.4f} ({change})")
            rows.append(row)
    document.table(["model", "alpha", *(f"loss on {data}" for data in sets)], rows)


def quantization(document: Document, results: Results) -> None:
    """Damage of quantization."""
    schemes = results.record["settings"]["quantize"]
    if not schemes:
        return
    document.heading("Quantization")
    document.text(
        "Damage is the loss after quantization minus before. Bits are per quantized weight, scales included; "
        "embeddings and output layer stay in full precision. `rtn` is simulated rounding in groups of 128."
    )
    rows = []
    for scheme in schemes:
        for name in results.models:
            (proof,) = results.find("quantized", name, scheme)
            bits = MISSING if proof["result"] is None else f"{proof['result']['bits']:.2f}"
            for data in results.old:
                before, after = results.loss(name, data), results.loss(name, data, scheme)
                rows.append([scheme, bits, name, data, loss_text(before), loss_text(after), change_text(before, after)])
    document.table(["scheme", "bits", "model", "data", "before", "after", "damage"], rows)


def benchmarks(document: Document, results: Results) -> None:
    """Scores, and their changes by fine-tuning and by quantization."""
    scores = [results.benchmarks(name) for name in results.models]
    before, tasks = scores[0], next(filter(None, scores), {})
    if not tasks:
        return
    document.heading("Benchmarks")
    document.text(
        "Scores of lm-evaluation-harness in per cent; in brackets the change against the base, or of a quantized model "
        "against the same one in full precision, with its 95% bootstrap interval over examples."
    )
    columns = [(results.base, "", None)]
    columns += [(name, "", before) for name in results.tuned]
    for alpha in results.record["settings"]["wise_ft"]:
        columns += [(name, f"wise-ft {alpha:g}", before) for name in results.tuned]
    for scheme in results.record["settings"]["quantize"]:
        columns += [(name, scheme, results.benchmarks(name)) for name in results.models]
    rows = []
    for task in tasks:
        row = [task, tasks[task].metric]
        for name, variant, reference in columns:
            result = results.benchmarks(name, variant).get(task)
            if result is None:
                row.append(MISSING)
                continue
            change = f" ({_percent(score_change(reference[task], result))})" if reference else ""
            row.append(f"{100 * result.value:.1f}{change}")
        rows.append(row)
    document.table(["task", "metric", *(f"{name} {variant}".strip() for name, variant, _ in columns)], rows)


def sharpness(document: Document, results: Results) -> None:
    """All sharpness measures."""
    kinds = results.record["settings"]["sharpness"]
    if not kinds:
        return
    document.heading("Sharpness")
    rho = results.record["settings"]["sam_rho"]
    titles = {
        "kl": ["KL under noise of 1e-5"],
        "sam": [f"SAM sharpness, rho {rho:g}"],
        "hessian": ["top Hessian eigenvalue", "Hessian trace"],
    }
    rows = []
    for name in results.models:
        row = [name]
        for kind in ("kl", "sam", "hessian"):
            if kind not in kinds:
                continue
            found = results.result(kind, name)
            if found is None:
                row += [MISSING] * len(titles[kind])
            elif kind == "kl":
                row.append(f"{found['value']:.3e} ± {error_text(found['standard_error'])}")
            elif kind == "sam":
                row.append(f"{found['value']:.5f}")
            else:
                row.append(f"{found['eigenvalues'][0]:.3f} ± {error_text(found['residuals'][0])}")
                row.append(f"{found['trace']:.1f} ± {error_text(found['trace_standard_error'])}")
        rows.append(row)
    if set(kinds) - {"noise"}:
        document.text(
            "The KL divergence between next-token distributions without and with noise (nats per token; ± standard "
            "error over noise samples), growth of the loss at w + e, the point at distance rho along the "
            "gradient, largest eigenvalue (± residual) and trace (± standard error) of the Hessian of the loss."
        )
        document.table(["model", *(title for kind in titles if kind in kinds for title in titles[kind])], rows)
    if "noise" in kinds:
        measured = _present({name: results.result("noise", name) for name in results.models})
        if measured:
            document.figure("noise", plot_noise(measured), "Growth of the loss under noise in proportion to each layer")


def landscapes(document: Document, results: Results) -> None:
    """Lines and planes."""
    kinds = results.record["settings"]["landscape"]
    if not kinds:
        return
    document.heading("Loss landscape")
    if "line" in kinds:
        lines = _present({name: results.result("line", name) for name in results.tuned})
        if lines:
            document.figure("line", plot_line(lines), "Loss from base to tuned, and its second-order Taylor expansion")
        document.table(
            ["model", "distance", "slope at base", "curvature at base", "barrier"],
            [
                [name, *(f"{line[key]:.4g}" for key in ("distance", "slope", "curvature", "barrier"))]
                for name, line in lines.items()
            ],
        )
    for record in [record for record in results.find("plane") if record["result"] is not None]:
        document.figure(
            "plane", plot_plane(record["result"]), f"Loss on the plane through {results.base}, {record['model']}"
        )
    if "random" in kinds:
        for name, plane in _present({name: results.result("random plane", name) for name in results.models}).items():
            document.figure(f"random_{name}", plot_plane(plane), f"Loss along random directions around {name}")


def similarity(document: Document, results: Results) -> None:
    """Distance from the base by layer."""
    if not results.record["settings"]["similarity"] or not results.tuned:
        return
    document.heading("Distance from the base")
    found = _present({name: results.result("similarity", name) for name in results.tuned})
    if not found:
        return
    angles = {name: values["mean_principal_angles"] for name, values in found.items()}
    document.figure("principal_angles", plot_layers(angles, "mean principal angle (degrees)"), "Hidden states by layer")
    ckas = {name: values["cka"] for name, values in found.items()}
    document.figure("cka", plot_layers(ckas, "linear CKA"), "Hidden states by layer: 1 is equal up to rotation")
    layers = [layer["layer"] for layer in next(iter(found.values()))["weights"]]
    rows = []
    for index, layer in enumerate(layers):
        weights = [values["weights"][index] for values in found.values()]
        rows.append([layer, *(f"{w['distance']:.4g} ({_share(w['relative'])})" for w in weights)])
    document.table(["weights", *(f"distance of {name}" for name in found)], rows)


def failures(document: Document, results: Results) -> None:
    """What could not be measured."""
    failed = [record for record in results.record["parts"] if record.get("error")]
    if failed:
        document.heading("Missing")
        columns = ("part", "model", "variant", "data", "error")
        rows = [[record.get(column, "") for column in columns] for record in failed]
        document.table(["measure", "model", "variant", "data", "why"], rows)


def loss_text(loss: HeldOutLoss | None) -> str:
    """A loss for a table."""
    return MISSING if loss is None else f"{loss.loss:.4f}"


def change_text(before: HeldOutLoss | None, after: HeldOutLoss | None) -> str:
    """How much a loss grew, with its interval, for a table."""
    return MISSING if before is None or after is None else str(forgetting(before, after))


def _present(found: dict) -> dict:
    return {name: value for name, value in found.items() if value is not None}


def _short(value) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def error_text(value: float | None) -> str:
    """An error bar for a table."""
    return "unknown" if value is None else f"{value:.1e}"


def _share(value: float | None) -> str:
    return "from zero" if value is None else f"{100 * value:.2f}%"


def _percent(change) -> str:
    return f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
