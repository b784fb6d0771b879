import random

import numpy as np
import pytest

from qtrain.data.sources import Document
from qtrain.data.splits import (
    SAMPLE_MODULUS,
    WINDOW_BYTES,
    Side,
    assign_sides,
    labelled,
    normalise,
    window_hashes,
)


class ListSource:
    name = "list"
    skipped = ()

    def __init__(self, texts):
        self.texts = list(texts)

    def documents(self):
        for i, text in enumerate(self.texts):
            yield Document(str(i), text)

    def fingerprint(self):
        return str(hash(tuple(self.texts)))


def prose(seed, words=300):
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(words))


def sides_by_text(texts, **kwargs):
    source = ListSource(texts)
    assignment = assign_sides(source, **kwargs)
    sides = {text: assignment.table.settled(side, text) for side, text in labelled(source, assignment)}
    assert len(sides) == len(set(texts))
    return sides, assignment


def a_validation_text(val_fraction=0.2, **kwargs):
    """A text that its own content puts on the validation side, and company for the training side."""
    texts = [prose(i, **kwargs) for i in range(60)]
    sides, _ = sides_by_text(texts, val_fraction=val_fraction)
    validation = [t for t in texts if sides[t] is Side.VAL]
    return validation[0], texts


def test_window_hashes_match_a_direct_count():
    data = normalise(prose(0, words=80))
    direct = {}
    for i in range(len(data) - WINDOW_BYTES + 1):
        window = data[i : i + WINDOW_BYTES]
        alone = window_hashes(window)  # one window: its own hash, or nothing when it is not sampled
        if len(alone):
            direct[window] = int(alone[0])
    assert sorted(direct.values()) == window_hashes(data).tolist()
    share = len(direct) / (len(data) - WINDOW_BYTES + 1)
    # binomial with p = 1/SAMPLE_MODULUS; five standard deviations
    assert abs(share - 1 / SAMPLE_MODULUS) < 5 * (0.25 * 0.75 / len(data)) ** 0.5
    assert len(window_hashes(data[: WINDOW_BYTES - 1])) == 0
    assert len(window_hashes(b"")) == 0


def test_window_hashes_across_internal_blocks(monkeypatch):
    data = normalise(prose(1, words=200))
    whole = window_hashes(data)
    monkeypatch.setattr("qtrain.data.splits._BLOCK", 100)
    assert np.array_equal(window_hashes(data), whole)


def test_exact_duplicates_are_dropped_up_to_whitespace():
    texts = [prose(i) for i in range(40)]
    copy = texts[0].replace(" ", " \n\t ")
    sides, assignment = sides_by_text([*texts, copy])
    assert sides[copy] is Side.EXACT_DUPLICATE
    assert sides[texts[0]] is not Side.EXACT_DUPLICATE
    assert assignment.sides.tolist().count(Side.EXACT_DUPLICATE) == 1


def test_empty_documents_are_dropped():
    sides, _ = sides_by_text([*(prose(i) for i in range(60)), "", " \n"])
    assert sides[""] is sides[" \n"] is Side.EXACT_DUPLICATE


def edited(text, every):
    words = text.split()
    return " ".join("CHANGED" if i % every == 0 else w for i, w in enumerate(words))


def to_training_side(make, val_fraction):
    """The first variant of ``make(k)`` that its content alone would put on the training side."""
    company = [prose(10_000 + i) for i in range(200)]
    for k in range(100):
        variant = make(k)
        sides, _ = sides_by_text([*company, variant], val_fraction=val_fraction)
        if sides[variant] is Side.TRAIN:
            return variant
    raise AssertionError("no variant falls on the training side")


@pytest.mark.parametrize(
    "make",
    [
        lambda text: lambda k: text + f" one more sentence {k}",
        lambda text: lambda k: f"{k} " + text.replace(" ", "  "),
        lambda text: lambda k: edited(text, every=100) + f" {k}",
        lambda text: lambda k: prose(5000 + k, words=900) + " " + text + " " + prose(7000 + k, words=900),
        lambda text: lambda k: text[k : k + 900],
    ],
    ids=["appended", "reflowed", "edited", "quoted whole", "excerpt"],
)
def test_near_duplicates_of_validation_documents_leave_the_training_side(make):
    text, texts = a_validation_text()
    near = to_training_side(make(text), 0.2)
    sides, _ = sides_by_text([*texts, near], val_fraction=0.2)
    assert sides[near] is Side.NEAR_DUPLICATE
    assert sides[text] is Side.VAL


def test_merely_related_documents_stay():
    text, texts = a_validation_text()
    quarter = text[: len(text) // 4]
    related = to_training_side(lambda k: quarter + " " + prose(3000 + k), 0.2)
    sides, _ = sides_by_text([*texts, related], val_fraction=0.2)
    assert sides[related] is Side.TRAIN


def test_near_duplicates_on_one_side_both_stay():
    texts = [prose(i) for i in range(60)]
    sides, _ = sides_by_text(texts, val_fraction=0.2)
    train = next(t for t in texts if sides[t] is Side.TRAIN)
    twin = to_training_side(lambda k: train + f" {k}", 0.2)
    sides, _ = sides_by_text([*texts, twin], val_fraction=0.2)
    assert sides[twin] is sides[train] is Side.TRAIN


def test_adding_documents_moves_none_to_the_other_side():
    texts = [prose(i) for i in range(300)]
    before, _ = sides_by_text(texts[:100], val_fraction=0.2)
    after, _ = sides_by_text(texts[::-1], val_fraction=0.2)
    assert all(after[text] is side for text, side in before.items())


def test_fraction_of_documents():
    texts = [prose(i, words=12) for i in range(4000)]
    _, assignment = sides_by_text(texts, val_fraction=0.1)
    # binomial, 4000 draws: five standard deviations are 95
    assert abs(assignment.sides.tolist().count(Side.VAL) - 400) < 95


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5])
def test_fraction_outside_is_refused(fraction):
    with pytest.raises(ValueError, match=r"val_fraction .* between 0 and 1"):
        assign_sides(ListSource([prose(0)]), fraction)


def test_an_empty_side_is_an_error():
    with pytest.raises(ValueError, match=r"the (train|val) split .* is empty.*separator"):
        assign_sides(ListSource([prose(0)]), 0.5)


def test_report_counts_documents():
    calls = []
    assign_sides(ListSource([prose(i) for i in range(30)]), 0.3, calls.append)
    assert calls == [*range(1, 31)]


def test_a_source_that_changes_in_between_is_an_error():
    source = ListSource([prose(i) for i in range(30)])
    assignment = assign_sides(source, 0.3)
    assert len(list(labelled(source, assignment))) == 30
    for change in (source.texts[:-1], [*source.texts, "more"]):
        with pytest.raises(RuntimeError, match="changed while"):
            list(labelled(ListSource(change), assignment))
