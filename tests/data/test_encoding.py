import random

from qtrain.data import encoding
from qtrain.data.encoding import DocumentEncoder, EncodedDocument, in_batches
from qtrain.data.splits import Side, WindowTable, normalise, window_hashes
from qtrain.data.tokenizers import ByteTokenizer


def prose(seed):
    return " ".join("".join(random.Random(seed).choices("abcdefgh", k=300)) for _ in range(2))


def test_batches_keep_order_and_bounds(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 10)
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 3)
    documents = [(Side.TRAIN, "x" * n) for n in (4, 4, 4, 20, 1, 1, 1, 1)]
    batches = list(in_batches(documents))
    assert [[len(t) for _, t in b] for b in batches] == [[4, 4, 4], [20], [1, 1, 1], [1]]
    assert list(in_batches([])) == []
    # What is left out anyway travels to no process
    dropped = [(Side.EXACT_DUPLICATE, "x" * 1000), (Side.VAL, "y")]
    assert list(in_batches(dropped)) == [[(Side.EXACT_DUPLICATE, ""), (Side.VAL, "y")]]


def test_every_document_keeps_its_own_ids():
    near = prose(0)
    table = WindowTable([window_hashes(normalise(near))])
    batch = [
        (Side.TRAIN, "héllo"),
        (Side.EXACT_DUPLICATE, ""),
        (Side.TRAIN, near + " more"),
        (Side.VAL, near),
        (Side.TRAIN, ""),
    ]
    found = DocumentEncoder(ByteTokenizer(), table)(batch)
    assert [d.side for d in found] == [
        Side.TRAIN,
        Side.EXACT_DUPLICATE,
        Side.NEAR_DUPLICATE,
        Side.VAL,
        Side.TRAIN,
    ]
    assert found[1] == EncodedDocument(Side.EXACT_DUPLICATE, None, 0)
    assert found[2] == EncodedDocument(Side.NEAR_DUPLICATE, None, 0)
    assert bytes(found[0].ids.tolist()).decode() == "héllo"
    assert bytes(found[3].ids.tolist()).decode() == near
    assert [d.text_bytes for d in found] == [6, 0, 0, len(near), 0]
    assert len(found[4].ids) == 0
