"""The README's example runs as it stands, and the commands it names exist."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()
MAKEFILE = (Path(__file__).parent.parent / "Makefile").read_text()


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        names = {}
        exec(block, names)
        assert names["first"].logits.grad.abs().sum() > 0
        assert names["ct_only"].shape == (4, 16, 64, 64)


def test_commands_exist():
    from sfg_fast import cli

    commands = set(re.findall(r"^sfg-fast (\w+)", README, re.MULTILINE))
    assert commands == {"preprocess", "train", "predict", "evaluate", "report"}
    assert all(callable(getattr(cli, name)) for name in commands)
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parent.parent / path).stat().st_size > 10_000
