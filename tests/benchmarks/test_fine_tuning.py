"""The benchmark in small worlds: the worlds, what open_clip is given, and what is chosen."""

import sys
from statistics import mean

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from script_runs import ROOT

from flickr8k.render_demo import render_demo
from models import build_model, tokenize
from models.clip_utils import create_model
from utils.data.annotations import annotations_json, read_annotations
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.retrieval.encode import encode_images, encode_texts
from utils.retrieval.scores import score_features
from utils.runs.checkpoint import save_weights

sys.path.append(str(ROOT / "tests" / "benchmarks"))

import fine_tuning
import open_clip_training
import runs
import worlds


@pytest.fixture
def small(monkeypatch):
    sizes = {"train": 12, "val": 4, "test": 5}
    monkeypatch.setattr(worlds, "IMAGES", dict.fromkeys(("A", "B", "B2"), sizes))
    return sizes


@pytest.mark.parametrize("name", ["A", "B", "B2"])
def test_a_world_follows_from_its_seed_and_its_parts_share_no_scene(name, small, tmp_path):
    roots = [worlds.render_world(tmp_path / str(i), name, seed) for i, seed in enumerate([3, 3, 4])]
    files = [{f.relative_to(root): f.read_bytes() for f in root.rglob("*.*")} for root in roots]
    assert files[0] == files[1] and files[0].keys() == files[2].keys() != set()
    assert files[0] != files[2]
    seen = []
    for split, number in small.items():
        entries = read_annotations(roots[0] / f"en_{split}.json")
        assert len(entries) == number
        seen += [frozenset(captions) for _, captions in entries]
    assert len(set(seen)) == sum(small.values())
    assert worlds.render_world(roots[0], name, seed=3) == roots[0]


def test_the_other_world_has_other_words_for_what_tells_images_apart(small, tmp_path):
    def words(name):
        entries = read_annotations(worlds.render_world(tmp_path / name, name, 0) / "en_train.json")
        texts = " ".join(caption for _, captions in entries for caption in captions)
        return set("".join(c if c.isalpha() else " " for c in texts.lower()).split())

    phrases = [p for values in worlds.demo.WORDINGS["en"].words.values() for p in values]
    telling = {word for phrase in phrases for word in phrase.split()} - {"in", "at", "the", "on"}
    assert words("A") & telling and words("B") & telling
    assert not words("B2") & telling


def test_hues_are_turned_by_a_quarter():
    look = worlds.WORLDS["B"].look._replace(noise=(0, 0))
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    turned = np.array(worlds.shifted(red, look, np.random.default_rng(0)))
    # 90 degrees after red, halfway from yellow (60) to green (120).
    np.testing.assert_allclose(turned[4, 4], [100, 200, 0], atol=2)


def point(setting, gained, kept):
    """Of two worlds and two seeds; test scores tell nothing about those of validation."""
    scores = {
        world: [
            {"gained": {"val": g, "test": 100 - g}, "kept": {"val": k, "test": 100 - k}}
            for g, k in zip(gained[world], kept[world], strict=True)
        ]
        for world in fine_tuning.WORLDS
    }
    return fine_tuning.Point("family", setting, 1.0, scores)


percent = st.integers(0, 100).map(float)
by_world = st.fixed_dictionaries({w: st.tuples(percent, percent) for w in fine_tuning.WORLDS})


@given(st.lists(st.tuples(by_world, by_world), max_size=6), percent)
def test_the_setting_is_chosen_on_validation_and_holds_in_both_worlds(scores, floor):
    points = [point(str(i), *both) for i, both in enumerate(scores)]
    allowed = [
        i
        for i, (_, kept) in enumerate(scores)
        if min(sum(kept[world]) / 2 for world in kept) >= floor
    ]
    chosen = fine_tuning.choose(points, floor)
    if not allowed:
        assert chosen is None
        return
    overall = {i: mean(sum(values) / 2 for values in scores[i][0].values()) for i in allowed}
    assert overall[int(chosen.setting)] == max(overall.values())


def test_results_are_printed_and_drawn(tmp_path, capsys):
    gained, kept = (dict.fromkeys(fine_tuning.WORLDS, v) for v in [(90.0, 80.0), (95.0, 93.0)])
    points = [
        fine_tuning.Point(family, setting, alpha, point("", gained, kept).scores)
        for family, setting in fine_tuning.all_settings()
        for alpha in ((1.0,) if family == "open_clip" else fine_tuning.ALPHAS)
    ]
    before = [{name: {"test": 50.0} for name in ("A", "B", "B2")}] * 2
    fine_tuning.print_points(points, before)
    fine_tuning.print_choices(points)
    printed = capsys.readouterr().out
    assert "| before fine-tuning" in printed and "15.00 ± 7.07" in printed
    assert "chosen on validation to keep 90 of A" in printed
    fine_tuning.plot(points, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"


def test_open_clip_reads_what_is_written_for_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    captions = ['two "big" dogs', "a\ttab", "'quoted'", "一只狗"]
    (tmp_path / "en_train.json").write_bytes(annotations_json([("images\\1.jpg", captions)]))
    assert open_clip_training.write_csv(tmp_path, tmp_path / "train.csv") == len(captions)
    table = pandas.read_csv(tmp_path / "train.csv", sep="\t")
    assert table["title"].tolist() == captions
    assert table["filepath"].unique().tolist() == [str(tmp_path.resolve() / "images" / "1.jpg")]


def test_open_clip_has_the_same_model_with_a_shorter_context(tmp_path):
    ours = create_model("ViT-demo")
    save_weights(ours, tmp_path / "weights.pth")
    start = open_clip_training.cut_context(tmp_path / "weights.pth", 40, tmp_path / "start.pt")
    open_clip_training.write_model_config(tmp_path / "ViT-demo.json", context_length=40)
    open_clip.add_model_config(tmp_path)
    theirs = open_clip.create_model("ViT-demo", pretrained=str(start))
    images, tokens = torch.randn(2, 3, 64, 64), tokenize(["a red ball", "two dogs"])
    ours = build_model({k: v.half().float() for k, v in ours.state_dict().items()})
    torch.testing.assert_close(theirs.encode_image(images), ours.encode_image(images))
    torch.testing.assert_close(theirs.encode_text(tokens[:, :40].long()), ours.encode_text(tokens))


def test_scores_in_parts_are_those_of_the_parts(tmp_path):
    data = render_demo(tmp_path / "data", n_train=4, n_val=10)
    entries = [*read_annotations(data / "en_val.json")]
    entries[7] = (entries[7][0], entries[1][1][:2])  # texts of another part
    entries[3] = (entries[3][0], entries[2][1])  # and of the same one
    torch.manual_seed(0)
    model = create_model("ViT-demo")
    found = []
    for part in (entries, entries[:5], entries[5:]):
        (data / "en_val.json").write_bytes(annotations_json(part))
        dataset = Flickr8kDataset(data, split="val", model=model)
        if part is entries:
            found += [runs.score(model, dataset), *runs.score_in_parts(model, dataset, 5)]
        tokens = dataset.tokens
        features = encode_images(model, dataset, 4, 0), encode_texts(model, tokens)
        expected = score_features(*features, dataset.img_to_txt, dataset.txt_to_img)
        assert found.pop(0) == expected.as_dict()
