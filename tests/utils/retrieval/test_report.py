"""The report: the answers are a sort's, what users wrote is text, and a browser shows it."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import CHROMIUM, Page
from definitions import ranking
from PIL import Image

from models.errors import InputError
from utils import Flickr8kDataset
from utils.metric import compute_metrics
from utils.retrieval.encode import Features
from utils.retrieval.report import write_report
from utils.retrieval.scores import score_features

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "<script>document.title = 'stolen'</script>",
    "</style></script></title><img src=http://localhost/x onerror=\"document.title='stolen'\">",
    "\" onmouseover='document.title=1' x=\"",
    "&lt;b&gt; &amp; <!-- ]]> {{ 7 * 7 }} {% raw %} ${words}",
    "a lone surrogate \udcff, bell \x07, nothing \x00, from right to left \u202e",
    "一只狗<b>在跑</b>",
]


# --- the page -------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """What html.parser finds in a page: elements with their attributes, and for each card its
    direction, its class, and the pieces of its text and the classes of its pictures in order."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.scripts, self.styles, self.text = [], [], [], []
        self.cards = {"i2t": [], "t2i": []}
        self.open, self.card = "", None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        self.open = tag
        if tag == "section" and "cards" in attributes.get("class", ""):
            self.way = attributes["class"].split()[1]
        elif tag == "article":
            self.card = []
            self.cards[self.way].append((attributes["class"], self.card))
        elif tag == "i":
            self.card.append(int(attributes["class"].removeprefix("i i")))

    def handle_data(self, data):
        kept = {"script": self.scripts, "style": self.styles}.get(self.open, self.text)
        kept.append(data)
        if self.card is not None and data.strip():
            self.card.append(data)

    def handle_endtag(self, tag):
        self.open = ""
        if tag == "article":
            self.card = None


def make_set(folder, captions, side=8):
    """A validation set in which image i is of one colour and has captions[i]."""
    entries = []
    for i, own in enumerate(captions):
        Image.new("RGB", (side, side), colour(i)).save(folder / f"{i}.png")
        entries.append({"image": f"{i}.png", "caption": own})
    (folder / "en_val.json").write_text(json.dumps(entries), "utf-8")
    return Flickr8kDataset(folder, side, is_train=False)


def colour(image):
    return (20 * image % 256, 255 - 20 * image % 256, 90)


def report(folder, dataset, features, weights="ViT-B/32"):
    """The page on these features, as text."""
    scores = score_features(*features, dataset.img_to_txt, dataset.txt_to_img, range(1, 11))
    write_report(folder / "report.html", weights, dataset, features, scores)
    return (folder / "report.html").read_bytes().decode()


