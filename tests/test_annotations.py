"""Reading caption files: what is taken, and what is said about the rest."""

import json
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import InputError
from utils.annotations import read_annotations

SHARED = Path(__file__).resolve().parents[2] / "shared" / "flickr8k"


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
        ("", "at line 1, column 1:"),
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


def test_another_encoding(file):
    file.write_text('[{"image": "a.jpg", "caption": "狗"}]', encoding="utf-16")
    assert "UTF-8" in refusal(file)


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in refusal(tmp_path / "en_val.json")
    refusal(tmp_path)


@pytest.mark.parametrize("content", [[], {}, "text", 3, None, {"image": "a.jpg", "caption": "x"}])
def test_not_a_list_of_entries(file, content):
    assert "should be a list" in refusal(write(file, content))


@pytest.mark.parametrize(
    "image",
    [
        *("..\\..\\secret.jpg", "../secret.jpg", "images/../../secret.jpg", "images\\..\\a.jpg"),
        *("/etc/passwd", "\\a.jpg", "C:\\a.jpg", "C:a.jpg", "c:/a.jpg", "\\\\host\\share\\a.jpg"),
    ],
)
def test_path_that_leaves_the_data_folder(file, image):
    message = refusal(write(file, [{"image": image, "caption": ["x"]}]))
    assert f'entry 0: "image" {image} leaves the data folder' in message


@pytest.mark.parametrize("image", ["", "  ", ".", "./", 3, None, ["a.jpg"], {}])
def test_image_that_is_no_path(file, image):
    message = refusal(write(file, [{"image": image, "caption": ["x"]}]))
    assert 'entry 0: "image" should be the path of a file' in message


@pytest.mark.parametrize("caption", ["", " \n", [], [""], ["x", "  "], ["x", 3], 3, None, {}])
def test_caption_that_is_no_text(file, caption):
    message = refusal(write(file, [{"image": "a.jpg", "caption": caption}]))
    assert 'entry 0: "caption" of a.jpg' in message


@pytest.mark.parametrize("entry", ["a.jpg", 3, None, ["a.jpg", "x"]])
def test_entry_that_is_no_object(file, entry):
    assert f"entry 0: is {type(entry).__name__}" in refusal(write(file, [entry]))


def test_missing_fields(file):
    message = refusal(write(file, [{"caption": "x"}, {"image": "a.jpg"}, {"img": "a.jpg"}]))
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        *("entry 0", "entry 1", "entry 2")
    ]


def test_duplicate_names_both_entries(file):
    entries = [{"image": image, "caption": "x"} for image in ("a/1.jpg", "2.jpg", "a\\1.jpg")]
    assert "entry 2: image a/1.jpg is listed already in entry 0" in refusal(write(file, entries))


def test_all_problems_at_once_and_ten_in_full(file):
    good = {"image": "a.jpg", "caption": "x"}
    bad = [{"image": f"{i}.jpg", "caption": 3} for i in range(13)]
    first, *lines = refusal(write(file, [good, *bad])).splitlines()
    assert "13 of 14 entries" in first
    assert [line.split(":")[0].strip() for line in lines[:-1]] == [
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
reuse = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@reuse
@given(content=st.lists(entries, max_size=4) | anything)
def test_any_json_is_taken_or_refused(file, content):
    """What is taken lies in the data folder and has captions; nothing but InputError is raised."""
    file.write_text(json.dumps(content), encoding="utf-8")
    try:
        pairs = read_annotations(file)
    except InputError:
        return
    assert len(pairs) == len(content)
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
