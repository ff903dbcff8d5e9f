"""The tables of README.md and outputs/BENCHMARKS.md, and the notebook's opening, from the result
files in outputs/.

    python tests/results.py            # print the tables
    python tests/results.py --write    # write them, and pack the files into the notebook"""
import argparse
import base64
import html
import json
import math
import re
import textwrap
import zlib

import nbformat
from nbclient import NotebookClient

import benchmark

ROOT = benchmark.ROOT


def models():
    """The notebook's models, the worst first. Chapter 12 of the notebook shows the same lines."""
    head = ["model", "chapter", "parameters", "steps", "characters read", "seconds",
            "windows of 32", "own windows"]
    rows = json.loads((ROOT / "outputs/results.json").read_text(encoding="utf-8"))["models"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in sorted((row for row in rows if row["chapter"] < 12),
                      key=lambda row: -row["val_loss_at_32"]):
        own = f"{row['val_loss']:.4f}" + (f" in {row['window']}" if row["window"] else "")
        cells = [row["name"], row["chapter"], f"{row['parameters']:,}", f"{row['steps']:,}",
                 f"{row['tokens']:,}", f"{row['seconds']:.0f}", f"**{row['val_loss_at_32']:.4f}**",
                 own]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def others():
    """The forerunners, and published losses, each in its own windows. Chapter 12 shows the same."""
    head = ["model", "parameters", "characters read", "windows", "training loss",
            "validation loss, own windows", "note"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    five = json.loads((ROOT / "outputs/forerunners.json").read_text(encoding="utf-8"))
    for entry in sorted(five, key=lambda entry: -entry["curve"][-1][2]):
        _, train_loss, val_loss = entry["curve"][-1]
        note = entry["reported"]
        if entry["steps_run"] < entry["steps"]:
            note = f"after {entry['steps_run']:,} of {entry['steps']:,} steps"
        cells = [entry["name"], f"{entry['parameters']:,}", f"{entry['tokens']:,}",
                 entry["block_size"], f"{train_loss:.4f}", f"{val_loss:.4f}", note]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    results = json.loads((ROOT / "outputs/results.json").read_text(encoding="utf-8"))
    for row in results["published"]:
        losses = " and ".join(f"{loss:.4f}" for loss in row["losses"])
        lines.append(f"| {row['name']} | | | | | | published: {losses} |")
    return "\n".join(lines)


def precisions():
    """Which forerunners were trained in float32; the others were in bfloat16."""
    five = json.loads((ROOT / "outputs/forerunners.json").read_text(encoding="utf-8"))
    names = [entry["name"].split(",")[0] for entry in five if entry["precision"] == "float32"]
    return f"In float32: {', '.join(names)}; the others in bfloat16."


def headline():
    """What README says first: the final model of the notebook's last complete run."""
    found = json.loads((ROOT / "outputs/results.json").read_text(encoding="utf-8"))
    row, pairs = (next(row for row in found["models"] if row["name"] == name)
                  for name in ("gpt.py", "bigram"))
    return textwrap.fill(
        f"In its last complete run the notebook trained a model of {row['parameters']:,} "
        f"parameters for {row['seconds'] / 60:.0f} minutes on {found['device']}. It reached "
        f"**{row['val_loss']:.4f} nats per character** on text that it had not seen; lower is "
        "better. Blind guessing costs "
        f"{math.log(65):.2f}, a table of letter pairs {pairs['val_loss']:.2f}, and nanoGPT's "
        "README reports 1.4697 as its best.",
        120, break_on_hyphens=False)


def expect():
    """What a first run reaches, from expect.json: a row for each number of minutes."""
    found = json.loads((ROOT / "outputs/expect.json").read_text(encoding="utf-8"))
    lines = [f"On {found['device']}, {found['rows'][0]['dtype']}, torch {found['torch']}:", "",
             "| minutes | steps | validation loss | the text begins |", "|---|---|---|---|"]
    for row in found["rows"]:
        text = "<br>".join(html.escape(line, quote=False) for line in row["text"])
        lines.append(f"| {row['minutes']:g} | {row['steps']:,} | {row['val_loss']:.2f} | {text} |")
    return "\n".join(lines)


def measured(earlier=False):
    """Of benchmarks.json, the rows that name no commit, or those that do: they are of an older
    gpt.py."""
    document = json.loads((ROOT / "outputs/benchmarks.json").read_text(encoding="utf-8"))
    chosen = {machine: {name: entry for name, entry in entries.items()
                        if ("commit" in entry["conditions"]) == earlier}
              for machine, entries in document.items()}
    return {machine: entries for machine, entries in chosen.items() if entries}


def in_short():
    """gpt.py beside nanoGPT, on the machines where both were measured."""
    lines = []
    for machine, entries in measured().items():
        found = {name: {figure: value["median"] for figure, value in entry["figures"].items()}
                 for name, entry in entries.items()}
        if not {f"{kind} nanogpt: nanoGPT, batch 16, dropout 0.0"
                for kind in ("train", "generate")} <= set(found):
            continue
        training, memory, writing = {}, {}, {}
        for dropout in (0.2, 0.0):
            shape = f"batch 16, dropout {dropout}"
            ours = found[f"train nanogpt: gpt.py, {shape}"]
            theirs = [found[f"train nanogpt: nanoGPT, {shape}{way}"] for way in ("", ", compiled")]
            training[dropout] = ours["tokens/s"] / max(way["tokens/s"] for way in theirs)
            memory[dropout] = ours["peak MiB"], min(way["peak MiB"] for way in theirs)
        for size in (1, 16):
            ours, theirs = (found[f"generate nanogpt: {engine}, batch {size}, dropout 0.0"]
                            for engine in ("gpt.py, cached", "nanoGPT"))
            writing[size] = ours["tokens/s past"] / theirs["tokens/s past"]
        lines.append(
            f"On {machine}, with dropout 0.2 in both, `gpt.py` trains {training[0.2]:.1f} times as "
            f"fast as nanoGPT, and without dropout {training[0.0]:.1f} times, each time against "
            f"the faster of nanoGPT's two ways, compiled and not. It takes {memory[0.2][0]:,.0f} "
            f"MiB, and nanoGPT {memory[0.2][1]:,.0f} in the way that takes less; without dropout, "
            f"{memory[0.0][0]:,.0f} and {memory[0.0][1]:,.0f}. Past the window it writes one text "
            f"{writing[1]:.1f} times as fast, and sixteen at once {writing[16]:.1f} times.")
    return "\n\n".join(textwrap.fill(line, 100, break_on_hyphens=False) for line in lines)


def study():
    """What best.json holds."""
    return json.loads((ROOT / "outputs/best.json").read_text(encoding="utf-8"))


def best():
    """The models of best.json. Chapter 10 of the notebook shows the same lines."""
    columns = {"model": "", "parameters": ",", "characters": ",", "minutes": ".0f",
               "evaluations": "", "val_loss, windows of 512": ".4f",
               "val_loss, windows of 256": ".4f"}
    order = ["teacher1", "teacher2", "mean of the teachers", "untaught1", "untaught2", "student1",
             "student2"]
    lines = [f"| {' | '.join(columns)} |".replace("val_loss", "loss"), "|---" + "|--:" * 6 + "|"]
    for row in sorted(study()["rows"], key=lambda row: order.index(row["model"])):
        cells = (format(row[key], kind) if key in row else "" for key, kind in columns.items())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"headline": headline, "expect": expect, "results": models}


def report():
    """The text of outputs/BENCHMARKS.md."""
    return f"""# Benchmarks

## The forerunners, and published losses

Chapter 12 of the notebook shows this table. The forerunners are five small projects that this one
grew out of, trained with the notebook's own classic code (`outputs/forerunners.json`; papermill
with `-p rerun_forerunners True` makes it). Their times are not given, since they ran on different
machines, some side by side. *lecture GPT*, a run of several hours, used that program's loop with
checkpoints added. {precisions()}

{others()}

## Speed and memory

Medians of the repetitions, with their range. `python tests/benchmark.py --peer DIR` writes them to
`outputs/benchmarks.json`; DIR is a checkout of nanoGPT. nanoGPT runs its own model and training
step at the same shape in the same run. *nanogpt* is 6 layers, 6 heads, 384 channels, context 256;
*gpt2* is 12 layers, 12 heads, 768 channels, context 1,024, with 65 characters. *Of the model* are
products in the model's shapes, *square* those of large square matrices; *classic* is the GPT of
chapter 6; *within* and *past* refer to the window. The rows of `gpt.py` were measured at commit
35c9463; the present one trains to the same weights, bit for bit, and its steps take the same time
within 3 per cent.

{in_short()}

{benchmark.tables(measured()).strip()}

## Measured earlier

With earlier versions of `gpt.py`, of 542 to 636 lines, and their presets of the time. *s to target*
asks how long `gpt.py train --minutes M` took, from the start of the process, to nanoGPT's 1.4697
over the whole validation split. 0 minutes stand for the preset's number of steps.

{benchmark.tables(measured(earlier=True)).strip()}

## The best model

`python tests/best.py`, at commit {study().get("commit", "HEAD")}. Two models with 192 channels
teach one with 256; half of its loss is the cross entropy against the mean of their predictions.
*Untaught* models are students without teachers. The losses are of the last weights, not of the best
of many evaluations; minutes are for one core each.

{best()}
"""


def filled(readme):
    """README's text with its tables made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = readme.partition(begin)
        _, marked, after = rest.partition(end)
        assert marked, f"README.md has no place for {name}"
        readme = f"{before}{begin}\n{table()}\n\n{end}{after}"
    return readme


def packed_files():
    """{name: text} of what the notebook carries along, so that it needs no other file: its result
    files; of benchmarks.json, what appendices B and C read."""
    names = ("moments.json", "results.json", "ladder.csv", "tried.csv", "forerunners.json",
             "sweep.csv", "best.json")
    files = {name: (ROOT / "outputs" / name).read_text(encoding="utf-8") for name in names}
    document = json.loads((ROOT / "outputs/benchmarks.json").read_text(encoding="utf-8"))

    def needed(name, figure):
        return (name.startswith("machine") and figure.endswith(", of the model") or
                name.startswith("target") and figure == "last val loss")

    small = {}
    for machine, entries in document.items():
        for name, entry in entries.items():
            if figures := {k: v for k, v in entry["figures"].items() if needed(name, k)}:
                small.setdefault(machine, {})[name] = {"figures": figures}
    return files | {"benchmarks.json": json.dumps(small)}


def write_opening(path):
    """Pack the result files into the notebook's first cell, and run that cell and the next."""
    book = nbformat.read(path, as_version=4)
    content = zlib.compress(json.dumps(packed_files(), sort_keys=True).encode(), 9)
    line = f'PACKED = "{base64.b64encode(content).decode()}"'
    opening = [cell for cell in book.cells if cell.cell_type == "code"][:2]
    opening[0].source = re.sub('(?m)^PACKED = ".*"$', line, opening[0].source)
    short = nbformat.v4.new_notebook(cells=opening)
    NotebookClient(short, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell, fresh in zip(opening, short.cells):
        cell.outputs = fresh.outputs
        cell.metadata.pop("execution", None)
    nbformat.write(book, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into the files")
    if parser.parse_args().write:
        path = ROOT / "README.md"
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
        path = ROOT / "outputs/BENCHMARKS.md"
        path.write_text(report(), encoding="utf-8", newline="\n")
        write_opening(ROOT / "gpt_from_scratch.ipynb")
    print(*(table() for table in TABLES.values()), report(), sep="\n\n")


if __name__ == "__main__":
    main()
