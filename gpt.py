"""gpt.py: a small GPT for one text file, from its characters to a trained model and back.

    python gpt.py train --minutes 5             # train on tiny Shakespeare
    python gpt.py generate --prompt "ROMEO:"    # let the best checkpoint go on from a prompt
    torchrun --nproc_per_node=4 gpt.py train    # the same training on four GPUs

gpt_from_scratch.ipynb explains every line and writes this file: make changes there."""
import argparse, hashlib, io, json, math, os, socket, sys, time, timeit
from dataclasses import asdict, dataclass, replace
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import distributed, nn
# ---- configuration -------------------------------------------------------------------------------
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}  # no torchrun: ignore RANK
RANK, WORLD = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))

def log(message):
    """Tell the user on standard error; of several processes, the first does."""
    if RANK == 0:
        print(message, file=sys.stderr, flush=True)

def check(fits, advice):
    """Raise ValueError(advice) unless `fits`: the command line prints it in one line."""
    if not fits:
        raise ValueError(advice)

@dataclass(frozen=True)
class Config:
    """All that defines a run. The defaults are for a GPU; CPU, below, differs."""
    data: str = ""  # UTF-8 text to learn; without one, tiny Shakespeare
    out_dir: str = "outputs/runs/shakespeare"  # folder of the run
    n_layer: int = 6  # blocks
    n_head: int = 4  # attention heads in each block
    n_embd: int = 256  # channels, a multiple of 2 * n_head
    block_size: int = 512  # context length in characters
    vocab_size: int = 65  # distinct characters; the text decides
    batch_size: int = 16  # windows of text per step, over all processes
    max_iters: int = 1300  # optimizer steps
    minutes: float = 0.0  # wall time to train for, compiling included, instead of max_iters
    learning_rate: float = 0.03  # peak rate of Muon, for the matrices of the blocks
    weight_decay: float = 0.3  # decoupled decay of these matrices
    adamw_learning_rate: float = 0.003  # peak rate of AdamW, for embeddings and head
    adamw_weight_decay: float = 2.0  # decoupled decay of embeddings and head
    decay_fraction: float = 0.6  # last part of the run, in which the rates fall to 0
    short_fraction: float = 0.0  # first part of the run, on more but shorter windows
    dropout: float = 0.1  # share of the channels dropped from each branch
    train_temperature: float = 0.88  # divides the logits in training only
    eval_interval: int = 0  # steps between evaluations, besides one a minute; 0: two epochs
    seed: int = 1  # seed of weights, batches and dropout
    device: str = "auto"  # where to compute: auto, cpu, cuda or mps
    dtype: str = "auto"  # format of matrix products: auto, float32, bfloat16 or float16
    compile: str = "on"  # torch.compile: on or off

    def __post_init__(self):
        sizes = self.n_layer, self.n_head, self.n_embd, self.batch_size, self.max_iters
        check(min(sizes) > 0 and self.block_size > 3 and self.n_embd % (2 * self.n_head) == 0,
              "sizes must be above 0, block_size above 3, n_embd a multiple of 2 * n_head")
        check(self.dtype in ("auto", "float32", "bfloat16", "float16"), f"no dtype {self.dtype}")

CPU = dict(n_layer=5, n_head=2, n_embd=128, block_size=256, batch_size=8, learning_rate=0.02,
           weight_decay=0.15, adamw_learning_rate=0.005, adamw_weight_decay=0.0,
           decay_fraction=0.8, short_fraction=0.8, dropout=0.0, train_temperature=0.92)
# ---- data ----------------------------------------------------------------------------------------
TEXT = Path(globals().get("__file__", "gpt.py")).with_name("data") / "tinyshakespeare.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def load_text(data=""):
    """Path of a text (none: tiny Shakespeare, downloaded once, or offline a bundled play), its
    characters, ids to train on, ids of the last tenth (at most 200,000), and its SHA-256."""
    path = Path(data or TEXT).expanduser()
    if not data and not TEXT.exists():
        try:
            TEXT.parent.mkdir(exist_ok=True)
            socket.setdefaulttimeout(20)  # some networks never answer
            torch.hub.download_url_to_file(URL, TEXT, hash_prefix=SHA256, progress=False)
        except Exception as error:  # no network, or another kind of page: each has its own type
            path = TEXT.with_name("the_salt_tide.txt")
            log(f"taking {path}, until you save {URL} as {TEXT}: {error}")
    text = path.read_text("utf-8-sig")
    chars, cut = "".join(sorted(set(text))), max(int(0.9 * len(text)), len(text) - 200_000)
    check(len(chars) > 1 and "\0" not in text, f"{path} is empty, binary, or of one character")
    train_data, val_data = encode(text[:cut], chars), encode(text[cut:], chars)
    return path, chars, train_data, val_data, hashlib.sha256(text.encode()).hexdigest()

