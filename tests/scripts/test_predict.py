"""predict.py and predict_zero_shot.py, run as a user runs them."""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip_folders import siglip
from PIL import Image
from published import save_published
from script_runs import ROOT, error_line, run_script, set_variables

import predict
import predict_zero_shot
from flickr8k.render_demo import render_demo
from models import load, tokenize
from models.clip_utils import create_model
from models.errors import InputError
from models.preprocess import open_image
from predict_zero_shot import LABELS
from utils.retrieval.plots import draw_ranking
from utils.retrieval.ranking import Ranked
from utils.runs.checkpoint import save_weights, write_json

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a data set, and a run in logs/ that was trained on it."""
    work = tmp_path_factory.mktemp("predict")
    data = render_demo(work / "data", n_train=4, n_val=8)
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    torch.manual_seed(0)
    save_weights(create_model("ViT-demo"), weights)
    write_json(weights.parents[1] / "arguments.json", {"dataset_path": str(data), "language": "en"})
    return work


@pytest.fixture(scope="module")
def photo(work):
    return next((work / "data" / "images").glob("val_*.png"))


@pytest.fixture
def run(monkeypatch, capsys):
    """A function like `run_script` that calls the script's main() in this process."""

    def call(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        {"predict.py": predict, "predict_zero_shot.py": predict_zero_shot}[script].main()
        return subprocess.CompletedProcess(script, 0, *capsys.readouterr())

    return call


def test_zero_shot_prints_the_probabilities_of_the_labels(work, run):
    """It prints three lines in a format that must stay. The probabilities are the softmax of the
    logits, computed once more here."""
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    image = ROOT / "R_mAP.png"
    done = run("predict_zero_shot.py", image, "--weights", weights, cwd=work)
    _, first, second, third = done.stdout.splitlines()

    model, preprocess = load(weights, "cpu")
    with torch.no_grad():
        logits, _ = model(preprocess(open_image(image))[None], tokenize(LABELS))
    expected = np.exp(logits[0].double().numpy())
    expected /= expected.sum()

    printed = re.fullmatch(r"Label probs: \[\[([^\[\]]*)\]\]", first)
    assert [float(p) for p in printed[1].split()] == pytest.approx(expected, rel=1e-4)
    best = int(expected.argmax())
    label, probability = second.rsplit(": ", 1)
    assert label == LABELS[best] and float(probability) == pytest.approx(expected[best], rel=1e-4)
    assert third.startswith("image 0: ")
    pairs = ast.literal_eval(third.removeprefix("image 0: "))
    order = np.argsort(-expected)
    assert [label for label, _ in pairs] == [LABELS[i] for i in order]
    assert [p for _, p in pairs] == pytest.approx(expected[order], rel=1e-4)
    for _, p in pairs:  # as float32 prints, such as 0.9547376
        assert f", {np.float32(p)!s})" in third


def test_zero_shot_takes_a_published_archive_any_labels_and_any_file_name(work, photo, run):
    torch.manual_seed(1)
    archive = save_published(create_model("ViT-demo").state_dict(), work / "published.pt")
    odd = work / "ein Bild 图片.png"
    odd.write_bytes(photo.read_bytes())
    done = run(
        "predict_zero_shot.py", odd.name, "--weights", archive, "--labels", "a dog", "一只猫",
        cwd=work,
    )  # fmt: skip
    assert done.stdout.startswith(f"weights: {archive}\n")
    assert len(done.stdout.splitlines()) == 4 and "一只猫" in done.stdout


def test_a_template_stands_around_each_label(work, photo, run):
    """One template does what writing the whole sentences does, to the last digit; of several, the
    normalised features are averaged, computed once more here."""
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    templates, labels = ["a photo of a {}.", "{}, drawn"], ["dog", "cat"]
    (work / "one.txt").write_text(templates[0], "utf-8")
    (work / "two.txt").write_text("\n".join(templates), "utf-8")
    start = "predict_zero_shot.py", photo, "--weights", weights, "--labels"
    first = run(*start, *labels, "--templates", "one.txt", cwd=work).stdout.splitlines()[1]
    sentences = [templates[0].replace("{}", label) for label in labels]
    assert first == run(*start, *sentences, cwd=work).stdout.splitlines()[1]

    model, preprocess = load(weights, "cpu")
    with torch.no_grad():
        means = []
        for label in labels:
            texts = tokenize([template.replace("{}", label) for template in templates])
            features = model.encode_text(texts)
            means.append((features / features.norm(dim=1, keepdim=True)).mean(dim=0))
        image = model.encode_image(preprocess(open_image(photo))[None])[0]
        similarity = torch.stack([m @ image / (m.norm() * image.norm()) for m in means])
    expected = (model.logit_scale.exp() * similarity).softmax(0).tolist()
    done = run(*start, *labels, "--templates", "two.txt", cwd=work)
    printed = ast.literal_eval(done.stdout.splitlines()[3].removeprefix("image 0: "))
    assert dict(printed) == pytest.approx(dict(zip(labels, expected, strict=True)), rel=1e-4)


def test_zero_shot_finds_its_picture_from_any_folder(work, run):
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    printed = [
        run("predict_zero_shot.py", *image, "--weights", weights, cwd=work).stdout
        for image in ([], [ROOT / "R_mAP.png"])
    ]
    assert printed[0] == printed[1]


def test_predict_ranks_the_captions_it_is_given(work, photo, run):
    """A caption that is given twice has one probability."""
    texts = ["a dog", "a cat", "an old tree"]
    done = run("predict.py", photo, "--text", *texts, "a dog", cwd=work)
    lines = [line for line in done.stdout.splitlines() if re.match(r"\d\. ", line)]
    model, preprocess = load(work / "logs/a run/weights/best_epoch_weights.pth", "cpu")
    with torch.no_grad():
        logits, _ = model(preprocess(open_image(photo))[None], tokenize(texts))
    probabilities = logits[0].double().softmax(0)
    expected = probabilities.argsort(descending=True).tolist()
    for place, (line, i) in enumerate(zip(lines, expected, strict=True), 1):
        assert line.startswith(f"{place}. ") and line.endswith(texts[i])
        assert f"{probabilities[i]:7.2%}" in line
    picture = work / "logs" / "a run" / "predictions" / f"{photo.stem}.png"
    assert str(picture.relative_to(work)) in done.stdout.replace(os.sep, "/")
    assert Image.open(picture).format == "PNG"


def test_predict_chooses_among_the_validation_captions_of_its_data_set(work, photo, run):
    done = run("predict.py", photo, "--output", "out/ranking.jpg", cwd=work)
    captions = [
        line.split("  ")[-1] for line in done.stdout.splitlines() if re.match(r"\d\. ", line)
    ]
    assert len(captions) == 5
    validation = (work / "data" / "en_val.json").read_text("utf-8")
    assert all(f'"{caption}"' in validation for caption in captions)
    assert Image.open(work / "out" / "ranking.jpg").format == "JPEG"


def test_predict_asks_for_images_until_an_empty_line(work, photo):
    (work / "captions.txt").write_text("a dog\n\na cat\n", encoding="utf-8")
    done = run_script(
        "predict.py", "--captions_file", "captions.txt", cwd=work,
        stdin=f"{photo}\nnowhere.png\n'{photo}'\n\n{photo}\n",
    )  # fmt: skip
    assert done.stdout.count("picture: ") == 2
    assert "nowhere.png: no such image file" in done.stdout


def test_every_picture_of_predict_stays(work, photo):
    """Images of one name in two folders, one image twice, and names as long as systems take."""
    images = ["a/same.png", "b/same.png", "a/same.png", "a/" + "x" * 251 + ".png",
              "b/" + "x" * 251 + ".png", "a/" + "图" * 83 + ".png"]  # fmt: skip
    for image in images:
        (work / image).parent.mkdir(exist_ok=True)
        (work / image).write_bytes(photo.read_bytes())
    done = run_script("predict.py", "--text", "a", "b", cwd=work, stdin="\n".join(images))
    pictures = re.findall(r"picture: (.*\.png)", done.stdout)
    assert len({*pictures}) == len(images)
    assert [re.split(r"[\\/]", p)[-1] for p in pictures[:3]] == [
        "same.png", "same_2.png", "same_3.png"
    ]  # fmt: skip
    for picture in pictures:
        Image.open(work / picture).load()


@pytest.fixture
def error_of(work, monkeypatch):
    """A function that calls a script's main() in the folder `work`; it returns the message."""

    def call(main: Callable[[], None], *arguments: object) -> str:
        monkeypatch.chdir(work)
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        with pytest.raises(InputError) as caught:
            main()
        return str(caught.value)

    return call


def test_unusable_images_end_in_one_line(work):
    templates = error_line("predict_zero_shot.py", "--templates", "phot", cwd=work)
    assert "--templates phot: neither a file nor a set; did you mean photo?" in templates
    (work / "text.png").write_text("no image")
    assert "text.png: not an image" in error_line("predict.py", "text.png", cwd=work)
    assert "nowhere.png" in error_line("predict_zero_shot.py", "nowhere.png", cwd=work)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text"], "--text: expected at least one argument"),
        (["--text", "a", "--captions_file", "b.txt"], "--captions_file: not allowed with .*--text"),
        (["--captions_file", "gone.txt"], "gone.txt: no such file"),
        (["--captions_file", "none.txt"], "none.txt: no captions in it"),
        (
            ["--weights", "alone.pth"],
            "alone.pth: not of a run of train.py.* --text or --captions_file",
        ),
        (["--weights", "ViT-B/33"], "ViT-B/33: neither a file nor .* the names are RN50, RN101"),
        (["--weights", ""], "--weights: the path is empty"),
        (["--text", "a", "--output", "ranking.xyz"], "ranking.xyz: no format .* png"),
        (["--device", "gpu"], "--device gpu: there is none here, only .*cpu"),
    ],
)
def test_predict_names_the_argument_that_it_cannot_use(work, photo, error_of, arguments, message):
    (work / "none.txt").write_text("\n")
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    (work / "alone.pth").write_bytes(weights.read_bytes())
    assert re.search(message, error_of(predict.main, photo, *arguments))


