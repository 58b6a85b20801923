"""The data set and the training batches."""

import json
import math
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from script_runs import ROOT

from models import tokenize
from models.clip_utils import create_model
from models.errors import InputError
from models.preprocess import Preprocess, normalize
from utils import Flickr8kDataset
from utils.data.augment import recolour
from utils.data.unlabelled import Unlabelled, find_unlabelled
from utils.flickr8k_dataloader import TrainLoader, check_batch_size
from utils.loss import contrastive_loss
from utils.machine.processes import ALONE, Processes

CPU = torch.device("cpu")
FLICKR8K = ROOT.parent / "shared" / "flickr8k"


@pytest.fixture
def root(tmp_path):
    """Eleven training and three validation images of several sizes, with one to five captions."""
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for split, count in (("train", 11), ("val", 3)):
        entries = []
        for i in range(count):
            size = (40 + 7 * i, 60 - 3 * i)
            pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((90, 70)).save(tmp_path / f"images/{split}{i}.png")
            captions = [f"{split} image {i} caption {c}" for c in range(1 + i % 5)]
            separator = "\\" if i % 2 else "/"
            entries.append(
                {
                    "image": f"images{separator}{split}{i}.png",
                    "caption": captions if len(captions) > 1 else captions[0],
                }
            )
        text = json.dumps(entries)
        (tmp_path / f"en_{split}.json").write_text(text, encoding="utf-8")
    return tmp_path


def test_attributes_agree_with_the_file(root):
    dataset = Flickr8kDataset(root, 32)
    entries = json.loads((root / "en_train.json").read_text("utf-8"))
    assert len(dataset) == len(dataset.image) == 11
    assert dataset.txt_to_img.keys() == set(range(len(dataset.text)))
    assert dataset.own_captions == dataset.img_to_txt  # no text is that of two images
    for i, entry in enumerate(entries):
        captions = [entry["caption"]] if isinstance(entry["caption"], str) else entry["caption"]
        assert Path(dataset.image[i]) == root / entry["image"].replace("\\", "/")
        assert [dataset.text[c] for c in dataset.img_to_txt[i]] == captions
        assert all(dataset.txt_to_img[c] == i for c in dataset.img_to_txt[i])


@pytest.fixture(scope="module")
def six_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six")
    for i in range(6):
        (folder / f"{i}.png").touch()
    return folder


CAPTIONS = ["a dog", "A  Dog", " a dog ", "a cat", "cat a", "狗", "dog " * 75, "dog " * 99]


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.sampled_from(CAPTIONS), min_size=1, max_size=4), min_size=1, max_size=6)
)
def test_a_caption_is_a_positive_of_every_image_that_has_its_tokens(six_files, captions):
    """Case and spaces make no other text, but tokens that are cut off do."""
    entries = [{"image": f"{i}.png", "caption": c} for i, c in enumerate(captions)]
    (six_files / "en_val.json").write_text(json.dumps(entries), "utf-8")
    dataset, plain = (
        Flickr8kDataset(six_files, 32, is_train=False, plain_protocol=p) for p in (False, True)
    )
    owner = [i for i, own in enumerate(captions) for _ in own]
    rows = [tuple(dataset.tokenizer.encode(text)) for text in dataset.text]
    having = {
        row: sorted({i for i, r in zip(owner, rows, strict=True) if r == row}) for row in rows
    }
    for caption, row in enumerate(rows):
        assert np.atleast_1d(dataset.txt_to_img[caption]).tolist() == having[row]
        assert isinstance(dataset.txt_to_img[caption], int) == (len(having[row]) == 1)
    assert dataset.img_to_txt == {
        i: [c for c, row in enumerate(rows) if i in having[row]] for i in range(len(captions))
    }
    assert dataset.count_shared_captions() == sum(len(having[row]) > 1 for row in rows)
    assert plain.txt_to_img == dict(enumerate(owner))
    assert plain.img_to_txt == plain.own_captions == dataset.own_captions
    assert plain.fingerprint() == dataset.fingerprint()
    assert plain.count_shared_captions() == 0