def encode(text, chars):
    """Ids of a text, int64 (T,): the places of its characters in `chars`."""
    ids, unknown = {char: i for i, char in enumerate(chars)}, sorted(set(text) - set(chars))
    check(text and not unknown, f"empty text, or characters the model has never seen: {unknown}")
    return torch.tensor([ids[char] for char in text])

def get_batch(data, batch_size, block_size, step, seed=0):
    """Windows of `data` and the same one character later, (B, T) each, this process's share: one
    in each of B equal parts, where golden-ratio steps spread them evenly (Kronecker sequence)."""
    place = (step * (5**0.5 - 1) / 2 + seed * 2**0.5) % 1  # in each part, 0 to 1
    span, part = len(data) - block_size, torch.arange(batch_size, device=data.device)
    start = part * span // batch_size + int(place * span / batch_size)  # (B,), exact on any device
    places = start[RANK::WORLD, None] + torch.arange(block_size + 1, device=data.device)
    return data[places[:, :-1]], data[places[:, 1:]]
# ---- model ---------------------------------------------------------------------------------------
def norm(x):
    """RMSNorm over the last axis, without weights (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x, (x.size(-1),))

def rotary(x, cos, sin):
    """Turn pairs of channels of x (..., T, D) by their positions' angles (Su et al., 2021)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)

class Block(nn.Module):
    """Attention, then an MLP, each added to the stream x (B, T, C). At first, both add nothing."""
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, C = config.n_head, nn.Dropout(config.dropout), config.n_embd
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.out.weight.data, self.down.weight.data = torch.zeros(C, C), torch.zeros(C, 4 * C)

    def forward(self, x, cos, sin, cache=None, layer=0):
        qkv = self.qkv(norm(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = rotary(norm(qkv[:2]), cos, sin), qkv[2]  # (B, H, T, D), with QK norm
        k, v = cache.update(layer, k, v) if cache else (k, v)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)  # (B, H, T, D)
        keep = self.dropout(x.new_ones(2, len(x) * WORLD, 1, x.size(2)))[:, RANK::WORLD]
        x = x + keep[0] * self.out(y.transpose(1, 2).flatten(2))  # (B, T, C)
        return x + keep[1] * self.down(F.relu(self.up(norm(x))).square())  # ReLU^2 (So et al.)

class KVCache:
    """Keys and values of each block for the last block_size of `length` ids, and the last two ids.
    At first, up to block_size ids may come at once; then one by one, in the end over the oldest."""
    def __init__(self, config, batch_size, device="cpu"):
        size = batch_size, config.n_head, config.block_size, config.n_embd // config.n_head
        self.kv = torch.zeros(config.n_layer, 2, *size, device=device)
        self.length, self.recent = 0, torch.full((batch_size, 2), config.vocab_size, device=device)

    def update(self, layer, k, v):
        """Keep a block's new k and v (B, H, T, D); return all that are kept, (2, B, H, S, D)."""
        kv, slot = self.kv[layer], self.length % self.kv.size(-2)  # (2, B, H, block_size, D)
        kv[0, :, :, slot:slot + k.size(2)], kv[1, :, :, slot:slot + k.size(2)] = k, v
        return kv[:, :, :, :self.length + k.size(2)]  # all of it, once it is full

class GPT(nn.Module):
    """Transformer from ids (B, T) to logits (B, T, V)."""
    def __init__(self, config):
        super().__init__()
        self.config, C, V = config, config.n_embd, config.vocab_size
        self.embeddings = nn.ModuleList(nn.Embedding(V + 1, C, padding_idx=V) for _ in range(3))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(C, V, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, idx, cache=None):
        """Logits (B, T, V) for ids (B, T), which go on from what `cache` has read."""
        D, V, device = self.config.n_embd // self.config.n_head, self.config.vocab_size, idx.device
        place = torch.arange(idx.size(1), device=device) + (cache.length if cache else 0)
        angles = torch.outer(place, 10000.0 ** (-torch.arange(0, D, 2, device=device) / D))
        idx = torch.cat((cache.recent, idx), dim=1) if cache else F.pad(idx, (2, 0), value=V)
        this, previous, before = self.embeddings  # of three characters; V stands for none
        x = norm(this(idx[:, 2:]) + previous(idx[:, 1:-1]) + before(idx[:, :-2]))  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles.cos(), angles.sin(), cache, layer)
        if cache:
            cache.length, cache.recent = cache.length + len(place), idx[:, -2:]
        return self.head(norm(x))  # (B, T, V)