def test_predict_reads_the_image_before_weights_and_captions(error_of, work):
    weights = work / "broken.pth"
    weights.write_text("no weights")
    arguments = ("nowhere.png", "--weights", weights)
    assert error_of(predict.main, *arguments) == "nowhere.png: no such image file or folder"


def test_predict_takes_the_captions_of_all_languages_of_its_run(work):
    weights = work / "elsewhere" / "weights" / "best_epoch_weights.pth"
    arguments = {"dataset_path": str(work / "data"), "language": ["cn", "en"]}
    save_weights(create_model("ViT-demo"), weights)
    write_json(weights.parents[1] / "arguments.json", arguments)
    captions = predict.read_captions(None, weights)
    entries = []
    for language in ("cn", "en"):
        entries += json.loads((work / "data" / f"{language}_val.json").read_text("utf-8"))
    assert captions == [caption for entry in entries for caption in entry["caption"]]

    write_json(weights.parents[1] / "arguments.json", arguments | {"language": ["en", "fr"]})
    with pytest.raises(
        InputError, match=r"no fr_val\.json in it, only .* --text or --captions_file"
    ):
        predict.read_captions(None, weights)


@pytest.mark.parametrize(
    "labels, message",
    [
        (["a dog", "a cat", "a dog"], "--labels: 'a dog' repeats 'a dog'"),
        (["A  dog", "a cat", "a dog "], "--labels: 'a dog ' repeats 'A  dog'"),
        ([], "--labels: expected at least one argument"),
        (["a dog", "word " * 99], "text 1 has 101 tokens, where 77 fit"),
    ],
)
def test_unusable_labels_are_named(work, photo, error_of, labels, message):
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    words = [photo, "--weights", weights, "--labels", *labels]
    assert message in error_of(predict_zero_shot.main, *words)