def test_a_batch_has_the_positives_of_its_images(root):
    """First those that it brings, then all others of the image, in a language of its own each."""
    entries = [{"image": f"images/train{i}.png", "caption": ["A bird", "二"]} for i in (2, 5)]
    (root / "cn_train.json").write_text(json.dumps(entries), "utf-8")
    dataset = Flickr8kDataset(root, 32, ["cn", "en"])
    shared = [dataset.own_captions[i] for i in (0, 1)]
    (batch,) = TrainLoader(dataset, 11, CPU, captions_per_image=2).epoch(1)
    brought = dataset.tokens[batch.texts[:, :2].flatten()]
    assert torch.equal(brought, batch.tokens)
    positives = [set(row.tolist()) for row in batch.texts]
    assert sorted(map(sorted, positives)) == sorted(
        sorted({dataset.text_ids[c].item() for c in own}) for own in dataset.own_captions.values()
    )
    assert sum({shared[0][0], shared[0][1]} <= texts for texts in positives) == 2
    parts = batch.split(4)
    assert torch.equal(torch.cat([part.texts for part in parts]), batch.texts)


def test_a_fingerprint_tells_images_captions_and_whose_they_are(six_files):
    """Captions that move to another image leave the lists of images and of captions as they are."""
    sets = [
        {"0": ["a dog", "a cat"], "1": ["a bird"]},
        {"0": ["a dog"], "1": ["a cat", "a bird"]},
        {"0": ["a dog", "a cat"], "2": ["a bird"]},
        {"0": ["a dog", "a cow"], "1": ["a bird"]},
        {"1": ["a dog", "a cat"], "0": ["a bird"]},
        {"0": ["a cat", "a dog"], "1": ["a bird"]},
    ]
    found = set()
    for captions_of in sets * 2:
        entries = [{"image": f"{image}.png", "caption": c} for image, c in captions_of.items()]
        (six_files / "en_val.json").write_text(json.dumps(entries), "utf-8")
        found.add(Flickr8kDataset(six_files, 32, split="val").fingerprint())
    assert len(found) == len(sets)


@pytest.mark.parametrize("model", ["ViT-demo", "cn-demo"])
def test_parts_of_words_are_counted_among_the_tokens_of_the_texts(six_files, model):
    """By the tokens' own spelling; those of start and end and what fills up a row are no texts."""
    texts = ["a dog", "a dog " * 60, "antidisestablishmentarianism", "一只狗 dog", "狗"]
    entries = [{"image": "0.png", "caption": texts}]
    (six_files / "en_val.json").write_text(json.dumps(entries), "utf-8")
    dataset = Flickr8kDataset(six_files, split="val", model=create_model(model))
    kept = dataset.context_length - 2  # of a text's tokens
    rows = [dataset.tokenizer.encode(text)[:kept] for text in texts]
    spelled = [dataset.tokenizer.decoder[token] for row in rows for token in row]
    if model == "ViT-demo":
        is_part = [not token.endswith("</w>") for token in spelled]
    else:
        is_part = [token.startswith("##") or token == "[UNK]" for token in spelled]
    assert 0 < sum(is_part) < len(is_part)
    assert dataset.share_of_fragments() == pytest.approx(np.mean(is_part))


def test_images_are_what_open_clip_makes_of_them(root):
    dataset = Flickr8kDataset(root, 32, is_train=False)
    transform = image_transform_v2(PreprocessCfg(size=(32, 32)), is_train=False)
    for i, path in enumerate(dataset.image):
        image, captions = dataset[i]
        assert image.dtype == torch.uint8
        torch.testing.assert_close(normalize(image), transform(Image.open(path)))
        assert captions == [dataset.text[c] for c in dataset.img_to_txt[i]]


def test_a_transform_of_ones_own_is_used(root):
    dataset = Flickr8kDataset(root, 32, transform=lambda image: torch.tensor(image.size))
    assert dataset[0][0].tolist() == [90, 70]


def test_what_a_transform_has_normalised_is_not_normalised_again(root):
    plain = TrainLoader(Flickr8kDataset(root, 32), 11, CPU, augment=False)
    own = Flickr8kDataset(root, 32, transform=Preprocess(32))
    assert equal(batches(plain, 1), batches(TrainLoader(own, 11, CPU, augment=False), 1))


def batches(loader, epoch, start=0):
    return [
        (batch.augmented_images(Preprocess(24)), batch.tokens)
        for batch in loader.epoch(epoch, start)
    ]