def random_features(dataset, seed=0):
    """Of images and captions; half of the captions are near their own images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(dataset), 8, generator=generator)
    owners = [i for i, own in dataset.own_captions.items() for _ in own]
    texts = torch.randn(len(owners), 8, generator=generator)
    texts[::2] += 2 * images[owners][::2]
    return Features(F.normalize(images), F.normalize(texts))


@pytest.fixture
def twelve(tmp_path):
    """Images with one to three captions; the first caption of images 0 and 7 is the same."""
    captions = [[f"bird {i}{c}" for c in "abc"[: 1 + i % 3]] for i in range(12)]
    captions[7][0] = captions[0][0]
    return make_set(tmp_path, captions)


def test_the_page_has_the_answers_of_a_sort(tmp_path, twelve):
    features = random_features(twelve)
    page = Parsed(report(tmp_path, twelve, features))
    scores = (features.images @ features.texts.T).numpy()
    shown = {"i2t": twelve.text, "t2i": range(12)}
    for way, rows, truth in (
        ("i2t", scores, twelve.img_to_txt),
        ("t2i", scores.T, twelve.txt_to_img),
    ):
        expected = []
        for query, row in enumerate(rows):
            right = set(np.atleast_1d(truth[query]).tolist())
            order = ranking(row, right)
            rank = 1 + next(i for i, item in enumerate(order) if item in right)
            content = [query, f"{query}.png"] if way == "i2t" else [twelve.text[query]]
            content += ["rank ", str(rank)]
            for place, item in enumerate(order, 1):
                if place <= 5 or place == rank:
                    mark = "✓ " if item in right else ""
                    name, cosine = shown[way][item], f"{row[item]:.3f}"
                    content += (
                        [str(place), f"{mark}{name}", cosine]
                        if way == "i2t"
                        else [name, f"{mark}{place} · {cosine}"]
                    )
            level = "r1" if rank == 1 else "r5" if rank <= 5 else ""
            expected.append((-rank, query, level, content))
        assert page.cards[way] == [(level, content) for *_, level, content in sorted(expected)]


def test_what_users_wrote_is_text_and_the_page_runs_its_own_script_alone(tmp_path, twelve):
    """Hostile captions and arguments make no other elements than harmless ones do."""
    run = tmp_path / "a run"
    (run / "weights").mkdir(parents=True)
    weights = run / "weights" / "<i>'\".pth"
    weights.touch()
    (run / "arguments.json").write_text(json.dumps({"lr": 1, "model": "ViT"}))
    features = random_features(twelve)
    harmless = Parsed(report(tmp_path, twelve, features, weights))
    _ = twelve.img_to_txt, twelve.txt_to_img  # of the harmless captions
    twelve.text = [HOSTILE[i % len(HOSTILE)] for i in range(len(twelve.text))]
    (run / "arguments.json").write_text(json.dumps({HOSTILE[1]: HOSTILE[2], "model": HOSTILE[0]}))
    page = report(tmp_path, twelve, features, weights)
    hostile = Parsed(page)
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in harmless.elements]
    both = harmless, hostile
    for (_, before), (_, after) in zip(*(p.elements for p in both), strict=True):
        assert before.keys() - {"lang"} == after.keys() - {"lang"}
        assert after.get("src", "data:").startswith("data:")
        assert after.get("href") in (None, "data:,")
    assert len(hostile.scripts) == len(hostile.styles) == 1
    assert hostile.scripts == harmless.scripts and hostile.styles == harmless.styles
    text = "".join(hostile.text)
    assert all(line in text for line in HOSTILE[:4]) and str(weights) in text
    assert "a lone surrogate \\udcff, " in text
    langs = [{a.get("lang") for tag, a in p.elements if tag in ("h3", "span")} for p in both]
    assert langs == [{None}, {None, "zh"}]


def test_each_picture_is_in_the_page_once(tmp_path, twelve):
    page = Parsed(report(tmp_path, twelve, random_features(twelve)))
    rules = re.findall(r"\.i(\d+)\{background-image:url\(\"data:image/jpeg;base64,(.*?)\"\)\}",
                       page.styles[0])  # fmt: skip
    assert [int(image) for image, _ in rules] == list(range(12))
    for image, data in rules:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.format == "JPEG" and picture.size == (128, 128)
            seen = np.asarray(picture).mean((0, 1))
        assert np.abs(seen - colour(int(image))).max() < 5
    used = [a for tag, a in page.elements if tag == "i"]
    assert len(used) > 12 and all(a["role"] == "img" and a["title"] for a in used)


def test_a_page_that_has_no_room_for_all_says_so(tmp_path, twelve, monkeypatch):
    monkeypatch.setattr("utils.retrieval.report.QUERIES", {"i2t": 3, "t2i": 20})
    monkeypatch.setattr("utils.retrieval.report.PICTURES", 9)
    features = random_features(twelve)
    page = Parsed(report(tmp_path, twelve, features))
    pictures = {int(a["class"][3:]) for tag, a in page.elements if tag == "i"}
    assert len(page.cards["i2t"]) == 3 and len(pictures) <= 9
    assert page.styles[0].count("base64") == len(pictures)
    text = "".join(page.text)
    assert "This page has the 3 hardest of 12 queries." in text
    left = len(page.cards["t2i"])
    assert 0 < left < 20 and f"This page has the {left} hardest of 24 queries." in text
    assert "3 of 12" in text and f"{left} of 24" in text


def test_filters_count_what_the_scores_count(tmp_path, twelve):
    features = random_features(twelve)
    page = Parsed(report(tmp_path, twelve, features))
    scores = features.images @ features.texts.T
    metrics = compute_metrics(scores, twelve.img_to_txt, scores.T, twelve.txt_to_img)
    for way, queries in (("i2t", 12), ("t2i", 24)):
        levels = [level for level, _ in page.cards[way]]
        assert len(levels) == queries
        assert 100 * levels.count("r1") / queries == pytest.approx(metrics[way]["R@1"])
        within = levels.count("r1") + levels.count("r5")
        assert 100 * within / queries == pytest.approx(metrics[way]["R@5"])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("arguments.json", "[1, 2]", "arguments.json: should hold a description, in braces"),
        ("arguments.json", "[" * 10**5, "arguments.json: broken JSON"),
        ("test_metrics.json", "[", "test_metrics.json: broken JSON"),
        ("3.png", "no picture", "3.png: not an image"),
    ],
)
def test_what_the_report_cannot_read_is_named(tmp_path, twelve, name, content, message):
    """And a report that was there is kept."""
    (tmp_path / "weights").mkdir()
    weights = tmp_path / "weights" / "best.pth"
    weights.touch()
    (tmp_path / "arguments.json").write_text("{}")
    (tmp_path / "report.html").write_text("as before")
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        report(tmp_path, twelve, random_features(twelve), weights)
    assert (tmp_path / "report.html").read_text() == "as before"


def test_curves_of_a_run_are_those_of_its_table(tmp_path, twelve):
    """Epoch 0 has no training loss."""
    (tmp_path / "weights").mkdir()
    weights = tmp_path / "weights" / "best.pth"
    weights.touch()
    (tmp_path / "arguments.json").write_text("{}")
    (tmp_path / "metrics.csv").write_text(
        "epoch,train_loss,val_loss,mean_recall\n0,,4.5,10\n1,4,,20\n2,3,4.25,30\n"
    )
    text = report(tmp_path, twelve, random_features(twelve), weights)
    assert 'loss of the run by epoch; at the end training 3, validation 4.25"' in text
    *_, losses, recalls = re.findall(r"svg\+xml;base64,(.*?)\"", text)
    for chart, points in (
        (losses, [(1, 4), (2, 3), (0, 4.5), (2, 4.25)]),
        (recalls, [(0, 10), (1, 20), (2, 30)]),
    ):
        markers = [
            [float(use.get("x")), float(use.get("y"))]
            for group in ElementTree.fromstring(base64.b64decode(chart)).iter(f"{SVG}g")
            if group.get("clip-path")
            for use in group.iter(f"{SVG}use")
        ]
        drawn, table = np.array(markers), np.array(points)
        assert drawn.shape == table.shape
        for axis, direction in ((0, 1), (1, -1)):  # y upwards in a chart, downwards in an SVG
            slope, start = np.polyfit(table[:, axis], drawn[:, axis], 1)
            assert slope * direction > 0
            assert drawn[:, axis] == pytest.approx(start + slope * table[:, axis], abs=1e-3)


MIXED = "alpha,epoch,chosen\n0,1,0\n0.5,1,1\n1,1,0\n"
UNMIXED = "alpha,epoch,chosen\n0,1,1\n0.5,1,0\n1,1,0\n"


@pytest.mark.parametrize(
    "name, mixtures, epoch, words",
    [
        ("best_epoch_weights.pth", MIXED, 1, "1 of 2"),
        ("last_epoch_weights.pth", MIXED, 2, "2 of 2"),
        ("wise_ft_weights.pth", MIXED, 1, "1, mixed with the start, alpha 0.5"),
        ("wise_ft_weights.pth", UNMIXED, 0, "0, the weights before training"),
        ("mine.pth", MIXED, None, None),
    ],
)
def test_the_page_names_model_and_epoch_and_marks_it_in_the_curves(
    tmp_path, twelve, name, mixtures, epoch, words
):
    (tmp_path / "weights").mkdir()
    weights = tmp_path / "weights" / name
    weights.touch()
    (tmp_path / "arguments.json").write_text('{"resume_training": "ViT-B/32"}')
    (tmp_path / "metrics.csv").write_text("epoch,mean_recall\n0,10\n1,40\n2,30\n")
    (tmp_path / "wise_ft.csv").write_text(mixtures)
    text = report(tmp_path, twelve, random_features(twelve), weights)
    assert "<dd>fine-tuned from ViT-B/32</dd>" in text
    assert ("<dt>epoch</dt>" in text) == bool(words)
    assert not words or f"<dt>epoch</dt><dd>{words}</dd>" in text
    *_, recalls = re.findall(r"svg\+xml;base64,(.*?)\"", text)
    chart = base64.b64decode(recalls).decode()
    assert re.findall(r"chosen: (\d)", chart) == ([] if epoch is None else [str(epoch)])


def test_the_page_has_mean_recall_and_the_test_scores_of_its_run(tmp_path, twelve):
    """Its own the mean of R@1, R@5 and R@10 in both directions, by numpy."""
    (tmp_path / "weights").mkdir()
    weights = tmp_path / "weights" / "best_epoch_weights.pth"
    weights.touch()
    (tmp_path / "arguments.json").write_text("{}")
    intervals = {"mean_recall": [1, 2], "i2t_R@1": [9.96, 30.04], "t2i_R@1": [3, 4]}
    scores = {"mean_recall": 30.0, "i2t": {"R@1": 20.0}, "t2i": {"R@1": 21.0}}
    content = scores | {
        "before": scores,
        "intervals": dict.fromkeys(("before", "after"), intervals),
    }
    (tmp_path / "test_metrics.json").write_text(json.dumps(content))
    features = random_features(twelve)
    text = report(tmp_path, twelve, features, weights).replace("\n", "")
    scores = features.images @ features.texts.T
    found = compute_metrics(scores, twelve.img_to_txt, scores.T, twelve.txt_to_img)
    mean = np.mean([found[way][f"R@{k}"] for way in found for k in (1, 5, 10)])
    assert f"Mean recall <b>{mean:.2f}</b>" in text
    row = "".join(
        f"<td>{cell} <small>{ends}</small></td>"
        for cell, ends in [
            ("30.00", "1.0 to 2.0"),
            ("20.00", "10.0 to 30.0"),
            ("21.00", "3.0 to 4.0"),
        ]
    )
    for title in ("before training", "after training"):
        assert f'<th scope="row">{title}</th>{row}' in text


@pytest.mark.slow
def test_a_thousand_images_and_five_thousand_captions_are_below_15_mb(tmp_path):
    """One made photograph stands for all: its picture is larger than those of Flickr8k are on
    average, 3.1 kB, and so are the captions, of 52 characters."""
    dataset = make_set(tmp_path, [[f"{'a' * 55} {i} {c}" for c in range(5)] for i in range(1000)])
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    photograph = np.asarray(coarse.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    photograph = (photograph + random.normal(0, 26, photograph.shape)).clip(0, 255)
    Image.fromarray(photograph.astype(np.uint8)).save(tmp_path / "photograph.jpg")
    dataset.image = [str(tmp_path / "photograph.jpg")] * 1000
    page = report(tmp_path, dataset, random_features(dataset))
    pictures = re.findall(r"jpeg;base64,(.*?)\"", page)
    assert len(pictures) == 1000 and len(pictures[0]) > 4 / 3 * 3100
    assert page.count("<article") == 6000
    assert (tmp_path / "report.html").stat().st_size < 15e6


# --- in a browser ---------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
# The cards that are shown, as direction and number.
SHOWN = """[...document.querySelectorAll("article")].filter(card => card.checkVisibility())
    .map(card => [card.parentNode.classList[1], card.querySelector("h3").textContent])"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(file, its cards) of a page with words that begin alike, and hostile captions."""
    folder = tmp_path_factory.mktemp("browser")
    own = [*HOSTILE[:4], "a man runs", "a woman runs", "A MAN sits", "一只狗", "dogs run", "a café"]
    captions = [[text, f"bird {i}"] for i, text in enumerate(own)]
    dataset = make_set(folder, captions)
    page = Parsed(report(folder, dataset, random_features(dataset)))
    return folder / "report.html", page.cards