def test_the_remedy_for_a_long_label_is_one_that_the_script_has(work, photo, error_of):
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    words = photo, "--weights", weights, "--labels", "word " * 99
    assert error_of(predict_zero_shot.main, *words).endswith("...; shorten it")


def test_one_label_has_no_rival(work, photo, run):
    """Its probability is 1, whatever the model is; what it says is the cosine, computed here."""
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    done = run("predict_zero_shot.py", photo, "--weights", weights, "--labels", "a dog", cwd=work)
    model, preprocess = load(weights, "cpu")
    with torch.no_grad():
        image = model.encode_image(preprocess(open_image(photo))[None])
        (cosine,) = torch.cosine_similarity(image, model.encode_text(tokenize(["a dog"])))
    *_, probability, _, said = done.stdout.splitlines()
    assert probability == "a dog: 1.0"
    assert said.startswith("a single label has no rival, ")
    assert float(said.rsplit(" ", 1)[1]) == pytest.approx(cosine.item(), abs=6e-4)
    done = run("predict.py", photo, "--text", "a dog", cwd=work)
    assert "a single caption has no rival" in done.stdout and said.split()[-1] in done.stdout


def test_captions_that_the_model_reads_alike_share_no_probability(work, photo, run):
    """The three long ones differ after the 75 tokens that fit, and "A  Dog" in nothing that the
    tokenizer keeps. Their rows of tokens are equal, and so would be their probabilities."""
    long = [("word " * 75 + end) for end in ("one", "two", "three")]
    texts = ["a dog", *long, "A  Dog"]
    assert len({*map(tuple, tokenize(texts, truncate=True).tolist())}) == 2
    done = run("predict.py", photo, "--text", *texts, cwd=work)
    assert "3 of the captions cut: the model reads 75 tokens of each" in done.stdout
    assert "3 of the captions left out: the model reads them like another one" in done.stdout
    shares = [float(share) for share in re.findall(r"\d\. +(\S+)%", done.stdout)]
    assert len(shares) == 2 and sum(shares) == pytest.approx(100, abs=0.02)
    folder = run("predict.py", work / "data" / "images", "--text", *long, cwd=work)
    assert len(lines_of(folder)) == 10 and "2 of the captions left out" in folder.stdout


