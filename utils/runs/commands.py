"""Commands that are printed to be pasted into a shell."""

import os
import re
import shlex
import shutil
import sys
from bisect import bisect_right
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from models.clip import CLIP
from models.tokens import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = sys.platform == "win32"
TO_PASTE = " (in PowerShell, write --% after python)" if WINDOWS else ""  # it takes "$(...)" apart


def command(script: str, *words: object, processes: int = 1) -> str:
    """The line that runs a script of this repository, in this folder, with the Python that runs
    now; with several `processes`, on one machine."""
    python = "python"
    found = shutil.which(python)
    if found is None or Path(found).parent != Path(sys.executable).parent:
        python = sys.executable
    start = [python]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    file = Path(script) if Path.cwd() == ROOT else ROOT / script
    return quoted([*start, file, *map(_argument, words)])


def quoted(words: Iterable[object], windows: bool = WINDOWS) -> str:
    """A command line that gives a program these words, whatever characters they have: in bash, zsh
    and the like, or in Windows' cmd."""
    return " ".join(map(_for_cmd if windows else _for_bash, map(str, words)))


def what_to_try(image: str, weights: Path, captions: Iterable[str], model: CLIP) -> str:
    """Two commands that use new weights of `model`, on an image and with two of the captions."""
    words = Path(image), "--weights", weights
    labels = labels_to_try(captions, model.tokenizer, model.context_length)
    return (
        f"now try{TO_PASTE}\n  {command('predict.py', *words)}\n"
        f"  {command('predict_zero_shot.py', *words, '--labels', *labels)}"
    )


def labels_to_try(captions: Iterable[str], tokenizer: Tokenizer, context_length: int) -> list[str]:
    """Two captions that predict_zero_shot.py takes as `--labels`: the first, and the last that the
    model reads differently, or something else where there are no two."""
    captions = list(dict.fromkeys(captions))
    others = ("something else", "a photo")
    labels = (_label(c, tokenizer, context_length) for c in chain(captions, others))
    first = next(filter(tokenizer.encode, labels))
    labels = (_label(c, tokenizer, context_length) for c in chain(reversed(captions), others))
    taken = ([], tokenizer.encode(first))
    return [first, next(label for label in labels if tokenizer.encode(label) not in taken)]


def _argument(word: object) -> str:
    """A path that starts with a hyphen would be taken for an option."""
    return f".{os.sep}{word}" if isinstance(word, Path) and f"{word}"[0] == "-" else str(word)


def _for_bash(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    return "$'{}'".format("".join(map(_in_dollar_quotes, word)))


def _in_dollar_quotes(character: str) -> str:
    """Line breaks, control codes and the bytes of a name that is not UTF-8: bytes in octal."""
    if character.isprintable() and character not in "'\\":
        return character
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(character))


def _for_cmd(word: str) -> str:
    """As `subprocess.list2cmdline`, by Microsoft's "Parsing C command-line arguments", with two
    differences for cmd, which knows no backslashes: a quote within quotes is doubled, and quoted is
    all that cmd could take for more than text. Only `%NAME%` is replaced in quotes, too."""
    if re.fullmatch(r"[\w./:\\+-]+", word):
        return word
    return '"{}"'.format(re.sub(r'(\\+)("|\Z)', r"\1\1\2", word).replace('"', '""'))


def _label(caption: str, tokenizer: Tokenizer, context_length: int) -> str:
    """What the model reads of a caption, as a word of a command line: one line without control
    codes, and no hyphen first, which would make it an option."""
    text = "".join(c if c.isprintable() else " " for c in caption)
    text = " ".join(text.split()).lstrip("- ")
    room = context_length - 2  # without the tokens for the start and the end
    lengths = range(len(text) + 1)
    fits = bisect_right(lengths, room, key=lambda n: len(tokenizer.encode(text[:n]))) - 1
    return text[:fits].rstrip()
