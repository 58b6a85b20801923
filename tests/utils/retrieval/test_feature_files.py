"""Files of features, read by the lines that are printed."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.retrieval import feature_files
from utils.retrieval.feature_files import write_features

NAMES = ['a/狗 "1".jpg', "two\nlines\u2028.jpg", os.fsdecode(b"\xe4.jpg"), "a", "a"]
READ = ['a/狗 "1".jpg', "two lines .jpg", "\\udce4.jpg", "a", "a"]


@pytest.mark.parametrize("ending", [".npy", ".parquet"])
def test_features_are_read_by_the_printed_lines(ending, tmp_path):
    """In float32, normalised again after rounding."""
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    features = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1)
    code = write_features(tmp_path / f"it's{ending}", NAMES, features.half())
    read = {}
    exec("\n".join(line.strip() for line in code.splitlines()), read)
    assert read["names"] == READ and read["features"].dtype == np.float32
    assert np.linalg.norm(read["features"], axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    assert np.allclose(read["features"], features, atol=2**-11)


def test_many_features_are_searched_by_the_printed_lines(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    assert "faiss" not in write_features(tmp_path / "few.npy", NAMES, torch.eye(5))
    monkeypatch.setattr(feature_files, "MANY", 5)
    features = F.normalize(torch.randn(20, 8), dim=1)
    code = write_features(tmp_path / "many.npy", [*map(str, range(20))], features)
    read = {}
    exec("\n".join(line.strip() for line in code.splitlines()), read)
    assert read["rows"][0].tolist() == (features @ features[0]).topk(10).indices.tolist()
