"""Tables of scores, and the scores of --retention in the rows of a CSV."""

from collections.abc import Mapping

from utils.data.annotations import SPLITS
from utils.retrieval.scores import K_VALUES, MAIN, Scores

RETENTION = "retention_"  # begins the column of a set of --retention; the set's name follows


def retained(row: Mapping[str, float]) -> dict[str, float]:
    """{name: score} of the sets of --retention in a row of a table."""
    return {c.removeprefix(RETENTION): s for c, s in row.items() if c.startswith(RETENTION)}


def points_lost(now: Mapping[str, float], before: Mapping[str, float]) -> float:
    """The mean loss on the sets of --retention, in points of percent, since the row `before`."""
    was = retained(before)
    lost = [was[name] - score for name, score in retained(now).items()]
    return round(sum(lost) / len(lost), 6)  # so that 60.1 - 58.1 is no more than 2


def score_table(scores: Scores) -> dict[str, dict[str, float]]:
    """The scores to show, a row a direction: {title: {name: score}}."""
    return {
        title: {name.replace("_", " "): score for name, score in way.named(K_VALUES).items()}
        for title, way in scores.by_title().items()
    }


def format_table(scores: Scores, split: str) -> str:
    """The scores on a split ("val", "test") as lines of text: both directions, the mean recall."""
    table = format_rows(score_table(scores), corner=SPLITS[split])
    return f"{table}\nmean recall {scores.mean_recall:.2f} (R@1, R@5, R@10, both ways)"


def format_change(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Mean recall, R@1 and the sets of --retention before and after training, as lines of text."""
    columns = MAIN | {name: RETENTION + name for name in retained(before)}
    both = {"before training": before, "after training": after}
    return format_rows(
        {title: {name: row[c] for name, c in columns.items()} for title, row in both.items()}
    )


def format_rows(rows: Mapping[str, Mapping[str, float]], corner: str = "") -> str:
    """A table as lines of text, from {title: {column: score}}; `corner` heads the titles."""
    names = list(next(iter(rows.values())))
    first = max(map(len, [corner, *rows]))
    widths = [max(8, len(name) + 2) for name in names]
    lines = [corner.ljust(first) + "".join(map(str.rjust, names, widths))]
    for title, row in rows.items():
        fields = (f"{row[name]:{width}.2f}" for name, width in zip(names, widths, strict=True))
        lines.append(title.ljust(first) + "".join(fields))
    return "\n".join(lines)
