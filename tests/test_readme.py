"""Every Python block of README and docs runs as it stands, and the commands they name exist."""

import re
from pathlib import Path

import pytest

DOCS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
README = (Path(__file__).parent.parent / "README.md").read_text()
MAKEFILE = (Path(__file__).parent.parent / "Makefile").read_text()


NOTHING_LEARNT = pytest.mark.filterwarnings("ignore:the most probable group is a tie")  # in an example of four lines


@NOTHING_LEARNT
def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        names = {}
        exec(block, names)
        if number:
            assert names["plain"](names["torch"].randn(1, 1, 64, 64))["ct"].shape == (1, 1, 64, 64)
            continue
        assert names["first"].logits.grad.abs().sum() > 0
        assert names["ct_only"].shape == (4, 16, 64, 64)


@NOTHING_LEARNT
@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_documentation_blocks_run(page):
    """One after the other, as a reader would type them."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, names)


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_files_that_the_documentation_names_exist(page):
    root = Path(__file__).parent.parent
    for name in re.findall(r"`((?:sfg_fast|tests|benchmarks|kernels|examples)/[\w/.]+)`", page.read_text()):
        assert (root / name).exists(), name
    for name in re.findall(r"!\[.*?\]\(([\w.]+)\)", page.read_text()):
        assert (root / "docs" / name).stat().st_size > 10_000


def test_messages_that_the_documentation_explains_are_there():
    root = Path(__file__).parent.parent
    source = " ".join(path.read_text() for part in ("sfg_fast", "kernels") for path in (root / part).rglob("*.py"))
    source = re.sub(r'"\s+f?"', "", source)  # parts of one string
    rows = re.findall(r"^\| `(.*?)`", (root / "docs/errors.md").read_text(), re.MULTILINE)
    assert len(rows) >= 12
    for row in rows:
        for part in row.split("..."):
            assert part.strip() in source, row


def test_commands_exist():
    from sfg_fast import cli

    commands = set(re.findall(r"^sfg-fast (\w+)", README, re.MULTILINE))
    assert commands == {"preprocess", "train", "predict", "evaluate", "report", "freeze", "experiment"}
    assert all(callable(getattr(cli, name)) for name in commands)
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parent.parent / path).stat().st_size > 10_000
