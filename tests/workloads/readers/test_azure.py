"""Azure's traces: images of the multimodal one, and times that are none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from flexirl.errors import UserError
from flexirl.workloads.readers import azure, read_trace

HEADER = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"


def test_images_are_kept_and_their_tokens_said_to_be_assumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "AzureLMMInferenceTrace_multimodal.csv"
    path.write_text(
        HEADER + "2024-10-15 12:00:00.5,0,300,20\n2024-10-15 12:00:30.5,1,1000,21\n2024-10-15 12:01:00.5,2,1700,22\n"
        "2024-10-15 12:01:30.5,3,100,23\n"
    )
    with caplog.at_level(logging.WARNING):
        rows = read_trace(path).rows
    assert rows["num_images"].tolist() == [0, 1, 2, 3] and rows["prompt_tokens"].tolist() == [300, 1000, 1700, 100]
    each = azure.IMAGE_TOKENS
    assert rows["image_tokens"].tolist() == [0, each, 2 * each, 99]  # at least one token is text
    assert "75.0% of its requests is read as 500" in caplog.text


def test_without_images_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "2024-10-15 12:00:00,0,300,20\n2024-10-15 12:00:30,0,1000,21\n")
    with caplog.at_level(logging.WARNING):
        assert not read_trace(path).rows["image_tokens"].any()
    assert caplog.text == ""


@pytest.mark.parametrize("stamp", ["", "NaT", "yesterday"])
def test_a_row_without_a_time_is_named(tmp_path: Path, stamp: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + f"2024-10-15 12:00:00,0,300,20\n{stamp},0,1000,21\n")
    with pytest.raises(UserError, match=f"line 3 has TIMESTAMP='{stamp}', which is not a date and time"):
        read_trace(path)
