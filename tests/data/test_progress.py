import io
import re

from qtrain.data.progress import LINE_SECONDS, Lines, shown_progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_line_now_and_then_with_the_time_left():
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    for second in range(41):
        clock.now = float(second)
        lines("tokenize", 10 * second, 1000)
    assert LINE_SECONDS == 15
    assert stream.getvalue().splitlines() == [
        "tokenize: 150 documents of 1,000, 85 s left after 15 s",
        "tokenize: 300 documents of 1,000, 70 s left after 30 s",
    ]


def test_each_stage_has_its_own_time_and_short_ones_no_line():
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    lines("split", 1, None)
    clock.now = 14.0
    lines("tokenize", 0, 10)
    clock.now = 28.0
    lines("tokenize", 5, 10)
    assert stream.getvalue() == ""
    lines("split", 5, None)
    clock.now = 50.0
    lines("split", 7, None)
    assert stream.getvalue() == "split: 7 documents after 22 s\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_lines_elsewhere():
    terminal = Terminal()
    with shown_progress(terminal) as progress:
        progress("tokenize", 20, 40)
        progress("tokenize", 40, 40)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "tokenize" in shown
    assert "40/40" in shown
    with shown_progress(io.StringIO()) as progress:
        assert isinstance(progress, Lines)
