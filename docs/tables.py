"""Writes the tables of these pages that are made from the package: `make tables`."""

import re
from pathlib import Path

from ksmcore._engine.counters import NUMBERS, SKIPPED, STAGES

TABLES = {
    "numbers": [
        ("number", "is", "meaning"),
        *(
            (f"`{name}`", " of ".join(filter(None, (one.kind, one.unit))), one.sentence)
            for name, one in NUMBERS.items()
        ),
    ],
    "stages": [("stage", "is"), *((f"`{name}`", text) for name, text in STAGES.items())],
    "reasons": [
        ("reason", "the page"),
        *((f"`{name}`", reason.page) for name, reason in SKIPPED.items()),
    ],
    "remedies": [
        ("`skipped[...]`", "do"),
        *((f"`{name}`", reason.remedy) for name, reason in SKIPPED.items()),
    ],
}
# Where a table belongs, by its name.
PLACE = re.compile(r"(<!-- made by tables.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name):
    head, *rows = ("| " + " | ".join(cells) + " |\n" for cells in TABLES[name])
    text = head + "|---" * len(TABLES[name][0]) + "|\n" + "".join(rows)
    # Names of numbers and settings as code.
    return re.sub(r"(?<![`\w.])(\w+\.)?\w+_\w+(?![`\w])", r"`\g<0>`", text)


def renewed(text):
    """The text of a page with its tables as they should be."""
    return PLACE.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", text)


if __name__ == "__main__":
    for page in Path(__file__).parent.glob("*.md"):
        page.write_text(renewed(page.read_text()))