def equal(first, second):
    first, second = [[x for batch in one for x in batch] for one in (first, second)]
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_batches_follow_from_seed_and_epoch_alone(root):
    dataset = Flickr8kDataset(root, 32)
    loader = TrainLoader(dataset, 4, CPU, seed=1)
    first = batches(loader, 1)
    assert len(first) == len(loader) == 2
    torch.manual_seed(99)
    list(loader.epoch(2))
    assert equal(first, batches(loader, 1))
    assert equal(first, batches(TrainLoader(dataset, 4, CPU, seed=1, num_workers=2), 1))
    assert not equal(first, batches(loader, 2))
    of_others = [batches(TrainLoader(dataset, 4, CPU, seed=seed), 3 - seed) for seed in (0, 2, 3)]
    assert not any(equal(batches(loader, 2), other) for other in of_others)  # seed + epoch is 3


def test_each_image_comes_once_with_one_of_its_captions_and_in_time_with_all(root):
    dataset = Flickr8kDataset(root, 32)
    pictures = normalize(torch.stack([dataset[i][0] for i in range(len(dataset))]))
    loader = TrainLoader(dataset, 11, CPU, augment=False)
    seen = set()
    for epoch in range(1, 60):
        ((images, tokens),) = batches(loader, epoch)
        found = [
            next(i for i, picture in enumerate(pictures) if torch.equal(picture, image))
            for image in images
        ]
        assert sorted(found) == list(range(11))
        for i, row in zip(found, tokens, strict=True):
            own = [c for c in dataset.img_to_txt[i] if torch.equal(dataset.tokens[c], row)]
            assert len(own) == 1
            seen.add(own[0])
    assert seen == set(range(len(dataset.text)))


def test_captions_and_crops_go_with_their_images_whatever_the_batch_size(root):
    dataset = Flickr8kDataset(root, 32)
    small, (large,) = (batches(TrainLoader(dataset, size, CPU), 1) for size in (4, 8))
    for of_small, of_large in zip(zip(*small, strict=True), large, strict=True):
        torch.testing.assert_close(torch.cat(of_small), of_large)


def test_augmentation_changes_pixels_a_little_and_captions_not(root):
    dataset = Flickr8kDataset(root, 32)
    plain = batches(TrainLoader(dataset, 11, CPU, augment=False), 1)
    augmented = batches(TrainLoader(dataset, 11, CPU), 1)
    assert torch.equal(plain[0][1], augmented[0][1])
    assert not torch.equal(plain[0][0], augmented[0][0])


