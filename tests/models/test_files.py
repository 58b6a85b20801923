"""Files that users name are read as their formats have it."""

import pytest

from models.files import read_lines


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_ends_of_text_files_end_a_line(tmp_path, end):
    """Those of Unix, Windows and the old Mac; U+2028 comes from web pages, U+000B from Word."""
    lines = [f"a{separator}dog" for separator in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"]
    file = tmp_path / "captions.txt"
    file.write_bytes(f"{end.join(lines)}{end}{end} last ".encode())
    assert read_lines(file, "caption") == [*lines, "last"]
