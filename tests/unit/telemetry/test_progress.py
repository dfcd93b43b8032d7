"""What a user sees, with the clock and the console in the test's hand."""

import io
from dataclasses import replace

from rich.console import Console

from longtrain.telemetry.events import CheckpointDone, Event, Started, StepDone, Warned
from longtrain.telemetry.progress import Progress

STARTED = Started(0, 40, 2048, 2, 2, 1234567, None, 3.2, "runs/tiny", "chunked")


class Screen:
    """A console of a given kind, and a clock that the test moves."""

    def __init__(self, terminal: bool, width: int = 80) -> None:
        self.now = 1000.0
        self.output = io.StringIO()
        console = Console(file=self.output, force_terminal=terminal, width=width, color_system=None)
        self.progress = Progress(console, clock=lambda: self.now, every_seconds=10)

    def show(self, *events: Event) -> list[str]:
        """Lines that appear."""
        before = len(self.output.getvalue())
        for event in events:
            self.progress.event(event)
        return self.output.getvalue()[before:].splitlines()

    def close(self) -> list[str]:
        before = len(self.output.getvalue())
        self.progress.close()
        return self.output.getvalue()[before:].splitlines()


def step(number: int, loss: float = 2.5) -> StepDone:
    return StepDone(number, number * 4096, loss, {}, 1.0, 1e-3, 1.0, 4096.4, 1000, 0.0, None)


def test_header() -> None:
    screen = Screen(terminal=False)
    assert screen.show(STARTED) == [
        "longtrain: 1,234,567 parameters, context 2k, 2 ranks, sequence parallel over 2, chunked mixers, "
        "run directory runs/tiny",
        "from the start: step 0 of 40 is done",
    ]
    resumed = Started(20, 40, 2048, 1, 1, 5, "runs/tiny/checkpoints/step-00000020", 3.2, "runs/tiny", "triton")
    header = Screen(terminal=False).show(resumed)
    assert "1 rank, sequence parallel over 1" in header[0]
    assert header[1] == "resumed from runs/tiny/checkpoints/step-00000020: step 20 of 40 is done"
    tuned = Screen(terminal=False).show(replace(STARTED, initial_weights="runs/text/checkpoints/step-00000020"))
    assert tuned[1] == "with the weights of runs/text/checkpoints/step-00000020: step 0 of 40 is done"
    again = Screen(terminal=False).show(replace(resumed, initial_weights="runs/other"))
    assert again[1] == (
        "resumed from runs/tiny/checkpoints/step-00000020 (initial_weights=runs/other is for a new run.name, and not "
        "read here): step 20 of 40 is done"
    )


def test_plain_lines_come_first_last_and_every_few_seconds() -> None:
    screen = Screen(terminal=False)
    screen.show(STARTED)
    shown = {}
    for number in range(1, 41):
        screen.now += 1
        shown[number] = screen.show(step(number))
    assert [number for number, lines in shown.items() if lines] == [1, 11, 21, 31, 40]
    assert shown[1] == ["step 1/40 · loss 2.5000 · 4,096 tokens/s · context 2k · ETA ? · not saved yet"]
    assert shown[11] == ["step 11/40 · loss 2.5000 · 4,096 tokens/s · context 2k · ETA 0:00:29 · not saved yet"]


def test_checkpoints_and_warnings_in_a_log_are_whole_lines() -> None:
    screen = Screen(terminal=False, width=40)
    screen.show(STARTED, step(1))
    path = "runs/tiny/checkpoints/step-00000002"
    assert screen.show(CheckpointDone(2, path, 0.25)) == [f"checkpoint of step 2 saved in 0.2 s: {path}"]
    message = "checkpoint [bold]x[/] is corrupt and was passed over: " + "y" * 60
    assert screen.show(Warned(message)) == [f"warning: {message}"]
    screen.now += 75
    assert screen.show(step(3))[0].endswith("saved 0:01:15 ago")


def test_summary_compares_with_the_unigram_entropy() -> None:
    screen = Screen(terminal=False)
    screen.show(STARTED, step(1, loss=5.545177444479562), step(2, loss=100.0))
    screen.show(*(step(n, loss=2.772588722239781 + (-1) ** n) for n in range(21, 41)))
    screen.now += 100
    assert screen.close() == [
        "step 40 of 40: done",
        "loss: 5.5452 nats/token (8.000 bits/token) at step 1, "
        "2.7726 nats/token (4.000 bits/token) over the last 20 steps",
        "unigram entropy of the data: 3.2000 nats/token (4.617 bits/token)",
        "163,840 tokens since the start of training; this command took 0:01:40",
    ]
    assert screen.close() == []


def test_summary_of_a_run_that_was_finished_before() -> None:
    screen = Screen(terminal=False)
    screen.show(replace(STARTED, step=40, resumed_from="runs/tiny/checkpoints/step-00000040"))
    assert screen.close() == ["nothing is left to do; the losses are in runs/tiny/metrics.jsonl"]


def test_summary_of_a_run_that_was_stopped() -> None:
    screen = Screen(terminal=False)
    assert screen.close() == []
    screen.show(STARTED, step(1), CheckpointDone(1, "p", 0.1))
    lines = screen.close()
    assert lines[0] == "step 1 of 40: stopped; the same command goes on"
    assert lines[-1] == "last checkpoint: step 1 in runs/tiny"


def test_summary_of_a_run_that_lost_steps() -> None:
    screen = Screen(terminal=False)
    screen.show(STARTED, step(1), step(2), step(3), STARTED, step(1), step(2))
    lines = screen.close()
    assert lines[0] == "step 2 of 40: stopped; nothing is saved, and the same command starts from the beginning"
    assert "over the last 2 steps" in lines[1]
    screen = Screen(terminal=False)
    screen.show(STARTED, step(1), CheckpointDone(1, "p", 0.1), step(2))
    assert screen.close()[0] == "step 2 of 40: stopped; the same command goes on from step 1"


def test_a_terminal_has_one_live_line_that_fits() -> None:
    for width in (60, 80, 160):
        screen = Screen(terminal=True, width=width)
        with screen.progress:
            screen.show(STARTED, CheckpointDone(1, "p", 0.1))
            screen.now += 5
            lines = screen.show(step(2), step(3))
            assert "step 3/40 · loss 2.5000 · 4,096 tokens/s" in lines[-1]
            assert all(len(line.split("\x1b[2K")[-1]) <= width for line in lines)
            assert ("━" in lines[-1]) == (width == 160), "a bar where there is room for one"
            assert width < 160 or "saved 0:00:05 ago" in lines[-1]
            warned = screen.show(Warned("look"))
            assert any("warning: look" in line for line in warned) and "step 3/40" in warned[-1]
        assert "step 3 of 40: stopped" in screen.output.getvalue()


def test_a_restart_measures_its_own_pace() -> None:
    screen = Screen(terminal=False)
    screen.show(STARTED, step(1), step(2))
    screen.now += 500
    screen.show(Started(2, 40, 2048, 2, 2, 1234567, "p", 3.2, "runs/tiny", "chunked"), step(3))
    screen.now += 20
    line = screen.show(step(13))[0]
    assert "ETA 0:00:54" in line and line.endswith("saved at step 2")
