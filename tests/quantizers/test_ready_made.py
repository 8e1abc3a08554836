"""Models that somebody else quantized: in the same tables, with the same numbers, and with proof."""

import json

import pytest
import torch
from toy_evaluation import sharp_olmo2
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_sam import commands
from hf_sam.evaluation import Results
from hf_sam.evaluation.inputs import find_quantized
from hf_sam.instruments import HeldOutData, held_out_loss
from hf_sam.quantizers import load_ready_made
from hf_sam.quantizers.ready_made import what_it_holds
from hf_sam.runtime.models import find_model


@pytest.fixture(scope="module")
def nf4(shelf, tmp_path_factory):
    """The base of the shelf as bitsandbytes and transformers save it."""
    folder = tmp_path_factory.mktemp("ready") / "base-nf4"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(shelf / "base", quantization_config=config).save_pretrained(folder)
    return folder


def packed(source, folder, bits: int) -> dict[str, torch.Tensor]:
    """A checkpoint in the compressed-tensors format, as llm-compressor and vLLM exchange it; returns its weights."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    stored, rounded = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        blocks = tensor.reshape(tensor.shape[0], -1, 32)
        half = 2 ** (bits - 1)
        scale = blocks.abs().amax(-1) / (half - 0.5)
        codes = (blocks / scale[..., None]).round().clamp(-half, half - 1)
        rounded[name] = (codes * scale[..., None]).reshape(tensor.shape)
        stored[f"{name}_packed"] = pack_to_int32(codes.reshape(tensor.shape).to(torch.int8), bits)
        stored[f"{name}_scale"] = scale
        stored[f"{name}_shape"] = torch.tensor(tensor.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return rounded


def evaluated(shelf, output, *quantized, extra=()):
    argv = ["evaluate", "--base", str(shelf / "base"), "--tuned", str(shelf / "tuned1"), "--max_length", "64"]
    argv += ["--data", str(shelf / "old.jsonl"), "--output", str(output), *extra]
    return commands.main([*argv, "--quantized", *quantized])


def old_data(shelf):
    return HeldOutData.from_dataset(
        [json.loads(line)["text"] for line in (shelf / "old.jsonl").read_text().splitlines()],
        AutoTokenizer.from_pretrained(shelf / "base"),
        max_length=64,
    )


def test_it_is_in_the_same_table_with_the_same_numbers(shelf, nf4, tmp_path, capsys):
    assert evaluated(shelf, tmp_path / "out", f"theirs={nf4}", extra=("--quantize", "nf4")) == 0
    results = Results.read(tmp_path / "out")
    ours, theirs = (results.find("quantized", "base", scheme)[0]["result"] for scheme in ("nf4", "theirs"))
    assert theirs["embedding_difference"] == 0
    assert {**theirs, "scheme": "nf4", "embedding_difference": None} == ours
    assert results.loss("base", "old", "theirs").loss == results.loss("base", "old", "nf4").loss
    assert results.schemes() == ["nf4", "theirs"]
    assert results.schemes("tuned1") == ["nf4"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"`theirs` of `base` was quantized elsewhere: `{nf4}`" in report
    # Another file under the same name is another evaluation.
    other = tmp_path / "other"
    other.mkdir()
    for file in nf4.iterdir():
        (other / file.name).write_bytes(file.read_bytes() + (b" " if file.name == "config.json" else b""))
    capsys.readouterr()
    assert evaluated(shelf, tmp_path / "out", f"theirs={other}", extra=("--quantize", "nf4")) == 2
    assert "its quantized model 'base/theirs' had other weights" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_are_proven_by_their_values(shelf, tmp_path, bits):
    rounded = packed(shelf / "base", tmp_path / "theirs", bits)
    base = find_model(str(shelf / "base"))
    (made,) = find_quantized([str(tmp_path / "theirs")], [base])
    model, proof = load_ready_made(made)
    assert proof.scheme == "theirs"
    assert proof.layers == len(rounded)
    assert proof.kinds == (f"int{bits} of compressed-tensors",)
    assert proof.bits == pytest.approx(bits + 32 / 32)
    plain = base.load(torch.float32)
    for name, weight in rounded.items():
        plain.get_parameter(name).data.copy_(weight)
    loss = held_out_loss(model, old_data(shelf)).loss
    assert loss == pytest.approx(held_out_loss(plain, old_data(shelf)).loss, abs=1e-5)
    # Unpacked by the forward pass, they are proven by their values; weights that are not on a grid are no proof.
    layer = model.model.layers[0].mlp.up_proj
    assert what_it_holds(layer, "weight").kind == f"int{bits} of compressed-tensors"
    layer.weight.data.add_(torch.randn_like(layer.weight) * layer.weight.std() / 100)
    assert "with its scales cannot" in what_it_holds(layer, "weight")


def test_a_model_made_from_another_one_is_doubted(shelf, tmp_path):
    """The same vocabulary and shapes, but other weights: only its embeddings show it."""
    torch.manual_seed(1)
    other = sharp_olmo2(vocab_size=find_model(str(shelf / "base")).vocabulary())
    other.save_pretrained(tmp_path / "other")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other", quantization_config=config)
    model.save_pretrained(tmp_path / "nf4")
    assert evaluated(shelf, tmp_path / "out", f"theirs={tmp_path / 'nf4'}") == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "it was made from another model" in report
    # Of another size, or with fewer layers, it is none at all.
    for name, change in (("wide", {"hidden_size": 128}), ("short", {"num_hidden_layers": 1})):
        other = sharp_olmo2(vocab_size=find_model(str(shelf / "base")).vocabulary(), **change)
        other.save_pretrained(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=config)
        model.save_pretrained(tmp_path / f"{name}-nf4")
        (made,) = find_quantized([f"x={tmp_path / f'{name}-nf4'}"], [find_model(str(shelf / "base"))])
        with pytest.raises(RuntimeError, match="it was made from another model"):
            load_ready_made(made)


def test_it_may_belong_to_a_tuned_model(shelf, nf4):
    models = [find_model(str(shelf / name)) for name in ("base", "tuned1")]
    base, tuned = find_quantized([f"x={nf4}", f"tuned1/x={nf4}"], models)
    assert (base.model.name, tuned.model.name) == ("base", "tuned1")
    for spec, problem in (
        (f"sft/x={nf4}", "no model 'sft', only base, tuned1"),
        (f"nf4={nf4}", "'nf4' cannot be its name"),
        (f"x={shelf / 'base'}", "has no quantization_config"),
        (f"x={shelf / 'nowhere.gguf'}", "There is no file|needs llama_cpp|needs gguf"),
    ):
        with pytest.raises((ValueError, ImportError), match=problem):
            find_quantized([spec], models)
    with pytest.raises(ValueError, match="names two models 'x'"):
        find_quantized([f"x={nf4}", f"x={nf4}"], models)


def test_a_config_that_only_says_so_is_noticed(shelf, tmp_path):
    """Weights in full precision under a config that promises 4 bits: a loader that ignored it measured no damage."""
    base = find_model(str(shelf / "base"))
    (tmp_path / "claim").mkdir()
    for file in (shelf / "base").iterdir():
        (tmp_path / "claim" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "claim" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "made-up", "bits": 4}
    (tmp_path / "claim" / "config.json").write_text(json.dumps(config))
    (made,) = find_quantized([f"x={tmp_path / 'claim'}"], [base])
    with pytest.raises((RuntimeError, ValueError), match=r"x failed silently|made-up"):
        load_ready_made(made)
