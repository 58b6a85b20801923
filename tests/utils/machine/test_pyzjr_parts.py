"""pyzjr where OpenCV, which it imports, cannot be loaded."""

import sys
from functools import partial

import pytest
import torch
from script_runs import run_script

from flickr8k.render_demo import render_demo

WITHOUT_LIBGL = 'raise ImportError("libGL.so.1: cannot open shared object file")'


def import_anew(folder):
    """Forget pyzjr and what it imports of OpenCV, which is that in `folder` from now on."""
    for name in [*sys.modules]:
        if name.startswith(("cv2", "pyzjr")) or name == "utils.machine.pyzjr_parts":
            del sys.modules[name]
    sys.path.insert(0, str(folder))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")
def test_a_run_without_libgl_has_the_weights_of_one_with_it(tmp_path):
    data = render_demo(tmp_path / "data", n_train=8, n_val=2)
    (tmp_path / "site" / "cv2").mkdir(parents=True)
    (tmp_path / "site" / "cv2" / "__init__.py").write_text(WITHOUT_LIBGL)
    weights = []
    for log_dir, prepare in (
        ("with", None),
        ("without", partial(import_anew, tmp_path / "site")),
    ):
        run_script("train.py", "--dataset_path", data, "--resume_training", "none", "--model",
                   "ViT-tiny", "--batch_size", 4, "--epochs", 1, "--log_dir", log_dir,
                   "--device", "cpu", cwd=tmp_path, prepare=prepare)  # fmt: skip
        (file,) = (tmp_path / log_dir).glob("*/weights/best_epoch_weights.pth")
        weights.append(torch.load(file))
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
