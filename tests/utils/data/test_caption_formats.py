"""Caption files as people have them."""

import pytest
from caption_files import FORMATS, as_csv, as_json_lines, as_list_of_single_captions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import InputError
from utils.data.annotations import caption_file, read_annotations

PAIRS = [
    ("images/1.jpg", ["a dog, wet", 'a sign: "stop"', "a dog, wet"]),
    ("images/sub folder/图 2.jpg", ["一只狗，在跑", "two\nlines; a | b\tc"]),
    ("images/3.jpg", ["one"]),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(tmp_path, name, encoding):
    write, suffix = FORMATS[name]
    file = tmp_path / f"en_train.{suffix}"
    file.write_bytes(write(PAIRS).encode(encoding))
    assert read_annotations(file) == PAIRS


@pytest.mark.parametrize("write", [as_csv, as_json_lines, as_list_of_single_captions])
def test_rows_of_one_image_are_put_together(tmp_path, write):
    """Also where it is spelled in several ways. A caption counts as often as it stands there, as in
    a list: Flickr8k's Chinese captions hold some twice, on which published scores are measured."""
    file = tmp_path / "en_train.csv"
    rows = [("images/1.jpg", ["a", "b"]), ("2.jpg", ["c"]), ("images\\1.jpg", ["b", "d", "a"])]
    file.write_text(write(rows), encoding="utf-8", newline="")
    pairs = [(image, sorted(captions)) for image, captions in read_annotations(file)]
    assert pairs == [("images/1.jpg", ["a", "a", "b", "b", "d"]), ("2.jpg", ["c"])]


def test_columns_with_bars_and_spaces_in_the_header(tmp_path):
    """As the results.csv of Flickr30k."""
    file = tmp_path / "en_train.csv"
    file.write_text(
        "image_name| comment_number| comment\n1.jpg| 0| Two men , one old .\n1.jpg| 1| A man .\n"
    )
    assert read_annotations(file) == [("1.jpg", ["Two men , one old .", "A man ."])]


UNUSABLE = {
    "no header": ("csv", "1.jpg,a dog\n", "first line should name the columns.*'1.jpg,a dog'"),
    "a token file": ("tsv", "1.jpg#0\ta dog\n", "Flickr8k.token.txt.*prepare.py --source"),
    "a comma without quotes": (
        "csv",
        'image,caption\n1.jpg,"two\nlines"\n2.jpg,red, blue\n',
        "1 of 2 entries.*\n  line 4: has 3 fields, where the first line has 2; .*quotes",
    ),
    "an open quote": (
        "csv",
        'image,caption\n1.jpg,a\n2.jpg,"b\n3.jpg,c\n',
        "broken table from line 3 on",
    ),
    "a quote in quotes": ("csv", 'image,caption\n1.jpg,"a "b" c"\n', "from line 2 on.*twice"),
    "no caption": ("csv", "image,caption\n1.jpg,\n", r'line 2 \("1.jpg"\): "caption" holds an'),
    "no image": ("tsv", "image\tcaption\n\ta\n", 'line 2 .*"image" should be the path'),
    "other names": (
        "json",
        '[{"img": "1.jpg", "caption": "a"}, {}]',
        '  entry 0: "image" is missing .it has img.\n  entry 1: "image" is missing; "caption" ',
    ),
    "an absolute path": ("tsv", "image\tcaption\nC:\\1.jpg\ta\n", '"image" is an absolute path'),
    "one backslash": (
        "json",
        r'[{"image": "图\1.jpg", "caption": "a"}]',
        r"column 14: Invalid \\escape; write / in paths, or \\\\ for \\$",
    ),
    "full-width quotes": (
        "json",
        '[{“image”: "1.jpg", "caption": "a"}]',
        "column 3: .*; “ is full-width: JSON takes",
    ),
    "outside": ("csv", "image,caption\n../1.jpg,a\n", r'line 2 \("../1.jpg"\): "image" leaves'),
    "only a header": ("csv", "image,caption\n", "no captions below the first line"),
    "a JSON line cut short": (
        "json",
        '{"image": "1.jpg", "caption": "a"}\n\n{"image": "2.jpg"\n[]\n',
        "2 of 3 entries.*\n  line 3: broken JSON at column 18.*\n  line 4: is list",
    ),
    "Karpathy's": ("json", '{"images": [{"filename": "1.jpg"}]}', "Karpathy.*prepare.py --source"),
    "COCO without captions": (
        "json",
        '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1}]}',
        "no annotation has a caption.*captions_",
    ),
    "COCO of other images": (
        "json",
        '{"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}, '
        '{"image_id": 1, "caption": "a"}, {"image_id": [], "caption": "a"}, 3]}',
        '4 of 4 .*\n  annotation 0: "image_id" is that of none.*\n  annotation 1: "image" should',
    ),
    "a workbook": ("csv", b"PK\x03\x04\xff\xfe", "Excel.*CSV UTF-8"),
    "the encoding of a Chinese Excel": ("csv", "image,caption\n1.jpg,狗".encode("gbk"), "UTF-8"),
    "UTF-16": (
        "csv",
        "image,caption\n1.jpg,a\n".encode("utf-16-le"),
        "NUL bytes; save it as UTF-8",
    ),
}


@pytest.mark.parametrize("suffix, content, message", UNUSABLE.values(), ids=UNUSABLE)
def test_what_cannot_be_read_is_named(tmp_path, suffix, content, message):
    file = tmp_path / f"en_train.{suffix}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_annotations(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_the_file_of_a_split_may_have_any_of_the_suffixes_but_only_one(tmp_path):
    assert caption_file(tmp_path, "en", "val") == tmp_path / "en_val.json"
    (tmp_path / "en_val.tsv").touch()
    (tmp_path / "en_train.csv").touch()
    assert caption_file(tmp_path, "en", "val") == tmp_path / "en_val.tsv"
    (tmp_path / "en_val.json").touch()
    with pytest.raises(InputError, match=r"en_val\.json, en_val\.tsv .* keep one"):
        caption_file(tmp_path, "en", "val")


# What a table keeps: spaces around a field do not count, and the csv module reads any line end as
# \n within a file that Python opens as text.
text = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1)
captions = st.lists(text.map(str.strip).filter(bool), min_size=1, max_size=3)
names = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=9)
images = st.builds("{}/{}.jpg".format, names, names)
pairs = st.lists(st.tuples(images, captions), min_size=1, max_size=4, unique_by=lambda p: p[0])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@pytest.mark.parametrize("name", FORMATS)
@given(pairs=pairs)
def test_any_captions_survive_every_format(tmp_path, name, pairs):
    write, suffix = FORMATS[name]
    file = tmp_path / f"en_train.{suffix}"
    file.write_bytes(write(pairs).encode())
    assert read_annotations(file) == pairs


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.text(alphabet='{}[]:,;|\t"\r\n image,caption', max_size=60), data=st.data())
def test_any_table_is_taken_or_refused(tmp_path, content, data):
    suffix = data.draw(st.sampled_from([".json", ".jsonl", ".csv", ".tsv"]))
    file = tmp_path / f"en_train{suffix}"
    header = data.draw(st.sampled_from(["", "image,caption\n", "image\tcaption\n"]))
    file.write_bytes(f"{header}{content}".encode())
    try:
        read = read_annotations(file)
    except InputError as error:
        assert str(error).startswith(str(file))
        return
    assert read and len({image for image, _ in read}) == len(read)
    assert all(captions and all(c.strip() for c in captions) for _, captions in read)
