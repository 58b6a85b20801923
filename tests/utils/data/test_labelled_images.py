"""Images of classes, from folders and from torchvision's data sets."""

import hashlib
import json
import pickle
import shutil
import urllib.error
import urllib.request
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, Caltech101, Food101, ImageFolder, StanfordCars

from models.clip_utils import create_model
from models.errors import InputError
from models.preprocess import Preprocess
from utils.classification import readable_features
from utils.data.labelled_images import find_labelled_images
from utils.data.torchvision_sets import TORCHVISION_SETS
from utils.machine.processes import ALONE, Processes
from utils.retrieval.encode import encode_images

SIDE = 16
NAMES = ["big_cat", "Dog", "狗"]


def noise(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def folder(tmp_path):
    """`train/` and `val/` with three classes; the files of a class are not all in one folder."""
    for split, count in (("train", 3), ("val", 4)):
        for c, name in enumerate(NAMES):
            for i in range(count):
                below = "more" if i == 2 else "."
                noise(tmp_path / "pets" / split / name / below / f"{i}.png", seed=10 * c + i)
    return tmp_path / "pets"


@pytest.mark.parametrize("split", ["train", "val"])
def test_class_folders_are_read_as_by_torchvision(folder, split):
    theirs = ImageFolder(folder / split)
    (folder / split / ".ipynb_checkpoints").mkdir()
    for name in ("Thumbs.db", "._0.png", "notes.txt"):
        (folder / split / "Dog" / name).touch()
    source = find_labelled_images(folder, is_train=split == "train")
    assert source.label == theirs.targets and source.name == f"pets_{split}"
    assert source.classes == [name.replace("_", " ") for name in theirs.classes]
    ours = {
        (x.numpy().tobytes(), label) for x, label in replace(source, preprocess=Preprocess(SIDE))
    }
    assert ours == {(np.asarray(i).transpose(2, 0, 1).tobytes(), label) for i, label in theirs}
    alone = find_labelled_images(folder / split)  # class folders without splits
    assert (alone.image, alone.label) == (source.image, source.label)
    assert alone.classes == source.classes


@pytest.mark.parametrize(
    "text, names",
    [
        ("a dog\n\n a cat \nanother dog", ["a dog", "a cat", "another dog"]),
        ("\ufeff狗\tdog\nDog\tother dog\nbig_cat\tcat\n", ["other dog", "cat", "dog"]),
        ("other\tbird\n狗\tdog\nDog\tother dog\nbig_cat\tcat", ["other dog", "cat", "dog"]),
        ("狗 dog\nDog  other dog\nbig_cat cat, or lion", ["other dog", "cat, or lion", "dog"]),
        ("Dog food\ncats\ndogs", ["Dog food", "cats", "dogs"]),
        ('{"狗": "a_dog", "Dog": "hot dog", "big_cat": "cat"}', ["hot dog", "cat", "a dog"]),
    ],
)
def test_names_from_a_file(folder, tmp_path, text, names):
    file = tmp_path / f"names.{'json' if text[0] == '{' else 'txt'}"
    file.write_text(text, "utf-8")
    assert find_labelled_images(folder, names_file=file).classes == names


@pytest.mark.parametrize("keys", [["n01440764", "n02012849", "n04266014"], ["0", "2", "10"]])
def test_names_from_the_class_index_of_imagenet(tmp_path, keys):
    """As Keras publishes it, in imagenet_class_index.json; of folders named by synset or number."""
    index = {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"],
             "2": ["n02012849", "crane"], "10": ["n04266014", "space_shuttle"]}  # fmt: skip
    for key in keys:
        noise(tmp_path / "data" / key / "0.png", seed=0)
    file = tmp_path / "imagenet_class_index.json"
    file.write_text(json.dumps(index))
    found = find_labelled_images(tmp_path / "data", names_file=file)
    assert found.classes == ["tench", "crane", "space shuttle"]


@pytest.mark.parametrize(
    "content", ["[", '["a", "b"]', '{"Dog": 1}', '{"0": ["a", ["b"]]}', '{"0": []}', "[" * 99999]
)
def test_unusable_json_is_told(folder, tmp_path, content):
    file = tmp_path / "names.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r'names.json: should be {"folder": "name", ...}, or as'):
        find_labelled_images(folder, names_file=file)


@pytest.mark.parametrize(
    "folders, names",
    [
        (["0", "1", "2", "10", "11"], ["0", "1", "2", "10", "11"]),
        (["digit_2", "digit_10"], ["digit 2", "digit 10"]),
        (["AnnualCrop", "SeaLake"], ["Annual Crop", "Sea Lake"]),  # EuroSAT's
        (["001.Black_Albatross", "010.Blackbird"], ["Black Albatross", "Blackbird"]),  # as in CUB
        (["n02085620-Chihuahua", "n02085782-Shih"], ["Chihuahua", "Shih"]),  # Stanford Dogs'
        (["n01440764", "n01443537"], ["n01440764", "n01443537"]),
        (["2_wheels", "4_wheels"], ["2 wheels", "4 wheels"]),  # the numbers tell them apart
        (["7_up", "cola"], ["7 up", "cola"]),
        (["2D", "3D"], ["2D", "3D"]),
    ],
)
def test_names_of_folders_are_sorted_and_read_as_people_do(tmp_path, folders, names):
    for name in folders:
        noise(tmp_path / name / "0.png", seed=0)
    source = find_labelled_images(tmp_path)
    assert source.classes == names
    assert [Path(image).parent.name for image in source.image] == folders


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "a\nb",
            r"names.txt: 2 class names, where there are 3 classes \(Dog to 狗\)",
        ),
        ("Dog\ta\nbig_cta\tb\n狗\tc", "names.txt: no name for big_cat; write"),
        ("Dog\ta\nbig_cat\tb", "names.txt: no name for 狗; write folder<TAB>name"),
        ("Dog\ta\nbig_cat\tb\n狗", "names.txt: no name for 狗"),
        ("Dog a\nbig_cat b", "names.txt: no name for 狗"),
        ("\n", "names.txt: no class names in it"),
        (None, "names.txt: no such file"),
    ],
)
def test_unusable_names_are_told(folder, tmp_path, text, message):
    file = tmp_path / "names.txt"
    if text is not None:
        file.write_text(text, "utf-8")
    with pytest.raises(InputError, match=message):
        find_labelled_images(folder, names_file=file)


