"""The weights of a script: those of `--weights`, else the newest run's, else published ones."""

from contextlib import suppress
from pathlib import Path

from models.errors import InputError, one_line
from models.run_files import run_folder, run_weights, runs_in, trained_on
from models.scripts import SCRIPTS

PUBLISHED = "ViT-B/32"


def weights_to_use(named: str | None) -> str | Path:
    """The weights that `--weights` names, or the default; prints which. Raises `InputError` for
    what is neither a name nor a path."""
    from models.clip_utils import check_name

    if named:
        weights, whose = named, "a run's" if run_folder(named) else ""
    elif runs := runs_in(Path("logs")) or runs_in(SCRIPTS / "logs"):
        weights, whose = run_weights(Path(runs[0])), "the newest run's"
    else:
        weights, whose = PUBLISHED, "published: no run in logs/ has weights yet"
    check_name(weights)
    data = ""
    with suppress(InputError):
        if found := trained_on(weights):
            languages = " and ".join(found.languages)
            data = one_line(f"trained on {found.dataset_path} ({languages})")
    print("weights:", ", ".join(filter(None, [str(weights), whose, data])))
    return weights