def test_long_captions_are_cut_and_counted(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    fits, cut = "dog " * 75, "dog " * 76
    entry = {"image": "a.png", "caption": [fits, cut, "short"]}
    (tmp_path / "en_train.json").write_text(json.dumps([entry]))
    dataset = Flickr8kDataset(tmp_path, 8)
    assert dataset.count_cut_captions() == 1
    assert torch.equal(dataset.tokens[0], dataset.tokens[1])
    assert torch.equal(dataset.tokens[:], tokenize([*dataset.text], truncate=True))


@pytest.mark.parametrize("model, word", [("ViT-demo", "dog "), ("cn-demo", "狗")])
def test_texts_that_are_equal_only_once_they_are_cut_stay_their_images_own(tmp_path, model, word):
    """With equal features the loss of two such images is that of a guess, log 2."""
    start = word * 90
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    captions = [[start + "a", start + "c"], [start + "b", start + "c"], ["short"]]
    entries = [{"image": f"{i}.png", "caption": own} for i, own in enumerate(captions)]
    (tmp_path / "en_val.json").write_text(json.dumps(entries))
    dataset = Flickr8kDataset(tmp_path, 8, is_train=False, model=create_model(model))
    assert (dataset.tokens[0] == dataset.tokens[:4]).all()
    assert dataset.txt_to_img == {0: 0, 1: [0, 1], 2: 1, 3: [0, 1], 4: 2}
    assert (dataset.count_cut_captions(), dataset.count_alike_captions()) == (4, 4)
    with patch("models.tokens.AT_ONCE", 2):  # as of a very large set
        lazy = Flickr8kDataset(tmp_path, 8, is_train=False, model=create_model(model))
        assert (lazy.count_cut_captions(), lazy.count_alike_captions()) == (4, 4)
    assert lazy.txt_to_img == dataset.txt_to_img
    features, texts = torch.ones(2, 3), dataset.text_ids[[0, 2]][:, None]
    loss = contrastive_loss(features, features, torch.tensor(0.0), texts=texts)
    assert loss.item() == pytest.approx(math.log(2))


def test_a_subset_is_the_data_set_of_a_list_with_these_images_alone(root, tmp_path):
    """Also where the captions were read and shared, and the images cached, before."""
    entries = json.loads((root / "en_train.json").read_text())
    entries[6]["caption"] = entries[3]["caption"] = ["the same", "other"]
    (root / "en_train.json").write_text(json.dumps(entries))
    dataset = Flickr8kDataset(root, 32)
    dataset.cache(tmp_path / "pixels")
    assert dataset.count_shared_captions() == 4
    part = dataset.subset([6, 8])
    (root / "en_val.json").write_text(json.dumps([entries[6], entries[8]]))
    expected = Flickr8kDataset(root, 32, split="val")
    assert (part.image, part.text, part.names) == (expected.image, expected.text, expected.names)
    for name in ("own_captions", "img_to_txt", "txt_to_img"):
        assert getattr(part, name) == getattr(expected, name), name
    assert torch.equal(part.tokens[:], expected.tokens[:]) and part.count_shared_captions() == 0
    pixels = [next(data.batches([[0, 1]], 0)) for data in (part, expected)]
    assert torch.equal(*pixels)
    assert len(dataset) == 11 and dataset.count_shared_captions() == 4
    plain = Flickr8kDataset(root, 32, plain_protocol=True)
    assert dataset.plain().img_to_txt == plain.img_to_txt != dataset.img_to_txt


def test_the_rest_of_an_epoch_is_what_it_would_have_been(root):
    loader = TrainLoader(Flickr8kDataset(root, 32), 3, CPU, seed=1, captions_per_image=2)
    assert equal(batches(loader, 2)[1:], batches(loader, 2, start=1))
    assert batches(loader, 2, start=3) == []


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_batches_of_one_process(root, size):
    dataset = Flickr8kDataset(root, 32)
    whole = batches(TrainLoader(dataset, 5, CPU, captions_per_image=2), 1)
    parts = [
        batches(
            TrainLoader(dataset, 5, CPU, captions_per_image=2, processes=Processes(rank, size)), 1
        )
        for rank in range(size)
    ]
    joined = [
        tuple(map(torch.cat, zip(*of_a_step, strict=True)))
        for of_a_step in zip(*parts, strict=True)
    ]
    assert equal(whole, joined)


def test_ranks_share_the_altered_images_of_one_process(root):
    """Every other image, from the first on, in other colours and with captions of other words."""
    dataset = Flickr8kDataset(root, 32)

    def altered(step, epoch=1, **given):
        loader = TrainLoader(dataset, 5, CPU, captions_per_image=2, alter=True, **given)
        return list(loader.epoch(epoch))[step]

    whole, others = altered(0), [altered(1), altered(0, epoch=2), altered(0, seed=1)]
    assert torch.equal(whole.altered.images, whole.images[::2])
    tokens = whole.tokens.unflatten(0, (5, 2))[::2].flatten(0, 1)
    assert torch.equal(whole.altered.tokens.argmax(1), tokens.argmax(1))
    assert not torch.equal(whole.altered.tokens, tokens)
    for other in others:  # in another step, epoch or run
        assert not torch.equal(whole.altered.colours, other.altered.colours)
    plain = whole._replace(images=whole.images[::2], crops=whole.crops[::2])
    expected = recolour(plain.augmented_images(Preprocess(32)), whole.altered.colours)
    assert torch.equal(whole.altered.augmented_images(Preprocess(32)), expected)
    for size in (2, 5):
        parts = [altered(0, processes=Processes(rank, size)).altered for rank in range(size)]
        parts = [part for part in parts if part is not None]
        for name in ("images", "crops", "tokens", "colours"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole.altered, name)), name
    without = TrainLoader(dataset, 5, CPU, captions_per_image=2)
    first, again = next(without.epoch(1)), whole._replace(altered=None)
    assert equal([first[:3]], [again[:3]]) and first.altered is None


