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
import statistics
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
            "validation loss, own windows", "published"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    five = json.loads((ROOT / "outputs/forerunners.json").read_text(encoding="utf-8"))
    short = {entry["name"]: entry["steps_run"] < entry["steps"] for entry in five}
    for entry in sorted(five, key=lambda entry: (short[entry["name"]], -entry["curve"][-1][2])):
        _, train_loss, val_loss = entry["curve"][-1]
        note = entry["reported"]
        if short[entry["name"]]:
            note = f"stopped after {entry['steps_run']} of {entry['steps']:,} steps: no result"
        cells = [entry["name"], f"{entry['parameters']:,}", f"{entry['tokens']:,}",
                 entry["block_size"], f"{train_loss:.4f}", f"{val_loss:.4f}", note]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    results = json.loads((ROOT / "outputs/results.json").read_text(encoding="utf-8"))
    for row in results["published"]:
        losses = " and ".join(f"{loss:.4f}" for loss in row["losses"])
        lines.append(f"| {row['name']} | | | | | | {losses} |")
    return "\n".join(lines)


def headline():
    """What README says first: the final model of the notebook's last complete run."""
    found = json.loads((ROOT / "outputs/results.json").read_text(encoding="utf-8"))
    row, pairs = (next(row for row in found["models"] if row["name"] == name)
                  for name in ("gpt.py", "bigram"))
    return textwrap.fill(
        f"In its last complete run the notebook trained {row['parameters']:,} parameters for "
        f"{row['seconds'] / 60:.0f} minutes on {found['device']} to **{row['val_loss']:.4f} nats "
        "per character** on text that it had not seen; lower is better. Guessing blindly costs "
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


def earlier():
    """What was measured with the earlier gpt.py: the shortest time to nanoGPT's loss
    and the lowest loss that were measured with an empty cache of compiled code, as a first run has
    it, on a CPU and on a GPU, the models of best.json, and the speeds of training and of writing.
    Losses are those of last weights."""
    file = (ROOT / "outputs/benchmarks.json").read_text(encoding="utf-8")
    document = json.loads(file)
    gpus = [machine for machine in document if not machine.endswith("cores")]
    cpus = [machine for machine in document if machine.endswith("cores")]

    def targets(machines):
        return [(machine, e["conditions"], e["figures"]) for machine in machines
                for name, e in document[machine].items() if name.startswith("target")
                and e["conditions"].get("compiler cache") == "empty"]

    found = targets(cpus)
    reached = [row for row in found if row[2]["s to target"]["median"]]
    where, how, fast = min(reached, key=lambda row: row[2]["s to target"]["median"])
    there, longest, low = min(found, key=lambda row: statistics.mean(
        row[2]["last val loss"]["values"]))
    many = len(longest["seeds"])
    many = f"mean of {many} seeds" if many > 1 else "one seed"
    gpu, plan, seen = min((row for row in targets(gpus) if not row[1]["minutes"]),
                          key=lambda row: row[2]["s in all"]["median"])

    way = "compiled" if "gpt.py, compiled" in file else "cached"  # the faster way of its time
    writing = f"generate nanogpt: gpt.py, {way}, batch 1, dropout 0.0"
    writer = max((machine for machine in cpus if writing in document[machine]),
                 key=lambda machine: document[machine][writing]["conditions"]["date"])

    def median(name, figure, machine):
        return document[machine][name]["figures"][figure]["median"]

    def peer(machine, batch=16, dropout=0.2):
        name = f"train nanogpt: nanoGPT, batch {batch}, dropout {dropout}"
        return max(median(name + also, "tokens/s", machine) for also in ("", ", compiled"))

    def times(figure, machine):
        return (median(writing, figure, machine) /
                median("generate nanogpt: nanoGPT, batch 1, dropout 0.0", figure, machine))

    stepping = seen.get("s of steps to target")  # as long as rows told the speed of steps alone
    stepping = f", of which {stepping['median']:.1f} are steps of training" if stepping else ""
    ours = "train nanogpt: gpt.py, batch 16, dropout 0.0"

    def ahead_in(precision):
        """How many times as fast in training, on the CPUs where gpt.py computes in this format."""
        ratios = {f"{median(ours, 'tokens/s', machine) / peer(machine):.1f}" for machine in cpus
                  if document[machine][ours]["conditions"]["precision"] == precision}
        return " to ".join(dict.fromkeys((min(ratios, key=float), max(ratios, key=float))))

    alike = median(ours, "tokens/s", writer) / peer(writer, dropout=0.0)
    ahead = (median("train nanogpt: gpt.py, batch 64, dropout 0.2", "tokens/s", gpu) /
             peer(gpu, 64))
    within, past = (times(figure, writer) for figure in ("tokens/s within", "tokens/s past"))
    study = json.loads((ROOT / "outputs/best.json").read_text(encoding="utf-8"))

    def mean(kind, size=512):
        return statistics.mean(row[f"val_loss, windows of {size}"] for row in study["rows"]
                               if row["model"] in (kind + "1", kind + "2"))

    points = [
        f"**{how['loss']} in {fast['s to target']['median']:.0f} seconds** on {where}, without a "
        f"GPU: `gpt.py train --minutes {how['minutes']:g}`, wall time with compiling anew and "
        f"evaluating (median of {len(how['seeds'])} seeds). The 5,000 steps of nanoGPT's own "
        f"recipe would take {5000 * 64 * 256 / peer(where) / 3600:.0f} hours there, at the speed "
        "that it reaches in our benchmark.",
        f"**{statistics.mean(low['last val loss']['values']):.4f} in {longest['minutes']:g} "
        f"minutes** on {there} ({many}, windows of {longest['context']} characters).",
        f"**{statistics.mean(seen['last val loss']['values']):.4f} in "
        f"{seen['s in all']['median']:.0f} seconds** on one {gpu} (mean of {len(plan['seeds'])} "
        f"seeds, windows of {plan['context']}). It passes {plan['loss']} after "
        f"{seen['s to target']['median']:.0f} seconds{stepping}.",
        f"**{mean('student'):.4f}** for the best model, trained on a CPU and taught by two others "
        f"(mean of 2 seeds, windows of 512; {mean('student', 256):.4f} on windows of 256). The "
        f"same training without teachers ends at {mean('untaught'):.4f}.",
        f"**Training {ahead_in('bfloat16')} times as fast as nanoGPT** at its shape, on CPUs that "
        "are fast in bfloat16 (nanoGPT computes in float32, and with dropout; without dropout in "
        f"either, it is {alike:.1f} times on {writer}); "
        f"{ahead_in('float32')} times where both compute in float32, {ahead:.1f} times on the "
        f"{gpu}, both in bfloat16.",
        f"**Writing {past:.0f} times as fast as nanoGPT** past the window"
        f"{', once compiled,' * (way == 'compiled')} and {within:.0f} times within it, on "
        f"{writer}; {times('tokens/s past', gpu):.0f} times on the {gpu}."]
    return "\n".join(textwrap.fill(point, 120, initial_indent="- ", subsequent_indent="  ",
                                   break_on_hyphens=False) for point in points)


def best():
    """The models of best.json. Chapter 10 of the notebook shows the same lines."""
    file = (ROOT / "outputs/best.json").read_text(encoding="utf-8")
    columns = {"model": "", "parameters": ",", "characters": ",", "minutes": ".0f",
               "evaluations": "", "val_loss, windows of 512": ".4f",
               "val_loss, windows of 256": ".4f"}
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in json.loads(file)["rows"]:
        cells = (format(row[key], kind) if key in row else "" for key, kind in columns.items())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def benchmarks():
    """The tables of benchmarks.json."""
    file = (ROOT / "outputs/benchmarks.json").read_text(encoding="utf-8")
    return benchmark.tables(json.loads(file)).strip()


TABLES = {"headline": headline, "expect": expect, "results": models}


def report():
    """The text of outputs/BENCHMARKS.md."""
    return f"""# Benchmarks

## The forerunners, and published losses

Chapter 12 of the notebook shows this table. The forerunners are five small projects that this one
grew out of, trained with the notebook's own classic code (`outputs/forerunners.json`; papermill
with `-p rerun_forerunners True` makes it). Their seconds are not told, since they ran beside each
other.

{others()}

## Speed and memory

Made by `python tests/results.py --write` from `outputs/benchmarks.json` (`python tests/benchmark.py
--peer DIR`, DIR being a checkout of nanoGPT) and `outputs/best.json` (`python tests/best.py`).

**All rows were measured with the earlier `gpt.py`**, of 612 to 636 lines (up to commit 1063059). It
trained the same recipe, wrote with a compiled model as well, and had teachers on board. The rows of
the present `gpt.py` are still to be measured.

## In short

{earlier()}

## The best model

Two models with 192 channels teach one with 256; half of its loss is the cross entropy against the
mean of their predictions. *Untaught* models are the students without teachers. Last weights, not
the best of many looks; minutes are of one core each.

{best()}

## Measured

Medians of the repetitions, with their range. nanoGPT runs its own model and training step at the
same shape in the same run. *s to target* asks how long `gpt.py train --minutes M` takes, from the
start of the process, to nanoGPT's 1.4697 over the whole validation split; *missed* means that it
did not get there. *nanogpt* is 6 layers, 6 heads, 384 channels, context 256; *gpt2* is 12 layers,
12 heads, 768 channels, context 1,024, with 65 characters.

{benchmarks()}
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
