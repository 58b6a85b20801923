"""flickr8k/prepare.py on captions of one's own."""

import csv
import io
import json
import zipfile

import pytest
from caption_files import FORMATS, as_coco, as_csv, as_list, as_tsv
from hypothesis import given, settings
from hypothesis import strategies as st
from script_runs import run_script

from flickr8k.prepare import prepare
from models.errors import InputError
from utils.data.annotations import read_annotations

# The same names in two folders, as data sets with a folder a class have them.
PAIRS = [
    (f"{folder}/{number:02}.jpg", [f"{folder} {number}", f"第 {number} 张图片，{folder}"])
    for folder in ("birds", "boats")
    for number in range(8)
]
IMAGES = [image for image, _ in PAIRS]


def place(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def images_in(folder):
    """Files whose content is their path, below a folder."""
    return {f"{folder}/{image}": image for image in IMAGES}


def read(root, language="en", splits=("train", "val", "test")):
    return {split: read_annotations(root / f"{language}_{split}.json") for split in splits}


def files_of(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_split_and_the_images_stay(tmp_path, name, capsys):
    write, suffix = FORMATS[name]
    file = f"captions.{suffix}"
    root = place(tmp_path / "my data", images_in("photos") | {file: write(PAIRS)})
    counts = prepare(root, [root])
    assert counts == {"train": 12, "val": 2, "test": 2}
    assert "at random" in capsys.readouterr().err
    made = [f"en_{split}.json" for split in counts]
    assert files_of(root) == sorted([*images_in("photos"), file, *made])
    listed = [pair for pairs in read(root).values() for pair in pairs]
    expected = [(f"photos/{image}", captions) for image, captions in PAIRS]
    assert sorted(listed) == expected
    assert all((root / image).is_file() for image, _ in listed)

    before = {split: (root / f"en_{split}.json").read_bytes() for split in counts}
    prepare(root, [root])  # its own lists are no captions to split once more
    assert before == {split: (root / f"en_{split}.json").read_bytes() for split in counts}


@pytest.mark.parametrize(
    "spelled",
    ["{}", "images/{}", "D:\\data\\images\\{}", "/data/someone/{}", "..\\images\\{}", "IMAGES/{}"],
)
def test_images_are_found_however_the_list_spells_them(tmp_path, spelled):
    """With paths of another computer, and in a zip; what is not in the output folder is copied."""
    pairs = [
        (spelled.format(image).replace("/", "\\" if "\\" in spelled else "/"), captions)
        for image, captions in PAIRS
    ]
    place(tmp_path, {"captions.csv": as_csv(pairs)})
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name, content in images_in("images").items():
            archive.writestr(name, content)
    sources = [tmp_path / "captions.csv", tmp_path / "pictures.zip"]
    prepare(tmp_path / "out", sources)
    listed = {image for pairs in read(tmp_path / "out").values() for image, _ in pairs}
    assert {image: (tmp_path / "out" / image).read_text() for image in listed} == {
        f"images/{image}": image for image in IMAGES
    }


words = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=3)
paths = st.lists(words.map("x{}".format), min_size=1, max_size=3).map("/".join).map("{}.jpg".format)


@settings(max_examples=50)
@given(
    images=st.lists(paths, min_size=3, max_size=8, unique_by=str.casefold),
    turned=st.booleans(),
    data=st.data(),
)
def test_no_caption_comes_to_another_image(tmp_path_factory, images, turned, data):
    """Whatever the images and folders are called, wherever they are, and in any order; or it is
    refused, if a name in the list may mean several files."""
    place(folder := tmp_path_factory.mktemp("own"), {f"in/{image}": image for image in images})
    listed = data.draw(st.permutations(images))
    slash = "\\" if turned else "/"
    place(folder, {"a.csv": as_csv([(i.replace("/", slash), [f"this is {i}"]) for i in listed])})
    for root in (folder, folder / "out"):
        try:
            prepare(root, [folder / "a.csv", folder / "in"])
        except InputError as error:
            assert "several files may be meant" in str(error)
            assert len({image.rpartition("/")[2] for image in images}) < len(images)
            continue
        pairs = [pair for part in read(root).values() for pair in part]
        assert all(f"this is {(root / i).read_text('utf-8')}" == c for i, (c,) in pairs)
        assert len(pairs) == len(images)


def test_an_image_that_is_spelled_in_two_ways_is_one(tmp_path):
    again = [("images/birds/00.jpg", ["again"])]
    root = place(tmp_path, images_in("images") | {"a.csv": as_csv([*PAIRS, *again])})
    assert prepare(root, [root]) == {"train": 12, "val": 2, "test": 2}
    captions = dict(pair for part in read(root).values() for pair in part)
    assert sorted(captions["images/birds/00.jpg"]) == sorted([*PAIRS[0][1], "again"])


def test_two_files_of_one_place_are_not_copied_over_each_other(tmp_path):
    files = {"one/a/1.jpg": "1", "two/b/1.jpg": "2"}
    place(tmp_path, files | {"c.csv": as_csv([("a/1.jpg", ["x"]), ("b/1.jpg", ["y"])])})
    sources = [tmp_path / name for name in ("one/a", "two/b", "c.csv")]
    with pytest.raises(InputError, match=r"both become images/1\.jpg; .* --source"):
        prepare(tmp_path / "out", sources)


def test_files_called_train_and_val_are_the_splits(tmp_path, capsys):
    """As COCO has them, whose lists name the images without their folders."""
    pairs = [(image.replace("/", "_"), captions) for image, captions in PAIRS]
    coco = {
        "annotations/captions_train2017.json": as_coco(pairs[:9]),
        "annotations/captions_val2017.json": as_coco(pairs[9:]),
    }
    images = {f"train2017/{image}": "" for image, _ in pairs[:9]}
    images |= {f"val2017/{image}": "" for image, _ in pairs[9:]}
    root = place(tmp_path / "coco", coco | images)
    assert prepare(root, [root], language="cn") == {"train": 9, "val": 7}
    assert capsys.readouterr().err == ""
    assert read(root, "cn", ("train", "val")) == {
        "train": [(f"train2017/{image}", captions) for image, captions in pairs[:9]],
        "val": [(f"val2017/{image}", captions) for image, captions in pairs[9:]],
    }
    assert not (root / "cn_test.json").exists()


def split_table(words):
    """A table of PAIRS whose third column goes through `words`, image after image."""
    rows = [
        f"{image},{caption},{words[number % len(words)]}"
        for number, (image, captions) in enumerate(PAIRS)
        for caption in captions
    ]
    return "\n".join(["image,caption,Split", *rows])


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_column_of_splits_splits(tmp_path, capsys, form):
    """In the words of Karpathy's files, of Hugging Face and of Flickr8k's lists."""
    words = ["train", "restval", "Dev", "test", "training", "validation", "testing", "val"]
    table = split_table(words)
    if form == "jsonl":
        names, *rows = csv.reader(io.StringIO(table))
        rows = [dict(zip([name.lower() for name in names], row, strict=True)) for row in rows]
        table = "\n".join(map(json.dumps, rows))
    root = place(tmp_path, images_in("images") | {f"captions.{form}": table})
    assert prepare(root, [root]) == {"train": 6, "val": 6, "test": 4}
    assert capsys.readouterr().err == ""
    of = {"train": (0, 1, 4), "val": (2, 5, 7), "test": (3, 6)}
    assert read(root) == {
        split: [(f"images/{i}", c) for n, (i, c) in enumerate(PAIRS) if n % 8 in numbers]
        for split, numbers in of.items()
    }


def test_a_column_with_one_split_of_all_is_split_at_random(tmp_path, capsys):
    root = place(tmp_path, images_in("images") | {"captions.csv": split_table(["train"])})
    assert prepare(root, [root]) == {"train": 12, "val": 2, "test": 2}
    assert "at random" in capsys.readouterr().err


def test_a_file_that_is_named_is_taken_among_others(tmp_path, capsys):
    files = {"old.csv": as_csv(PAIRS[:3]), "new.csv": as_csv(PAIRS), "size.json": '{"side": 3}'}
    root = place(tmp_path, images_in("images") | files)
    with pytest.raises(InputError, match=r"several .*new\.csv, .*old\.csv; name one .*--source"):
        prepare(root, [root])
    assert "size.json: is not a list" in capsys.readouterr().err
    prepare(root, [root, root / "new.csv"])
    assert sum(map(len, read(root).values())) == 16


def test_of_two_files_in_question_the_one_in_the_output_folder_is_meant(tmp_path):
    place(tmp_path, {"captions.csv": as_csv(PAIRS)} | images_in("photos"))
    prepare(tmp_path / "out", [tmp_path])
    lists = read(tmp_path / "out")
    prepare(tmp_path / "out", [tmp_path])
    assert read(tmp_path / "out") == lists


UNUSABLE = {
    "an image missing": (
        {"a.csv": as_csv([*PAIRS, ("birds/99.jpg", ["x"])])},
        r"1 of 17 images .* birds/99\.jpg; .*--source",
    ),
    "an image in question": (
        {"a.csv": as_csv([("00.jpg", ["x"])])},
        r"00\.jpg: several files may be meant, .*birds.00\.jpg and .*boats.00\.jpg",
    ),
    "an image in two splits": (
        {"train.csv": as_csv(PAIRS), "dev.json": as_list(PAIRS[:2])},
        r"images/birds/00\.jpg is in the splits 2 times",
    ),
    "an image in two splits of a column": (
        {"a.csv": split_table(["train", "val"]) + "\nbirds/00.jpg,again,val"},
        r"images/birds/00\.jpg is in the splits 2 times",
    ),
    "a split without a name": ({"a.csv": split_table(["train", "fold 2"])}, "'fold 2', 'train'; "),
    "an empty split": ({"a.csv": split_table(["train", "val", ""])}, "split is one of '', 'train'"),
    "no validation": ({"a.csv": split_table(["train", "test"])}, "and val in some"),
    "an image without its ending": (
        {"a.csv": as_csv([("birds/00", ["x"])])},
        r"birds/00 .there is birds/00\.jpg\)",
    ),
    "two images": ({"a.csv": as_csv(PAIRS[:2])}, "2 images, .* at least 3"),
    "a bad row": ({"a.csv": "image,caption\nbirds/00.jpg,a,b\n"}, r"a\.csv: 1 of 1 .*\n  line 2:"),
    "no header": (
        {"a.csv": "birds/00.jpg,a\n"},
        r"hold no captions:\n  .*a\.csv: the first line should",
    ),
    "three files": (
        {"train.csv": as_csv(PAIRS), "val.csv": as_csv(PAIRS), "dev.csv": as_csv(PAIRS)},
        "several files hold captions",
    ),
    "no file for training": (
        {"val.csv": as_csv(PAIRS[:8]), "test.csv": as_csv(PAIRS[8:])},
        "several files hold captions",
    ),
    "nothing": ({}, "CSV, TSV, JSON lines, COCO"),
    "a list called as what is written": (
        {"cn_train.json": as_list(PAIRS)},
        r"no captions .*en_train\.json is a result: .*captions\.json",
    ),
}


@pytest.mark.parametrize("files, message", UNUSABLE.values(), ids=UNUSABLE)
def test_what_cannot_be_used_is_named(tmp_path, files, message):
    root = place(tmp_path, images_in("images") | files)
    before = files_of(root)
    with pytest.raises(InputError, match=message):
        prepare(root, [root])
    assert files_of(root) == before


def test_script_makes_what_train_py_reads(tmp_path):
    """From any folder, with paths that are relative to it."""
    pairs = [(image.replace("/", "\\"), captions) for image, captions in PAIRS]
    file = {"我的 数据/描述.tsv": as_tsv(pairs)}
    place(tmp_path, images_in("我的 数据/pictures") | file)
    given = ["--source", "我的 数据", "--output", "我的 数据", "--language", "cn"]
    done = run_script("flickr8k/prepare.py", *given, cwd=tmp_path, fresh=True)
    assert "12 training, 2 validation and 2 test images" in done.stdout
    (entry, *_) = json.loads((tmp_path / "我的 数据" / "cn_val.json").read_text("utf-8"))
    assert (tmp_path / "我的 数据" / entry["image"]).is_file()
