"""Caption files as people have them."""

import numpy as np
import pytest
from caption_files import FORMATS, as_csv, as_json_lines, as_list_of_single_captions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import InputError
from utils.data.annotations import NOTHING, caption_file, read_annotations

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


LISTS = {  # as `str` of a list, `json.dumps` and `str` of an array write them into a cell
    "Python": """['a "red" dog', "the dog's, wet", '一只狗\\n在跑']""",
    "JSON": r"""["a \"red\" dog", "the dog's, wet", "一只狗\n在跑"]""",
    "numpy": """['a "red" dog' "the dog's, wet"\n '一只狗\\n在跑']""",
}


@pytest.mark.parametrize("cell", LISTS.values(), ids=LISTS)
def test_a_list_cell_is_its_captions(tmp_path, cell):
    file = tmp_path / "en_train.csv"
    file.write_text(as_csv([("1.jpg", [cell]), ("2.jpg", ["[a dog]", "['a', b]"])]), "utf-8")
    assert read_annotations(file) == [
        ("1.jpg", ['a "red" dog', "the dog's, wet", "一只狗\n在跑"]),
        ("2.jpg", ["[a dog]", "['a', b]"]),
    ]


def test_a_list_cell_is_what_pandas_writes(tmp_path):
    pandas = pytest.importorskip("pandas")
    captions = [['it\'s "a" dog', "a dog"], ["[two] boats", "zwei Böte"]]
    for cells in (captions, [np.array(texts, object) for texts in captions]):
        table = pandas.DataFrame({"filename": ["1.jpg", "2.jpg"], "captions": cells})
        table.to_csv(tmp_path / "en_train.csv", index=False)
        read = read_annotations(tmp_path / "en_train.csv")
        assert read == list(zip(["1.jpg", "2.jpg"], captions, strict=True))


def test_empty_cells_are_no_captions_and_images_without_others_are_counted(tmp_path, capsys):
    """In the spellings of pandas' missing value, in tables and in JSON."""
    (tmp_path / "en_train.csv").write_text(
        "image,caption\n1.jpg,a\n1.jpg,nan\n1.jpg,\n2.jpg,NaN\n3.jpg,<NA>\n3.jpg,nano\n"
    )
    assert read_annotations(tmp_path / "en_train.csv") == [("1.jpg", ["a"]), ("3.jpg", ["nano"])]
    assert "1 images are left out, whose captions are empty" in capsys.readouterr().out
    (tmp_path / "en_val.json").write_text(
        '[{"image": "1.jpg", "caption": ["a", null, ""]}, {"image": "2.jpg", "caption": NaN}]'
    )
    assert read_annotations(tmp_path / "en_val.json") == [("1.jpg", ["a"])]
    assert "1 images are left out, whose captions are empty" in capsys.readouterr().out
    (tmp_path / "en_test.csv").write_text("image,caption\n1.jpg,\n")
    with pytest.raises(InputError, match="all its captions are empty"):
        read_annotations(tmp_path / "en_test.csv")


def test_the_name_of_a_file_says_its_split(tmp_path, capsys):
    (tmp_path / "en_val.csv").write_text("image,caption,split\n1.jpg,a,dev\n2.jpg,b,test\n")
    assert read_annotations(tmp_path / "en_val.csv") == [("1.jpg", ["a"]), ("2.jpg", ["b"])]
    assert "entries whose split is test count as val" in capsys.readouterr().out


def test_a_key_that_is_repeated_in_an_object_has_the_captions_of_both(tmp_path):
    (tmp_path / "en_train.json").write_text('{"1.jpg": "a", "2.jpg": ["b"], "1.jpg": ["c", "d"]}')
    pairs = [("1.jpg", ["a", "c", "d"]), ("2.jpg", ["b"])]
    assert read_annotations(tmp_path / "en_train.json") == pairs


def test_columns_with_bars_and_spaces_in_the_header(tmp_path):
    """As the results.csv of Flickr30k."""
    file = tmp_path / "en_train.csv"
    file.write_text(
        "image_name| comment_number| comment\n1.jpg| 0| Two men , one old .\n1.jpg| 1| A man .\n"
    )
    assert read_annotations(file) == [("1.jpg", ["Two men , one old .", "A man ."])]


UNUSABLE = {
    "no header": ("csv", "1.jpg,a dog\n", "first line should name the columns.*'1.jpg,a dog'"),
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
    "no caption": ("csv", "image,caption\n1.jpg,\n", "all its captions are empty"),
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
    "outside": ("csv", "image,caption\n../1.jpg,a\n", r"line 2 \('../1.jpg'\): .image. leaves"),
    "only a header": ("csv", "image,caption\n", "all its captions are empty"),
    "a JSON line cut short": (
        "json",
        '{"image": "1.jpg", "caption": "a"}\n\n{"image": "2.jpg"\n[]\n',
        "2 of 3 entries.*\n  line 3: broken JSON at column 18.*\n  line 4: is list",
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
# Those of `NOTHING` are none.
texts = text.map(str.strip).filter(lambda caption: caption.lower() not in NOTHING)
captions = st.lists(texts, min_size=1, max_size=3, unique=True)
names = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=9)
images = st.builds("{}/{}.jpg".format, names, names)
pairs = st.lists(st.tuples(images, captions), min_size=1, max_size=4, unique_by=lambda p: p[0])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", FORMATS)
@given(pairs=pairs)
def test_any_captions_survive_every_format(tmp_path, name, pairs):
    write, suffix = FORMATS[name]
    file = tmp_path / f"en_train.{suffix}"
    file.write_bytes(write(pairs).encode())
    assert read_annotations(file) == pairs


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
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