@pytest.mark.slow
def test_predict_takes_any_path_and_the_home_folder(work, photo):
    """Here no shell replaces the tilde: it is quoted, or typed when the script asks."""
    home = work / "home 家"
    home.mkdir()
    at_home = partial(set_variables, HOME=str(home), USERPROFILE=str(home))
    names = ["two words.png", "图片 一.png", "it's (1) [x] #5 100%.png"]
    for name in names:
        (home / name).write_bytes(photo.read_bytes())
    typed = [f"~/{names[0]}", *(f'"{home / name}"' for name in names[1:])]
    texts = ["--text", "a", "b"]
    run_script("predict.py", *texts, cwd=work, stdin="\n".join(typed), prepare=at_home)
    predictions = work / "logs" / "a run" / "predictions"
    assert {*names} <= {file.name for file in predictions.iterdir()}
    run_script("predict.py", f"~/{names[1]}", *texts, "--output", "~/ranking.png", cwd=work,
               prepare=at_home)  # fmt: skip
    assert (home / "ranking.png").is_file()


# Features and answers for other programs


def test_features_of_a_folder_are_written_in_its_order(work, photo, run, tmp_path):
    """Those of the model itself, rounded to float16; the second time none is encoded."""
    for name in ("b/2.png", "a/10.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(photo, tmp_path / name)
    Image.open(photo).rotate(90).save(tmp_path / "a" / "10.png")
    (tmp_path / "b" / "broken.png").write_text("no image")
    words = "predict.py", tmp_path, "--features", "out/f.npy"
    first, second = (run(*words, cwd=work).stdout for _ in range(2))
    assert "broken.png: not an image" in first and "3 features written to " in first
    assert "are cached in" in first and "are cached in" not in second
    names = (work / "out" / "f.names.txt").read_text("utf-8").splitlines()
    assert names == [str(tmp_path / name) for name in ("a/10.png", "b/2.png", "c.png")]
    model, preprocess = load(work / "logs" / "a run" / "weights" / "best_epoch_weights.pth", "cpu")
    with torch.no_grad():
        pixels = torch.stack([preprocess(open_image(name)) for name in names])
        own = torch.nn.functional.normalize(model.encode_image(pixels), dim=-1)
    assert np.load(work / "out" / "f.npy") == pytest.approx(own.numpy(), abs=1e-3)


def test_features_of_the_lines_of_a_file(work, run):
    """Also of a line that stands there twice, and of one that is cut."""
    lines = ["a dog", "word " * 99 + "end", "一只狗", "a dog"]
    (work / "lines.txt").write_text("\n\n".join(lines), "utf-8")
    words = "--captions_file", "lines.txt", "--features", "lines.npy"
    text = run("predict.py", *words, cwd=work).stdout
    assert "1 of the captions cut: the model reads 75 tokens" in text
    assert (work / "lines.names.txt").read_text("utf-8").splitlines() == lines
    model, _ = load(work / "logs" / "a run" / "weights" / "best_epoch_weights.pth", "cpu")
    with torch.no_grad():
        own = model.encode_text(tokenize(lines, truncate=True), normalize=True)
    assert np.load(work / "lines.npy") == pytest.approx(own.numpy(), abs=1e-3)


@pytest.fixture
def answer(work, photo, run):
    """A function that runs predict_zero_shot.py on three images, one of them broken, with the
    `weights`; it returns (the lines printed, rows by image, cosines of images and labels)."""
    folder = work / "answered"
    folder.mkdir(exist_ok=True)
    (folder / "broken.png").write_text("no image")
    for i, other in enumerate(sorted((work / "data" / "images").glob("*.png"))[:2]):
        shutil.copy(other, folder / f"图 {i}.png")

    def call(weights: Path, file: str, *arguments: object):
        words = "--weights", weights, "--labels", *THREE, "--csv", file, *arguments
        done = run("predict_zero_shot.py", "answered", *words, cwd=work)
        with (work / file).open(encoding="utf-8", newline="") as lines:
            rows = list(map(json.loads, lines) if file.endswith("jsonl") else csv.DictReader(lines))
        model, preprocess = load(weights, "cpu")
        with torch.no_grad():
            pixels = torch.stack([preprocess(open_image(folder / f"图 {i}.png")) for i in range(2)])
            images, texts = model.encode_image(pixels), model.encode_text(model.tokenize(THREE))
        cosines = torch.cosine_similarity(images[:, None].double(), texts[None].double(), dim=-1)
        return done.stdout, {Path(row["image"]).name: row for row in rows}, cosines

    return call


THREE = ["a dog", "a red, round circle", "星星"]


def test_a_folder_is_answered_in_a_csv_and_in_json_lines(work, answer):
    """Features are rounded to float16, of 11 bits: a logit by less than 1%."""
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    printed, rows, cosines = answer(weights, "out/a.csv")
    _, same, _ = answer(weights, "a.jsonl")
    assert "broken.png: not an image" in printed and "answers for 2 images written" in printed
    probabilities = (load(weights, "cpu")[0].logit_scale.exp() * cosines).softmax(dim=1)
    assert list(rows) == list(same) == ["图 0.png", "图 1.png"]
    for i, (of_csv, of_json) in enumerate(zip(rows.values(), same.values(), strict=True)):
        best = THREE[cosines[i].argmax()]
        assert of_csv["labels"] == best and of_json["labels"] == [best]
        for name, expected in (("similarity", cosines[i]), ("probability", probabilities[i])):
            found = [float(of_csv[f"{name}: {label}"]) for label in THREE]
            assert found == list(of_json[name].values())
            assert found == pytest.approx(expected.tolist(), abs=2e-3)


def test_labels_are_judged_each_on_its_own(work, answer, tmp_path):
    """A CLIP's by their cosines; a SigLIP's by their own probabilities, a sigmoid. The threshold is
    in the widest gap between scores, which rounding does not close."""
    siglip(tmp_path / "siglip")
    for weights in (work / "logs/a run/weights/best_epoch_weights.pth", tmp_path / "siglip"):
        _, _, scores = answer(weights, "a.csv")
        model, _ = load(weights, "cpu")
        if model.logit_bias is not None:
            scores = (model.logit_scale.exp() * scores + model.logit_bias).sigmoid()
        ordered = scores.flatten().sort().values.detach()
        widest = ordered.diff().argmax()
        threshold = (ordered[widest : widest + 2].mean()).item()
        _, rows, _ = answer(weights, "a.jsonl", "--threshold", threshold)
        expected = [
            [label for label, score in zip(THREE, row, strict=True) if score > threshold]
            for row in scores.tolist()
        ]
        assert [row["labels"] for row in rows.values()] == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["data"], "data: a folder; add --csv FILE"),
        (["nowhere.png", "--csv", "a.csv"], "nowhere.png: no such image file"),
        (["data", "--csv", "a.txt"], "a.txt: name a file that ends in .csv or .jsonl"),
        (["data", "--csv", "data/en_val.json/a.csv"], "en_val.json: cannot be written"),
        (["data", "--threshold", "30"], "--threshold: 30 is not a number from 0 to 1"),
        (["empty", "--csv", "a.csv"], "empty: there are no images in it"),
    ],
)
def test_answers_that_cannot_be_given_are_refused(work, error_of, arguments, message):
    (work / "empty").mkdir(exist_ok=True)
    assert message in error_of(predict_zero_shot.main, *arguments)


