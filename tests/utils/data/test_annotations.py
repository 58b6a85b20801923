"""Reading caption files: what is taken, and what is said about the rest."""

import json
import tracemalloc
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from script_runs import ROOT

from models.errors import InputError
from utils.data.annotations import (
    missing_annotations,
    read_annotations,
)

SHARED = ROOT.parent / "shared" / "flickr8k"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "en_train.json"


def write(file: Path, entries: object, encoding: str = "utf-8") -> Path:
    file.write_text(json.dumps(entries, ensure_ascii=False), encoding=encoding)
    return file


def refusal(file: Path) -> str:
    """The message about a file that cannot be used; it names the file first."""
    with pytest.raises(InputError) as caught:
        read_annotations(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    return message


@pytest.mark.parametrize(
    "image", ["images/a b.jpg", "images\\a b.jpg", ".\\images\\a b.jpg", " images//a b.jpg "]
)
def test_every_spelling_of_a_path_is_one_path(file, image):
    assert read_annotations(write(file, [{"image": image, "caption": ["x"]}])) == [
        ("images/a b.jpg", ["x"])
    ]


def test_order_captions_and_other_fields(file):
    entries = [
        {"image": "images\\b.jpg", "caption": ["一只狗", "a dog "], "id": 7},
        {"image": "a.jpg", "caption": "one string"},
    ]
    expected = [("images/b.jpg", ["一只狗", "a dog "]), ("a.jpg", ["one string"])]
    assert read_annotations(write(file, entries)) == expected
    assert read_annotations(write(file, entries, encoding="utf-8-sig")) == expected


def test_other_fields_are_not_copied_in_memory(file):
    """A file of 4 MB, nearly all of it in another field, which the parsed records hold once."""
    entries = [
        {"image": f"{n}.jpg", "caption": "x", "more": f"{n % 10}" * 10**5} for n in range(40)
    ]
    write(file, entries)
    size = file.stat().st_size
    tracemalloc.start()
    pairs = read_annotations(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) == 40
    assert peak < 2.5 * size  # the text, and the records


@pytest.mark.parametrize("language", ["en", "cn"])
@pytest.mark.parametrize(("split", "count"), [("train", 6000), ("val", 1000)])
def test_flickr8k(language, split, count):
    if not SHARED.exists():
        pytest.skip("needs Flickr8k")
    pairs = read_annotations(SHARED / f"{language}_{split}.json")
    assert len(pairs) == count
    assert all(len(captions) == 5 for _, captions in pairs)
    assert {str(PurePosixPath(image).parent) for image, _ in pairs} == {"images"}
    assert (SHARED / pairs[0][0]).is_file()


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('[\n {"image": "a.jpg",\n  "caption": nothing}]', "at line 3, column 14:"),
        ('[{"image": "a.jpg" "caption": "x"}]', "at line 1, column 20:"),
        ("[" * 200_000, ""),
        ("[" + "1" * 5000 + "]", "digits"),
    ],
)
def test_broken_json_is_located(file, content, where):
    file.write_text(content, encoding="utf-8")
    message = refusal(file)
    assert "broken JSON" in message
    assert where in message


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_file(file, content):
    file.write_text(content, encoding="utf-8-sig")
    assert "is empty" in refusal(file)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be", "gb18030", "latin-1"])
def test_another_encoding(file, encoding):
    caption = "Ä" if encoding == "latin-1" else "狗"
    write(file, [{"image": "a.jpg", "caption": caption}], encoding)
    assert "UTF-8" in refusal(file)
    if encoding.startswith("utf"):  # plain ASCII looks like UTF-8 with NUL bytes
        write(file, [{"image": "a.jpg", "caption": "x"}], encoding)
        assert "UTF-8" in refusal(file)


def test_missing_folder_is_told_from_missing_file(tmp_path):
    """And what is there instead is named: another language, another split is no help."""

    def missing(file: Path) -> str:
        with pytest.raises(InputError) as caught:
            read_annotations(file)
        problem = missing_annotations(file)
        assert str(caught.value).startswith(problem)
        assert "another folder" in str(caught.value) and "prepare.py" in str(caught.value)
        return problem

    absent = tmp_path / "absent"
    assert missing(absent / "en_train.json") == f"{absent}: no such folder"
    assert missing(tmp_path / "en_train.json") == f"{tmp_path}: no en_train.json in it"
    for name in ("fr_train.json", "cn_train.json", "en_val.json", "notes.txt"):
        (tmp_path / name).touch()
    assert missing(tmp_path / "en_train.json") == (
        f"{tmp_path}: no en_train.json in it, only cn_train.json, fr_train.json"
    )
    assert missing(tmp_path / "en_test.json").endswith(
        ": no en_test.json in it, only cn_train.json, en_val.json, fr_train.json"
    )
    for number in range(9):
        (tmp_path / f"{number}.csv").touch()
    assert missing(tmp_path / "en_test.json").endswith("in it, only 0.csv, 1.csv, 2.csv and 9 more")
    assert missing_annotations(tmp_path / "cn_train.json") is None
    assert missing_annotations(tmp_path / "notes.txt" / "en_train.json") == (
        f"{tmp_path / 'notes.txt'}: is not a folder"
    )


def test_folder_in_place_of_the_file(tmp_path):
    refusal(tmp_path)


