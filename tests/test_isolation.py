"""What lies in a user's checkout and home changes no test, and no test changes it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from script_runs import ROOT

OF_USERS = [
    "checkout/logs/run/weights/best_epoch_weights.pth",
    "checkout/predictions/ranking.png",
    "checkout/flickr8k/demo/en_train.json",
    "checkout/flickr8k/cn_train.json",
    "checkout/flickr8k/images/1.jpg",
    "checkout/models/models_pth/ViT-B-32.pt",
    "checkout/models/models_pth/README.md",
    "checkout/torchvision_data/cifar-10.tar.gz",
    "home/.cache/huggingface/hub/version.txt",
]
TESTS = """
from pathlib import Path
from script_runs import ROOT

def test_that_looks_around():
    found = [*(ROOT / "flickr8k").iterdir(), *Path.home().rglob("*"), *Path.cwd().iterdir()]
    assert {path.suffix for path in found} <= {".py"}
    for folder in ("logs", "predictions", "torchvision_data", "models/models_pth"):
        assert not (ROOT / folder).exists()

def test_that_writes_beside_the_scripts():
    (ROOT / "logs").mkdir()
    (ROOT / "logs" / "console.log").touch()

def test_that_writes_in_the_home():
    (Path.home() / "features.npz").touch()

def test_that_writes_where_it_stands():
    Path("R_mAP.png").touch()
"""


def test_tests_neither_see_nor_change_what_users_have(tmp_path):
    """Tests of a checkout of its own, beside whose scripts a user has files."""

    def files() -> dict[Path, bytes]:
        found = {path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        return {path: path.read_bytes() for path in found}

    shutil.copytree(ROOT, tmp_path / "checkout")
    for name in OF_USERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a user's")
    tests = tmp_path / "checkout" / "tests" / "test_own.py"
    tests.write_text(TESTS)
    before = files()
    home = {name: str(tmp_path / "home") for name in ("HOME", "USERPROFILE")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", tests],
        cwd=tmp_path / "checkout", env=os.environ | home, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "4 passed, 3 errors" in done.stdout, done.stdout + done.stderr
    for test in ("beside_the_scripts", "in_the_home", "where_it_stands"):
        assert f"ERROR at teardown of test_that_writes_{test}" in done.stdout
    assert files() == before
