"""The best single model of gpt.py: two models teach a third one, which on a CPU is larger. Beside
it, the same without teachers. An hour and a half on two cores; the rows go to outputs/best.json.

    python tests/best.py

Runs are kept in outputs/runs/best. What is finished there is not trained again, and what was
interrupted goes on."""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmark import ROOT, device_name, gpt

RUNS = Path("outputs/runs/best")
DEVICE, _ = gpt.pick_device(dtype="float32")  # each training picks its own format
ON_CPU = DEVICE.type == "cpu"
KINDS = "teacher", "student", "untaught"
TEACHERS, STUDENTS, UNTAUGHT = ([kind + seed for seed in "12"] for kind in KINDS)
PLANS = {"teacher": gpt.preset(DEVICE.type, 15) | (dict(max_iters=2200) if ON_CPU else {}),
         "student": gpt.preset(DEVICE.type, 30) | (dict(max_iters=2600) if ON_CPU else {})}
PLANS["untaught"] = PLANS["student"]


def train(name):
    """Train one of the models with one thread, unless that was done; its run.json."""
    out_dir, plan, seed = RUNS / name, PLANS[name[:-1]], name[-1]
    plan = plan | dict(eval_interval=plan["max_iters"] // 2, seed=seed, out_dir=out_dir)
    if name in STUDENTS:
        plan["teachers"] = ",".join(str(RUNS / teacher / "last.pt") for teacher in TEACHERS)
    command = [sys.executable, "gpt.py", "train"]
    command += [word for key, value in plan.items() for word in (f"--{key}", str(value))]
    command += ["--resume"] * (out_dir / "last.pt").exists()
    threads = {"OMP_NUM_THREADS": "1"} if ON_CPU else {}
    subprocess.run(command, check=True, env=os.environ | threads)
    return json.loads((out_dir / "run.json").read_text())


def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.chdir(ROOT)
    with ThreadPoolExecutor(os.cpu_count() if ON_CPU else 1) as pool:
        runs = {name: run for names in (TEACHERS, STUDENTS, UNTAUGHT)
                for name, run in zip(names, pool.map(train, names))}
    models = {name: gpt.load(RUNS / name / "last.pt", DEVICE)[0] for name in runs}
    models["mean of the teachers"] = lambda x: sum(
        models[name](x).softmax(-1) / len(TEACHERS) for name in TEACHERS).log()
    val_data = gpt.load_text(gpt.find_text())[2].to(DEVICE)
    rows = []
    for name, model in models.items():
        row = {"model": name}
        if run := runs.get(name):
            row |= {"seed": run["config"]["seed"], "parameters": run["parameters"],
                    "steps": run["step"], "characters": run["tokens"],
                    "minutes": round(run["seconds"] / 60, 1), "evaluations": len(run["metrics"]),
                    "train_loss": round(run["train_loss"], 4)}
        rows.append(row | {f"val_loss, windows of {size}": round(
            gpt.evaluate(model, val_data, size), 4) for size in (512, 256)})
        print(rows[-1])
    found = {"device": device_name(DEVICE), "precision of training": runs[TEACHERS[0]]["precision"],
             "threads": 1 if ON_CPU else None, "torch": torch.__version__, "plans": PLANS,
             **{key: runs[TEACHERS[0]][key] for key in ("data", "sha256")}}
    gpt.write(Path("outputs/best.json"), json.dumps(found | {"rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
