"""Data in the forms that people have, compared with the JSON list of the same images."""

import base64
import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from caption_files import write_tar
from PIL import Image

from flickr8k.prepare import prepare
from models.errors import InputError
from utils import Flickr8kDataset
from utils.data.annotations import caption_file, missing_annotations, read_annotations
from utils.data.caption_folders import folder_records
from utils.data.containers import index_of
from utils.data.image_files import check_splits
from utils.flickr8k_dataloader import TrainLoader
from utils.training.settings import read_data

SPLITS = {"train": 8, "val": 4, "test": 3}


def encoded(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream := io.BytesIO(), "png")
    return stream.getvalue()


def samples(split: str) -> list[tuple[str, bytes, list[str]]]:
    """The name, the file and the captions of each image."""
    first = 100 * list(SPLITS).index(split)
    return [
        (f"{n:06}", encoded(n), [f"number {n}", f"一张图 {n}, the second"])
        for n in range(first, first + SPLITS[split])
    ]


def write_files(folder, split):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, content, _ in samples(split):
        (folder / f"images/{name}.png").write_bytes(content)


def as_list(root, split):
    write_files(root, split)
    entries = [{"image": f"images/{n}.png", "caption": texts} for n, _, texts in samples(split)]
    (root / f"en_{split}.json").write_text(json.dumps(entries))


def as_object(root, split):
    write_files(root, split)
    entries = {f"images/{name}.png": texts for name, _, texts in samples(split)}
    (root / f"en_{split}.json").write_text(json.dumps(entries))


def as_one_table(root, split):
    write_files(root, split)
    with (root / "captions.csv").open("a", encoding="utf-8") as file:
        if split == "train":
            file.write("image,caption,split\n")
        for name, _, texts in samples(split):
            file.writelines(f'images/{name}.png,"{text}",{split}\n' for text in texts)