def remove(folder, name):
    shutil.rmtree(folder / name)


def empty(folder, name):
    remove(folder, name)
    (folder / name).mkdir()


@pytest.mark.parametrize(
    "change, is_train, message",
    [
        (lambda f: remove(f, "."), False, "pets: no such folder, and no data set of torchvision"),
        (lambda f: empty(f, "."), False, "pets: no class folders; give a folder with a folder of"),
        (lambda f: remove(f, "val"), False, "pets: has train/, and no val/ .* name .*train"),
        (
            lambda f: [remove(f, f"val/{n}") for n in NAMES[1:]],
            False,
            "val: only one class folder in it, big_cat; give",
        ),
        (lambda f: empty(f, "val/狗"), False, "狗: there are no images in it; put some into it"),
        (lambda f: remove(f, "train"), True, "train: no class folders; give a folder"),
        (lambda f: remove(f, "val"), True, "pets: has train/, and no val/"),
        (lambda f: remove(f, "val/Dog"), True, "only one of them has Dog$"),
    ],
)
def test_unusable_folders_are_told(folder, change, is_train, message):
    change(folder)
    with pytest.raises(InputError, match=message):
        find_labelled_images(folder, is_train=is_train)


def test_validation_images_come_before_test_images(folder):
    shutil.copytree(folder / "val", folder / "test")
    assert find_labelled_images(folder).name == "pets_val"
    remove(folder, "val")
    assert find_labelled_images(folder).name == "pets_test"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("ViT-demo", input_shape=SIDE)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_cached", [False, True])
def test_broken_images_are_named_once_and_passed_over(
    folder, model, capsys, num_workers, is_cached
):
    whole = readable_features(
        model, replace(find_labelled_images(folder), preprocess=model.preprocess)
    )
    source = find_labelled_images(folder)
    broken = [1, 11]
    for row in broken:
        Path(source.image[row]).write_bytes(b"broken")
    images = replace(source, preprocess=model.preprocess)
    for _ in range(2):
        if is_cached:
            images.cache(num_workers=num_workers)
        found = readable_features(model, images, 5, num_workers)
        kept = [row for row in range(12) if row not in broken]
        assert torch.equal(found.labels, whole.labels[kept])
        torch.testing.assert_close(found.images, whole.images[kept])
    printed = capsys.readouterr().out
    for row in broken:
        assert printed.count(f"{source.image[row]}: not an image") == 1
    assert list((folder / ".cache").glob("*")) == (
        [folder / ".cache" / f"pets_val_{SIDE}.pixels"] if is_cached else []
    )


class OneOfTwo(Processes):
    """A process of two, which keeps its own part of a sum."""

    def sum(self, tensor):
        return tensor


@pytest.mark.parametrize("is_cached", [False, True])
def test_the_features_of_several_processes_add_up_to_those_of_one(folder, model, is_cached):
    """Also where one of them alone has met a broken image, which another stood in for."""
    (folder / "val" / "Dog" / "1.png").write_bytes(b"broken")
    found = []
    for processes in (ALONE, OneOfTwo(0, 2), OneOfTwo(1, 2)):
        images = replace(find_labelled_images(folder), preprocess=model.preprocess)
        if is_cached:
            images.cache()
        found.append(encode_images(model, images, 5, 0, processes))
    torch.testing.assert_close(found[1] + found[2], found[0])
    assert found[0].any(dim=1).sum() == 11


# torchvision's data sets


