"""Streams of local folders, through the code that reads the hub's datasets."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from qtrain.data import streamed_text
from qtrain.data.read_ahead import ReadAhead, StreamError
from qtrain.data.streamed_text import StreamedCorpus, StreamedText
from qtrain.data.tokenizers import ByteTokenizer

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "chases",
    "small",
    "old",
    "quick",
    "river",
    "tree",
    "house",
    "and",
    "then",
]
HELD = 5


def document(k: int, i: int) -> str:
    draw = random.Random(1000 * k + i)
    return f"{k}-{i}: " + " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 30)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four shards of 23 to 26 documents; one of the second shard has the text of a held-out one."""
    root = tmp_path_factory.mktemp("dataset")
    for k in range(4):
        rows = [document(k, i) for i in range(23 + k)]
        if k == 1:
            rows[7] = document(0, 2)
        (root / f"part-{k}.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in rows))
    return root


def plan(folder, **more) -> StreamedText:
    settings = {"tokenizer": "byte", "val_documents": HELD, "shuffle_documents": 10, "ahead_tokens": 500}
    return StreamedText(str(folder), **{**settings, **more})


def trained_documents() -> set[str]:
    every = {document(k, i) for k in range(4) for i in range(23 + k) if (k, i) != (1, 7)}
    return every - {document(0, i) for i in range(HELD)}


def tokens_of(windows, samples) -> list[int]:
    return [t for i in samples for t in windows[i]["input"].tolist()]


def test_an_epoch_has_every_document_but_the_held_out_ones_once(folder):
    windows = plan(folder).open().train_windows(16, 3)
    length = sum(len(t.encode()) + 1 for t in trained_documents())
    ids = np.array(tokens_of(windows, range(2 * length // 16 + 1)))
    for epoch in (0, 1):
        part = ids[epoch * length : (epoch + 1) * length]
        found = [
            bytes(d.tolist()).decode()
            for d in np.split(part, np.flatnonzero(part == 256) + 1)[:-1]
            for d in [d[:-1]]
        ]
        assert sorted(found) == sorted(trained_documents())
    assert not np.array_equal(ids[:length], ids[length : 2 * length])
    windows.close()


def test_targets_follow_inputs_across_samples(folder):
    windows = plan(folder).open().train_windows(16, 3)
    for i in range(5):
        assert torch.equal(windows[i]["target"][:-1], windows[i]["input"][1:])
        assert windows[i]["target"][-1] == windows[i + 1]["input"][0]
    windows.close()


def test_documents_are_shuffled_by_the_seed(folder):
    corpus = plan(folder).open()
    streams = [corpus.train_windows(16, seed) for seed in (3, 3, 4)]
    one, two, other = (tokens_of(s, range(40)) for s in streams)
    assert one == two
    assert one != other
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("epoch_share", [0.05, 0.5, 0.97, 1.0, 1.02, 2.3])
@pytest.mark.parametrize("block", [3, 10, 1000])
def test_a_resumed_stream_goes_on_with_the_same_samples(folder, epoch_share, block):
    """Of another object, as in another process, from a state that went through JSON as plain containers do."""
    length = sum(len(t.encode()) + 1 for t in trained_documents())
    at = int(length * epoch_share / 16)
    whole = plan(folder, shuffle_documents=block).open().train_windows(16, 3)
    for i in range(at):
        whole[i]
        whole.release(i - 3)
    state = json.loads(json.dumps(whole.state_dict(at)))
    expected = tokens_of(whole, range(at, at + 200))
    resumed = plan(folder, shuffle_documents=block).open().train_windows(16, 3)
    resumed.load_state_dict(state, at)
    assert tokens_of(resumed, range(at, at + 200)) == expected
    # and the state of a resumed stream is that of one which never stopped
    for later in (1, 150):
        assert resumed.state_dict(at + later) == whole.state_dict(at + later)
    whole.close()
    resumed.close()


def test_what_was_released_is_gone_and_what_was_not_is_there(folder):
    windows = plan(folder).open().train_windows(16, 3)
    first = [windows[i]["input"] for i in range(300)]
    assert torch.equal(windows[2]["input"], first[2])
    windows.release(250)
    assert torch.equal(windows[250]["input"], first[250])
    with pytest.raises(IndexError, match="sample 2 lies before"):
        windows[2]
    with pytest.raises(IndexError, match="sample 2 lies before"):
        windows.state_dict(2)
    windows.close()


def test_data_that_changed_are_not_gone_on_with(folder, tmp_path):
    windows = plan(folder).open().train_windows(16, 3)
    windows[100]
    state = windows.state_dict(100)
    windows.close()
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text().replace("cat", "cow"))
    changed = plan(tmp_path).open().train_windows(16, 3)
    changed.load_state_dict(state, 100)
    with pytest.raises(StreamError, match="does not go on as it did"):
        changed[100]
    changed.close()


def test_the_identity_holds_settings_and_validation_documents(folder, tmp_path):
    one = plan(folder).open().identity()
    assert one == plan(folder).open().identity()
    assert one["shards"].startswith("stream-")
    for more in ({"shuffle_documents": 11}, {"val_documents": 6}):
        other = plan(folder, **more).open().identity()
        assert other["shards"] != one["shards"]
        with pytest.raises(ValueError, match=f"trained on {one['shards']}"):
            plan(folder, **more).open(one)


def test_validation_is_the_first_documents(folder):
    val = plan(folder).open().validation(16, None)
    text = b"".join(document(0, i).encode() + b"\xff" for i in range(HELD))
    ids = [256 if b == 255 else b for b in text]
    assert val.tokens()[:, :-1].reshape(-1).tolist() == ids[: len(val) * 16]
    assert val.tokens_per_byte == pytest.approx(len(ids) / (len(ids) - HELD))


def test_the_end_stops_or_repeats(folder):
    windows = plan(folder, at_end="stop").open().train_windows(16, 3)
    length = sum(len(t.encode()) + 1 for t in trained_documents())
    whole = (length - 1) // 16
    tokens_of(windows, range(whole))
    state = windows.state_dict(whole)
    with pytest.raises(StreamError, match=f"came to its end after {length} tokens; set data.at_end=repeat"):
        tokens_of(windows, range(whole, whole + 2))
    with pytest.raises(StreamError, match="came to its end"):
        windows[whole + 1]
    assert state["tokens"] <= whole * 16
    windows.close()


class Flaky:
    """A dataset of one shard whose connection fails before each row of ``fails``, once."""

    num_shards = 1

    def __init__(self, fails, forever=False):
        self.fails, self.forever, self.at = set(fails), forever, 0

    def shard(self, num_shards, index):
        child = Flaky((), self.forever)
        child.fails = self.fails
        return child

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def __iter__(self):
        while self.at < 90:
            if self.at in self.fails:
                if not self.forever:
                    self.fails.discard(self.at)
                raise ConnectionError(f"lost at {self.at}")
            self.at += 1
            yield {"text": document(0, self.at)}


def flaky(fails, forever=False):
    held = [{"text": "held"}]
    return StreamedCorpus(plan("hub/name"), Flaky(fails, forever), held).train_windows(16, 3)


def test_a_lost_connection_changes_nothing(monkeypatch):
    monkeypatch.setattr(streamed_text, "_BACKOFF", (0.0, 0.0))
    smooth, rough = flaky([]), flaky([0, 15, 16, 40, 89])
    assert tokens_of(smooth, range(900)) == tokens_of(rough, range(900))
    smooth.close()
    rough.close()


def test_a_connection_that_stays_lost_is_said_and_can_be_gone_on_from(monkeypatch):
    monkeypatch.setattr(streamed_text, "_BACKOFF", (0.0, 0.0))
    windows = flaky([40], forever=True)
    with pytest.raises(StreamError, match=r"3 attempts in a row: lost at 40; .* resume=auto"):
        tokens_of(windows, range(900))
    state = windows.state_dict(3)
    resumed = flaky([])
    resumed.load_state_dict(state, 3)
    smooth = flaky([])
    assert tokens_of(resumed, range(3, 300)) == tokens_of(smooth, range(300))[3 * 16 :]


def test_errors_of_the_program_are_not_tried_again():
    attempts = []

    def chunks(state):
        attempts.append(state)
        raise KeyError("a bug")
        yield

    ahead = ReadAhead(chunks, {}, 10, (0.0, 0.0))
    with pytest.raises(KeyError, match="a bug"):
        next(ahead)
    assert attempts == [{}]


def test_the_thread_reads_no_further_than_it_may_and_ends():
    made = []

    def chunks(state):
        for i in range(10**6):
            made.append(i)
            yield {"i": i}, np.zeros(100, np.int32)

    ahead = ReadAhead(chunks, {}, 1000, ())
    for _ in range(5):
        next(ahead)
    ahead._thread.join(0.5)
    assert 10 <= len(made) <= 17
    ahead.close()
    ahead._thread.join(5)
    assert not ahead._thread.is_alive()
    assert not any(t.name == "read-ahead" and t is ahead._thread for t in threading.enumerate())


class Stateless:
    num_shards = 1

    def shard(self, num_shards, index):
        return self


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: plan(f / "nowhere").open(), "cannot be opened"),
        (lambda f: plan(f, text="body").open(), "no column 'body'; it has text, n: give data.text=COLUMN"),
        (lambda f: plan(f, split="dev").open(), "cannot be opened"),
        (lambda f: StreamedCorpus(plan(f), Stateless(), [{"text": "t"}]), "cannot say where it stands"),
        (lambda f: StreamedCorpus(plan(f), Stateless(), [{"text": ""}]), "holds no documents"),
        (lambda f: plan(f, val_documents=1000).open().train_windows(16, 0)[0], "no documents beside the 97 held out"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_dataset_is_said(folder, make, message):
    with pytest.raises(StreamError, match=message):
        make(folder)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"val_documents": 0}, "val_documents=0"),
        ({"shuffle_documents": 1.5}, "shuffle_documents=1.5"),
        ({"at_end": "loop"}, "at_end='loop': allowed are repeat and stop"),
        ({"tokenizer": "bpe:300"}, "trained while texts are prepared"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_read(more, message):
    with pytest.raises(ValueError, match=message):
        plan("nowhere", **more)


def test_states_of_other_data_are_refused(folder):
    windows = StreamedCorpus(plan(folder), Flaky([]), [{"text": "held"}]).train_windows(16, 3)
    with pytest.raises(ValueError, match="holds no state of a stream"):
        windows.load_state_dict(None, 4)
    with pytest.raises(ValueError, match="stands after sample 1"):
        windows.load_state_dict({"tokens": 100, "digest": ""}, 1)
    assert ByteTokenizer().vocab_size == 257
