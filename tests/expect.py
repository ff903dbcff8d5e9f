"""What a first run looks like on this machine, for README: outputs/expect.json.

    python tests/expect.py                    # 1, 2, 5 and 10 minutes, one after the other
    python tests/expect.py --minutes 1 2      # only these; the other rows stay
    python tests/expect.py --repeats 3        # of three runs each, the one that took most steps"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def first_run(minutes):
    """Train for so many minutes with no other flag, and let the best checkpoint write."""
    with tempfile.TemporaryDirectory() as folder:
        gpt = [sys.executable, str(ROOT / "gpt.py")]
        anew = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}  # as a first run does
        subprocess.run([*gpt, "train", "--minutes", str(minutes), "--out_dir", folder], check=True,
                       env=anew)
        text = subprocess.run([*gpt, "generate", "--checkpoint", f"{folder}/best.pt"], check=True,
                              capture_output=True, encoding="utf-8").stdout
        run = json.loads(Path(folder, "run.json").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line]
    best = min(row["val_loss"] for row in run["metrics"])  # of best.pt, which has written
    return {"minutes": minutes, "steps": run["step"], "val_loss": best,
            "train_loss": run["train_loss"], "dtype": run["config"]["dtype"], "text": lines[:3]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/expect.json")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text("utf-8"))["rows"] if args.out.exists() else []
    for minutes in args.minutes:
        runs = [first_run(minutes) for _ in range(args.repeats)]
        best = max(runs, key=lambda run: run["steps"])
        rows = sorted([row for row in rows if row["minutes"] != minutes] + [best],
                      key=lambda row: row["minutes"])
        gpu = torch.cuda.is_available() and torch.cuda.get_device_name()
        found = {"device": gpu or f"{os.cpu_count()} CPU cores", "torch": str(torch.__version__),
                 "rows": rows}
        args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(best)


if __name__ == "__main__":
    main()