@pytest.mark.parametrize("size", [(1, 1), (10_000, 10), (10, 10_000)])
def test_any_picture_and_caption_can_be_drawn(tmp_path, size):
    captions = [
        "a dog " * 10_000,
        "x" * 10_000,
        "\ud800\0\x1b[2J",
        "$x^{2 \\frac",
        "👨\u200d👩 狗\n\t",
    ]
    ranked = [Ranked(caption, 0.2, 0.3) for caption in captions]
    draw_ranking(Image.new("RGB", size), ranked, tmp_path / "ranking.png")
    with Image.open(tmp_path / "ranking.png") as image:
        assert min(image.size) > 300


# Mixed precision


@pytest.fixture
def in_bfloat16(work, photo):
    """(texts, cosine of each with `photo`, its probability) of features that are computed in
    bfloat16, and then in float64. With those of float32 the probabilities are others."""
    model, preprocess = load(work / "logs" / "a run" / "weights" / "best_epoch_weights.pth", "cpu")
    texts, pixels = ["a dog", "a red circle"], preprocess(open_image(photo))[None]
    found = []
    for is_mixed in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            image, of_texts = model.encode_image(pixels), model.encode_text(tokenize(texts))
        similarity = torch.cosine_similarity(image.double(), of_texts.double())
        found.append((similarity, (model.logit_scale.exp() * similarity).softmax(dim=0)))
    (_, other), (similarity, probability) = found
    assert (other - probability).abs().max() > 3e-4
    return texts, similarity.tolist(), probability.tolist()


