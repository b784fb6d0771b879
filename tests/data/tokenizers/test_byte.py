import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtrain.data.tokenizers import ByteTokenizer


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode(iter(ids.tolist())) == text


def test_end_of_document_is_its_own_id_and_decodes_to_nothing():
    tokenizer = ByteTokenizer()
    assert tokenizer.eot_token == 256
    assert tokenizer.vocab_size == 257
    assert tokenizer.decode([104, 256, 105]) == "hi"
    assert tokenizer.decode([]) == ""


def test_bytes_that_are_no_utf8_become_replacement_characters():
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    assert ByteTokenizer().decode([0xFF, 0x61]) == "\ufffda"


@pytest.mark.parametrize("bad", [257, -1, 100_000])
def test_decode_refuses_foreign_ids(bad):
    with pytest.raises(ValueError, match=f"{bad}.*vocabulary"):
        ByteTokenizer().decode(np.array([1, bad]))