@pytest.fixture(scope="module", params=[True, False], ids=["script", "no script"])
def opened(request, written, tmp_path_factory):
    with Page(written[0], tmp_path_factory.mktemp("profile"), scripts=request.param) as page:
        page.has_script = request.param
        yield page
        assert page.errors == []  # also none of the policy's


def narrow(page, words):
    page.value(f"""(() => {{
        const field = document.querySelector("#narrow input");
        field.value = {json.dumps(words)};
        field.dispatchEvent(new Event("input"));
    }})()""")


def choose(page, name):
    page.value(f"document.getElementById('{name}').click()")


def expected(cards, way, *hidden):
    names = [
        content[1 if way == "i2t" else 0] for level, content in cards[way] if level not in hidden
    ]
    return [[way, " ".join(name.split())] for name in names]


@in_browser
def test_filters_work_with_and_without_a_script(written, opened):
    _, cards = written
    for way in ("i2t", "t2i"):
        choose(opened, way)
        for name, hidden in (("wrong-at-1", ["r1"]), ("wrong-at-5", ["r1", "r5"]), ("all", [])):
            choose(opened, name)
            assert opened.value(SHOWN) == expected(cards, way, *hidden)
            if opened.has_script:
                left, of = len(expected(cards, way, *hidden)), len(cards[way])
                told = opened.value("document.querySelector('output').textContent")
                assert told == f"{left} of {of} queries shown"
    assert opened.value("document.getElementById('narrow').checkVisibility()") == opened.has_script


