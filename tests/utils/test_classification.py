"""Zero-shot classification and the linear probe, against transformers and scikit-learn."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import disturb, transformers_model
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from torch.nn.functional import normalize

from models.clip_utils import build_model, create_model, load
from models.config import OPENAI_MEAN, OPENAI_STD
from models.errors import InputError
from models.simple_tokenizer import chunks
from utils.classification import (
    Features,
    accuracy,
    choose_c,
    held_out,
    linear_probe,
    main,
    readable_features,
    zero_shot_classifier,
)
from utils.data.labelled_images import find_labelled_images
from utils.data.templates import TEMPLATE_SETS, read_templates
from utils.retrieval.plots import plot_confusion
from utils.runs.checkpoint import save_weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Weights, and scikit-learn's handwritten digits as class folders of images."""
    work = tmp_path_factory.mktemp("classification")
    torch.manual_seed(0)
    save_weights(create_model("ViT-demo"), work / "weights.pth")
    digits = load_digits(n_class=6)
    for i, (image, label) in enumerate(zip(digits.images[:600], digits.target, strict=False)):
        folder = work / "digits" / ("val" if i % 3 == 0 else "train") / f"digit_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    return work


@pytest.fixture
def classify(work, monkeypatch, capsys):
    """Runs the script on these weights; returns what it prints."""

    def call(*arguments: object) -> str:
        monkeypatch.chdir(work)
        command = ["classification.py", "--weights", "weights.pth", "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in command])
        main()
        return capsys.readouterr().out

    return call


# --- zero-shot ------------------------------------------------------------------------------------


def test_zero_shot_probabilities_are_those_of_transformers(tmp_path):
    """The embeddings of classes are averaged here as section 3.1.4 of the paper says. The images
    have the size that the model takes, so that nothing is resized."""
    torch.manual_seed(0)
    model = create_model("ViT-demo")
    disturb(model)
    model.eval()
    peer = transformers_model(model.state_dict())
    random = np.random.default_rng(0)
    pixels = []
    for i, name in enumerate(["a_cat", "dog", "hot air balloon"] * 2):
        pixels.append(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(pixels[i]).save(tmp_path / name / f"{i}.png")
    source = find_labelled_images(tmp_path)
    templates = ["{}", "a photo of a {}.", "the {} and another {}"]

    found = readable_features(model, replace(source, preprocess=model.preprocess), batch_size=4)
    classifier = zero_shot_classifier(model, source.classes, templates)
    ours = (model.logit_scale.exp() * found.images @ classifier.T).softmax(dim=1)

    tokenize = open_clip.get_tokenizer("ViT-B-32")
    images = (np.array(pixels) / 255 - OPENAI_MEAN) / OPENAI_STD
    images = torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2)
    classes = []
    with torch.no_grad():
        for label in ("a cat", "dog", "hot air balloon"):
            texts = [label, f"a photo of a {label}.", f"the {label} and another {label}"]
            features = peer.get_text_features(tokenize(texts)).pooler_output
            classes.append(normalize(normalize(features, dim=1).mean(dim=0), dim=0))
        features = normalize(peer.get_image_features(images).pooler_output, dim=1)
        logits = peer.logit_scale.exp() * features @ torch.stack(classes).T
    order = [0, 3, 1, 4, 2, 5]  # of the images, class by class
    torch.testing.assert_close(ours, logits.softmax(dim=1)[order], rtol=0, atol=1e-4)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_model_that_reads_fewer_tokens_says_the_same_of_short_texts():
    """Attention is causal: positions that no text reaches change nothing."""
    torch.manual_seed(0)
    model = create_model("ViT-demo").eval()
    labels, templates = ["dog", "cat"], TEMPLATE_SETS["ensemble"]
    expected = zero_shot_classifier(model, labels, templates)
    weights = model.state_dict()
    weights["positional_embedding"] = weights["positional_embedding"][:20]
    short = build_model(weights, replace(model.config, context_length=20))
    torch.testing.assert_close(zero_shot_classifier(short, labels, templates), expected)
    with pytest.raises(InputError, match="text 1 has 22 tokens, where 20 fit: 'dog dog"):
        zero_shot_classifier(short, ["cat", "dog " * 20])


@pytest.mark.parametrize("name", TEMPLATE_SETS)
def test_built_in_templates_are_different_texts_around_the_label(name):
    templates = read_templates(name)
    assert all(template.count("{}") == 1 for template in templates)
    assert len({*map(tuple, map(chunks, templates))}) == len(templates)
    if name.endswith("ensemble"):
        assert len(templates) >= 24


# --- accuracy -------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 12), st.integers(1, 4))
def test_accuracy_is_its_definition(seed, classes, n, levels):
    """With few different scores, so that many tie; by sorting and counting image by image."""
    random = np.random.default_rng(seed)
    scores, labels = random.integers(0, levels, (n, classes)), random.integers(0, classes, n)
    found = accuracy(torch.from_numpy(scores).float(), torch.from_numpy(labels))
    places = []
    confusion = np.zeros((classes, classes))
    for row, label in zip(scores, labels, strict=True):
        ranking = sorted(range(classes), key=lambda c: (-row[c], c))
        places.append(ranking.index(label))
        confusion[label, ranking[0]] += 1
    assert found.top1 == pytest.approx(100 * np.mean([place < 1 for place in places]))
    assert found.top5 == pytest.approx(100 * np.mean([place < 5 for place in places]))
    right = [
        100 * np.mean([places[i] == 0 for i in range(n) if labels[i] == c])
        for c in sorted(set(labels))
    ]
    assert found.mean_per_class == pytest.approx(np.mean(right))
    assert [share for share in found.per_class if share == share] == pytest.approx(right)
    assert np.array_equal(found.confusion, confusion)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(6, 20), st.integers(1, 50))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_accuracy_is_scikit_learns(seed, classes, n):
    random = np.random.default_rng(seed)
    scores, labels = random.normal(size=(n, classes)), random.integers(0, classes, n)
    found = accuracy(torch.from_numpy(scores), torch.from_numpy(labels))
    every = range(classes)
    for k, ours in ((1, found.top1), (5, found.top5)):
        theirs = top_k_accuracy_score(labels, scores, k=k, labels=every)
        assert ours == pytest.approx(100 * theirs)
    predicted = scores.argmax(axis=1)
    assert found.mean_per_class == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    assert np.array_equal(found.confusion, confusion_matrix(labels, predicted, labels=every))


