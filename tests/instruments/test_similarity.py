"""Principal angles, CKA and distances: against rotations made by hand."""

import math

import pytest
import torch
from toy_evaluation import FailsAfter, busy, held_out, moved, sharp_olmo2, unchanged
from transformers.modeling_outputs import CausalLMOutput

from hf_sam.instruments import HeldOutData, representation_similarity, weight_distance


class Features(torch.nn.Module):
    """A "model" whose only hidden states are fixed features of the tokens, times a matrix."""

    def __init__(self, features: torch.Tensor, matrix: torch.Tensor | None = None):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(features)
        self.matrix = torch.nn.Parameter(torch.eye(features.shape[1]).to(features) if matrix is None else matrix)

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False):
        hidden = self.table(input_ids) @ self.matrix
        return CausalLMOutput(logits=hidden, hidden_states=(hidden,))


def features(scales, tokens=64, seed=0):
    """Independent features of very different sizes, so that the principal components are the axes."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.linalg.qr(torch.randn(tokens, len(scales) + 1, generator=generator, dtype=torch.float64)).Q
    raw = raw - raw.mean(0)  # and again orthogonal after centering
    raw = torch.linalg.qr(raw).Q[:, : len(scales)]
    return raw * torch.tensor(scales, dtype=torch.float64)


def rotation(size, plane, angle):
    """Rotates by `angle` in the plane of two axes."""
    matrix = torch.eye(size, dtype=torch.float64)
    i, j = plane
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = math.sin(angle), -math.sin(angle)
    return matrix


# Each token once as context, so that the moments are those of the table.
ONCE = HeldOutData([{"input_ids": [i, 0]} for i in range(64)])


def test_rotation_out_of_the_subspace_is_the_angle():
    """Two of the three leading directions stay, the third turns by 30 degrees: the mean is 10."""
    table = features([9, 8, 7, 0.1, 0.1])
    turned = rotation(5, (2, 3), math.radians(30))
    measured = representation_similarity(Features(table), Features(table, turned), ONCE, rank=3)
    assert measured.mean_principal_angles[0] == pytest.approx(10.0, abs=1e-6)
    assert measured.tokens == 64


def test_rotation_within_the_subspace_is_none():
    table = features([9, 8, 7, 0.1, 0.1])
    turned = rotation(5, (0, 1), 1.0)
    measured = representation_similarity(Features(table), Features(table, turned), ONCE, rank=3)
    assert measured.mean_principal_angles[0] == pytest.approx(0.0, abs=1e-6)


def test_cka_sees_no_rotation_and_no_scale_but_other_features():
    table = features([9, 8, 7, 3, 2])
    turned = 5 * rotation(5, (0, 4), 1.2) @ rotation(5, (1, 2), 0.3)
    assert representation_similarity(Features(table), Features(table, turned), ONCE, rank=2).cka[0] == pytest.approx(
        1.0
    )
    other = features([9, 8, 7, 3, 2], seed=1)
    x, y = (t - t.mean(0) for t in (table, other))
    expected = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    measured = representation_similarity(Features(table), Features(other), ONCE, rank=2).cka[0]
    assert measured == pytest.approx(expected.item(), rel=1e-9)
    assert measured < 0.5


def test_layers_of_a_model():
    base = sharp_olmo2()
    other, data = moved(base, 0.02), held_out(20)
    with unchanged(base, other):
        measured = representation_similarity(base, other, data, rank=5)
    assert len(measured.mean_principal_angles) == len(measured.cka) == 3
    assert all(0 < angle < 90 for angle in measured.mean_principal_angles)
    assert all(0.5 < cka < 1 for cka in measured.cka)
    same = representation_similarity(base, base, data, rank=5)
    assert same.mean_principal_angles == pytest.approx([0, 0, 0], abs=1e-4)
    assert same.cka == pytest.approx([1, 1, 1])
    for batch_size in (1, 7):
        again = representation_similarity(base, other, data, rank=5, batch_size=batch_size)
        assert again.mean_principal_angles == pytest.approx(measured.mean_principal_angles, rel=1e-3)
        assert again.cka == pytest.approx(measured.cka, rel=1e-5)


def test_weights_by_layer():
    base, other = sharp_olmo2(), sharp_olmo2()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.5)
        other.lm_head.weight.mul_(1.1)
    layers = {layer.layer: layer for layer in weight_distance(base, other)}
    assert set(layers) == {"embed_tokens", "layer 0", "layer 1", "norm", "lm_head"}
    assert layers["layer 1"].distance == pytest.approx(0.5 * math.sqrt(64 * 128))
    assert layers["lm_head"].relative == pytest.approx(0.1, rel=1e-4)
    assert [layers[name].distance for name in ("embed_tokens", "layer 0", "norm")] == [0, 0, 0]


def test_the_models_are_left_as_they_were():
    base, other = busy(sharp_olmo2()), busy(moved(sharp_olmo2()))
    failing = FailsAfter(other, calls=1)
    with unchanged(base, failing), pytest.raises(KeyboardInterrupt):
        representation_similarity(base, failing, held_out(), batch_size=4)


def test_what_cannot_be_compared_is_refused():
    base = sharp_olmo2()
    with pytest.raises(ValueError, match="64 and 32 dimensions"):
        representation_similarity(base, sharp_olmo2(hidden_size=32), held_out())
    with pytest.raises(ValueError, match="differ in depth"):
        representation_similarity(base, sharp_olmo2(num_hidden_layers=1), held_out())
    with pytest.raises(ValueError, match="rank 200"):
        representation_similarity(base, base, held_out(), rank=200)
