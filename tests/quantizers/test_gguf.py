"""GGUF files, evaluated by llama.cpp, where the extra `gguf` is installed (llama-cpp-python compiles for minutes)."""

import ctypes
import json

import numpy as np
import pytest
import torch
from toy_tasks import write_task
from toy_trl import tokenizer
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from hf_sam import commands
from hf_sam.evaluation import Results
from hf_sam.evaluation.inputs import find_quantized
from hf_sam.instruments import HeldOutData, held_out_loss, run_benchmarks
from hf_sam.quantizers import load_ready_made
from hf_sam.quantizers.gguf import GGUFForCausalLM, GGUFHeader
from hf_sam.runtime.models import find_model

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

FILE_TYPES = {"Q4_K_M": 15, "Q5_K_M": 17, "Q8_0": 7, "Q3_K_M": 12}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order in which llama.cpp rotates them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: LlamaForCausalLM, tokens: list[str], path) -> None:
    """A Llama in fp32, as llama.cpp's own converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([1] * len(tokens))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, param in model.state_dict().items():
        weight = param.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, config.num_attention_heads)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source, target, kind: str) -> None:
    """What `llama-quantize` does."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = FILE_TYPES[kind], 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama wide enough for blocks of 256 weights, its GGUF files, and text."""
    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    vocabulary = sorted(tokenizer().get_vocab().items(), key=lambda item: item[1])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            initializer_range=0.1,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    write_gguf(model, [token for token, _ in vocabulary], folder / "f32.gguf")
    for kind in FILE_TYPES:
        quantize(folder / "f32.gguf", folder / f"{kind}.gguf", kind)
    return folder


def made(folder, spec: str):
    return find_quantized([spec], [find_model(str(folder / "base"))])[0]


def data(shelf) -> HeldOutData:
    texts = [json.loads(line)["text"] for line in (shelf / "old.jsonl").read_text().splitlines()][:20]
    return HeldOutData.from_dataset(texts, tokenizer(), max_length=64)


def test_llama_cpp_computes_what_transformers_computes(folder, shelf):
    """In fp32 nothing is quantized: the loss is that of the plain model, and the proof says that it is no proof."""
    one = made(folder, str(folder / "f32.gguf"))
    with pytest.raises(RuntimeError, match=r"f32 failed silently: .* in full precision.*which is F32"):
        load_ready_made(one)
    by_llama = GGUFForCausalLM(one.path, AutoConfig.from_pretrained(folder / "base"), torch.float32)
    plain = one.model.load(torch.float32)
    assert held_out_loss(by_llama, data(shelf)).loss == pytest.approx(held_out_loss(plain, data(shelf)).loss, abs=1e-3)


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8.5), ("Q5_K_M", 5.6), ("Q4_K_M", 4.8), ("Q3_K_M", 3.9)])
def test_damage_is_that_of_the_values_in_the_file(folder, shelf, kind, bits):
    """The plain model with the weights that the `gguf` package decodes; llama.cpp rounds activations, too."""
    model, proof = load_ready_made(made(folder, f"q={folder / kind}.gguf"))
    assert proof.layers == 14
    assert proof.bits == pytest.approx(bits, abs=0.6)  # llama.cpp gives some layers more bits than others
    assert all(name.startswith("Q") for name in proof.kinds)
    assert 0 < proof.embedding_difference < 0.2
    plain = find_model(str(folder / "base")).load(torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    stored = {one.name: one for one in gguf.GGUFReader(folder / f"{kind}.gguf").tensors}
    with torch.no_grad():
        for name, param in plain.named_parameters():
            one = stored[names.get_name(name, (".weight",))]
            values = gguf.dequantize(one.data, one.tensor_type)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = values.reshape(4, -1, 2, 256).swapaxes(1, 2).reshape(values.shape)
            param.copy_(torch.from_numpy(np.array(values)))
    found = held_out_loss(model, data(shelf)).document_losses
    by_hand = held_out_loss(plain, data(shelf)).document_losses
    before = held_out_loss(find_model(str(folder / "base")).load(torch.float32), data(shelf)).document_losses
    # With 8 bits the rounding of activations is half of all.
    assert np.abs(found - by_hand).mean() < 0.8 * np.abs(found - before).mean()
    assert np.abs(found - by_hand).mean() < 0.01 * before.mean()


def test_it_is_in_the_same_tables(folder, shelf, tmp_path):
    argv = ["evaluate", "--base", str(folder / "base"), "--data", str(shelf / "old.jsonl"), "--max_length", "64"]
    argv += ["--quantize", "rtn4", "--quantized", f"q4_k_m={folder / 'Q4_K_M.gguf'}", "--output", str(tmp_path / "out")]
    assert commands.main(argv) == 0
    results = Results.read(tmp_path / "out")
    assert results.schemes() == ["rtn4", "q4_k_m"]
    assert results.loss("base", "old", "q4_k_m").loss != results.loss("base", "old").loss
    assert "| q4_k_m" in (tmp_path / "out" / "report.md").read_text()


def test_benchmarks_read_it(folder, tmp_path):
    pytest.importorskip("lm_eval")
    tasks = write_task(tmp_path)
    model, _ = load_ready_made(made(folder, f"q={folder / 'Q8_0.gguf'}"))
    plain = find_model(str(folder / "base")).load(torch.float32)
    both = [
        run_benchmarks(one, tokenizer(), ["toy_choice"], num_fewshot=0, include_path=tasks)["toy_choice"]
        for one in (plain, model)
    ]
    assert len(both[1].scores) == 24
    agree = [both[0].scores[i] == both[1].scores[i] for i in both[0].scores]
    assert np.mean(agree) > 0.8
    with pytest.raises(RuntimeError, match="cannot be run on a GGUF file"):
        model.generate()


def test_another_vocabulary_and_damaged_files_are_refused(folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    tokens = GGUFHeader(folder / "f32.gguf").tokens()
    write_gguf(model, [tokens[1], tokens[0], *tokens[2:]], tmp_path / "swapped.gguf")
    with pytest.raises(ValueError, match=r"vocabularies of .* differ: 2 of"):
        made(folder, str(tmp_path / "swapped.gguf"))
    (tmp_path / "cut.gguf").write_bytes((folder / "Q8_0.gguf").read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a GGUF file, or a damaged one"):
        made(folder, str(tmp_path / "cut.gguf"))
    (tmp_path / "text.gguf").write_text("not one")
    with pytest.raises(ValueError, match="not a GGUF file, or a damaged one"):
        made(folder, str(tmp_path / "text.gguf"))
    with pytest.raises(ValueError, match="There is no file"):
        made(folder, str(tmp_path / "none.gguf"))