def test_zero_shot_in_mixed_precision_rounds_features_alone(work, photo, in_bfloat16, run):
    """Not their similarities and the probabilities, which 8 bits would round to 0.4%."""
    weights, (texts, _, expected) = work / "logs/a run/weights/best_epoch_weights.pth", in_bfloat16
    done = run("predict_zero_shot.py", photo, "--weights", weights, "--labels", *texts,
                      "--use_amp", cwd=work)  # fmt: skip
    printed = ast.literal_eval(done.stdout.splitlines()[3].removeprefix("image 0: "))
    assert dict(printed) == pytest.approx(dict(zip(texts, expected, strict=True)), rel=1e-4)


def test_captions_and_a_search_in_mixed_precision(work, photo, in_bfloat16, tmp_path, run):
    texts, similarity, probability = in_bfloat16
    done = run("predict.py", photo, "--text", *texts, "--use_amp", cwd=work)
    printed = re.findall(r"\. +(\S+)%  similarity (\S+)  (.*)", done.stdout)
    assert {text: float(percent) for percent, _, text in printed} == pytest.approx(
        {text: 100 * p for text, p in zip(texts, probability, strict=True)}, abs=6e-3
    )
    (tmp_path / "one").mkdir()
    shutil.copy(photo, tmp_path / "one")
    done = run("predict.py", tmp_path / "one", "--text", *texts, "--use_amp", cwd=work)
    assert "features of 1 images are cached in " in done.stdout
    assert [found for _, found, _ in lines_of(done)] == pytest.approx(similarity, abs=6e-4)