def test_a_batch_says_which_of_its_inputs_are_cached_features(root):
    """They are passed on unchanged, also to distillation and to the parts of a batch."""
    dataset = Flickr8kDataset(root, 32)
    loader = TrainLoader(dataset, 4, CPU, alter=True)
    assert all(batch.cached == batch.altered.cached == set() for batch in loader.epoch(1))
    loader.features["text"] = torch.randn(len(dataset.text), 7)
    for batch in loader.epoch(1):
        assert all(one.cached == {"text"} for one in (batch, batch.altered, *batch.split(3)))
        assert torch.equal(batch.altered.tokens, batch.tokens[::2])
        assert torch.equal(batch.tokens, loader.features["text"][batch.texts[:, 0]])


def test_unlabelled_images_and_sentences_take_the_place_of_altered_ones(root, tmp_path, capsys):
    """Those of a step are the same for any number of processes; a broken file is passed over, and
    the captions and images to train on stay as they were."""
    dataset, folder = Flickr8kDataset(root, 32), tmp_path / "scans"
    folder.mkdir()
    for shade in range(20):
        Image.new("RGB", (50, 40), (10 * shade, 0, 0)).save(folder / f"{shade:02}.png")
    (folder / "20.png").write_bytes(b"no image")
    (tmp_path / "sentences.txt").write_text("one\n\ntwo\nthree\n")
    given = find_unlabelled([str(folder), str(tmp_path / "sentences.txt")])
    sentences = tokenize(["one", "two", "three"]).tolist()

    def steps(**options):
        loader = TrainLoader(dataset, 5, CPU, captions_per_image=2, alter=True, **options)
        loader.features["text"] = torch.randn(len(dataset.text), 7)  # of a frozen tower
        return [*loader.epoch(1), *loader.epoch(2)]

    whole, without = steps(unlabelled=given), steps()
    shades = set()
    for batch, plain in zip(whole, without, strict=True):
        assert torch.equal(batch.images, plain.images) and torch.equal(batch.texts, plain.texts)
        altered = batch.altered
        assert altered.images.shape == (3, 3, 32, 32) and altered.colours is None
        assert not altered.images[:, 1:].any() and not altered.cached
        shades |= set((altered.images[:, 0, 0, 0] // 10).tolist())
        assert len(altered.tokens) == 6 and all(row in sentences for row in altered.tokens.tolist())
    assert len(shades) > 6
    assert capsys.readouterr().out.count("20.png: ") <= 1
    for size in (2, 5):
        ranks = [steps(unlabelled=given, processes=Processes(rank, size)) for rank in range(size)]
        for step, of_ranks in enumerate(zip(*ranks, strict=True)):
            parts = [batch.altered for batch in of_ranks if batch.altered]
            for name in ("images", "tokens"):
                joined = torch.cat([getattr(part, name) for part in parts])
                assert torch.equal(joined, getattr(whole[step].altered, name)), name


def test_what_is_given_of_unlabelled_data_alone_is_replaced(root, tmp_path):
    dataset = Flickr8kDataset(root, 32)
    loader = partial(TrainLoader, dataset, 5, CPU, alter=True)
    plain = next(loader().epoch(1)).altered
    images = next(loader(unlabelled=Unlabelled(images=dataset.image[:2])).epoch(1)).altered
    assert torch.equal(images.tokens, plain.tokens) and not torch.equal(images.images, plain.images)
    texts = next(loader(unlabelled=Unlabelled(texts=["one"])).epoch(1)).altered
    assert torch.equal(texts.images, plain.images) and torch.equal(texts.colours, plain.colours)
    assert texts.tokens.tolist() == 3 * tokenize("one").tolist()


@pytest.mark.parametrize("name, problem", [("gone", "no such file"), ("empty", "no images")])
def test_unlabelled_data_that_is_not_there_is_refused(tmp_path, name, problem):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"--distill_data: .*{name}: .*{problem}"):
        find_unlabelled([str(tmp_path / name)])


def test_several_captions_of_an_image_are_different_while_it_has_enough(root):
    dataset = Flickr8kDataset(root, 32)
    loader = TrainLoader(dataset, 11, CPU, augment=False, captions_per_image=3)
    pictures = normalize(torch.stack([dataset[i][0] for i in range(len(dataset))]))
    for epoch in range(1, 20):
        ((images, tokens),) = batches(loader, epoch)
        for image, rows in zip(images, tokens.split(3), strict=True):
            i = next(i for i, picture in enumerate(pictures) if torch.equal(picture, image))
            own = dataset.tokens[dataset.img_to_txt[i]]
            drawn = [next(c for c, t in enumerate(own) if torch.equal(t, row)) for row in rows]
            assert len(set(drawn)) == min(3, len(own))
    loader = TrainLoader(dataset, 11, CPU, captions_per_image=99, alter=True)
    (batch,) = loader.epoch(1)
    assert loader.captions_per_image == 5  # which the richest image has
    assert (len(batch.tokens), len(batch.altered.tokens)) == (11 * 5, 6 * 5)


def test_two_languages_bring_an_images_captions_in_both(root):
    entries = [{"image": "images/train3.png", "caption": ["一", "二"]},
               {"image": "images/val0.png", "caption": "三"}]  # fmt: skip
    (root / "cn_train.json").write_text(json.dumps(entries), "utf-8")
    english, both = Flickr8kDataset(root, 32), Flickr8kDataset(root, 32, ["en", "cn"])
    assert both.image == [*english.image, str(root / "images/val0.png")]
    texts = [[both.text[c] for c in captions] for captions in both.img_to_txt.values()]
    expected = [[english.text[c] for c in captions] for captions in english.img_to_txt.values()]
    expected[3] += ["一", "二"]
    assert texts == [*expected, ["三"]]
    assert all(c in both.img_to_txt[i] for c, i in both.txt_to_img.items())


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({}, "train"),
        ({"is_train": True}, "train"),
        ({"is_train": False}, "val"),
        ({"split": "test"}, "test"),
        ({"split": "val", "is_train": False}, "val"),
        ({"split": "test", "is_train": False}, "test"),
        ({"split": "tests"}, None),
    ],
)
def test_a_split_goes_by_its_name_or_by_whether_it_is_trained_on(root, arguments, expected):
    entry = {"image": "images/val2.png", "caption": "of the test"}
    (root / "en_test.json").write_text(json.dumps([entry]), "utf-8")
    if expected is None:
        with pytest.raises(InputError, match=r"no en_tests\.json in it"):
            Flickr8kDataset(root, 32, **arguments)
    else:
        count = {"train": 11, "val": 3, "test": 1}[expected]
        assert len(Flickr8kDataset(root, 32, **arguments)) == count


