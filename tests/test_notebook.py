"""The notebook: gpt.py comes out of it byte for byte, it runs, and its parameters are checked."""
import ast
import builtins
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

NAME = "gpt_from_scratch.ipynb"
CELLS = json.loads((ROOT / NAME).read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_gpt_py_is_the_export_byte_for_byte():
    """Rebuilt from the notebook's JSON. Tests run notebooks in folders of their own, so none of
    them can mend a stale gpt.py before this one sees it."""
    exported = {}
    for source in CODE:
        first, _, rest = source.partition("\n")
        if first.startswith("#| export "):
            exported[first.split()[-1]] = rest.strip() + "\n"
    scope = {}
    exec(next(source for source in CODE if "def assemble(" in source), scope)
    assert scope["assemble"](exported).encode() == (ROOT / "gpt.py").read_bytes()


def sizes(source):
    """Lines, lines of code (not blank, no comment, no docstring), longest function, widest line."""
    lines, tree, told = source.splitlines(), ast.parse(source), set()
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node):
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [i for i, line in enumerate(lines, 1)
            if line.strip() and not line.strip().startswith("#") and i not in told]
    functions = [node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
                 if isinstance(node, ast.FunctionDef)]
    return len(lines), len(code), max(functions), max(map(len, lines))


def fits(source):
    """Whether a file is small enough to be held in the head."""
    return all(size <= most for size, most in zip(sizes(source), (370, 300, 60, 100)))


def test_gpt_py_stays_small():
    source = (ROOT / "gpt.py").read_text(encoding="utf-8")
    assert fits(source), sizes(source)
    assert not fits(source + "x = 1\n" * 100)
    assert not fits(source + "#" * 101)
    starts = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    assert len(starts) == len(set(starts))  # one statement on a line


