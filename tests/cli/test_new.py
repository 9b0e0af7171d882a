"""`mpk-spec new`: a draft that loads, plans and reads its checkpoint, or says what is left to do."""

from __future__ import annotations

import json

import pytest

from mpk_spec import errors
from mpk_spec.cli import new
from mpk_spec.cli.main import main
from mpk_spec.schema import load_spec, spec_names

KEYS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def one_cache(shared_cache, own_cache, monkeypatch):
    monkeypatch.setenv("MPK_SPEC_CACHE", str(shared_cache))


@pytest.fixture
def saved(tmp_path):
    """Saves a random model of a class and returns its folder."""

    def save(architecture: str, **keys):
        import transformers

        from mpk_spec.weights.config import make_config

        folder = tmp_path / f"My-{architecture.removesuffix('ForCausalLM')}"
        transformers.logging.set_verbosity_error()
        getattr(transformers, architecture)(make_config(architecture, {**KEYS, **keys})).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def hide(monkeypatch):
    """Pretends that some specs do not exist."""

    def hidden(*names: str) -> None:
        monkeypatch.setattr(new, "known_specs", lambda: [load_spec(n) for n in spec_names() if n not in names])

    return hidden


def test_biases_are_found(saved, hide, tmp_path, capsys):
    hide("qwen2_5")
    out = tmp_path / "mine.yaml"
    assert main(["new", "--from", str(saved("Qwen2ForCausalLM")), "-o", str(out)]) == errors.EXIT_OK
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n"
    assert f"wrote {out}, extending llama3; to check: " in shown.err
    assert shown.err.splitlines()[-1].startswith("it loads, plans, and reads every tensor")
    spec, theirs = load_spec(out), load_spec("qwen2_5")
    assert {n: [e.text for e in w.shape] for n, w in spec.weights.items()} == {
        n: [e.text for e in w.shape] for n, w in theirs.weights.items()
    }
    assert spec.blocks == theirs.blocks
    assert spec.model.architectures == ["Qwen2ForCausalLM"]
    assert [r.text for r in spec.model.requires] == ['config.hidden_act == "silu"']


def test_the_draft_passes_its_own_checks(saved, hide, tmp_path, capsys):
    """As far as an editor's hand: it equals Hugging Face on a tiny model, and notices a missing rope."""
    hide("qwen2_5")
    out = tmp_path / "mine.yaml"
    main(["new", "--from", str(saved("Qwen2ForCausalLM")), "-o", str(out)])
    assert main(["test", str(out), "--size", "tiny"]) == errors.EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    passed = [line.split()[1] for line in lines if line.startswith("pass")]
    assert passed == [
        "mine/plans[tiny]",
        "mine/huggingface[tiny,",
        "mine/huggingface[tiny,",
        "mine/kl_ratio",
        "mine/planted",
    ]


def test_norms_of_queries_and_keys_are_found(saved, hide, tmp_path, capsys):
    hide("qwen3", "qwen3_moe", "gemma3")
    out = tmp_path / "mine.yaml"
    assert main(["new", "--from", str(saved("Qwen3ForCausalLM", head_dim=16)), "-o", str(out)]) == errors.EXIT_OK
    assert "reads every tensor" in capsys.readouterr().err
    spec, theirs = load_spec(out), load_spec("qwen3")
    assert spec.blocks == theirs.blocks
    assert set(spec.fusions["attend"].of) == set(theirs.fusions["attend"].of)
    assert "# check: 'q_norm' is taken for a norm of each head before the rope" in out.read_text()


def test_missing_norms_are_dropped(saved, hide, tmp_path, capsys):
    """A Llama, where only Qwen3 is known: what it lacks becomes null, with its operators."""
    hide("llama3", "smollm2", "qwen2_5")
    out = tmp_path / "mine.yaml"
    assert main(["new", "--from", str(saved("LlamaForCausalLM", head_dim=16)), "-o", str(out)]) == errors.EXIT_OK
    assert "extending qwen3" in capsys.readouterr().err
    text = out.read_text()
    assert "    q_norm: null\n" in text and "    qn: null\n" in text and "    qr: {rope: q}\n" in text
    spec, theirs = load_spec(out), load_spec("llama3")
    assert spec.blocks == theirs.blocks
    assert spec.fusions["attend"].of == theirs.fusions["attend"].of


def test_a_known_architecture_needs_little(saved, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    assert main(["new", "--from", str(saved("LlamaForCausalLM", head_dim=16)), "-o", str(out)]) == errors.EXIT_OK
    assert "'llama3' reads LlamaForCausalLM already: it may need no spec of its own" in capsys.readouterr().err
    assert "blocks:" not in out.read_text() and "weights:" not in out.read_text()


def test_an_unknown_architecture_says_what_is_left(saved, tmp_path, capsys):
    """Phi-3 joins queries, keys and values in one tensor: no guess, but the draft loads and names them."""
    out = tmp_path / "mine.yaml"
    folder = saved("Phi3ForCausalLM", pad_token_id=0)
    assert main(["new", "--from", str(folder), "-o", str(out)]) == errors.EXIT_OK
    said = capsys.readouterr().err
    assert "it loads, but this checkpoint cannot be planned yet:" in said
    assert "'model.layers.0.self_attn.q_proj.weight'" in said
    text = out.read_text()
    assert "# check: the checkpoint has no 'model.layers.{i}.self_attn.q_proj.weight'" in text
    assert "  # qkv_proj: {from: model.layers.{i}.self_attn.qkv_proj.weight, shape: [128, hidden]}" in text
    load_spec(out)


def test_switches_that_no_tensor_shows_are_asked_about(saved, tmp_path, capsys):
    """Mistral is Llama with a window."""
    out = tmp_path / "mine.yaml"
    folder = saved("MistralForCausalLM", sliding_window=64)
    assert main(["new", "--from", str(folder), "-o", str(out)]) == errors.EXIT_OK
    assert "extending llama3; to check: 4 places" in capsys.readouterr().err
    said = "# check: config.sliding_window is 64, which llama3 knows nothing of: does it change the numbers?"
    assert [line for line in out.read_text().splitlines() if line.startswith("# check:")] == [said]


def test_nothing_alike_is_an_error(saved, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    folder = saved("GPTNeoXForCausalLM")
    assert main(["new", "--from", str(folder), "-o", str(out)]) == errors.EXIT_BAD_INPUT
    assert "error: no spec is near GPTNeoXForCausalLM: none of its 16 tensor names is known" in capsys.readouterr().err
    assert not out.exists()


def test_an_existing_file_is_left_alone(saved, tmp_path, capsys, monkeypatch):
    folder = saved("LlamaForCausalLM", head_dim=16)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_llama.yaml").write_text("mine\n")
    assert main(["new", "--from", str(folder)]) == errors.EXIT_BAD_INPUT
    assert "error: my_llama.yaml exists already, and a draft never replaces a file" in capsys.readouterr().err
    assert (tmp_path / "my_llama.yaml").read_text() == "mine\n"


def test_the_size_is_the_checkpoints_config(saved, tmp_path):
    out = tmp_path / "mine.yaml"
    folder = saved("LlamaForCausalLM", head_dim=16)
    main(["new", "--from", str(folder), "-o", str(out)])
    size = load_spec(out).sizes["100k"].config
    published = json.loads((folder / "config.json").read_text())
    assert size.items() <= published.items()
    assert KEYS.items() <= size.items()