def test_one_image_is_too_few():
    """A batch of one has no negatives."""
    with pytest.raises(InputError, match=r"at least 2 images, and there is 1$"):
        check_batch_size(64, 1, ALONE)


def test_too_large_a_batch_is_named(root):
    with pytest.raises(InputError, match=r"--batch_size 12 is more than the 11.*--batch_size 11"):
        TrainLoader(Flickr8kDataset(root, 32), 12, CPU)


def test_missing_images_of_the_validation_set_or_all_of_them_are_named(root):
    (root / "images" / "val1.png").unlink()
    with pytest.raises(InputError, match=r"1 of the 3 val images are missing.*val1\.png"):
        Flickr8kDataset(root, 32, is_train=False)
    for image in (root / "images").glob("train*"):
        image.unlink()
    with pytest.raises(InputError, match="11 of the 11 train images are missing"):
        Flickr8kDataset(root, 32)


@pytest.mark.parametrize(
    "image, hint",
    [
        (r"图\bird.jpg", r'"[^"]*图\\bird\.jpg" \(in JSON write a path with /'),
        ("images/VAL1.png", r"VAL1\.png \(there is val1\.png\);"),
        ("images/none.png", r"none\.png; put them there"),
    ],
)
def test_what_may_be_wrong_with_a_missing_image_is_told(root, image, hint):
    """A single backslash before b, f, n, r or t is something else to JSON."""
    if (root / "images" / "VAL1.png").exists():
        pytest.skip("upper and lower case are the same here")
    text = f'[{{"image": "{image}", "caption": "a"}}]'
    (root / "en_val.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=hint):
        Flickr8kDataset(root, 32, is_train=False)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_another_image_takes_the_place_of_a_bad_one_which_is_reported_once(
    root, num_workers, cache, capsys
):
    (root / "images" / "train4.png").unlink()
    (root / "images" / "train7.png").write_bytes(b"<html>")
    dataset = Flickr8kDataset(root, 32)
    if cache:
        dataset.cache(num_workers=num_workers)
        dataset = Flickr8kDataset(root, 32)  # as the next run finds it
        dataset.cache()
    loader = TrainLoader(dataset, 5, CPU, num_workers=num_workers, augment=False)
    good = {i: normalize(dataset[i][0]) for i in range(11) if i not in (4, 7)}
    capsys.readouterr()
    for epoch in range(1, 5):
        for images, tokens in batches(loader, epoch):
            rows = [next(i for i, p in good.items() if torch.equal(p, image)) for image in images]
            assert len(set(rows)) == 5
            for i, row in zip(rows, tokens, strict=True):
                assert any(torch.equal(dataset.tokens[c], row) for c in dataset.img_to_txt[i])
    printed = capsys.readouterr().out
    assert printed.count("train4.png") == printed.count("train7.png") == 1
    assert printed.count("another image takes its place") == 2


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_strict_training_stops_at_a_bad_image(root, num_workers, cache):
    (root / "images" / "train7.png").write_bytes(b"<html>")
    dataset = Flickr8kDataset(root, 32)
    if cache:
        dataset.cache()
    loader = TrainLoader(dataset, 11, CPU, num_workers=num_workers, strict=True)
    with pytest.raises(InputError, match=r"train7\.png") as error:
        batches(loader, 1)
    assert "\n" not in str(error.value)


def test_without_any_good_image_there_is_no_training(root):
    for image in (root / "images").glob("train*"):
        image.write_bytes(b"")
    with pytest.raises(InputError, match="none of the images can be read"):
        batches(TrainLoader(Flickr8kDataset(root, 32), 4, CPU), 1)


def test_in_a_batch_of_all_images_a_good_one_stands_twice(root):
    (root / "images" / "train7.png").write_bytes(b"")
    ((images, _),) = batches(TrainLoader(Flickr8kDataset(root, 32), 11, CPU, augment=False), 1)
    assert len({image.numpy().tobytes() for image in images}) == 10


@pytest.mark.skipif(not FLICKR8K.exists(), reason="needs Flickr8k")
@pytest.mark.parametrize("language", ["en", "cn"])
@pytest.mark.parametrize("is_train, count", [(True, 6000), (False, 1000)])
def test_flickr8k(language, is_train, count):
    dataset = Flickr8kDataset(FLICKR8K, 224, language, is_train)
    assert len(dataset) == count
    assert len(dataset.text) == 5 * count
    if not is_train:
        assert dataset.count_shared_captions() == {"en": 6, "cn": 707}[language]
    assert dataset[count - 1][0].shape == (3, 224, 224)


def test_a_sample_is_the_same_images_with_their_own_captions(root, tmp_path):
    dataset = Flickr8kDataset(root, 32)
    dataset.cache(tmp_path / "cache")
    assert dataset.sample(11) is dataset
    sample = dataset.sample(5)
    rows = [dataset.image.index(image) for image in sample.image]
    assert rows == sorted(set(rows)) and len(rows) == 5
    assert [sample[i][1] for i in range(5)] == [dataset[row][1] for row in rows]
    (pixels,), (expected,) = (s.batches([r], 0) for s, r in ((sample, range(5)), (dataset, rows)))
    assert torch.equal(pixels, expected)
    assert torch.equal(pixels, torch.stack([dataset[row][0] for row in rows]))
    assert [*sample.image] == [*dataset.sample(5).image]


def test_an_image_with_many_captions_does_not_make_every_row_long(tmp_path):
    """The draw of a row does not depend on which other rows are drawn."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    entries = [{"image": "a.png", "caption": [f"{i}" for i in range(1000)]}]
    entries += [{"image": f"{i}.png", "caption": ["b", "c"]} for i in range(50)]
    (tmp_path / "en_train.json").write_text(json.dumps(entries))
    loader = TrainLoader(Flickr8kDataset(tmp_path, 8), 2, CPU, captions_per_image=2)
    state = np.random.PCG64(3).state
    drawn = np.random.Generator(np.random.PCG64(3)).random((51, 1000))
    for rows in ([0], [7, 3], [50, 0, 50]):
        own = [loader.dataset.own_captions[row] for row in rows]
        found = loader._draw_captions(rows, state).tolist()
        for row, captions, got in zip(rows, own, found, strict=True):
            order = sorted(range(len(captions)), key=drawn[row].__getitem__)
            assert got == [captions[order[i % len(order)]] for i in range(1000)]
