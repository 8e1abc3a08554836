"""A new quantizer is one registration: its flag, the proof, results, tables and comparison follow."""

import json
import re

import pytest
import torch
from toy_evaluation import held_out, sharp_olmo2, unchanged

from hf_sam import commands
from hf_sam.quantizers import QUANTIZERS, Held, Quantizer, quantization_damage, quantized, register
from hf_sam.quantizers.proof import linear_layers


def signs(model: torch.nn.Module) -> None:
    for layer in linear_layers(model).values():
        layer.weight.copy_(layer.weight.sign() * layer.weight.abs().mean())


def one_bit(module: torch.nn.Module, name: str) -> Held | str:
    values = getattr(module, name).abs().unique()
    return Held("signs", module.weight.numel() // 8 + 2) if len(values) == 1 else f"holds {len(values)} sizes"


@pytest.fixture
def made_up():
    before = dict(QUANTIZERS)
    yield register(Quantizer("signs", "one bit a weight", one_bit, apply=signs, simulated=True))
    QUANTIZERS.clear()
    QUANTIZERS.update(before)


def test_a_made_up_quantizer_is_in_flags_results_report_and_comparison(shelf, tmp_path, capsys, made_up):
    with pytest.raises(SystemExit):
        commands.main(["evaluate", "--help"])
    assert "signs: one bit a weight" in re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, base in (("one", "base"), ("two", "tuned1")):
        argv = ["evaluate", "--base", str(shelf / base), "--data", str(shelf / "old.jsonl"), "--max_length", "64"]
        assert commands.main([*argv, "--quantize", "signs", "--output", str(tmp_path / name)]) == 0
    (proof,) = [
        part["result"]
        for part in json.loads((tmp_path / "one" / "results.json").read_text())["parts"]
        if part["part"] == "quantized"
    ]
    assert proof["bits"] == pytest.approx(1, abs=0.01)
    assert proof["kinds"] == ["signs"]
    assert re.search(r"\| signs\s+\| 1\.0\d \| signs \(14\)", (tmp_path / "one" / "report.md").read_text())
    assert commands.main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(tmp_path / "c")]) == 0
    assert "Quantized to signs" in (tmp_path / "c" / "report.md").read_text()


def test_its_weights_come_back(made_up):
    model = sharp_olmo2()
    with unchanged(model):
        assert quantization_damage(model, held_out(), "signs").damage.value != 0


def test_a_layer_that_it_leaves_out_is_noticed(made_up):
    def lazy(model: torch.nn.Module) -> None:
        last = model.model.layers[1].mlp.down_proj.weight
        before = last.clone()
        signs(model)
        last.copy_(before)

    register(Quantizer("lazy", "leaves one out", one_bit, apply=lazy, simulated=True))
    with pytest.raises(RuntimeError, match=r"to lazy failed silently: 'model.layers.1.mlp.down_proj' holds"):
        quantization_damage(sharp_olmo2(), held_out(), "lazy")


def test_what_a_quantizer_needs_is_told_before(monkeypatch):
    with pytest.raises(ValueError, match="already a quantizer 'nf4'"):
        register(Quantizer("nf4", "another", one_bit, apply=signs))
    with pytest.raises(ValueError, match="needs either `apply` or `load`"):
        register(Quantizer("neither", "", one_bit))
    real = QUANTIZERS["rtn4"]
    monkeypatch.setitem(QUANTIZERS, "rtn4", Quantizer("rtn4", "", real.held, apply=real.apply, packages=("no_such",)))
    model = sharp_olmo2()
    with pytest.raises(ImportError, match=r"Quantization to rtn4 needs no_such\. Install it"), quantized(model, "rtn4"):
        pass
    away = Quantizer("rtn4", "", real.held, apply=real.apply, problem=lambda device: f"there is only a {device}")
    monkeypatch.setitem(QUANTIZERS, "rtn4", away)
    with pytest.raises(ValueError, match="rtn4 cannot run here: there is only a cpu"), quantized(model, "rtn4"):
        pass


def test_calibration_is_asked_for(shelf, tmp_path, capsys, monkeypatch):
    real = QUANTIZERS["rtn4"]
    seen = []

    def load(path, *, dtype, device_map, calibration):
        from hf_sam.runtime.models import load_checked

        seen.append(calibration)
        model = load_checked(path, dtype=dtype, device_map=device_map)
        with torch.no_grad():
            real.apply(model)
        return model

    monkeypatch.setitem(QUANTIZERS, "rtn4", Quantizer("rtn4", "", real.held, load=load, calibrated=True))
    argv = ["evaluate", "--base", str(shelf / "base"), "--data", str(shelf / "old.jsonl"), "--max_length", "64"]
    argv += ["--quantize", "rtn4", "--output", str(tmp_path / "out")]
    assert commands.main(argv) == 2
    assert "--quantize rtn4 needs --calibration_data" in capsys.readouterr().err
    assert commands.main([*argv, "--calibration_data", str(shelf / "old.jsonl")]) == 2
    assert "are the held-out data 'old'" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text(
        "".join((shelf / "old.jsonl").read_text().splitlines(keepends=True)[:10]), encoding="utf-8"
    )
    assert commands.main([*argv, "--calibration_data", str(tmp_path / "other.jsonl")]) == 0
    assert [data.documents for data in seen] == [10]
    # Other calibration data make another evaluation.
    text = (tmp_path / "other.jsonl").read_text()
    (tmp_path / "third.jsonl").write_text(text[: text.rindex("\n", 0, -1) + 1])
    capsys.readouterr()
    assert commands.main([*argv, "--calibration_data", str(tmp_path / "third.jsonl")]) == 2
    assert "rtn4 was calibrated on other data" in capsys.readouterr().err
