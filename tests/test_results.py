"""The result files hold what the notebook and README say, and both show the same numbers; and
best.py, which makes one of them, teaches as it says."""
import csv
import json
import math
from dataclasses import replace

import pytest
import torch

import best
import gpt
import results
from conftest import weights

OUTPUTS = results.ROOT / "outputs"


def read(name):
    """A result file: the rows of a CSV file, or what a JSON file holds."""
    text = (OUTPUTS / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith("json") else list(csv.DictReader(text.splitlines()))


def test_readme_shows_the_tables_of_the_result_files():
    readme = (results.ROOT / "README.md").read_text(encoding="utf-8")
    assert results.filled(readme) == readme


def test_benchmarks_md_is_made_from_the_result_files():
    assert (OUTPUTS / "BENCHMARKS.md").read_text(encoding="utf-8") == results.report()


def test_readme_is_short_and_comes_to_the_point():
    lines = (results.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 230 and len(" ".join(lines).split()) <= 2200
    assert any(line.startswith("    python") for line in lines[:30])


def test_a_changed_number_in_readme_is_seen():
    readme = (results.ROOT / "README.md").read_text(encoding="utf-8")
    row = results.models().splitlines()[-1]
    digit = next(c for c in reversed(row) if c.isdigit())
    wrong = row[::-1].replace(digit, str(9 - int(digit)), 1)[::-1]
    changed = readme.replace(row, wrong)
    assert changed != readme and results.filled(changed) == readme


def test_notebook_shows_the_same_table():
    notebook = json.loads((results.ROOT / "gpt_from_scratch.ipynb").read_text(encoding="utf-8"))
    shown = ["".join(output["data"].get("text/markdown", [])) for cell in notebook["cells"]
             for output in cell.get("outputs", []) if "data" in output]
    assert {results.models(), results.others(), results.best()} <= set(shown)


def test_notebook_carries_the_result_files(tmp_path, monkeypatch):
    """Its first cell, run where there are no files, returns what outputs/ holds; a file that the
    run has made anew comes first."""
    notebook = json.loads((results.ROOT / "gpt_from_scratch.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    scope = {}
    exec("".join(cells[0]["source"]), scope)
    files = results.packed_files()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ladder.csv").write_text("anew")
    assert scope["recorded"]("ladder.csv", ".") == "anew"
    assert {name: scope["recorded"](name) for name in files} == files
    found = read("results.json")
    row = next(row for row in found["models"] if row["name"] == "gpt.py")
    shown = "".join(text for output in cells[1]["outputs"] for text in output.get("text", []))
    assert f"{row['parameters']:,} parameters" in shown and found["sample"][:99] in shown


def test_ladder_has_its_rungs_and_equal_compute():
    rows = [row for row in read("ladder.csv") if row["budget"] == "tokens"]
    rungs = {row["rung"] for row in rows if not row["rung"].startswith("\u2212")}
    assert len(rungs) >= 10 and len({row["tokens"] for row in rows}) == 1
    for rung in rungs:
        assert len({row["seed"] for row in rows if row["rung"] == rung}) >= 3


def test_sweep_has_its_sizes_and_budgets():
    rows = read("sweep.csv")
    assert len({row["parameters"] for row in rows}) >= 4
    assert len({row["tokens"] for row in rows}) >= 2
    assert len({(row["parameters"], row["tokens"]) for row in rows}) == len(rows) >= 8


def test_the_five_forerunners_were_trained():
    entries, models = read("forerunners.json"), read("results.json")["models"]
    assert {entry["name"].split(",")[0] for entry in entries} == {
        "raw", "mini-GPT T4", "lecture GPT", "progression", "tiny GPT"}
    for entry in entries:
        steps = [step for step, _, _ in entry["curve"]]
        assert steps == sorted(steps) and steps[-1] == entry["steps_run"] <= entry["steps"]
        assert all(0 < loss < math.log(65) for point in entry["curve"] for loss in point[1:])
        name = f"forerunner: {entry['name'].split(',')[0]}"
        row = next(row for row in models if row["name"].split(",")[0] == name)
        assert (" of " in row["name"]) == (entry["steps_run"] < entry["steps"])  # says it is short
        assert row["val_loss"] == pytest.approx(entry["curve"][-1][2], abs=1e-4)


def test_teachers_are_learned_beside_the_text(config, text_file, tmp_path, monkeypatch):
    """One plain step from zero weights of the head, against the gradient of the formula."""
    monkeypatch.setattr(gpt, "make_optimizers", lambda model, config: [
        torch.optim.SGD(model.parameters(), lr=1.0)])
    _, chars, data, _, _ = gpt.load_text(text_file)
    likes = 5.0 * torch.eye(len(chars))[[3, 7]]  # what the two teachers expect everywhere
    teachers = [lambda x, logits=logits: logits.expand(*x.shape, -1) for logits in likes]
    config = replace(config, max_iters=1, data=str(text_file), out_dir=str(tmp_path / "run"))
    run = best.teach(config, teachers)
    x, y = gpt.get_batch(data, 4, 16, 0, seed=1)
    torch.manual_seed(1)
    model = gpt.GPT(gpt.Config(**run["config"]))
    logs = (model(x) / config.train_temperature).log_softmax(-1)  # (B, T, V)
    text = -logs.gather(-1, y[..., None]).sum()
    taught = -(logs * likes.softmax(-1).mean(0)).sum()
    ((text + taught) / 2).backward()
    found = weights(tmp_path / "run")["head.weight"]
    assert found.abs().max() > 0.1 and torch.allclose(found, -model.head.weight.grad, atol=1e-4)
    assert abs(run["train_loss"] - text / 64) < 1e-5 and gpt.train_step.__module__ == "gpt"
