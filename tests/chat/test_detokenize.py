from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpk_spec.chat.detokenize import Detokenizer, ThinkSplitter


class Bytes:
    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def bpe():
    """A real byte-level BPE tokenizer, trained so that some characters are one token, some several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the cat and the dog ate 中文 and 🎉🎉 été"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_no_half_character_is_ever_shown():
    detokenizer = Detokenizer(Bytes())
    shown = [detokenizer.push(byte) for byte in "a🎉é".encode()]
    assert shown == ["a", "", "", "", "🎉", "", "é"]
    assert detokenizer.flush() == ""


def test_bytes_that_are_no_character_appear_at_the_end():
    detokenizer = Detokenizer(Bytes())
    assert [detokenizer.push(byte) for byte in b"a\xf0\x9f"] == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_bytes_that_are_no_character_appear_once_text_follows():
    detokenizer = Detokenizer(Bytes())
    assert [detokenizer.push(byte) for byte in b"\xf0b"] == ["", "\ufffdb"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("the 中文🎉é\n "), max_size=40))
def test_pieces_of_a_real_tokenizer_add_up_to_its_decoding(bpe, text):
    ids = bpe(text)["input_ids"]
    detokenizer = Detokenizer(bpe)
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.flush()]
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=30))
def test_pieces_of_arbitrary_bytes_add_up(data):
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.push(byte) for byte in data] + [detokenizer.flush()]
    assert "".join(pieces) == data.decode(errors="replace")


def test_the_space_of_a_word_piece_decoder_is_kept():
    class Words:  # as sentencepiece: a leading space is dropped at the start of a decoding only
        def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
            return "".join(ids).replace("▁", " ").removeprefix(" ")

    detokenizer = Detokenizer(Words())
    assert [detokenizer.push(word) for word in ["▁one", "▁two", "three"]] == ["one", " two", "three"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thought_and_answer_are_told_apart_however_the_text_is_cut(size):
    text = "<think>why <b>?</think>because </thin> <thin"
    splitter = ThinkSplitter()
    found = [piece for i in range(0, len(text), size) for piece in splitter.push(text[i : i + size])] + splitter.flush()
    assert "".join(piece for piece, thought in found if thought) == "why <b>?"
    assert "".join(piece for piece, thought in found if not thought) == "because </thin> <thin"


def test_a_prompt_may_have_opened_the_thought():
    splitter = ThinkSplitter(thinking=True)
    assert splitter.push("hm</think>so") == [("hm", True), ("so", False)]
