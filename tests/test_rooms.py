"""A room uses only the rooms above it in the README's table: held by import-linter, which is shown to notice."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

from tests import planted_errors

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lora_one_dist"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 50
UPWARDS = CONTRACTS[0]["layers"][::-1]  # the first uses none, the last uses all


def lint(folder: Path) -> str:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    return done.stdout if done.returncode else ""


def test_the_readme_has_the_rooms_in_the_order_that_is_held():
    table = re.findall(r"^\| \[(\w+)/\]\(lora_one_dist/\1\) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert table == UPWARDS
    assert {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")} == set(table)


def test_an_upward_import_in_any_room_and_a_circle_inside_one_are_noticed(tmp_path):
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert lint(tmp_path) == "", "as it stands"
    for room, above in pairwise(UPWARDS):
        # In a file of its own, inside a function: as an import that nobody notices would be.
        (tmp_path / PACKAGE / room / "planted.py").write_text(f"def use():\n    from {PACKAGE} import {above}\n")
    (tmp_path / PACKAGE / "plan" / "shape.py").open("a").write(f"\nfrom {PACKAGE}.plan import memory\n")
    said = lint(tmp_path)
    missed = [
        room
        for room, above in pairwise(UPWARDS)
        if f"{PACKAGE}.{room} is not allowed to import {PACKAGE}.{above}" not in said
    ]
    assert missed == [], said
    assert re.search(r"No two files of a room use each other.* BROKEN", said), said


def test_files_and_functions_are_short():
    long = []
    for path in (ROOT / PACKAGE).rglob("*.py"):
        text = path.read_text()
        if text.count("\n") > MOST_LINES:
            long.append(str(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION:
                long.append(f"{path}:{node.name}")
    assert long == []


def test_planted_errors_have_their_places():
    lost = [
        (error.name, old)
        for error in planted_errors.ERRORS
        for old, _ in error.edits
        if old not in (ROOT / PACKAGE / error.file).read_text()
    ]
    assert lost == []
