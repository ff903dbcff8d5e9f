"""A sweep of size against data: four sizes of gpt.py's model, each for two budgets of characters,
one seed. A few minutes on two cores; the rows go to outputs/sweep.csv.

    python tests/sweep.py"""
import argparse
import csv
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmark import ROOT, count, gpt

SIZES = [dict(n_embd=channels, n_head=2) for channels in (16, 32, 64, 128)]
BUDGETS = [dict(max_iters=100), dict(max_iters=400)]  # of 16 x 128 characters each
SHARED = dict(n_layer=4, block_size=128, batch_size=16, dropout=0.0, seed=1, device="cpu")


def run(parameters):
    """Train one of them; a row of sweep.csv."""
    torch.set_num_threads(1)  # a core for each run
    with tempfile.TemporaryDirectory() as folder:
        config = gpt.Config(**gpt.CPU | SHARED | parameters, out_dir=folder, dtype="float32",
                            compile="off")
        found = gpt.train(config)
        model, _ = gpt.load(Path(folder, "last.pt"))
    row = SHARED | parameters | {
        "parameters": count(model),
        "tokens": found["step"] * config.batch_size * config.block_size,
        "precision": found["config"]["dtype"], "val_loss": round(found["val_loss"], 5),
        "train_loss": round(found["train_loss"], 5)}
    print(row, flush=True)
    return row


def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(run, [size | budget for size in reversed(SIZES)
                                   for budget in reversed(BUDGETS)]))
    with open(ROOT / "outputs/sweep.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
