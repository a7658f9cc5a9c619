"""The planner's command line: what it prints, and which questions it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import tool


def test_a_plan_that_fits():
    done = tool.run("plan", "--model", "tools/shapes/llama-3.1-8b", "--hosts", 4, "lora.r=64")
    assert "8.03 B parameters, 224 target layers" in done.stdout
    assert "4 x 8 ranks" in done.stdout
    assert "lora_one, r 64: 167.8 M in the adapters" in done.stdout
    assert done.stdout.rstrip().endswith("every phase fits")


def test_seconds_of_cpu_ranks_are_not_guessed():
    asked = ("plan", "--model", "tools/shapes/llama-2-7b", "--backend", "gloo")
    assert "tokens a second" not in (guessed := tool.run(*asked).stdout)
    assert "no seconds: give what these machines reach" in guessed
    slow, fast = (tool.run(*asked, "--tflops", tflops).stdout for tflops in (1, 2))
    speeds = [float(re.search(r"(\d+) tokens a second", text)[1]) for text in (slow, fast)]
    assert speeds[1] == pytest.approx(2 * speeds[0], rel=0.01), "where operations take nearly all of a step"


def test_a_plan_that_does_not_fit_says_what_to_change():
    done = tool.run("plan", "--model", "tools/shapes/llama-3.3-70b/config.json", "--gpu_gb", 40, check=False)
    assert done.returncode == 2
    assert done.stdout.count("DOES NOT FIT") == 2
    assert "svd needs 52.0 GB, 36 GB are there. One of these is enough: init.layer_groups=2;" in done.stdout


@pytest.mark.parametrize(
    ("name", "model", "hosts", "each"),
    [("demo", None, 1, 8), ("llama3_3_70b_chat", "tools/shapes/llama-3.3-70b", 4, 8)],
)
def test_a_run_is_planned_from_its_yaml_without_its_data(name, model, hosts, each):  # all of them: test_recipes.py
    own = ["--model", model] if model else []
    path = f"launch/configs/{name}.yaml"
    done = tool.run("plan", "--config", path, *own, "--hosts", hosts, "--ranks_per_host", each)
    assert f"{hosts} x {each} ranks, stage 3" in done.stdout
    assert "every phase fits" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model or --config must say which model"),
        (["--model", "nowhere"], "model.path = nowhere: is neither a folder nor a hub name"),
        (["--model", "tools/shapes/llama-2-7b", "lora.rank=8"], "lora.rank = 8: no such setting"),
        (["--model", "tools/shapes/llama-2-7b", "lora.r=5000"], "lora.r = 5000: must be at most min(m, n) = 4096"),
        (["--model", "tools/shapes/llama-2-7b", "lora.target_modules=[k_prj]"], "Did you mean k_proj"),
        (["--config", "none.yaml"], "--config none.yaml: cannot be read"),
        (["--model", "tools/shapes/llama-2-7b", "--gpu_gb", "4"], "--gpu_gb 4"),
    ],
)
def test_questions_that_make_no_sense(arguments, said):
    done = tool.run("plan", *arguments, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stdout == ""


def test_the_readme_has_the_table_that_the_tool_prints():
    printed = tool.run("plan", "--table").stdout.strip().splitlines()
    assert len(printed) == 2 + 4 * 3
    readme = Path("README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in printed if line not in readme] == []