def names_used(source):
    """What a cell uses beyond its own names: attributes, keyword arguments, functions, modules."""
    nodes = list(ast.walk(ast.parse(source)))
    own = {n.arg for n in nodes if isinstance(n, ast.arg)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    named = ast.FunctionDef | ast.ClassDef | ast.ExceptHandler
    own |= {n.name for n in nodes if isinstance(n, named)}
    used = {n.id for n in nodes if isinstance(n, ast.Name)} - own - set(dir(builtins))
    used |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    used |= {n.arg for n in nodes if isinstance(n, ast.keyword) and n.arg}
    return {name for name in used if not name.startswith("__")}


def never_met(cells):
    """Names that an exported cell uses and that stand neither in a cell before it nor in the text
    right after it, as (cell, name). The imports explain nothing, so they don't count."""
    told, missing = "", []
    for cell, after in zip(cells, cells[1:] + [None]):
        source = "".join(cell["source"])
        if source.startswith("#| export imports"):
            continue
        if source.startswith("#| export"):
            text = "".join(after["source"]) if after and after["cell_type"] == "markdown" else ""
            missing += [(source.split()[2], name) for name in sorted(names_used(source))
                        if not re.search(rf"\b{re.escape(name)}\b", told + text)]
        told += source + "\n"
    return missing


def test_every_name_in_gpt_py_is_met_before_it_is_used():
    assert not never_met(CELLS)
    exported = {"cell_type": "code", "source": ["#| export x\n", "torch.lerp(a, weight=b)\n"]}
    assert {name for _, name in never_met([exported])} == {"torch", "lerp", "a", "weight", "b"}


def test_the_telling_keeps_its_measure():
    """Words and habits of the main text, and cells that show something."""
    prose = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
    first = next(i for i, text in enumerate(prose) if text.startswith("# Appendix"))
    main = [re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL) for text in prose[:first]]
    assert sum(len(text.split()) for text in main) <= 11_750
    assert len(re.findall(r"[(][^()]{60,}[)]", " ".join(main))) <= 10
    assert len(re.findall(r"(?:^|[.!?:] )So ", " ".join(main))) <= 12
    told = [cell for cell in CELLS if cell["cell_type"] == "code"
            and not "".join(cell["source"]).startswith("#| export")]
    assert sum(not cell["outputs"] for cell in told) <= 0.4 * len(told)
    lengths = sorted(len("".join(cell["source"]).splitlines()) for cell in told)
    assert lengths[len(lengths) // 2] <= 6 and lengths[int(0.9 * len(lengths))] <= 20
    assert all("<details>" in text for text in prose if "### Exercises" in text)


def test_committed_copy_was_run_from_top_to_bottom():
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [o for cell in CELLS if cell["cell_type"] == "code" for o in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert (ROOT / NAME).stat().st_size < 3_000_000


def test_environment_and_readme_name_the_same_packages():
    conda = re.findall(r"^  - ([a-z]+)", (ROOT / "environment.yml").read_text(), re.MULTILINE)
    command = re.search(r"pip install torch==\S+ (jupyter.*?) &&", (ROOT / "README.md").read_text())
    conda = set(conda) - {"conda", "python", "pytorch"}
    assert conda == set(command.group(1).split())


@pytest.fixture
def folder(tmp_path):
    """A folder that holds the notebook and the bundled corpus, and nothing else."""
    shutil.copy(ROOT / NAME, tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data/the_salt_tide.txt", tmp_path / "data")
    return tmp_path


def run(*words, folder, **environment):
    offline = {"https_proxy": "http://127.0.0.1:9", "GPT_FAST": "1", "MPLBACKEND": "agg"}
    quick = ["--no-request-save-on-cell-execute"] if words[0] == "papermill" else []
    return subprocess.run([sys.executable, "-m", *map(str, words), *quick], cwd=folder, text=True,
                          capture_output=True, timeout=1800, env=os.environ | offline | environment)


def test_nbval_fast_mode(folder):
    done = run("pytest", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env", NAME,
               folder=folder)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (folder / "gpt.py").read_bytes() == (ROOT / "gpt.py").read_bytes()
    assert not (folder / "outputs/results.json").exists()  # fast runs keep to their own folder


@pytest.mark.parametrize("flags, named", [
    (("-p", "max_itres", "50"), "max_itres is not a parameter"),
    (("-y", "learning_rate: 1e-3"), "learning_rate must be float"),
    (("-p", "max_iters", "false"), "max_iters must be int")])
def test_papermill_stops_at_a_wrong_parameter(folder, flags, named):
    done = run("papermill", NAME, "out.ipynb", *flags, folder=folder)
    assert done.returncode != 0
    assert named in done.stderr and "Valid are n_layer: int" in done.stderr
    assert not (folder / "gpt.py").exists()  # it stopped before anything was done


@pytest.mark.parametrize("flags, advice", [
    (("-p", "n_head", "3"), "n_embd must be a multiple of 2 * n_head"),
    (("-p", "data", "nowhere.txt"), "there is no file nowhere.txt")])
def test_papermill_stops_at_what_can_not_work(folder, flags, advice):
    done = run("papermill", NAME, "out.ipynb", *flags, folder=folder)
    assert done.returncode != 0 and advice in done.stderr
    assert not (folder / "outputs").exists()


def test_papermill_runs_with_parameters_and_a_text_of_many_symbols(folder):
    """3,000 characters after a byte order mark: no line break, a thousand symbols, and a last tenth
    that the rest does not prepare for. out_dir keeps every file of the run."""
    signs = [chr(0x4E00 + i) for i in range(1000)]
    text = "".join(signs + [signs[i * i % 997] for i in range(1700)]) + "αβγδε " * 50
    (folder / "my.txt").write_text(text, encoding="utf-8-sig")
    done = run("papermill", NAME, "out.ipynb", "-p", "max_iters", "7", "-p", "data", "my.txt",
               "-p", "out_dir", "outputs/runs/seven", folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    about = json.loads((folder / "outputs/runs/seven/final/run.json").read_text())
    assert about["step"] == about["config"]["max_iters"] == 7
    assert about["chars"] == "".join(sorted(set(text)))
    assert os.listdir(folder / "outputs") == ["runs"]
    assert "Glyph" not in (folder / "out.ipynb").read_text(encoding="utf-8") + done.stderr


def test_a_text_of_one_symbol_is_refused(folder):
    (folder / "my.txt").write_text("a" * 5000)
    done = run("papermill", NAME, "out.ipynb", "-p", "data", "my.txt", folder=folder)
    assert done.returncode != 0 and "of one character" in done.stderr
