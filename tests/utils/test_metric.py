"""Retrieval scores against their definition, written out query by query."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from definitions import by_definition
from hypothesis import given, settings
from hypothesis import strategies as st

from flickr8k.render_demo import render_demo
from models.clip_utils import create_model
from models.errors import InputError
from utils import Flickr8kDataset
from utils.metric import compute_metrics, main
from utils.retrieval.scores import score_features
from utils.runs.checkpoint import save_weights, write_json

K_VALUES = (1, 2, 3, 5, 10, 50)


@st.composite
def retrieval_problems(draw):
    """Few distinct scores, so that many tie, and images with one to six captions."""
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    seed, levels = draw(st.integers(0, 2**31)), draw(st.integers(1, 12))
    random = np.random.default_rng(seed)
    images, texts = len(counts), sum(counts)
    owner = random.permutation(np.repeat(np.arange(images), counts))
    img2txt = {i: np.flatnonzero(owner == i).tolist() for i in range(images)}
    txt2img = dict(enumerate(owner.tolist()))
    scores = random.integers(0, levels, (images, texts)).astype(np.float32)
    other = random.integers(0, levels, (texts, images)).astype(np.float32)
    return scores, img2txt, other, txt2img


@settings(max_examples=300)
@given(retrieval_problems(), st.integers(0, 6))
def test_compute_metrics_is_the_definition(problem, many_positives):
    scores_i2t, img2txt, scores_t2i, txt2img = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.retrieval.ranking.MANY_POSITIVES", many_positives)
        metrics = compute_metrics(scores_i2t, img2txt, scores_t2i, txt2img, K_VALUES)
    assert metrics["i2t"] == pytest.approx(by_definition(scores_i2t, img2txt, K_VALUES))
    assert metrics["t2i"] == pytest.approx(by_definition(scores_t2i, txt2img, K_VALUES))


@settings(max_examples=100)
@given(retrieval_problems(), st.integers(1, 200))
def test_scores_of_features_are_the_same(problem, block_bytes):
    """Small whole numbers: products are exact, so ties tie; blocks of any size."""
    scores, img2txt, _, txt2img = problem
    random = np.random.default_rng(scores.size)
    images = torch.from_numpy(random.integers(-2, 3, (len(img2txt), 3)).astype(np.float32))
    texts = torch.from_numpy(random.integers(-2, 3, (len(txt2img), 3)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.retrieval.ranking.BLOCK_BYTES", block_bytes)
        scores = score_features(images, texts, img2txt, txt2img, K_VALUES)
    similarities = images @ texts.T
    metrics = compute_metrics(similarities, img2txt, similarities.T, txt2img, K_VALUES)
    assert scores.as_dict() == metrics


def test_average_precision_is_scikit_learns_when_k_covers_the_gallery():
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    scores = random.normal(size=(20, 60))
    img2txt = {i: list(range(3 * i, 3 * i + 3)) for i in range(20)}
    txt2img = {t: t // 3 for t in range(60)}
    expected = [
        average_precision_score(np.isin(np.arange(60), img2txt[i]), scores[i]) for i in range(20)
    ]
    metrics = compute_metrics(scores, img2txt, scores.T, txt2img, (60,))
    assert metrics["i2t"]["mAP@60"] == pytest.approx(100 * np.mean(expected))


def test_a_model_that_says_the_same_to_everything_gets_nothing():
    scores = np.zeros((10, 50))
    img2txt = {i: list(range(5 * i, 5 * i + 5)) for i in range(10)}
    metrics = compute_metrics(scores, img2txt, scores.T, {t: t // 5 for t in range(50)}, (1, 5))
    assert metrics["i2t"]["R@5"] == metrics["t2i"]["R@5"] == 0
    assert metrics["i2t"]["median_rank"] == 46
    assert metrics["t2i"]["median_rank"] == 10


@pytest.mark.parametrize("many_positives", [0, 9])
def test_minus_infinity_is_a_score_like_any_other(many_positives, monkeypatch):
    monkeypatch.setattr("utils.retrieval.ranking.MANY_POSITIVES", many_positives)
    scores = np.array([[-np.inf, 1.0, 0.0], [2.0, -np.inf, -np.inf]])
    img2txt = {0: [0], 1: [1, 2]}
    metrics = compute_metrics(scores, img2txt, scores.T, {0: 0, 1: 1, 2: 1}, (1, 2, 3))
    assert metrics["i2t"] == pytest.approx(by_definition(scores, img2txt, (1, 2, 3)))


@settings(max_examples=100)
@given(retrieval_problems(), st.integers(0, 9))
def test_a_k_beyond_the_gallery_takes_all_of_it(problem, beyond):
    scores_i2t, img2txt, *_ = problem
    images, texts = scores_i2t.shape
    k_values = (images, texts, texts + beyond)
    metrics = compute_metrics(*problem, k_values)
    assert metrics["i2t"] == pytest.approx(by_definition(scores_i2t, img2txt, k_values))
    for direction, gallery in (("i2t", texts), ("t2i", images)):
        assert metrics[direction][f"R@{texts + beyond}"] == 100
        of_all = metrics[direction][f"mAP@{gallery}"]
        assert metrics[direction][f"mAP@{texts + beyond}"] == pytest.approx(of_all)


@pytest.mark.parametrize("k", [0, -1, 2.0, 1.5, "5", None, True, float("nan")])
def test_a_k_that_is_no_positive_integer_is_named(k):
    truth = {0: 0, 1: 1}
    with pytest.raises(InputError, match=r"k_values: .* is not a positive integer"):
        compute_metrics(np.eye(2), truth, np.eye(2), truth, (1, k))


@pytest.mark.parametrize("block_bytes", [1, 2**26])
def test_k_values_may_be_read_only_once_and_of_numpy(block_bytes, monkeypatch):
    monkeypatch.setattr("utils.retrieval.ranking.BLOCK_BYTES", block_bytes)
    features, truth = torch.eye(3), {0: 0, 1: 1, 2: 2}
    expected = compute_metrics(np.eye(3), truth, np.eye(3), truth, (1, 5))
    assert set(expected["t2i"]) == {"R@1", "R@5", "mAP@1", "mAP@5", "median_rank", "mean_rank"}
    for k_values in (iter((1, 5)), np.array([1, 5])):
        assert compute_metrics(np.eye(3), truth, np.eye(3), truth, k_values) == expected
    for k_values in (iter((1, 5)), np.array([1, 5])):
        found = score_features(features, features, truth, truth, k_values)
        assert found.as_dict() == expected


@pytest.mark.parametrize("dtype", [np.int64, bool, np.float16])
@pytest.mark.parametrize("many_positives", [0, 9])
def test_scores_of_any_number_format(dtype, many_positives, monkeypatch):
    monkeypatch.setattr("utils.retrieval.ranking.MANY_POSITIVES", many_positives)
    scores = np.array([[1, 0, 0], [0, 1, 1]])
    img2txt, txt2img = {0: 0, 1: [1, 2]}, {0: 0, 1: 1, 2: 1}
    metrics = compute_metrics(scores.astype(dtype), img2txt, scores.T.astype(dtype), txt2img, (1,))
    assert metrics["i2t"] == pytest.approx(by_definition(scores, img2txt, (1,)))


@pytest.mark.parametrize(
    "img2txt, message",
    [
        ({0: [0], 1: []}, "query 1 has no positive"),
        ({0: [0]}, "query 1 has no positive"),
        ({0: [0], 2: [1]}, "query 1 has no positive"),
        ({0: [0], 1: [2]}, "2 is not among the 2"),
        ({0: [0], 1: [-1]}, "-1 is not among the 2"),
        ({0: [0], 1: [1, 0, 1]}, "query 1 has the same positive twice"),
        ({0: [0], 1: [0.5]}, "should be integers"),
        ({0: [0], 1: [1], 2: [0]}, "of 3 queries, where 2 have scores"),
    ],
)
def test_unusable_positives_are_named(img2txt, message):
    with pytest.raises(InputError, match=message):
        compute_metrics(np.eye(2), img2txt, np.eye(2), {0: 0, 1: 1})


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3), (3, 3)), ((2,), (2,))])
def test_scores_of_shapes_that_do_not_match(shapes):
    first, second = (np.zeros(shape) for shape in shapes)
    with pytest.raises(InputError, match=r"scores_t2i \[[\d, ]+\] \[texts, images\]"):
        compute_metrics(first, {0: 0, 1: 1}, second, {0: 0, 1: 1, 2: 1})


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_score(shape):
    scores = np.zeros(shape)
    with pytest.raises(InputError, match="nothing to score"):
        compute_metrics(scores, {}, scores.T, {})


def test_nan_is_refused():
    scores = np.array([[1.0, np.nan], [0.0, 1.0]])
    with pytest.raises(InputError, match="NaN"):
        compute_metrics(scores, {0: 0, 1: 1}, scores.T, {0: 0, 1: 1})


# --- the script -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights in a run, beside a data set of 8 validation images."""
    work = tmp_path_factory.mktemp("metric")
    render_demo(work / "data", n_train=2, n_val=8)
    weights = work / "logs" / "a run" / "weights" / "last.pth"
    torch.manual_seed(0)
    save_weights(create_model("ViT-demo"), weights)
    return weights