@pytest.mark.parametrize("content", [{}, "text", 3, None, {"a": ["x"]}])
def test_not_a_list_of_entries(file, content):
    assert "is not a list" in refusal(write(file, content))


def test_no_images(file):
    assert "lists no images" in refusal(write(file, []))


@pytest.mark.parametrize(
    "image",
    [
        *("..\\..\\secret.jpg", "../secret.jpg", "images/../../secret.jpg", "images\\..\\a.jpg"),
        *("images/.. /a.jpg", "~/a.jpg", "~root\\a.jpg", "~"),
        *("/etc/passwd", "\\a.jpg", "C:\\a.jpg", "C:a.jpg", "c:/a.jpg", "\\\\host\\share\\a.jpg"),
    ],
)
def test_path_that_leaves_the_data_folder(file, image):
    message = refusal(write(file, [{"image": image, "caption": ["x"]}]))
    why = "is an absolute path" if PureWindowsPath(image).anchor else "leaves the data folder"
    assert f'entry 0 ({image!r}): "image" {why}; give ' in message


@pytest.mark.parametrize(
    "field, entry",
    [
        ("caption", r'{"image": "a.jpg", "caption": ["a dog", "half \ud83d of it"]}'),
        ("caption", r'{"image": "a.jpg", "caption": "\ud83d"}'),
        ("image", r'{"image": "a\ud83d.jpg", "caption": "a dog"}'),
    ],
)
def test_a_lone_surrogate_is_named_as_it_is_spelled(file, field, entry):
    """JSON can spell it, but no file, no console and no picture can show it."""
    file.write_text(f"[{entry}]", encoding="utf-8")
    message = refusal(file)
    message.encode()
    assert f"\"{field}\" holds a lone surrogate, '\\ud83d'; write" in message
    file.write_text(f"[{entry}]".replace(r"\ud83d", r"\ud83d\udc36"), encoding="utf-8")
    ((image, captions),) = read_annotations(file)
    assert "\N{DOG FACE}" in image + captions[-1]


@pytest.mark.parametrize("image", ["", "  ", ".", "./", 3, None, ["a.jpg"], {}])
def test_image_that_is_no_path(file, image):
    message = refusal(write(file, [{"image": image, "caption": ["x"]}]))
    assert "entry 0" in message and '"image" should be the path of a file' in message


@pytest.mark.parametrize("caption", ["", " \n", [], [""], None])
def test_no_caption_at_all(file, caption):
    assert "all its captions are empty" in refusal(
        write(file, [{"image": "a.jpg", "caption": caption}])
    )


@pytest.mark.parametrize("caption", [["x", 3], 3, {}])
def test_caption_that_is_no_text(file, caption):
    message = refusal(write(file, [{"image": "a.jpg", "caption": caption}]))
    assert "entry 0 ('a.jpg'): \"caption\" " in message


@pytest.mark.parametrize("entry", ["a.jpg", 3, None, ["a.jpg", "x"]])
def test_entry_that_is_no_object(file, entry):
    assert f"entry 0: is {type(entry).__name__}" in refusal(write(file, [entry]))


def test_missing_fields(file):
    entries = [{"caption": "x"}, {"image": "a.jpg"}, {"img": "a.jpg"}, {"image": "/a.jpg"}]
    assert [line.strip() for line in refusal(write(file, entries)).splitlines()[1:]] == [
        'entry 0: "image" is missing',
        "entry 1 ('a.jpg'): \"caption\" is missing",
        'entry 2: "image" is missing; "caption" is missing (it has img)',
        "entry 3 ('/a.jpg'): \"image\" is an absolute path; give it relative to the data folder; "
        '"caption" is missing',
    ]


def test_a_long_or_odd_name_stays_on_its_line(file):
    image = "../" + "a\n\x1b[2J" * 10_000
    _, line = refusal(write(file, [{"image": image, "caption": "x"}])).split("\n")
    assert line.isprintable() and len(line) < 300


def test_all_problems_at_once_and_ten_in_full(file):
    good = {"image": "a.jpg", "caption": "x"}
    bad = [{"image": f"{i}.jpg", "caption": 3} for i in range(13)]
    first, *lines = refusal(write(file, [good, *bad])).splitlines()
    assert "13 of 14 entries" in first
    assert [line.split(" (")[0].strip() for line in lines[:-1]] == [
        f"entry {i}" for i in range(1, 11)
    ]
    assert lines[-1].strip() == "... and 3 more"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
images = st.text(alphabet="ab./\\: ", max_size=6) | anything
entries = st.fixed_dictionaries({"image": images, "caption": anything}) | anything
reuse = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@reuse
@given(content=st.lists(entries, max_size=4) | anything)
def test_any_json_is_taken_or_refused(file, content):
    """What is taken lies in the data folder and has captions; nothing but InputError is raised."""
    file.write_text(json.dumps(content), encoding="utf-8")
    try:
        pairs = read_annotations(file)
    except InputError:
        return
    assert len({image for image, _ in pairs}) == len(pairs) <= len(content)
    root = Path("/data")
    for image, captions in pairs:
        assert root in (root / image).parents
        assert ".." not in PurePosixPath(image).parts
        assert captions
        assert all(caption.strip() for caption in captions)


@reuse
@given(content=st.binary(max_size=60) | st.text(alphabet='[]{}:,"\\ \n1ae', max_size=30))
def test_any_bytes_are_taken_or_refused(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError):
        read_annotations(file)
