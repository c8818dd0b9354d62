"""Progress: how far a run is, and a few plain lines where nobody is looking."""

import io
import sys

import pytest
import torch
from token_models import Recurrent, recurrent_models

import sculpt
from sculpt import bars, progress
from sculpt.progress import Progress, watch


@pytest.fixture
def clock(monkeypatch):
    """The seconds since the start, which the test decides."""
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_ever_less_often_and_the_last_says_how_it_ended(clock, capsys):
    with bars.bar(title="fitting", total=4000) as done:
        for _ in range(4000):
            clock[0] += 1
            done.update()
            done.set_postfix(best="0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fitting: 5 of 4,000, best=0.5, 5 s" and lines[-1] == "fitting: 4,000 of 4,000, best=0.5, 4000 s"
    assert [int(line.partition(":")[2].split()[0].replace(",", "")) for line in lines[:5]] == [5, 15, 35, 75, 155]
    assert len(lines) == 6 + (4000 - 315) // 300 + 1  # doubling up to five minutes, then every five minutes, and the end


def test_what_is_quick_says_nothing_and_what_is_hidden_neither(clock, capsys):
    assert list(bars.bar(range(3), "quick", 3)) == [0, 1, 2]
    for _ in bars.bar(range(30), "hidden", 30, show=False):
        clock[0] += 10
    assert capsys.readouterr().err == ""


def test_a_loop_that_is_left_says_where(clock, capsys):
    for k in bars.bar(range(30), "drawing", 30):
        clock[0] += 10
        if k == 3:
            break
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["drawing: 1 of 30, 10 s", "drawing: 2 of 30, 20 s", "drawing: 3 of 30, 40 s"]


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with bars.bar(title="t", total=3, delay=0) as done:
        done.update()
    assert "\r" in sys.stderr.getvalue() and "1/3" in sys.stderr.getvalue()


def texts(road):
    """Language models of at most 6 tokens, alone and composed on a road."""
    p, q = recurrent_models(2, length=6)
    if road == "alone":
        return p, None
    if road == "tracked":
        return p & q, sculpt.Tracked(particles=50)
    classifier = sculpt.fit([p, q], steps=2, samples=50, batch_size=8, progress=False)
    return p & q, sculpt.Guided(classifier, particles=50 if road == "corrected" else None)


@pytest.mark.parametrize("road", ["alone", "tracked", "guided"])
def test_a_bar_of_language_models_goes_through_their_positions_while_texts_end(monkeypatch, road):
    class Bar(bars.Lines):
        def update(self, k=1):
            super().update(k)
            told.append((self.n, self.total, self._said))

    told: list = []
    monkeypatch.setattr(progress, "bar", lambda title, total, **_: Bar(None, title, total))
    model, how = texts(road)
    seen: list[Progress] = []
    samples = model.sample(20, how, generator=torch.Generator().manual_seed(0), callback=seen.append)
    n = seen[-1].n
    written, totals, notes = zip(*told, strict=True)
    assert set(totals) == {6} and {now.longest for now in seen} == {6} and len(samples) == 20
    # From one step to the next there is a position more, however many have ended.
    assert list(written) == [min(max(0, k - 1), 6) for k in range(len(seen) - 1)] + [written[-1]]
    assert notes[1] == f"0 of {n} have ended" and notes[-1] == f"{n} of {n} have ended" and written[1] == 0
    assert any(0 < now.ended < n for now in seen), "some end before others"


def test_lines_of_language_models_say_the_position_and_how_many_have_ended(clock, capsys):
    model = sculpt.Tokens(Recurrent(0), vocabulary=4, end=3, max_length=30, name="r", prompt=[3])

    def slow(now):
        clock[0] += 3

    model.sample(200, generator=torch.Generator().manual_seed(0), callback=slow)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("sampling r: 0 of 30, 0 of 200 have ended, 6 s") and len(lines) >= 3
    assert "200 of 200 have ended" in lines[-1] and lines[-1].split(" of 30, ")[0] > "sampling r: 0"


@pytest.mark.parametrize(
    ("now", "far"),
    [
        (Progress("x", 3, 8, 0, 5), ((3, 8), "")),  # steps are known
        (Progress("x", 0, None, 4, 9), ((4, 9), "")),  # samples that are kept
        (Progress("x", 4, None, 1, 9), ((3, None), "1 of 9 have ended")),  # actions, nobody knows how many
        (Progress("x", 0, None, 0, 9, longest=5), ((0, 5), "")),
        (Progress("x", 4, None, 1, 9, longest=5), ((3, 5), "1 of 9 have ended")),
        (Progress("x", 7, None, 9, 9, longest=5), ((5, 5), "9 of 9 have ended")),  # the last step writes the end alone
    ],
)
def test_how_far_a_run_is(now, far):
    assert (now.far, now.note) == far


def test_a_run_that_ends_by_itself_counts_its_steps_without_a_total(clock, capsys):
    def way():
        for step in range(6):
            clock[0] += 4
            yield Progress("w", step, None, 0, 9)
        yield Progress("w", 6, None, 9, 9, samples=sculpt.Samples(torch.zeros(9)))

    watch(way())
    assert capsys.readouterr().err.splitlines() == [
        "w: 1, 0 of 9 have ended, 8 s",
        "w: 4, 0 of 9 have ended, 20 s",
        "w: 5, 9 of 9 have ended, 20 s",
    ]
