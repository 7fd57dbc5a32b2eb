"""Numbers are written with three digits and the right unit, at the edges between units too."""

import re

import pytest

import shardlm as sl
from shardlm.inspect import render


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (998, "998 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),  # would round to 1000 kB
        (999_999_999, "1 GB"),
        (80e9, "80 GB"),
        (1.5e18, "1.5 EB"),
        (4.2e21, "4,200 EB"),
        (None, "-"),
    ],
)
def test_size(count, text):
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.5e-9, "2.5 ns"),
        (9.996e-7, "1 us"),  # would round to 1000 ns
        (0.0123, "12.3 ms"),
        (0.9996, "1 s"),
        (59.94, "59.9 s"),
        (12345.6, "12,346 s"),
        (None, "-"),
    ],
)
def test_seconds(value, text):
    assert render.seconds(value) == text


def test_a_report_is_one_line_in_a_terminal_and_tables_in_print():
    report = sl.Trainer(sl.presets.tiny(), sl.Layout(), devices=1).explain(2, 16)
    peak = render.size(report.peak)
    assert repr(report) == f"<Report on data=1: 1 devices, peak {peak} on each; print it for its tables>"
    assert "memory on one device" in str(report)
    both = sl.inspect.compare({"a": report, "b": report})
    assert repr(both) == "<Comparison of a, b; print it for its table>"
    assert "side by side" in str(both)


def test_advice_on_terabytes_and_petaflops_is_written_like_everything_else():
    layout = sl.Layout(fsdp=64, tensor=8)
    report = sl.Trainer(sl.presets.llama3_70b(), layout, devices=512).explain(512, 8192, hardware="h100")
    assert report.peak > 1e12
    [line] = report.advice
    assert re.search(r" would bring it to [\d.]+ GB, for 1\.\d\d PFLOP recomputed on each device: ", line)