@in_browser
def test_pictures_show_and_nothing_is_asked_for_elsewhere(written, opened):
    """The middle of a picture on the screen has the colour of its image."""
    choose(opened, "i2t")
    for width, dark in ((1280, False), (380, True)):
        opened.resize(width, dark)
        x, y, image = opened.value("""(() => {
            const picture = document.querySelector("article > .i");
            picture.scrollIntoView({ block: "center" });
            const { x, y, width } = picture.getBoundingClientRect();
            return [x + width / 2, y + width / 2, parseInt(picture.classList[1].slice(1))];
        })()""")
        screen = Image.open(io.BytesIO(opened.picture())).convert("RGB")
        seen = screen.getpixel((round(x), round(y)))
        assert np.abs(np.subtract(seen, colour(image))).max() < 6
        ground = screen.getpixel((2, 2))
        assert max(ground) < 60 if dark else min(ground) > 230
        assert opened.value("document.documentElement.scrollWidth") <= width  # nothing is cut off
    assert {u for u in opened.requested if not u.startswith("data:")} == {written[0].as_uri()}
    assert "Retrieval" in opened.value("document.title")


@in_browser
@pytest.mark.parametrize("opened", [True], indirect=True)
@pytest.mark.parametrize(
    "words, left",
    [
        ("man", ["a man runs", "A MAN sits"]),  # words begin so; "woman" does not
        ("runs man", ["a man runs"]),
        ("RUN", ["a man runs", "a woman runs", "dogs run"]),
        ("狗", ["一只狗"]),
        ("caf", ["a café"]),
        ("(", []),
        ("</style>", [HOSTILE[1]]),
        ("", None),
    ],
)
def test_words_narrow_what_is_shown(written, opened, words, left):
    choose(opened, "t2i")
    choose(opened, "all")
    narrow(opened, words)
    shown = [name for _, name in opened.value(SHOWN)]
    if left is None:
        assert len(shown) == len(written[1]["t2i"])
    else:
        assert sorted(shown) == sorted(left)
    told = opened.value("document.querySelector('output').textContent")
    assert told == f"{len(shown)} of {len(written[1]['t2i'])} queries shown"


