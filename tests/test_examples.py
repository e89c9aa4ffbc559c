"""The examples run as they stand."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.usefixtures("one_thread")
def test_a_context_is_streamed_and_continued(capsys):
    main = runpy.run_path(str(EXAMPLES / "stream_context.py"))["main"]
    main(["--tokens", "130", "--rate", "2000", "--spec", "K4V4"])
    shown = capsys.readouterr().out
    assert "level medium: " in shown and "129 tokens in" in shown and shown.count("chunk ") == 3
