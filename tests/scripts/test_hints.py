"""Messages that name an option: the script that prints them has it.

Which script prints a message is read off the sources: a script reaches the functions that it names,
those that these name, and so on.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache

from script_runs import ROOT

SCRIPTS = [
    *("train.py", "predict.py", "predict_zero_shot.py", "utils/metric.py"),
    "utils/classification.py",
    *("models/clip_utils.py", "models/convert.py"),
    "flickr8k/prepare.py",
]
# Raised for another input_shape, which only train.py asks for; or for training images of classes,
# which only classification.py does.
CANNOT_BE = {
    ("models/clip_utils.py", "_build_through_open_clip"),
    ("models/weights/architecture.py", "check_resolution"),
    ("utils/data/labelled_images.py", "_class_folders"),
    ("utils/data/torchvision_sets.py", "open_torchvision_set"),
}
OPTION = re.compile(r"--[a-z][a-z_-]*(?:\{\})?")
OF_OTHERS = {
    "--shm-size",
    "--nproc_per_node={}",
    "--nproc_per_node",
    "--standalone",
    "--upgrade",
}  # of Docker, torchrun, pip
Definition = tuple[str, str]  # a source file, and a name that it defines, "" for the file itself


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text("utf-8"))


@cache
def options(script: str) -> set[str]:
    """All strings that are an option and nothing else, in a script and in the functions `add_...`
    that it imports, and in those that these call: those of its parser."""
    shared = [place for name, place in imports(script).items() if name.startswith("add_")]
    pieces: list[ast.AST] = [tree(script)]
    for file, name in shared:
        pieces.append(definitions(file)[name])
        shared += [place for place in named(file, pieces[-1], set()) if place[1].startswith("add_")]
    return {"--help", *(s for piece in pieces for s in strings(piece) if OPTION.fullmatch(s))}


def file_of(module: str) -> str | None:
    names = (f"{module.replace('.', '/')}{end}" for end in (".py", "/__init__.py"))
    return next((name for name in names if (ROOT / name).is_file()), None)


@cache
def definitions(file: str) -> dict[str, ast.AST]:
    """What a file defines; a method is called `Class.method`."""
    found: dict[str, ast.AST] = {}
    for node in tree(file).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef):
                found[f"{node.name}.{method.name}"] = method
    return found


@cache
def methods(file: str) -> dict[str, list[str]]:
    """{name of a method: the definitions in a file that have it}"""
    found: dict[str, list[str]] = {}
    for name in definitions(file):
        found.setdefault(name.rpartition(".")[2], []).append(name)
    return {method: [n for n in names if "." in n] for method, names in found.items()}


@cache
def parts(node: ast.AST) -> list[ast.AST]:
    """A piece of code and all within it."""
    return list(ast.walk(node))


@cache
def imports(file: str) -> dict[str, Definition]:
    """The names that a file imports, at any place, from other files of ours."""
    found = {}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and (source := file_of(node.module or "")):
            for name in node.names:
                found[name.asname or name.name] = (source, name.name)
    return found


def named(file: str, node: ast.AST, files: set[str]) -> Iterator[Definition]:
    """The definitions that a piece of `file` names; a method of any class in `files` whose name
    stands after a dot may be meant."""
    for part in parts(node):
        if isinstance(part, ast.Name):
            if part.id in definitions(file):
                yield file, part.id
            elif part.id in imports(file):
                yield imports(file)[part.id]
        elif isinstance(part, ast.Attribute) and not part.attr.startswith("__"):
            yield from (
                (other, name) for other in files for name in methods(other).get(part.attr, ())
            )


def reached(script: str) -> set[Definition]:
    files: set[str] = set()
    waiting = [script]
    while waiting:
        file = waiting.pop()
        if file not in files:
            files.add(file)
            waiting += [source for source, _ in imports(file).values()]
    found: set[Definition] = set()
    open_ones: list[Definition] = [(script, "main")]
    while open_ones:
        definition = open_ones.pop()
        file, name = definition
        node = definitions(file).get(name)
        if node is None and name in imports(file):  # a name that a package passes on
            open_ones.append(imports(file)[name])
        if node is None or definition in found:
            continue
        found.add(definition)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in definitions(file) if part.startswith(f"{name}.__")]
            open_ones += [(file, method) for method in methods]
        else:
            open_ones += named(file, node, files)
    return found


def strings(node: ast.AST) -> Iterator[str]:
    """The strings in a piece of code, but for docstrings; `{}` stands for what is filled in, and
    the name of a file for `from_here` of it."""
    skipped = {  # docstrings, and then what is part of a whole
        id(part.body[0].value)
        for part in parts(node)
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and isinstance(part.body[0], ast.Expr)
    }
    for part in parts(node):
        if isinstance(part, ast.JoinedStr):
            skipped |= {id(value) for value in ast.walk(part)}
            yield "".join(map(_spelled, part.values))
        elif isinstance(part, ast.Constant) and id(part) not in skipped:
            yield from [part.value] if isinstance(part.value, str) else []


def _spelled(value: ast.expr) -> str:
    if isinstance(value, ast.Constant):
        return value.value
    filled = [part.value for part in ast.walk(value) if isinstance(part, ast.Constant)]
    return next((text for text in filled if str(text).endswith(".py")), "{}")


def advised(message: str) -> Iterator[tuple[str | None, str]]:
    """(script, option) for each option that a message names; None is the script that prints it. An
    option belongs to the command before it in the same clause, if there is one."""
    for clause in re.split(r"[;,\n)]|\. ", message):
        owner: str | None = None
        for word in clause.split():
            if word == "torchrun":
                owner = word
            elif word.endswith(".py"):
                owner = next((script for script in SCRIPTS if script.endswith(word)), word)
            elif option := OPTION.search(word):
                yield owner, option[0]


def is_in(script: str, option: str) -> bool:
    start, filled_in, _ = option.partition("{}")
    return any(o.startswith(start) if filled_in else o == start for o in options(script))


def test_every_option_that_a_message_names_is_one_of_the_script_that_prints_it():
    wrong = []
    seen = set()
    for script in SCRIPTS:
        pieces = [(*place, definitions(place[0])[place[1]]) for place in reached(script)]
        pieces.append((script, "description", tree(script).body[0]))
        for file, name, node in pieces:
            for message in strings(node):
                if OPTION.fullmatch(message) or (file, name) in CANNOT_BE:
                    continue  # an option alone is a parameter, not a message
                for owner, option in advised(message):
                    seen.add(option)
                    if (
                        owner != "torchrun"
                        and option not in OF_OTHERS
                        and not is_in(owner or script, option)
                    ):
                        wrong.append(f"{file}, {name}: {owner or script} has no {option}")
    assert len(seen) > 30  # or nothing was found to check
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_every_script_is_looked_at():
    scripts = {
        path.relative_to(ROOT).as_posix()
        for folder in (".", "models", "utils", "flickr8k")
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
        if "run_script(main)" in path.read_text("utf-8")
    }
    assert scripts == set(SCRIPTS)
