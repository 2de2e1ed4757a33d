"""Every example of the README runs, and its set-up commands are two."""

import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
EXAMPLES = [code for language, code in BLOCKS if language == "python"]


def test_two_set_up_commands():
    """One installs and runs the main job, one installs and tests; each is one line in one block."""
    commands = [code for language, code in BLOCKS if language == "bash"]
    assert [code.count("\n") for code in commands] == [1, 1]
    words = [shlex.split(code) for code in commands]
    assert words[0] == ["pip", "install", "-e", ".[plot]", "&&", "fastdmf", "demo"]
    assert words[1] == ["pip", "install", "-e", ".[test]", "&&", "pytest"]


def test_examples_are_found():
    """All fenced blocks are either set-up commands or examples."""
    assert {language for language, _ in BLOCKS} == {"bash", "console", "python"}  # test_commands.py runs the console's
    assert len(EXAMPLES) == 13
    assert README.count("```") == 2 * len(BLOCKS)


@pytest.mark.parametrize("code", EXAMPLES, ids=[str(i) for i in range(len(EXAMPLES))])
def test_example(code):
    """An example runs in a namespace of its own and keeps its promises."""
    assert "assert" in code
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