# ---- optimizer -----------------------------------------------------------------------------------
def orthogonalize(x):
    """Nearly U V^T for each U S V^T in x (L, rows, columns), by Newton-Schulz (Jordan, 2024)."""
    if x.size(-2) > x.size(-1):
        return orthogonalize(x.mT).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x

class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum (Jordan et al., 2024). A group's matrices have one shape."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            grad = torch.stack([p.grad for p in group["params"]])  # (L, rows, columns)
            average = self.state[group["params"][0]].setdefault("average", torch.zeros_like(grad))
            average.lerp_(grad, 1 - group["momentum"])
            update = orthogonalize(grad.lerp(average, group["momentum"]))
            update *= group["lr"] * max(1, grad.size(-2) / grad.size(-1)) ** 0.5
            for p, change in zip(group["params"], update):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change)

def make_optimizers(model, config):
    """Muon for the matrices of the blocks, AdamW for embeddings and head."""
    groups = [{"params": same} for same in zip(*(block.parameters() for block in model.blocks))]
    tables = [*model.embeddings.parameters(), model.head.weight]
    muon = dict(lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95)
    adamw = dict(lr=config.adamw_learning_rate, weight_decay=config.adamw_weight_decay)
    return Muon(groups, muon), torch.optim.AdamW(tables, betas=(0.9, 0.95), **adamw)
# ---- training ------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, data, block_size):
    """Mean loss in nats of a function from ids (B, T) to logits (B, T, V), over all of `data`."""
    rest = (1 - len(data)) % block_size  # to fill the last window; it doesn't count
    inputs = F.pad(data[:-1], (0, rest)).view(-1, block_size).split(16)
    targets = F.pad(data[1:], (0, rest), value=-100).view(-1, block_size).split(16)
    with torch.compiler.set_stance("force_eager"):
        return sum(F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="sum")
                   for x, y in zip(inputs, targets)).item() / (len(data) - 1)

def pick_device(name="auto"):
    """The torch.device of this name; "auto" is the fastest one."""
    there = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    check(name in ("auto", "cpu", there.type), f"there is no {name} here: use --device auto")
    return there if name == "auto" else torch.device(name)

def pick_dtype(device):
    """The number format in which a device multiplies fastest; Apple's GPUs take the CPU's."""
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() says yes on a T4, which emulates it
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    samples = torch.ones(256, 256), torch.ones(256, 256, dtype=torch.bfloat16)
    return min(samples, key=lambda x: min(timeit.repeat(lambda: x @ x, number=1))).dtype

def load(path, device="cpu"):
    """Model and content of a checkpoint. Reads tensors and plain values, and runs no code."""
    try:
        saved = torch.load(Path(path).expanduser(), map_location=device, weights_only=True)
        model = GPT(Config(**(saved["config"] | {"vocab_size": len(saved["chars"])}))).to(device)
        model.load_state_dict(saved["states"][0])
        return model.eval(), saved
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint that can be loaded ({type(error).__name__})")

def save(out_dir, run, *parts):
    """Write last.pt (to resume), best.pt (to generate), metrics.jsonl and run.json (to read)."""
    states, rows = [part.state_dict() for part in parts], run["metrics"]
    files = {"metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
             "run.json": json.dumps(run, indent=1), "last.pt": run | {"states": states}}
    if rows and rows[-1]["val_loss"] == min(row["val_loss"] for row in rows):
        files = {"best.pt": run | {"states": states[:1]}} | files  # first: last.pt ends a save
    for name, content in files.items():  # under another name first: a file is all old or all new
        torch.save(content, file := io.BytesIO())  # not to the disk: when full, it hides why
        (out_dir / "new.tmp").write_bytes(file.getbuffer() if ".pt" in name else content.encode())
        os.replace(out_dir / "new.tmp", out_dir / name)

