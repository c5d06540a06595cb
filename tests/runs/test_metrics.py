"""A record that goes on keeps what a user has put into it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from torchrl_pmoe.runs import MetricsFile, read_metrics
from torchrl_pmoe.runs.metrics import why_unreadable

ROW = {"frames": 300, "return_mean": 3.0, "loss": 0.5}


def go_on(directory: Path, text: str | bytes, row: dict[str, float] = ROW, frames: int = 200) -> list[list[str]]:
    """What stands in ``metrics.csv`` after a resume and one more row."""
    (directory / "metrics.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    metrics = MetricsFile(directory)
    metrics.resume(frames)
    metrics.write(row)
    with (directory / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_columns_that_were_added_stay(tmp_path):
    text = "note,frames,return_mean,loss,mine\nfirst,100,1,2,7\n,200,2,1,text\n"
    assert go_on(tmp_path, text) == [
        ["note", "frames", "return_mean", "loss", "mine"],
        ["first", "100", "1", "2", "7"],
        ["", "200", "2", "1", "text"],
        ["", "300", "3", "0.5", ""],
    ]
    assert [*read_metrics(tmp_path / "metrics.csv")["return_mean"]] == [1, 2, 3]


def test_columns_that_were_taken_out_and_those_that_a_run_gets_on_its_way_are_added(tmp_path):
    assert go_on(tmp_path, "frames,loss\n100,2\n200,1\n") == [
        ["frames", "loss", "return_mean"], ["100", "2", ""], ["200", "1", ""], ["300", "0.5", "3"],
    ]  # fmt: skip


def test_rows_that_are_no_rows_of_ours_stay_in_their_places(tmp_path):
    text = b"frames,return_mean,loss\n100,1,2\n# moved to node 5\n150,n/a,\n160,\xff,1\n200,2,1,4\n250,9,9\n# the end"
    assert go_on(tmp_path, text) == [
        ["frames", "return_mean", "loss"],
        ["100", "1", "2"],
        ["# moved to node 5"],
        ["150", "n/a", ""],
        ["160", "\ufffd", "1"],
        ["200", "2", "1", "4"],
        ["# the end"],
        ["300", "3", "0.5"],
    ]
    assert [*read_metrics(tmp_path / "metrics.csv")["frames"]] == [100, 150, 160, 200, 300]


def test_a_byte_order_mark_is_none_of_a_name(tmp_path):
    found = go_on(tmp_path, "\ufeffframes,return_mean,loss\r\n100,1,2\r\n")
    assert found == [["frames", "return_mean", "loss"], ["100", "1", "2"], ["300", "3", "0.5"]]


@pytest.mark.parametrize("text", ["", "frames,retu", "frames,return_mean,loss\n", "frames,return_mean,loss\n1"])
def test_a_record_without_a_whole_row_begins(text, tmp_path):
    assert go_on(tmp_path, text) == [["frames", "return_mean", "loss"], ["300", "3", "0.5"]]


@pytest.mark.parametrize("torn", ["768,6.", "768,6.5,", "768,6.5,1", "7", "768,6.\r\n", "768,6.5,1\0\0\r\n"])
def test_a_torn_row_is_dropped_when_a_record_goes_on(torn, tmp_path):
    found = go_on(tmp_path, "frames,return_mean,loss\r\n256,1.5,2\r\n512,2.5,3\r\n" + torn, frames=1000)
    assert found[1:] == [["256", "1.5", "2"], ["512", "2.5", "3"], ["300", "3", "0.5"]]


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        (b"frames;return_mean\n100;1,5\n", "frames;return_mean"),
        (b"steps,return_mean\n100,1\n", "steps,return_mean"),
        (b"\n100,1\n", ""),
        ("frames,a\n1,2\n".encode("utf-16"), "\ufffd\ufffdf"),
    ],
    ids=["semicolons", "renamed", "no header", "utf-16"],
)
def test_what_cannot_be_read_as_a_record_is_told(text, begins, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(text)
    why = why_unreadable(tmp_path / "metrics.csv")
    assert why is not None
    assert why.startswith(f"must have a column frames, and commas between its columns; it begins with '{begins}")
    assert "\n" not in why
    (tmp_path / "metrics.csv").write_text("frames,a\n1,2\n3,")
    assert why_unreadable(tmp_path / "metrics.csv") is None