def as_texts(root, split):
    write_files(root / split, split)
    for name, _, texts in samples(split):
        (root / split / f"images/{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def as_chinese_clip(root, split):
    split_word = "valid" if split == "val" else split
    images, texts = [], []
    for name, content, captions in samples(split):
        images.append(f"{name}\t{base64.urlsafe_b64encode(content).decode()}\n")
        texts += [{"text_id": 1, "text": text, "image_ids": [name]} for text in captions]
    (root / f"{split_word}_imgs.tsv").write_text("".join(images))
    (root / f"{split_word}_texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))


def as_shards(root, split):
    """Two shards, as img2dataset writes them, one with captions in .json."""
    (root / split).mkdir(parents=True)
    half = SPLITS[split] // 2
    for number, part in enumerate((samples(split)[:half], samples(split)[half:])):
        members = {}
        for name, content, texts in part:
            members[f"{name}.png"] = content
            captions = json.dumps({"caption": texts, "url": "x"}) if number else texts[0]
            members[f"{name}.json" if number else f"{name}.txt"] = captions.encode()
        write_tar(root / split / f"{number:05}.tar", members)
        (root / split / f"{number:05}_stats.json").write_text("{}")


def as_parquet(root, split):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_files(root, split)
    rows = [{"image": f"images/{n}.png", "caption": texts} for n, _, texts in samples(split)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"en_{split}.parquet")


def as_datasets(root, split):
    """Images in the rows, as an Image feature has them."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    features = {"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))}
    features = datasets.Features(features)
    rows = [
        {"image": {"bytes": content, "path": None}, "caption": texts}
        for _, content, texts in samples(split)
    ]
    table = datasets.table.InMemoryTable(pyarrow.Table.from_pylist(rows, features.arrow_schema))
    # With a fingerprint, since some versions of its parts cannot compute one together.
    made = datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint=split)
    made.save_to_disk(root / ("validation" if split == "val" else split))


FORMS = {
    form.__name__.removeprefix("as_"): form
    for form in (as_object, as_one_table, as_texts, as_chinese_clip, as_shards, as_parquet,
                 as_datasets)
}  # fmt: skip


def content_of(dataset):
    return {dataset[i][0].numpy().tobytes(): dataset[i][1] for i in range(len(dataset))}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_the_images_and_captions_of_the_list(tmp_path, form):
    for split in SPLITS:
        FORMS[form](tmp_path, split)
    sets = read_data(tmp_path, ["en"], 2, TrainLoader.processes)
    assert {split: len(dataset) for split, dataset in sets.items()} == SPLITS
    check_splits(sets, 0)
    for split, dataset in sets.items():
        expected = {name: texts for name, _, texts in samples(split)}
        if form == "shards":  # a .txt holds one caption
            first_shard = [*expected][: len(expected) // 2]
            expected |= {name: expected[name][:1] for name in first_shard}
        prepare_image = dataset.preprocess.resize_and_crop
        pixels = {name: prepare_image(Image.open(io.BytesIO(c))) for name, c, _ in samples(split)}
        assert content_of(dataset) == {
            pixels[name].numpy().tobytes(): texts for name, texts in expected.items()
        }


def test_a_line_of_a_text_ends_where_editors_end_one(tmp_path):
    """U+2028 and a form feed come with texts that were copied; Windows ends with \\r\\n."""
    as_texts(tmp_path, "val")
    name = samples("val")[0][0]
    (tmp_path / f"val/images/{name}.txt").write_bytes("a\u2028b\x0cc\r\nd\n".encode())
    contents = [record.content for record in folder_records(tmp_path / "val", "en")]
    assert contents[0] == {"image": f"images/{name}.png", "caption": ["a\u2028b\x0cc", "d"]}


def test_workers_read_shards_by_the_places_that_they_are_given(tmp_path, monkeypatch):
    for split in SPLITS:
        as_shards(tmp_path, split)
    dataset = Flickr8kDataset(tmp_path, 16)
    reader = pickle.loads(pickle.dumps(dataset.reader))
    monkeypatch.setattr("utils.data.containers.index_of", None)  # which takes long
    assert all(torch.equal(reader[i], dataset.reader[i]) for i in range(8))
    cached = Flickr8kDataset.cache
    monkeypatch.undo()
    cached(dataset)
    assert torch.equal(next(dataset.batches([[5, 1]], 0))[0], reader[5])


def test_class_folders_are_captioned_by_templates(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("big_cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(3):
                (tmp_path / split / name / f"{n}.png").write_bytes(encoded(10 * label + n))
    dataset = Flickr8kDataset(tmp_path, 16, split="val")
    assert dataset.names[0] == "val/big_cat/0.png"
    assert dataset[0][1][0] == "a photo of a big cat." and len(dataset) == 6
    assert dataset[5][1][0] == "a photo of a dog."
    assert dataset.txt_to_img[0] == [0, 1, 2]  # equal texts are one class
    chinese = Flickr8kDataset(tmp_path, 16, "cn")
    assert chinese[0][1][0] == "一张big cat的照片。"
    assert missing_annotations(caption_file(tmp_path, "en", "test")) is not None


@pytest.mark.parametrize("form", ["texts", "shards", "classes", "parquet of images", "datasets"])
def test_prepare_splits_what_has_no_splits(tmp_path, form):
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    if form == "texts":
        as_texts(source, "train")
        (source / "train").rename(source / "all")
    elif form == "shards":
        as_shards(source, "train")
        (source / "train").rename(moved := tmp_path / "shards")
        source = moved
    elif form == "classes":
        for n, (_, content, _) in enumerate(samples("train")):
            (source / "ab"[n % 2]).mkdir(exist_ok=True)
            (source / "ab"[n % 2] / f"{n}.png").write_bytes(content)
    elif form == "datasets":
        as_datasets(source, "train")
        (source / "train").rename(moved := tmp_path / "saved")
        source = moved
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [{"img": {"bytes": c, "path": None}, "text": texts[0]} for _, c, texts in
                samples("train")]  # fmt: skip
        parquet.write_table(pyarrow.Table.from_pylist(rows), source / "all.parquet")
    if form in ("shards", "datasets", "parquet of images"):
        with pytest.raises(InputError, match=r"its images stay in it; .*--output"):
            prepare(output, [source])
        shutil.copytree(source, output)
        source = output
    for place in (output, source):  # copied there; left where they are
        counts = prepare(place, [source], language="en")
        assert counts == {"train": 6, "val": 1, "test": 1}
        sets = [Flickr8kDataset(place, 224, split=split) for split in counts]
        found = [pixels for dataset in sets for pixels in content_of(dataset)]
        prepare_image = sets[0].preprocess.resize_and_crop
        expected = [prepare_image(Image.open(io.BytesIO(c))) for _, c, _ in samples("train")]
        assert sorted(found) == sorted(pixels.numpy().tobytes() for pixels in expected)


def test_what_is_wrong_with_a_form_is_told_in_one_line(tmp_path):
    shards = tmp_path / "train"
    as_shards(tmp_path, "train")
    (shards / "00002.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match=r"00002\.tar: is no whole tar"):
        Flickr8kDataset(tmp_path)
    write_tar(shards / "00002.tar", {"7.png": encoded(7), "8.png": encoded(8), "8.txt": b"x"})
    with pytest.raises(InputError, match=r"00002\.tar/7: should be an image beside a \.txt"):
        Flickr8kDataset(tmp_path)
    (shards / "00002.tar").unlink()
    with tarfile.open(shards / "00001.tar") as tar:
        second = tar.getmembers()[1].offset
    broken = bytearray((shards / "00001.tar").read_bytes())
    broken[second : second + tarfile.BLOCKSIZE] = b"?" * tarfile.BLOCKSIZE
    (shards / "00003.tar").write_bytes(broken)
    with pytest.raises(InputError, match=r"00003\.tar: is no whole tar"):
        Flickr8kDataset(tmp_path)
    texts = tmp_path / "texts"
    as_texts(texts, "train")
    (texts / "train/images/000003.txt").unlink()
    with pytest.raises(InputError, match=r"images/000003\.png: no 000003\.txt beside it"):
        Flickr8kDataset(texts)


def test_names_in_shards_are_read_as_those_of_files(tmp_path):
    """With Windows' slashes and from a root; a Mac's notes on files are none of them."""
    notes = {"._1.png": b"\0", "._1.txt": b"\0"}
    members = {
        "a\\1.png": encoded(1),
        "a\\1.txt": b"one",
        "/b/2.png": encoded(2),
        "/b/2.txt": b"two",
    }
    (tmp_path / "train").mkdir()
    write_tar(tmp_path / "train" / "0.tar", notes | members)
    dataset = Flickr8kDataset(tmp_path)
    assert [captions for _, captions in dataset] == [["one"], ["two"]]  # a loop ends
    assert dataset[-1][1] == ["two"]


def test_a_table_tells_of_rows_without_a_split(tmp_path, capsys):
    for split in SPLITS:
        as_one_table(tmp_path, split)
    table = tmp_path / "captions.csv"
    table.write_text(table.read_text("utf-8") + "images/7.png,x,\nimages/8.png,y,banana\n", "utf-8")
    read_data(tmp_path, ["en"], 2, TrainLoader.processes)
    assert "2 images are left out, whose split is empty, banana;" in capsys.readouterr().out


def test_a_bad_table_alone_tells_of_its_own_problem(tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption,split\n1.jpg,a,train\n2.jpg,b, c,val\n")
    with pytest.raises(InputError, match=r"captions\.csv: 1 of 2 .*\n  line 3: has 4 fields"):
        missing_annotations(caption_file(tmp_path, "en", "train"))


def test_an_image_in_two_splits_of_one_table_is_warned_of(tmp_path, capsys):
    for split in SPLITS:
        as_one_table(tmp_path, split)
    table = tmp_path / "captions.csv"
    table.write_text(table.read_text("utf-8") + "images/000000.png,again,val\n", "utf-8")
    check_splits(read_data(tmp_path, ["en"], 2, TrainLoader.processes), 0)
    assert "1 images are in both training and validation" in capsys.readouterr().out


def test_folders_that_lack_classes_or_a_split_are_named_with_the_remedy(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(encoded(1))
    told = missing_annotations(caption_file(tmp_path, "en", "train"))
    assert f"{tmp_path / 'train'}: no captions" in told and "only one class folder, cat" in told
    (tmp_path / "train" / "dog").mkdir()
    told = missing_annotations(caption_file(tmp_path, "en", "val"))
    assert "no val/ beside train/" in told
    assert f"prepare.py --source {tmp_path / 'train'} --output {tmp_path}" in told


@pytest.mark.parametrize("form", [as_chinese_clip, as_shards])
def test_prepare_says_of_what_is_split_that_it_is_read_as_it_is(tmp_path, form):
    for split in SPLITS:
        form(tmp_path, split)
    with pytest.raises(InputError, match=r"is read as it is: train\.py --dataset_path "):
        prepare(tmp_path / "out", [tmp_path])


def test_columns_of_parquet_in_capitals(tmp_path):
    """As those of a table of text, whose names are read so too."""
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{" Filepath": "1.jpg", "TITLE": "a"}, {" Filepath": "2.jpg", "TITLE": "b"}]
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "en_train.parquet"
    )
    (tmp_path / "en_val.csv").write_text(" Filepath,TITLE\n1.jpg,a\n2.jpg,b\n")
    for file in ("en_train.parquet", "en_val.csv"):
        assert read_annotations(tmp_path / file) == [("1.jpg", ["a"]), ("2.jpg", ["b"])]


def test_a_container_that_was_changed_is_read_anew(tmp_path):
    file = tmp_path / "0.tar"
    for name in ("first.png", "another.png"):
        write_tar(file, {name: encoded(1)})
        assert [*index_of(file)] == [name]


def test_a_row_that_is_no_picture_is_named(tmp_path):
    for split in SPLITS:
        as_chinese_clip(tmp_path, split)
    table = tmp_path / "valid_imgs.tsv"
    name = samples("val")[0][0]
    table.write_text(f"{name}\t%%%\n" + table.read_text().partition("\n")[2])
    sets = read_data(tmp_path, ["en"], 2, TrainLoader.processes)
    with pytest.raises(InputError, match=f"valid_imgs.tsv/{name}: is no picture in base64"):
        check_splits(sets, 0)
    lines = (tmp_path / "train_texts.jsonl").read_text()
    (tmp_path / "train_texts.jsonl").write_text(lines + '{"text": "x", "image_ids": 5}\n')
    with pytest.raises(InputError, match=r'line 17.*should be \{"text"'):
        Flickr8kDataset(tmp_path)