def train_step(model, optimizers, data, config, step, done):
    """One step, a function of nothing but seed, step, share of the run done, and states. Returns
    this process's mean loss. Gradients are of the sum: large enough for float16 unscaled."""
    torch.manual_seed(config.seed * 2**20 + step)  # for dropout, the same in all processes
    cut = 4 if done < config.short_fraction / 2 else 2 if done < config.short_fraction else 1
    x, y = get_batch(data, config.batch_size * cut, config.block_size // cut, step, config.seed)
    model.train().zero_grad()
    with torch.autocast(data.device.type, getattr(torch, config.dtype), config.dtype != "float32"):
        logits = model(x).flatten(0, 1).float() / config.train_temperature  # (B T, V)
        loss = F.cross_entropy(logits, y.flatten(), reduction="sum")
        loss.backward()
        for p in model.parameters() if WORLD > 1 and optimizers else ():  # a trial may fail in one
            distributed.all_reduce(p.grad)  # their sum
        factor = min(1, (1 - done) / max(config.decay_fraction, 1e-9))  # decay_fraction may be 0
        for optimizer in optimizers:  # in autocast, too: Muon's products
            for group in optimizer.param_groups:  # settings of now, not of the checkpoint
                group.update(optimizer.defaults, lr=optimizer.defaults["lr"] * factor)
            optimizer.step()
    return loss.detach() / y.numel()

def train(config, saved=None):
    """Train a GPT, or go on with `saved`, the content of last.pt. Process 0 returns run.json."""
    device, out_dir = pick_device(config.device), Path(config.out_dir).expanduser()
    dtype = pick_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    path, chars, data, val_data, sha256 = load_text(config.data)
    check(len(data) > config.block_size and len(val_data) > 1, "text too short: lower --block_size")
    config = replace(config, vocab_size=len(chars), dtype=str(dtype)[6:], seed=config.seed % 2**32)
    if WORLD > 1:
        check(not config.minutes, "several processes train for --max_iters, not for --minutes")
        torch.cuda.set_device(int(TORCHRUN["LOCAL_RANK"]) if device.type == "cuda" else -1)
        distributed.init_process_group()
    torch.manual_seed(config.seed)
    model, data, val_data = GPT(config).to(device), data.to(device), val_data.to(device)
    optimizers = make_optimizers(model, config)
    fixed = [config.n_layer, config.n_head, config.n_embd, config.block_size, sha256]
    run = {"step": 0, "seconds": 0.0, "metrics": [], "fixed": fixed} | (saved or {})
    check(run["fixed"] == fixed, f"{out_dir} is of another text or shape of the model")
    run |= {"config": asdict(config), "chars": chars}
    for part, state in zip((model, *optimizers), run.pop("states", ())):
        part.load_state_dict(state)
    if RANK == 0 and not saved:
        out_dir.mkdir(parents=True, exist_ok=True)
        check(not any(out_dir.glob("*.pt")), f"{out_dir} holds a run: --resume it, or name another")
        save(out_dir, run, model, *optimizers)
    step, loss, begin = run["step"], 0.0, time.perf_counter() - run["seconds"]
    done = run["seconds"] / 60 / config.minutes if config.minutes > 0 else step / config.max_iters
    check(done < 1, "this run is finished: --resume it with more --max_iters or --minutes")
    log(f"{device}, {config.dtype}, compile {config.compile}: {len(data):,} characters of {path}")
    interval = config.eval_interval or 1 + 2 * len(data) // config.batch_size // config.block_size
    if config.compile != "off":
        try:
            for block in model.blocks:
                block.compile(dynamic=False)
            for start in {0, config.short_fraction / 2, config.short_fraction}:  # every window size
                train_step(model, (), data, config, 0, start)  # no optimizer: changes nothing
        except Exception as error:  # no C++ compiler, no Triton, an old GPU: each has its own type
            torch.compiler.set_stance("force_eager")
            log(f"torch.compile fails here ({type(error).__name__}): going on without")
    while done < 1:
        loss += train_step(model, optimizers, data, config, step, done)
        step, seconds = step + 1, time.perf_counter() - begin
        done = seconds / 60 / config.minutes if config.minutes > 0 else step / config.max_iters
        if RANK == 0 and (done >= 1 or step % interval == 0 or seconds > run["seconds"] + 60):
            train_loss = float(loss) / (step - run["step"])
            val_loss = evaluate(model.eval(), val_data, config.block_size)
            check(math.isfinite(train_loss + val_loss), "NaN loss: --resume, lower --learning_rate")
            seconds = time.perf_counter() - begin  # evaluating counts, too
            row = dict(step=step, seconds=seconds, train_loss=train_loss, val_loss=val_loss)
            run.update(row, metrics=[*run["metrics"], row])
            save(out_dir, run, model, *optimizers)
            log(f"step {step}, {done:.0%}: train {train_loss:.4f}, val {val_loss:.4f} nats, "
                f"{val_loss / math.log(2):.4f} bits, perplexity {math.exp(min(val_loss, 700)):.3f}")
            loss = 0.0
    return run
# ---- sampling ------------------------------------------------------------------------------------
def sample_next(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One id (B, 1) for each row of logits (B, V). Temperature 0 is greedy, top_k 0 keeps all."""
    logits, ids = logits.float().cpu().topk(min(top_k or logits.size(1), logits.size(1)))
    probs = ((logits - logits[:, :1]) / max(temperature, 1e-9)).softmax(-1)  # the first is largest
    probs[probs.cumsum(-1) - probs >= max(top_p, 1e-9)] = 0  # enough came before (Holtzman, 2020)
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))

@torch.inference_mode()
def generate(model, idx, max_new_tokens=500, temperature=0.8, top_k=0, top_p=1.0, seed=1):
    """Go on from the last block_size of idx (B, T): yields max_new_tokens times one id (B, 1)."""
    check(min(temperature, max_new_tokens, top_k) >= 0 < top_p <= 1, "a number is out of range")
    idx, device = idx[:, -model.config.block_size:], model.head.weight.device
    cache, generator = KVCache(model.config, len(idx), device), torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        idx = sample_next(model(idx.to(device), cache)[:, -1], temperature, top_k, top_p, generator)
        yield idx
# ---- command line --------------------------------------------------------------------------------
WRITING = dict(checkpoint=f"{Config.out_dir}/best.pt", prompt="", max_new_tokens=500,
               temperature=0.8, top_k=0, top_p=1.0, seed=1, device="auto")

def main(argv=None):
    """Run a command line and return its exit status."""
    parser = argparse.ArgumentParser("gpt.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, defaults in (("train", asdict(Config())), ("generate", WRITING)):
        flags = commands.add_parser(command, argument_default=argparse.SUPPRESS)
        for name, value in defaults.items():
            flags.add_argument("--" + name, type=type(value), help=f"default: {value!r}")
    commands.choices["train"].add_argument("--resume", action="store_true")
    given, saved = vars(parser.parse_args(argv)), None
    try:
        check(torch.__version__ >= (2, 11), f"torch 2.11 is needed, {torch.__version__} is too old")
        if given.pop("command") == "train":
            base = CPU if pick_device(given.get("device", "auto")).type == "cpu" else {}
            if given.pop("resume", False):
                _, saved = load(Path(given.setdefault("out_dir", Config.out_dir), "last.pt"))
                base = saved["config"] | ({"minutes": 0} if "max_iters" in given else {})
            run = train(Config(**base | given), saved)
            log(f"next: python gpt.py generate --checkpoint {run['config']['out_dir']}/best.pt")
        else:
            given = WRITING | given
            model, saved = load(given.pop("checkpoint"), pick_device(given.pop("device")))
            idx = encode(given["prompt"] or saved["chars"][0], saved["chars"])[None]
            print(given.pop("prompt"), end="")
            for token in generate(model, idx, **given):
                print(saved["chars"][token.item()], end="", flush=True)
            print()
    except (ValueError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)  # Ctrl-C has no text
        return 2

if __name__ == "__main__":
    sys.exit(main())
