"""Facts on a run: what it was trained on, and which of its weights count."""

from pathlib import Path

import pytest

from models.errors import InputError
from models.run_files import TrainedOn, run_folder, run_weights, trained_on


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "a run" / "weights" / "last.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def test_a_run_tells_what_its_weights_were_trained_on(weights):
    file = weights.parents[1] / "arguments.json"
    assert trained_on(weights) is run_folder(weights) is None
    file.write_text('{"dataset_path": "data", "language": "en"}')
    assert trained_on(weights) == TrainedOn(Path("data"), ["en"])
    file.write_text('{"dataset_path": "C:/数据", "language": ["cn", "en"]}', encoding="utf-8")
    assert trained_on(str(weights)) == TrainedOn(Path("C:/数据"), ["cn", "en"])
    assert run_folder(weights) == run_folder(weights.parents[1]) == weights.parents[1]
    assert trained_on(weights.parents[1]) == trained_on(weights)


def test_names_and_missing_files_are_of_no_run(weights, monkeypatch):
    """Even where the folder at that place is a run."""
    (weights.parents[1] / "arguments.json").write_text('{"dataset_path": "d", "language": "en"}')
    monkeypatch.chdir(weights.parents[1])
    assert run_folder("ViT-B/32") is trained_on("ViT-B/32") is None
    assert run_folder("weights/gone.pth") is None
    assert run_folder("weights/last.pth") == weights.parents[1]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"language": "en"}', '{"dataset_path": "d", "language": 3}']
)
def test_broken_arguments_of_a_run_are_named(weights, content):
    (weights.parents[1] / "arguments.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"arguments\.json: (should hold|broken JSON)"):
        trained_on(weights)


@pytest.mark.parametrize(
    "files, counting",
    [(["best", "last"], "best"), (["best", "last", "wise_ft"], "wise_ft"), (["start"], None)],
)
def test_the_weights_that_count(tmp_path, files, counting):
    """The mixture that --wise_ft chose, else the best."""
    names = {name: f"{name}{'' if name in ('start', 'wise_ft') else '_epoch'}_weights.pth"
             for name in ("start", "best", "last", "wise_ft")}  # fmt: skip
    (tmp_path / "weights").mkdir()
    for name in files:
        (tmp_path / "weights" / names[name]).touch()
    assert run_weights(tmp_path) == (counting and tmp_path / "weights" / names[counting])