def save_cifar10(root, monkeypatch, names):
    """CIFAR-10 in the layout of its archive, with an image for each class in each file; the
    digests that torchvision compares are those of these files."""
    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)
    random = np.random.default_rng(0)

    def digest(file, content):
        data = pickle.dumps(content)
        (base / file).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for batches in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(CIFAR10, batches):
            labels = random.permutation(10).tolist()
            data = random.integers(0, 256, (10, 3 * 32 * 32), dtype=np.uint8)
            entries.append([file, digest(file, {"data": data, "labels": labels})])
        monkeypatch.setattr(CIFAR10, batches, entries)
    file = CIFAR10.meta["filename"]
    md5 = digest(file, {CIFAR10.meta["key"]: names})
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5})


def test_a_set_of_torchvision_is_read_from_its_files(tmp_path, monkeypatch):
    save_cifar10(tmp_path, monkeypatch, names=[f"class_{i}" for i in range(10)])
    for is_train, count in ((True, 50), (False, 10)):
        images = replace(
            find_labelled_images("cifar10", is_train, tmp_path), preprocess=Preprocess(32)
        )
        theirs = CIFAR10(tmp_path, train=is_train)
        assert images.classes == [f"class {i}" for i in range(10)] and len(images) == count
        assert images.label == theirs.targets
        for (pixels, label), (image, target) in zip(images, theirs, strict=True):
            assert label == target
            assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(image))
        images = pickle.loads(pickle.dumps(images))  # as the processes that read get it
        images.cache(tmp_path / "cache")
        batch = next(images.batches([[3, 1]], 0))
        assert torch.equal(batch, torch.stack([images[3][0], images[1][0]]))


def save_caltech101(root):
    for name in ("BACKGROUND_Google", "ant", "wild_cat"):
        for i in (1, 2):
            noise(root / "caltech101" / "101_ObjectCategories" / name / f"image_000{i}.jpg", i)
    return ["ant", "wild cat"], Caltech101(root)


def save_food101(root):
    names = {"apple_pie": ["apple_pie/1"], "sushi": ["sushi/2", "sushi/3"]}
    (root / "food-101" / "meta").mkdir(parents=True)
    (root / "food-101" / "meta" / "test.json").write_text(json.dumps(names))
    for i, file in enumerate(chain.from_iterable(names.values())):
        noise(root / "food-101" / "images" / f"{file}.jpg", i)
    return ["apple pie", "sushi"], Food101(root, "test")


def save_stanford_cars(root):
    """Its labels start from 1."""
    base = root / "stanford_cars"
    for i in range(3):
        noise(base / "cars_test" / f"{i}.jpg", i)
    (base / "devkit").mkdir()
    names = np.array(["Audi TT 2011", "Fiat 500 2012"], dtype=object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    rows = [{"fname": f"{i}.jpg", "class": 1 + i % 2} for i in range(3)]
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    return names.tolist(), StanfordCars(root, "test")


@pytest.mark.parametrize("save", [save_caltech101, save_food101, save_stanford_cars])
def test_labels_and_names_are_torchvisions(tmp_path, save):
    """Of a set for each of the ways in which torchvision keeps labels, besides CIFAR-10's."""
    names, theirs = save(tmp_path)
    source = find_labelled_images(save.__name__.removeprefix("save_"), data_root=tmp_path)
    assert source.classes == names and source.label == [label for _, label in theirs]
    for (pixels, _), (image, _) in zip(
        replace(source, preprocess=Preprocess(SIDE)), theirs, strict=True
    ):
        assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(image))


def test_a_broken_image_of_torchvision_is_passed_over(tmp_path, monkeypatch, model, capsys):
    save_cifar10(tmp_path, monkeypatch, names=[f"class_{i}" for i in range(10)])
    images = replace(
        find_labelled_images("cifar10", data_root=tmp_path), preprocess=model.preprocess
    )
    read = CIFAR10.__getitem__

    def broken(self, index):
        if index == 4:
            raise SyntaxError("broken PNG file")
        return read(self, index)

    monkeypatch.setattr(CIFAR10, "__getitem__", broken)
    assert len(readable_features(model, images).labels) == 9
    place = tmp_path / "cifar10_test" / "4"
    assert f"{place}: not a readable image (broken PNG file)" in capsys.readouterr().out


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_without_a_network_one_line_says_what_to_put_where(tmp_path, monkeypatch, name):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    known = TORCHVISION_SETS[name]
    assert hasattr(torchvision.datasets, known.loader)
    for is_train in (False, True):
        with pytest.raises(InputError) as error:
            find_labelled_images(name, is_train, tmp_path)
        message = str(error.value)
        assert "\n" not in message
        if is_train and known.train is None:
            assert f"{name}: has no training images of its own" in message
        else:
            assert "unexpected keyword" not in message
            assert f"{name}: is not in {tmp_path}, or not whole" in message
            assert f"what torchvision.datasets.{known.loader} reads" in message


def test_unknown_sets_are_told_with_names_like_theirs():
    with pytest.raises(InputError, match=r"cifar_10: no such folder, .*did you mean cifar10 or"):
        find_labelled_images("cifar_10")
