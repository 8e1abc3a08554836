"""No measure depends on how the documents are batched: on which side they are padded, or whether they are packed."""

import pytest
import torch
from toy_evaluation import held_out, moved, sharp_olmo2, token_rows

from hf_sam.baselines import estimate_fisher
from hf_sam.instruments import (
    HeldOutData,
    Hessian,
    loss_along_line,
    noise_kl,
    noise_sensitivity,
    relative_hessian_trace,
    relative_noise_kl,
    representation_similarity,
    sam_sharpness,
)

MODEL = sharp_olmo2(initializer_range=0.1)
OTHER = moved(MODEL, 0.02)


def packed():
    """Three documents a row, told apart by their positions."""
    rows = token_rows()
    batches = []
    for start in range(0, len(rows), 3):
        three = [row["input_ids"] for row in rows[start : start + 3]]
        ids = torch.tensor([[token for document in three for token in document]])
        positions = torch.tensor([[position for document in three for position in range(len(document))]])
        batches.append({"input_ids": ids, "position_ids": positions})
    return torch.utils.data.DataLoader(batches, batch_size=None)


def product(data):
    with Hessian(MODEL, data, parameters="mlp") as hessian:
        vector = torch.ones(hessian.size)
        return (vector @ (hessian @ vector)).item()


MEASURES = {
    "KL": (lambda data: noise_kl(MODEL, data, sigma=1e-3, samples=2).value, 1e-4),
    "relative KL": (lambda data: relative_noise_kl(MODEL, data, sigma=1e-2, samples=2).value, 1e-4),
    "relative trace": (lambda data: relative_hessian_trace(MODEL, data, probes=2).value, 1e-3),
    "sensitivity": (lambda data: noise_sensitivity(MODEL, data, strengths=(0.5,), samples=1).losses[0][0], 1e-6),
    "SAM": (lambda data: sam_sharpness(MODEL, data).value, 1e-3),
    "Hessian": (product, 1e-3),
    "line": (lambda data: loss_along_line(MODEL, OTHER, data, positions=(0, 1)).quadratic[1], 1e-4),
    "angles": (lambda data: representation_similarity(MODEL, OTHER, data, rank=5).mean_principal_angles[-1], 1e-3),
    "CKA": (lambda data: representation_similarity(MODEL, OTHER, data, rank=5).cka[-1], 1e-5),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_do_not_depend_on_the_batches(name):
    """Each tolerance is relative; logits of other shapes differ in the last bits, and SAM is a small difference."""
    measure, tolerance = MEASURES[name]
    expected = measure(held_out())
    for data in (held_out().batches(5, "left"), held_out().batches(1), packed()):
        assert measure(data) == pytest.approx(expected, rel=tolerance)


def test_fisher_information_takes_packed_rows_apart():
    rows = token_rows(4)
    together = [{"input_ids": [token for row in rows for token in row["input_ids"]], "seq_lengths": []}]
    together[0]["seq_lengths"] = [len(row["input_ids"]) for row in rows]
    apart, packed_rows = (estimate_fisher(MODEL, data)["lm_head.weight"] for data in (HeldOutData(rows), together))
    torch.testing.assert_close(packed_rows, apart)