@in_browser
@pytest.mark.parametrize("opened", [True], indirect=True)
def test_words_are_looked_for_in_the_answers_of_an_image(written, opened):
    """Also the first word of an answer, which stands beside its place."""
    choose(opened, "i2t")
    choose(opened, "all")
    for words in (["man"], ["a", "woman"], ["dogs"]):
        narrow(opened, " ".join(words))
        having = []
        for _, content in written[1]["i2t"]:
            begin = [w for piece in content[1:] for w in re.findall(r"\w+", str(piece).lower())]
            if all(any(w.startswith(word) for w in begin) for word in words):
                having.append(["i2t", content[1]])
        assert 0 < len(having) < 10 and opened.value(SHOWN) == having
    narrow(opened, "")


@in_browser
@pytest.mark.parametrize("opened", [True], indirect=True)
def test_the_keyboard_reaches_the_filters_and_a_reader_hears_the_answers(written, opened):
    """As the browser's accessibility tree has them; what is far below has its name alone there."""
    choose(opened, "i2t")
    choose(opened, "all")
    opened.value("document.getElementById('all').focus()")
    opened.press("ArrowRight", 39)
    assert opened.value("document.activeElement.id") == "wrong-at-1"
    assert opened.value(SHOWN) == expected(written[1], "i2t", "r1")
    opened.press("ArrowLeft", 37)
    opened.value("""new Promise(done => {
        document.querySelector("article[aria-label$=' a man runs']").scrollIntoView();
        requestAnimationFrame(() => setTimeout(done));
    })""")
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    heard = {
        (node["role"]["value"], " ".join(node.get("name", {}).get("value", "").split()))
        for node in nodes
        if "role" in node
    }
    assert {("radio", "All 10"), ("radio", "Text to image"), ("searchbox", "Words")} <= heard
    articles = [name for role, name in heard if role == "article"]
    assert len(articles) == 10 and all(re.match(r"rank \d+: .", name) for name in articles)
    assert ("image", "a man runs") in heard and ("heading", "4.png") in heard
    (recall,) = (name for role, name in heard if name.startswith("image to text, percent by K"))
    assert "at the end recall" in recall
