"""The pages of docs/ are true: code runs, commands exist, messages are the code's own."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from harness.mpirun import ROOT
from zerompi.cli.app import app
from zerompi.cli.train import add_missing_value

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
FENCE = re.compile(r"^```(?P<info>\S*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
GAP = "…"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [m["text"] for m in FENCE.finditer(page.read_text("utf-8")) if m["info"] == language]


def name_of(page: Path) -> str:
    """For the names of tests."""
    return str(page.relative_to(DOCS))


def commands(page: Path) -> list[list[str]]:
    """The words of each command on a page."""
    text = "".join(blocks(page, "console")).replace("\\\n", " ")
    lines = text.splitlines()
    assert all(line.startswith("$ ") for line in lines), f"{page}: expected commands, got output"
    return [shlex.split(line[2:], comments=True) for line in lines]


# -- code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_of_a_page_runs_on_two_ranks(run_mpi, tmp_path, page):
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks(page, "python")), "utf-8")
    job = run_mpi(2, [program], cwd=tmp_path)
    assert job.returncode == 0, job.output


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_hides_code_from_these_tests(page):
    languages = {match["info"] for match in FENCE.finditer(page.read_text("utf-8"))}
    directives = {language for language in languages if language.startswith("{")}
    assert languages - directives <= {"", "python", "console", "text", "none"}
    for path in re.findall(r"^```\{literalinclude\} (\S+)", page.read_text("utf-8"), re.MULTILINE):
        assert path.startswith("examples/")


def test_every_example_is_on_a_page():
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    missing = [path.name for path in (DOCS / "examples").glob("*.py") if path.name not in text]
    assert not missing


# -- commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console")], ids=name_of)
def test_commands_of_a_page_exist(page):
    command = typer.main.get_command(app)
    for words in commands(page):
        if "zerompi" in words:
            arguments = words[words.index("zerompi") + 1 :]
            if "--help" not in arguments:
                # Parses everything; what it returns would run.
                assert callable(
                    command.main(add_missing_value(arguments), standalone_mode=False)
                ), words
        for word in words:
            if word.startswith(("docs/", "jobscripts/")):
                assert (ROOT / word).is_file(), words


# So small that a job takes seconds; given last, these options win over those of the page.
SMALL = shlex.split(
    "--layers 1 --width 32 --heads 2 --context 16 --batch 8 --eval-batches 1 --sample 0"
)
STEPS_PER_STEP = 50  # of the page, for each step here


@pytest.mark.slow
def test_training_commands_of_the_tutorial_run_in_their_order(run_mpi, tmp_path):
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text("utf-8"), "utf-8")
    for words in commands(DOCS / "tutorial.md"):
        if "docs/examples/make_tiny_llama.py" in words:
            pytest.importorskip("transformers")
            job = run_mpi(1, [ROOT / words[1], *words[2:]], cwd=tmp_path)
        elif words[0] == "mpiexec" and words[3:5] == ["zerompi", "train"]:
            steps = int(words[words.index("--steps") + 1]) // STEPS_PER_STEP
            arguments = [*words[5:], *SMALL, "--steps", str(steps)]
            job = run_mpi(int(words[2]), ["-m", "zerompi", "train", *arguments], cwd=tmp_path)
        else:
            continue
        assert job.returncode == 0, f"{words}\n{job.output}"
        assert ("continuing from" in job.output) == ("--resume" in words)


# -- messages ----------------------------------------------------------------------------------


def source_messages() -> Iterator[tuple[str, bool]]:
    """Every text in the package, gaps for what is filled in; whether it is a ZerompiError's."""
    for path in (ROOT / "zerompi").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                text = template(node)
                if text:
                    yield text, False
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                text = template(node.args[0])
                if node.func.id in ("ZerompiError", "MismatchError") and text.strip(GAP):
                    yield text, True


def template(node: ast.expr) -> str:
    """The text of an expression, a gap for each part that is not constant; empty if no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) or GAP for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + GAP
    return ""


def documented_messages() -> list[str]:
    """The messages of zerompi in the page on troubleshooting."""
    text = "".join(blocks(DOCS / "troubleshooting.md", "text"))
    return [line for line in text.splitlines() if line]


def says(documented: str, message: str) -> bool:
    """Whether the documented form is that of the message."""
    position = 0
    for part in re.split(r"\s*…\s*", documented):
        position = message.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


def test_documented_messages_are_those_of_the_code():
    messages = {text for text, _ in source_messages()}
    unknown = [d for d in documented_messages() if not any(says(d, text) for text in messages)]
    assert not unknown


def test_every_zerompi_error_is_documented():
    documented = documented_messages()
    missing = {
        message
        for message, is_error in source_messages()
        if is_error and not any(says(line, message) for line in documented)
    }
    assert not missing