def test_nothing_to_score_and_scores_that_are_not_numbers():
    with pytest.raises(InputError, match="no images that can be read"):
        accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match="NaN"):
        accuracy(torch.tensor([[0.0, torch.nan]]), torch.tensor([0]))


# --- the linear probe -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_the_probe_is_scikit_learns_on_the_same_features(work, classify, monkeypatch, tmp_path):
    """The features of random weights tell digits apart far better than guessing (16.7%), as random
    projections of pixels do."""
    chosen = []
    monkeypatch.setattr(
        "utils.classification.choose_c", lambda *train: chosen.append(choose_c(*train)) or chosen[0]
    )
    printed = classify("--data", "digits", "--linear_probe", "--json", tmp_path / "scores.json")
    model, preprocess = load(work / "weights.pth", "cpu")
    sources = (find_labelled_images(work / "digits", is_train) for is_train in (True, False))
    train, scored = (readable_features(model, replace(s, preprocess=preprocess)) for s in sources)
    theirs = LogisticRegression(C=chosen[0], max_iter=1000)
    theirs.fit(train.images.numpy(), train.labels.numpy())
    predicted = theirs.predict(scored.images.numpy())
    assert "digits_val: 200 images of 6 classes, templates: 1" in printed
    assert f"trained on 400 images, C = {chosen[0]:.3g}" in printed
    found = json.loads((tmp_path / "scores.json").read_text("utf-8"))
    right = predicted == scored.labels.numpy()
    assert found["linear_probe"]["top1"] == pytest.approx(100 * right.mean()) and right.mean() > 0.7
    expected = 100 * balanced_accuracy_score(scored.labels, predicted)
    assert found["linear_probe"]["mean_per_class"] == pytest.approx(expected)
    assert found["classes"] == [f"digit {label}" for label in range(6)]
    per_class = [100 * right[scored.labels == label].mean() for label in range(6)]
    assert found["linear_probe"]["per_class"] == pytest.approx(per_class)
    assert found["chance"]["top5"] == pytest.approx(100 * 5 / 6)
    assert f"{found['zero_shot']['top1']:.2f}" in printed
    zero_shot = zero_shot_classifier(model, found["classes"], ["a photo of a {}."])
    of_texts = accuracy(scored.images @ zero_shot.T, scored.labels)
    assert found["zero_shot"]["top5"] == pytest.approx(of_texts.top5)


