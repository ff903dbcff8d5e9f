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
from dataclasses import asdict
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmark import ROOT, count, device_name, gpt

RUNS = ROOT / "outputs/runs/best"
DEVICE = gpt.pick_device()
ON_CPU = DEVICE.type == "cpu"
KINDS = "teacher", "student", "untaught"
TEACHERS, STUDENTS, UNTAUGHT = ([kind + seed for seed in "12"] for kind in KINDS)
LONG = dict(n_layer=6, block_size=512, batch_size=8, learning_rate=0.02, weight_decay=0.4,
            adamw_learning_rate=0.003, decay_fraction=0.6, short_fraction=0.8,
            train_temperature=0.92)
PLANS = {"teacher": LONG | dict(n_head=3, n_embd=192, adamw_weight_decay=1.0, dropout=0.05,
                                max_iters=2200),
         "student": LONG | dict(n_head=4, n_embd=256, adamw_weight_decay=2.0, dropout=0.1,
                                max_iters=2600)} if ON_CPU else {"teacher": {}, "student": {}}
PLANS["untaught"] = PLANS["student"]


def taught_step(teachers):
    """gpt.train_step for one process, but half of the loss is cross entropy with the mean of the
    teachers' predictions (Hinton et al., 2015; Furlanello et al., 2018)."""
    def train_step(model, optimizers, data, config, step, done):
        torch.manual_seed(config.seed * 2**20 + step)
        cut = 4 if done < config.short_fraction / 2 else 2 if done < config.short_fraction else 1
        x, y = gpt.get_batch(data, config.batch_size * cut, config.block_size // cut, step,
                             config.seed)
        model.train().zero_grad()
        precision = getattr(torch, config.dtype)
        with torch.autocast(data.device.type, precision, config.dtype != "float32"):
            with torch.no_grad():
                soft = sum(teacher(x).float().softmax(-1) for teacher in teachers) / len(teachers)
            logits = model(x).flatten(0, 1).float() / config.train_temperature  # (B T, V)
            loss, taught = (F.cross_entropy(logits, target.flatten(0, 1), reduction="sum")
                            for target in (y, soft))
            ((loss + taught) / 2).backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    factor = min(1, (1 - done) / config.decay_fraction)
                    group.update(optimizer.defaults, lr=optimizer.defaults["lr"] * factor)
                optimizer.step()
        return loss.detach() / y.numel()
    return train_step


def teach(config, teachers, saved=None):
    """gpt.train, but learning from `teachers`, too: functions from ids (B, T) to logits."""
    with patch.object(gpt, "train_step", taught_step(teachers)):
        return gpt.train(config, saved)


def plan(name):
    """The configuration of a model."""
    return gpt.Config(**PLANS[name[:-1]], seed=int(name[-1]), out_dir=str(RUNS / name))


def train(name):
    """Train one of the models in a process of its own, on a CPU with one thread, unless that was
    done; its run.json."""
    config, file = plan(name), RUNS / name / "run.json"
    if not file.exists() or json.loads(file.read_text())["step"] < config.max_iters:
        command = [sys.executable, __file__, "--student", name]
        if name not in STUDENTS:
            command = [sys.executable, ROOT / "gpt.py", "train"] + ["--resume"] * file.exists()
            command += [word for key, value in asdict(config).items()
                        for word in (f"--{key}", str(value))]
        threads = {"OMP_NUM_THREADS": "1"} if ON_CPU else {}
        subprocess.run(command, check=True, env=os.environ | threads)
    return json.loads(file.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=STUDENTS, help=argparse.SUPPRESS)  # only this one
    if name := parser.parse_args().student:
        last = RUNS / name / "last.pt"
        teach(plan(name), [gpt.load(RUNS / it / "last.pt", DEVICE)[0] for it in TEACHERS],
              gpt.load(last)[1] if last.exists() else None)
        return
    with ThreadPoolExecutor(os.cpu_count() if ON_CPU else 1) as pool:
        runs = {name: run for names in (TEACHERS, STUDENTS, UNTAUGHT)
                for name, run in zip(names, pool.map(train, names))}
    models = {name: gpt.load(RUNS / name / "last.pt", DEVICE)[0] for name in runs}
    models["mean of the teachers"] = lambda x: sum(
        models[name](x).softmax(-1) / len(TEACHERS) for name in TEACHERS).log()
    path, _, _, val_data, sha256 = gpt.load_text()
    rows = []
    for name, model in models.items():
        row = {"model": name}
        if run := runs.get(name):
            config = plan(name)
            row |= {"seed": config.seed, "parameters": count(model), "steps": run["step"],
                    "characters": run["step"] * config.batch_size * config.block_size,
                    "minutes": round(run["seconds"] / 60, 1), "evaluations": len(run["metrics"]),
                    "train_loss": round(run["train_loss"], 4)}
        rows.append(row | {f"val_loss, windows of {size}": round(
            gpt.evaluate(model, val_data.to(DEVICE), size), 4) for size in (512, 256)})
        print(rows[-1])
    found = {"device": device_name(DEVICE),
             "precision of training": runs[TEACHERS[0]]["config"]["dtype"],
             "threads": 1 if ON_CPU else None, "torch": torch.__version__, "plans": PLANS,
             "data": path.name, "sha256": sha256, "rows": rows,
             "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                                      capture_output=True).stdout.strip()}
    (ROOT / "outputs/best.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