@pytest.mark.slow
def test_mixed_precision_is_right_on_a_cpu_without_bfloat16(work, photo, monkeypatch):
    """As oneDNN and torch compute where there are no instructions for it, on an x86 CPU."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    weights, labels = work / "logs/a run/weights/best_epoch_weights.pth", ["a dog", "a red circle"]
    start = "predict_zero_shot.py", photo, "--weights", weights, "--labels", *labels
    done = run_script(*start, cwd=work), run_script(*start, "--use_amp", cwd=work, fresh=True)
    lines = (printed.stdout.splitlines()[3].removeprefix("image 0: ") for printed in done)
    exact, mixed = (dict(ast.literal_eval(line)) for line in lines)
    assert mixed == pytest.approx(exact, abs=0.05) and mixed != exact


# Searching a folder


def lines_of(done) -> list[tuple[str, float, str]]:
    """(place, similarity, image) of the images that were printed."""
    found = re.findall(r"^ *(\d+)\. similarity (-?\d\.\d{3})  (.*)$", done.stdout, re.MULTILINE)
    return [(place, float(similarity), image) for place, similarity, image in found]


def test_a_folder_is_searched_for_each_text(work, tmp_path, run):
    """The ranking is that of the model's own features; the second time none is computed. Pictures
    are named by the folder and the query, without what Windows has in no name."""
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    shutil.copytree(work / "data" / "images", tmp_path / "found 图")
    (tmp_path / "found 图" / "broken.png").write_text("no image")
    folder = tmp_path / "found 图"
    texts = ['a <red> "square"?', "两个蓝色的圆"]
    first, second = (run("predict.py", folder, "--text", *texts, cwd=work) for _ in range(2))
    images = sorted(file for file in folder.iterdir() if file.name != "broken.png")
    model, preprocess = load(weights, "cpu")
    with torch.no_grad():
        pixels = torch.stack([preprocess(open_image(image)) for image in images])
        logits, _ = model(pixels, tokenize(texts))
    similarities = (logits / model.logit_scale.exp()).double().T
    assert lines_of(first) == lines_of(second) and len(lines_of(first)) == 20
    for number, of_text in enumerate(similarities):
        found = lines_of(first)[10 * number : 10 * number + 10]
        own = {
            str(image): similarity
            for image, similarity in zip(images, of_text.tolist(), strict=True)
        }
        assert [place for place, _, _ in found] == [str(place) for place in range(1, 11)]
        assert [s for _, s, _ in found] == pytest.approx([own[f] for _, _, f in found], abs=1e-3)
        worst, others = found[-1][1], own.keys() - {image for _, _, image in found}
        assert all(own[image] <= worst + 1e-3 for image in others)
    for done, end in ((first, ""), (second, "_2")):
        assert ("features of 12 images are cached in " in done.stdout) == (not end)
        (line,) = [line for line in done.stdout.splitlines() if "broken.png" in line]
        assert "not an image" in line
        pictures = [Path(picture) for picture in re.findall("picture: (.*)", done.stdout)]
        assert [picture.name for picture in pictures] == [
            f"found_图_a_red_square{end}.png", f"found_图_两个蓝色的圆{end}.png"
        ]  # fmt: skip
        for picture in pictures:
            assert Image.open(picture).format == "PNG" and picture.parent.name == "predictions"


def test_images_like_another_are_found(work, photo, tmp_path, run):
    """A copy of it is the most similar; the image itself is no answer."""
    folder = shutil.copytree(work / "data" / "images", tmp_path / "images")
    copy = shutil.copy(photo, folder / "a copy.png")
    done = run("predict.py", folder, "--similar", folder / photo.name, "--output",
                      tmp_path / "like.jpg", cwd=work)  # fmt: skip
    found = lines_of(done)
    assert found[0] == ("1", 1.0, str(copy)) and len(found) == 10
    assert str(folder / photo.name) not in {image for _, _, image in found}
    assert Image.open(tmp_path / "like.jpg").format == "JPEG"


SCORED = r"\d\. +(\d+\.\d\d)%  similarity (-?\d\.\d{3})  (.*)"


def test_captions_are_encoded_once(work, photo, run):
    (work / "two.txt").write_text("a dog\na cat\n", encoding="utf-8")
    first, second, other = (
        run("predict.py", photo, *given, cwd=work).stdout.splitlines()
        for given in (["--captions_file", "two.txt"],) * 2 + (["--text", "a dog", "a cat"],)
    )
    assert first[0] == second[0]
    assert first[1].startswith("features of 2 captions are cached in ")
    assert first[2:4] == second[1:3]
    # Features in float16, of 11 bits, may round a printed digit to the other side.
    kept, own = (
        {
            text: (float(probability), float(similarity))
            for probability, similarity, text in re.findall(SCORED, "\n".join(lines))
        }
        for lines in (second, other)
    )
    assert kept.keys() == own.keys() == {"a dog", "a cat"}
    for text in own:
        assert kept[text] == pytest.approx(own[text], abs=0.02)


def test_a_folder_in_which_nothing_can_be_read_ends_in_one_line(work, tmp_path):
    (tmp_path / "none").mkdir()
    arguments = ("--text", "a dog")
    line = error_line("predict.py", tmp_path / "none", *arguments, cwd=work)
    assert f"{tmp_path / 'none'}: there are no images in it" in line
    for name in ("1.jpg", "2.png"):
        (tmp_path / "none" / name).write_text("no image")
    line = error_line("predict.py", tmp_path / "none", *arguments, cwd=work)
    assert "none of its 2 images can be read" in line and "1.jpg: not an image" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["data"], "data: a folder; say what to search for: --text or --similar IMAGE"),
        (
            ["data", "--text", "a", "b", "--output", "x.png"],
            "--output is for one picture; give one",
        ),
        (["data", "--similar", "gone.png"], "gone.png: no such image file"),
        (["photos", "--text", "a"], "photos: no such image file or folder"),
        (["data", "--similar", "data"], "data: no such image file"),
        (["--similar", "gone.png"], "--similar searches a folder of images: name the folder"),
        (["data", "--similar", "a.png", "--text", "a"], "not allowed with"),
        (["data", "--text", "a", "--weights", "ViT-B/33"], "ViT-B/33: neither a file nor"),
        (
            ["data", "--captions_file", "gone.txt", "--weights", "ViT-B/32"],
            "gone.txt: no such file",
        ),
        (["--captions_file", "gone.txt", "--features", "f.npy"], "gone.txt: no such file"),
        (["--features", "f.npy"], "--features takes a FOLDER of images or a --captions_file"),
        (["data", "--text", "a", "--features", "f.npy"], "a --captions_file, nothing else"),
        (["data/en_val.json", "--features", "f.npy"], "en_val.json: no such folder; --features"),
        (["gone", "--features", "f.npy"], "gone: no such folder; --features takes a folder"),
        (["data", "--features", "f.npz"], "f.npz: name a file that ends in .npy or .parquet"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_before_weights_are_loaded(
    error_of, arguments, message
):
    assert message in error_of(predict.main, *arguments)