@pytest.fixture
def clouds():
    """Points of three classes around three centres, half as far apart as they are wide."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 60)
    points = random.normal(size=(180, 8)) + 0.5 * random.normal(size=(3, 8))[labels]
    return Features(torch.from_numpy(points).float(), torch.from_numpy(labels))


def test_the_strength_is_the_best_on_the_images_held_out(clouds):
    """Of all that the search of appendix A.3 may try, within an eighth of a power of ten."""
    x, y = clouds.images.numpy(), clouds.labels.numpy()
    held = held_out(y)
    assert [held[y == label].sum() for label in range(3)] == [12, 12, 12]
    assert not any(held[y == label][:12].all() for label in range(3))  # files may be in an order
    exponents = np.arange(-48, 49) / 8
    score = {}
    for e in exponents:
        theirs = LogisticRegression(C=10**e, max_iter=1000).fit(x[~held], y[~held])
        score[e] = theirs.score(x[held], y[held])
    chosen = round(8 * np.log10(choose_c(x, y))) / 8
    assert 10**chosen == pytest.approx(choose_c(x, y))
    coarse = [score[e] for e in range(-6, 7, 2)]
    near = [score[e] for e in (chosen - 1 / 8, chosen + 1 / 8) if abs(e) <= 6]
    assert score[chosen] >= max(*coarse, *near) and min(coarse) < score[chosen]


def test_of_equally_good_strengths_it_is_the_smallest_that_was_tried(clouds):
    """Classes so far apart that every C separates them: it is the first, 1e-6."""
    apart = clouds.images.numpy() + 100 * np.eye(8)[clouds.labels]
    assert choose_c(apart, clouds.labels.numpy()) == pytest.approx(1e-6)


def test_two_classes_and_classes_with_one_image(clouds):
    two = clouds.labels < 2
    two = Features(clouds.images[two], clouds.labels[two])
    scores, c = linear_probe(two, clouds.images, ["a", "b"])
    theirs = LogisticRegression(C=c, max_iter=1000).fit(two.images, two.labels)
    assert np.array_equal(scores.argmax(dim=1), theirs.predict(clouds.images))
    few = Features(clouds.images[[0, 60, 61]], clouds.labels[[0, 60, 61]])
    scores, _ = linear_probe(few, clouds.images, ["a", "b"])
    assert scores.shape == (180, 2)
    with pytest.raises(InputError, match="no class has two training images"):
        linear_probe(Features(few.images[:2], few.labels[:2]), clouds.images, ["a", "b"])
    with pytest.raises(InputError, match="'c': there is no training image of this class"):
        linear_probe(few, clouds.images, ["a", "b", "c"])


# --- the script -----------------------------------------------------------------------------------


def test_script_draws_the_confusions_and_takes_templates_and_names(work, classify):
    (work / "templates.txt").write_text("一张{}的照片\n\nthe number {}\n", "utf-8")
    (work / "names.txt").write_text("零\n一\n二\n三\n四\n$x^{2 \\frac\n", "utf-8")
    printed = classify("--data", "digits/val", "--templates", "templates.txt", "--classnames",
                       "names.txt", "--plot", "confusion.png")  # fmt: skip
    assert "val: 200 images of 6 classes, templates: 2" in printed
    with Image.open(work / "confusion.png") as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_script_in_mixed_precision_rounds_features_alone(work, classify, monkeypatch):
    """Not their products, which 8 bits would round to 0.4%."""
    scored = []
    monkeypatch.setattr(
        "utils.classification.accuracy", lambda *given: scored.append(given[0]) or accuracy(*given)
    )
    classify("--data", "digits/val", "--use_amp")
    model, preprocess = load(work / "weights.pth", "cpu")
    images = replace(find_labelled_images(work / "digits"), preprocess=preprocess)
    products = []
    for is_mixed in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            classes = zero_shot_classifier(model, images.classes, ["a photo of a {}."])
            features = readable_features(model, images).images
        products.append((features.double() @ classes.double().T).float())
    torch.testing.assert_close(scored[0], products[0], rtol=0, atol=1e-6)
    assert (products[0] - products[1]).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_script_writes_the_answer_for_each_image(work, classify, monkeypatch):
    """With the probabilities of scikit-learn, and of the softmax in float64."""
    data = work / "two"
    for own in product(("train", "val"), ("digit_0", "digit_1")):
        shutil.copytree((work / "digits").joinpath(*own), data.joinpath(*own))
    (data / "val" / "digit_0" / "broken.png").write_text("no image")
    monkeypatch.setattr("utils.classification.choose_c", lambda *train: 1.0)
    classify("--data", data, "--linear_probe", "--csv", "answers.csv")
    classify("--data", data, "--csv", "answers.jsonl")
    with (work / "answers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    alone = [json.loads(line) for line in (work / "answers.jsonl").read_text("utf-8").splitlines()]

    model, preprocess = load(work / "weights.pth", "cpu")
    sources = (find_labelled_images(data, is_train) for is_train in (True, False))
    train, scored = (readable_features(model, replace(s, preprocess=preprocess)) for s in sources)
    texts = zero_shot_classifier(model, ["digit 0", "digit 1"], ["a photo of a {}."])
    logits = model.logit_scale.exp().double() * scored.images.double() @ texts.double().T
    probe = LogisticRegression(C=1.0, max_iter=1000).fit(train.images.numpy(), train.labels.numpy())
    theirs = {"zero-shot": logits.softmax(dim=1).detach().numpy(),
              "linear probe": probe.predict_proba(scored.images.numpy())}  # fmt: skip
    assert [row["path"] for row in rows] == [row["path"] for row in alone] == list(scored.paths)
    assert [row["label"] for row in rows] == [f"digit {label}" for label in scored.labels]
    assert not any(row["path"].endswith("broken.png") for row in rows)
    for way, expected in theirs.items():
        found = [float(row[f"probability of the {way}"]) for row in rows]
        assert found == pytest.approx(expected.max(axis=1), abs=1e-4)
        predicted = [row[f"prediction of the {way}"] for row in rows]
        assert predicted == [f"digit {i}" for i in expected.argmax(axis=1)]
    assert [row["prediction"] for row in alone] == [
        row["prediction of the zero-shot"] for row in rows
    ]


def test_any_number_of_classes_can_be_drawn(tmp_path):
    """The second panel is of a class without images."""
    confusions = {"one": torch.eye(120), "other": torch.zeros(120, 120)}
    plot_confusion(confusions, [f"class {i}" for i in range(120)], tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as image:
        assert image.width > 1.5 * image.height > 900


@pytest.mark.parametrize("name", ["one", "One "])
def test_script_warns_of_classes_that_share_a_name(work, classify, name):
    (work / "same.txt").write_text(f"one\ntwo\n{name}\nfour\nfive\nsix\n", "utf-8")
    printed = classify("--data", "digits/val", "--classnames", "same.txt")
    assert f"warning: several classes are called {name.strip()};" in printed


def test_script_says_that_synsets_are_no_words(work, classify):
    for number, label in enumerate(("n01440764", "n01443537")):
        if not (work / "synsets" / label).exists():
            shutil.copytree(work / "digits/val" / f"digit_{number}", work / "synsets" / label)
    names = work / "mapping.txt"  # as Kaggle has it, in LOC_synset_mapping.txt
    names.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    hint = "hint: n01440764 is not a word, and neither are the other classes; give their names with"
    assert hint in classify("--data", "synsets")
    assert "hint:" not in classify("--data", "synsets", "--classnames", names)
    assert "hint:" not in classify("--data", "digits")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: --data"),
        (["--data", "gone"], "--data gone: no such folder, and no data set of torchvision; the"),
        (["--data", "weights.pth"], "--data weights.pth: is not a folder, and no data set of"),
        (["--data", "cifar_10"], r"did you mean cifar10 or cifar100\?; the sets are caltech101"),
        (["--data", "digits", "--templates", "phot"], "did you mean photo.*; the sets are none,"),
        (["--data", "digits", "--templates", "plain.txt"], "plain.txt: the template 'a photo' has"),
        (["--data", "digits/val", "--linear_probe"], "train: no class folders"),
        (["--data", "digits", "--weights", "gone.pth"], "gone.pth: neither a file nor the name"),
        (["--data", "digits", "--plot", "c.xyz"], "c.xyz: no format for pictures"),
        (["--data", "digits", "--batch_size", "0"], "--batch_size: 0 is not an integer from 1 to"),
    ],
)
def test_script_names_what_it_cannot_use(work, classify, arguments, message):
    (work / "plain.txt").write_text("a photo\n")
    with pytest.raises(InputError, match=message):
        classify(*arguments)


@pytest.mark.parametrize(
    "model, template", [("ViT-demo", "a photo of a {}."), ("cn-demo", "一张{}的照片。")]
)
def test_classes_are_described_in_the_language_of_the_model(
    work, classify, monkeypatch, model, template
):
    used = []
    monkeypatch.setattr(
        "utils.classification.zero_shot_classifier",
        lambda model, labels, templates: (
            used.append(templates) or zero_shot_classifier(model, labels, templates)
        ),
    )
    save_weights(create_model(model), work / model / "weights.pth")
    for given_now in ([], ["--templates", "none"]):
        classify("--weights", f"{model}/weights.pth", "--data", "digits/val", *given_now)
    assert used == [[template], ["{}"]]


def test_without_weights_it_takes_the_newest_run(work, monkeypatch, capsys):
    save_weights(create_model("ViT-demo"), work / "logs/a/weights/best_epoch_weights.pth")
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["classification.py", "--data", "digits", "--device", "cpu"])
    main()
    assert "zero-shot" in capsys.readouterr().out
