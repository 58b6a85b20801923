"""Coverage-guided fuzzing (atheris, on libFuzzer) of what reads files of strangers.

    pip install atheris
    python tests/fuzz/fuzz.py weights CORPUS_FOLDER -runs=1000000 -max_len=6000
    python tests/fuzz/fuzz.py annotations CORPUS_FOLDER -runs=1000000 -max_len=600

The folder keeps inputs that reached something new, for the next run. Further options are
libFuzzer's. A finding ends the run with its traceback and leaves its input as `crash-...`,
`timeout-...` or `oom-...`; `python tests/fuzz/fuzz.py weights crash-...` runs it again.
"""

import sys
import tempfile
from pathlib import Path

import atheris

LIMITS = ["-timeout=10", "-rss_limit_mb=2048"]  # seconds for one input; memory
INSTRUMENTED = [
    *(
        "models.weights.read",
        "models.weights.unpickle",
        "models.weights.read",
        "pickletools",
        "zipfile",
    ),
    *("utils.data.annotations", "json.decoder"),
]
HERE = Path(__file__).resolve().parent

sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
with atheris.instrument_imports(include=INSTRUMENTED):
    import targets


def main() -> None:
    name, corpus, *options = sys.argv[1:]
    target, seeds = targets.TARGETS[name]
    if not Path(corpus).is_file():
        Path(corpus).mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds()):
            (Path(corpus) / f"seed_{number}").write_bytes(seed)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder) / "file"
        atheris.Setup(
            # -len_control=0: the seeds are whole files, so there is no start with short inputs.
            [sys.argv[0], *LIMITS, "-len_control=0", corpus, *options],
            lambda data: target(data, path),
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