@pytest.fixture
def score(trained, monkeypatch, capsys):
    """Runs the script on these weights of a run that was started with `run`; what it prints."""

    def call(*arguments: object, run: object) -> str:
        write_json(trained.parents[1] / "arguments.json", run)
        monkeypatch.chdir(trained.parents[3])
        command = ["metric.py", "--weights", trained, "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in command])
        main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("language, captions", [("en", 40), (["cn"], 40), (["en", "cn"], 80)])
def test_script_scores_on_what_the_run_was_trained_on(trained, score, language, captions):
    run = {"dataset_path": str(trained.parents[3] / "data"), "language": language}
    assert f"8 images, {captions} captions" in score(run=run)


@pytest.fixture(scope="module")
def correlated(tmp_path_factory):
    """Weights with a mean recall near 33% on 1,000 images of the demo set, which lie beside them:
    the towers are random, and their projections the canonical correlations (Hotelling 1936) of the
    60 strongest components of what they give for these images and captions."""
    root = render_demo(tmp_path_factory.mktemp("correlated"), n_train=2, n_val=1000)
    entries = json.loads((root / "en_val.json").read_text("utf-8"))
    entries = [{**entry, "caption": entry["caption"][0]} for entry in entries]
    (root / "en_val.json").write_text(json.dumps(entries), "utf-8")
    torch.manual_seed(0)
    model, dataset = create_model("ViT-demo").eval(), Flickr8kDataset(root, split="val")
    dataset.prepare_for(model)
    (pixels,) = dataset.batches([list(range(1000))], num_workers=0)
    of_images, of_texts = model.visual.proj, model.text_projection
    with torch.no_grad():
        for projection in (of_images, of_texts):
            projection.copy_(torch.eye(*projection.shape))
        images = model.encode_image(model.preprocess.normalize(pixels))[:, : len(of_images)]
        texts = model.encode_text(dataset.tokens[:])[:, : len(of_texts)]
        u, to_u = strongest_components(images, model.visual.ln_post)
        w, to_w = strongest_components(texts, model.ln_final)
        left, _, right = torch.linalg.svd(u.T @ w)
        of_images.zero_()[:, :60] = to_u @ left
        of_texts.zero_()[:, :60] = to_w @ right.T
    save_weights(model, weights := root / "weights.pth")
    return weights


def strongest_components(features: torch.Tensor, norm: torch.nn.LayerNorm):
    """The 60 strongest of `features` `[n, c]`, which come from `norm` and so have a mean of zero
    from now on: orthonormal `[n, 60]`, and the matrix that makes them of the features."""
    norm.bias -= features.mean(dim=0)
    u, s, v = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
    return u[:, :60], v[:60].T / s[:60]


@pytest.mark.slow
def test_script_in_mixed_precision_finds_what_float32_finds(correlated, score, tmp_path):
    """Of 1,000 images; of a trained model's recalls the largest difference is 0.1 points."""
    found = []
    for number, option in enumerate(([], ["--use_amp"])):
        file = tmp_path / f"{number}.json"
        score("--weights", correlated, "--dataset_path", correlated.parent, "--language", "en",
              "--json", file, *option, run={})  # fmt: skip
        found.append(json.loads(file.read_text()))
    exact, mixed = (
        [scores[way][f"R@{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)] for scores in found
    )
    assert found[0] != found[1] and np.mean(exact) > 20
    assert np.mean(mixed) == pytest.approx(np.mean(exact), abs=0.5)


def test_script_takes_the_folder_of_a_run_for_its_best_weights(trained, score):
    shutil.copy(trained, best := trained.with_name("best_epoch_weights.pth"))
    run = {"dataset_path": str(trained.parents[3] / "data"), "language": "cn"}
    assert "8 images, 40 captions" in score("--weights", trained.parents[1], run=run)
    best.unlink()


def test_script_counts_shared_captions_and_can_score_as_other_programs_do(trained, score):
    """Of eight images four have each of two captions. Whatever the model, one of four positives
    is among the first five of eight; a text's three twins stand before it where it alone is right,
    and one image alone can be the first for all four."""
    data = trained.parents[3] / "data"
    shutil.copytree(data, classes := data.with_name("classes"))
    images = [entry["image"] for entry in json.loads((data / "en_val.json").read_text("utf-8"))]
    texts = ["a shape", "a thing"] * 4
    entries = [{"image": i, "caption": t} for i, t in zip(images, texts, strict=True)]
    (classes / "en_val.json").write_text(json.dumps(entries), "utf-8")
    run = {"dataset_path": "classes", "language": "en"}
    shared = score("--json", "one.json", run=run)
    assert "8 of the captions belong to several images" in shared and "--plain_protocol" in shared
    plain = score("--json", "plain.json", "--plain_protocol", run=run)
    assert "several images" not in plain
    one, own = (json.loads((classes.parent / f"{n}.json").read_text()) for n in ("one", "plain"))
    assert one["i2t"]["R@5"] == one["t2i"]["R@5"] == 100
    assert own["i2t"]["R@3"] == 0 and own["t2i"]["R@1"] <= 25


def test_script_scores_on_what_it_is_told(score):
    run = {"dataset_path": "elsewhere", "language": "en"}
    arguments = ("--dataset_path", "data", "--language", "cn", "en", "cn")
    assert "8 images, 80 captions" in score(*arguments, run=run)
    assert "8 images, 80 captions" in score(*arguments, run="not asked for what is told")


def test_without_arguments_the_newest_run_is_scored_on_its_own_data(
    trained, monkeypatch, capsys, tmp_path
):
    run = shutil.copytree(trained.parents[1], tmp_path / "logs" / "run")
    write_json(run / "arguments.json",
               {"dataset_path": str(trained.parents[3] / "data"), "language": "cn"})  # fmt: skip
    (run / "weights" / "last.pth").rename(run / "weights" / "best_epoch_weights.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["metric.py"])
    main()
    printed = capsys.readouterr().out
    assert "8 images, 40 captions" in printed and "\nvalidation " in printed


def test_script_writes_a_report_of_the_run(trained, score):
    run = {"dataset_path": "data", "language": "en", "lr": 0.0123}
    printed = score("--report", "seen/report.html", run=run)
    page = (trained.parents[3] / "seen" / "report.html").read_text("utf-8")
    assert f"report written to {Path('seen/report.html')}" in printed
    assert page.count("<article") == 8 + 40  # a card for each image and each caption
    assert "0.0123" in page and str(trained) in page


@pytest.mark.parametrize(
    "run, arguments, message",
    [
        (("gone", "en"), [], "gone: no such folder; name the data with --dataset_path"),
        (("mine", "en"), [], "mine: no en_val.json in it, only cn_val.json; .* and --language"),
        (("data", "en"), ["--split", "test"], "data: no en_test.json in it"),
        (("data", "en"), ["--split", "train"], r"--split: .*choose from '?val'?, '?test'?"),
        (("data", ["en", "fr"]), [], "data: no fr_val.json in it, only cn_val.json, en_val.json"),
        (("gone", "en"), ["--dataset_path", "also gone"], "also gone: no such folder"),
        (("data", "en"), ["--weights", "gone.pth"], "gone.pth: neither a file nor"),
        (("data", "en"), ["--weights", "ViT-B/33"], "the names are RN50, RN101"),
        ((3, "en"), [], "arguments.json: should hold dataset_path and language"),
        (("data", None), [], "arguments.json: should hold dataset_path and language"),
        (
            ("data", "en"),
            ["--batch_size", "0"],
            "--batch_size: 0 is not an integer from 1 to 1,000,000,000",
        ),
        (("data", "en"), ["--batch_size", "1" + "0" * 19], "is not an integer from 1 to 1,000,0"),
        (("data", "en"), ["--batch_size", "1.5"], "1.5 is not an integer from 1 to 1,000,000,000"),
        (("data", "en"), ["--batch_size", "9" * 5000], r"--batch_size: 9{60} is not an integer"),
        (("data", "en"), ["--num_workers", "-1"], "-1 is not an integer from 0 to 256"),
        (("data", "en"), ["--language", "fr"], r"--language: .*choose from '?en'?, '?cn'?"),
        (("data", "en"), ["--dataset_path", " "], "--dataset_path: the path is empty"),
    ],
)
def test_script_names_what_it_cannot_use(trained, score, run, arguments, message):
    mine = trained.parents[3] / "mine"
    mine.mkdir(exist_ok=True)
    (mine / "cn_val.json").touch()
    with pytest.raises(InputError, match=message):
        score(*arguments, run=dict(zip(("dataset_path", "language"), run, strict=True)))
