"""gpt.py: a small GPT for one text file, from its characters to a trained model and back.

    python gpt.py train --minutes 5             # train on tiny Shakespeare
    python gpt.py generate --prompt "ROMEO:"    # let the best checkpoint go on from a prompt
    python gpt.py evaluate                      # its loss over the whole validation split
    torchrun --nproc_per_node=4 gpt.py train    # the same training on four GPUs

gpt_from_scratch.ipynb explains every line and writes this file: make changes there."""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11,<2.14", "numpy"]
# ///
import argparse, array, copy, hashlib, io, itertools, json, math, os, signal, sys, time, timeit
import urllib.request
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import distributed, nn

# ---- configuration -------------------------------------------------------------------------------
class UserError(Exception):
    """A mistake that the user can mend: the command line prints it in one line and exits with 2."""

def check(fits, advice):
    """Raise UserError(advice) unless `fits`."""
    if not fits:
        raise UserError(advice)

LOG = sys.stderr if os.environ.get("RANK", "0") == "0" else open(os.devnull, "w")

def option(default, meaning, least=0, most=2**31 - 1):
    return field(default=default, metadata={"meaning": meaning, "least": least, "most": most})

@dataclass(frozen=True)
class Config:
    """Shape of the model and plan of its training. UserError for values that can't work."""
    n_layer: int = option(6, "layers", 1)
    n_head: int = option(6, "attention heads per layer", 1)
    n_embd: int = option(384, "channels, a multiple of 2 * n_head", 1)
    block_size: int = option(256, "context length in characters", 1)
    vocab_size: int = option(65, "distinct characters; the text decides", 1)
    batch_size: int = option(64, "sequences per step, over all processes", 1)
    gradient_accumulation_steps: int = option(1, "parts of a batch, one after the other", 1)
    max_iters: int = option(2000, "optimizer steps", 1)
    minutes: float = option(0.0, "wall time to train for, instead of max_iters; 0: off")
    learning_rate: float = option(0.02, "peak rate of Muon, for the matrices of the layers")
    adamw_learning_rate: float = option(0.003, "peak rate of AdamW, for embedding and head")
    decay_fraction: float = option(0.6, "last part, in which the rates fall to 0", 1e-9, 1)
    short_fraction: float = option(0.0, "first part, on more and shorter windows", 0, 1)
    weight_decay: float = option(0.4, "decoupled decay of the matrices")
    adamw_weight_decay: float = option(1.0, "decoupled decay of embedding and head")
    dropout: float = option(0.2, "share of the channels dropped from each branch", 0, 0.99)
    train_temperature: float = option(0.92, "divides the logits in training only", 0.1)
    eval_interval: int = option(0, "steps between evaluations; 0: two readings, at most 1000")
    seed: int = option(1, "seed of weights, batches and dropout")

    def __post_init__(self):
        for f in fields(self):
            value, least, most = getattr(self, f.name), f.metadata["least"], f.metadata["most"]
            check(type(value) in (int, f.type) and least <= value <= most,
                  f"{f.name} must be {f.type.__name__}, {least} to {most}, not {value!r}")
        check(self.n_embd % (2 * self.n_head) == 0, f"n_embd ({self.n_embd}) must be a multiple of "
              f"2 * n_head ({2 * self.n_head}), so that every head has an even size")

SMALL = dict(n_layer=5, n_head=2, n_embd=128, batch_size=8, adamw_learning_rate=0.005,
             decay_fraction=0.8, short_fraction=0.8, adamw_weight_decay=0.0, dropout=0.0)
PRESETS = {  # where they differ from the defaults
    "gpu": dict(n_head=4, n_embd=256, block_size=512, batch_size=16, max_iters=1300,
                learning_rate=0.03, weight_decay=0.3, adamw_weight_decay=2.0, dropout=0.1,
                train_temperature=0.88),
    "cpu": SMALL | dict(weight_decay=0.1),
    "cpu, 7 minutes or more": SMALL | dict(weight_decay=0.15),
    "cpu, 15 minutes or more": dict(n_head=3, n_embd=192, block_size=512, batch_size=8,
                                    short_fraction=0.8, dropout=0.05),
    "cpu, 30 minutes or more": dict(n_head=4, n_embd=256, block_size=512, batch_size=8,
                                    short_fraction=0.8, adamw_weight_decay=2.0, dropout=0.1)}

def preset(device, minutes=0.0):
    """The preset for a device ("cpu", "cuda", "mps") and a time budget."""
    long = [f", {least} minutes or more" for least in (30, 15, 7) if minutes >= least]
    return PRESETS["cpu" + (*long, "")[0] if device == "cpu" else "gpu"]

# ---- data ----------------------------------------------------------------------------------------
OUT_DIR = "outputs/runs/shakespeare"
TEXT, BUNDLED = Path("data/tinyshakespeare.txt"), Path("data/the_salt_tide.txt")
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def write(path, content):
    """Replace a file by bytes, or by a checkpoint: afterwards it is all old or all new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, buffer = Path(f"{path}.{os.getpid()}.tmp"), io.BytesIO()
    buffer.write(content) if isinstance(content, bytes) else torch.save(content, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:  # what a full disk cut off must not keep it full
        temporary.unlink(missing_ok=True)

def find_text(data=""):
    """Path of the text `data`; unnamed, of tiny Shakespeare, which is downloaded if missing, or
    without a network of a bundled play."""
    if data and (Path(data) != TEXT or TEXT.exists()):
        return Path(data)
    source = TEXT if TEXT.exists() else URL
    try:
        content = (TEXT.read_bytes() if source is TEXT else
                   urllib.request.urlopen(URL, timeout=20).read())
    except Exception as error:  # no network, or an answer that makes no sense
        check(BUNDLED.exists(), f"no network: save {URL} as {TEXT}, or name a text with --data")
        print(f"no tiny Shakespeare ({error}): using {BUNDLED} instead", file=LOG)
        return BUNDLED
    check(hashlib.sha256(content).hexdigest() == SHA256, f"{source} has a wrong SHA-256: put the "
          f"right file at {TEXT}, or train on a text of your own with --data")
    if source is URL:
        write(TEXT, content)
    return TEXT

class CharTokenizer:
    """Numbers the distinct characters of a text in the order of their code points."""
    def __init__(self, text):
        self.chars = "".join(sorted(set(text)))
        self.ids = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text):
        """Ids of a text, int32 (T,). UserError if it is empty or has characters without an id."""
        unknown = " ".join(map(repr, sorted(set(text) - set(self.ids))))
        check(text, "the text is empty: give it at least one character")
        check(not unknown, f"the model has never seen {unknown}: leave these characters out")
        return torch.frombuffer(array.array("i", map(self.ids.get, text)), dtype=torch.int32)

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

def load_text(path, tokenizer=None):
    """Tokenizer, ids to train on (first 90 %) and to validate (last 10 %) of a UTF-8 text file."""
    text = Path(path).read_text("utf-8-sig", "replace")
    check(text and not {"\0", "\ufffd"} & set(text), f"{path} is empty or not UTF-8 text")
    tokenizer = tokenizer or CharTokenizer(text)
    ids, cut = tokenizer.encode(text), int(0.9 * len(text))
    return tokenizer, ids[:cut], ids[cut:]

def get_batch(data, batch_size, block_size, step, seed=0):
    """Windows of `data` and the same one character later, (B, T) each: one from each of B equal
    parts, at a place that golden-ratio steps spread evenly (a Kronecker sequence)."""
    place = (step * (5**0.5 - 1) / 2 + seed * 2**0.5) % 1  # in each part, 0 to 1
    part = torch.arange(batch_size, dtype=torch.double)[:, None]
    start = ((part + place) / batch_size * (len(data) - block_size)).long()  # (B, 1)
    start = start.to(data.device, non_blocking=data.is_cuda)  # elsewhere, that would be unsafe
    window = data[start + torch.arange(block_size + 1, device=data.device)].long()  # (B, T + 1)
    return window[:, :-1], window[:, 1:]

# ---- model ---------------------------------------------------------------------------------------
def norm(x):
    """RMSNorm over the last axis, without weights (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x, (x.size(-1),))

def rotary(x, cos, sin):
    """Turn pairs of channels of x (..., D) by their positions' angles (Su et al., 2021), whose cos
    and sin must fit (..., D / 2)."""
    a, b = x.chunk(2, dim=-1)
    turned = a * cos - b * sin, b * cos + a * sin
    return torch.cat([half.to(x.dtype) for half in turned], dim=-1)

def positions(place, S, D):
    """For positions `place` (T,) and keys at 0 to S - 1: cos and sin of the positions' angles,
    (T, D / 2), and a mask (T, S) to add to the scores, 0 up to the position itself, then -inf."""
    angles = torch.outer(place, 10000.0 ** (-torch.arange(0, D, 2, device=place.device) / D))
    future = torch.arange(S, device=place.device) > place[:, None]
    return angles.cos(), angles.sin(), torch.where(future, -math.inf, 0.0)

def attention(q, k, v, mask):
    """Attention of queries (B, H, T, D) to k, v (B, H, S, D), with their causal mask (T, S)."""
    (T, S), scale = mask.shape, 1 / math.sqrt(q.size(-1))
    if T == 1 and torch.compiler.is_compiling():  # sums become one loop each
        weights = ((q * k).sum(-1) * scale + mask).softmax(-1)  # (B, H, S)
        return (weights[..., None] * v).sum(-2, keepdim=True)
    if q.device.type == "cpu" and torch.is_grad_enabled():  # there the fused backward is slower
        weights = (q @ k.mT * scale + mask).to(v.dtype).exp()  # by QK norm, at most e^sqrt(D)
        return weights @ v / weights.sum(-1, keepdim=True, dtype=torch.float)
    return F.scaled_dot_product_attention(q, k, v, None if T == S else mask, is_causal=T == S)

def linear(x, weight):
    """x @ weight.T. For a single row, compiled: one loop, as fast as memory gives the weights."""
    if x.numel() == x.size(-1) and torch.compiler.is_compiling():
        return (x.unsqueeze(-2) * weight).sum(-1)
    return F.linear(x, weight.to(x.dtype))

class KVCache:
    """For each layer, keys and values of the last block_size of `length` ids, two tensors
    (B, H, block_size, D); and the last two ids."""
    def __init__(self, config, batch_size, device):
        shape = batch_size, config.n_head, config.block_size, config.n_embd // config.n_head
        self.kv = [[torch.zeros(shape, device=device) for _ in "kv"] for _ in range(config.n_layer)]
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.recent = torch.zeros(batch_size, 2, dtype=torch.long, device=device)

class GPT(nn.Module):
    """Transformer from ids (B, T) to logits (B, T, V). Stacks hold one matrix for every layer,
    (L, rows, columns). Those that write to the stream start at zero: a new layer does nothing."""
    def __init__(self, config):
        super().__init__()
        self.config, L, C, V = config, config.n_layer, config.n_embd, config.vocab_size
        scale = torch.tensor([1, 2, 2])[:, None, None]  # a character, and the two before it
        self.embedding = nn.Parameter(torch.randn(3, V, C) / scale)
        self.qkv = nn.Parameter(torch.randn(L, 3 * C, C) / math.sqrt(3 * C))
        self.out = nn.Parameter(torch.zeros(L, C, C))
        self.up = nn.Parameter(torch.randn(L, 4 * C, C) / math.sqrt(3 * C))
        self.down = nn.Parameter(torch.zeros(L, C, 4 * C))
        self.head = nn.Parameter(torch.zeros(V, C))

    def block(self, x, place, cos, sin, mask, qkv, out, up, down, kv):
        """One layer: x (B, T, C) after attention and MLP. kv, a pair, takes its keys and values."""
        (B, T, C), H, p = x.shape, self.config.n_head, self.config.dropout * self.training
        qk, v = linear(norm(x), qkv).view(B, T, 3, H, -1).split([2, 1], dim=2)
        qk = rotary(norm(qk), cos[:, None, None], sin[:, None, None])  # QK norm; (B, T, 2, H, D)
        q, k, v = (z.transpose(1, 2) for z in (*qk.unbind(2), v.squeeze(2)))  # (B, H, T, D)
        if kv is not None:
            k, v = (old.index_copy_(2, place % old.size(2), new)  # (B, H, S, D)
                    for old, new in zip(kv, (k, v)))
        y = attention(q, k, v, mask).transpose(1, 2).reshape(B, T, -1)  # (B, T, C)
        keep = F.dropout(x.new_ones(2, B, 1, C), p)  # one mask for all positions
        x = x + keep[0] * linear(y, out)
        y = F.relu(linear(norm(x), up)).square()  # (B, T, 4C), ReLU^2 (So et al., 2021)
        return x + keep[1] * linear(y, down)

    def stream(self, idx, place, shared, kv):
        """Logits for idx (B, 2 + T) without its first two, given what all layers share."""
        tables = self.embedding[:self.config.block_size]  # a window of 1 trains only the first
        shifts = (F.embedding(idx[:, 2 - i:idx.size(1) - i], table).float() * (place >= i)[:, None]
                  for i, table in enumerate(tables))
        x = norm(sum(shifts))  # (B, T, C)
        for layer in zip(self.qkv, self.out, self.up, self.down, kv):
            x = self.block(x, place, *shared, *layer)
        return linear(norm(x), self.head)  # (B, T, V)

    def forward(self, idx, cache=None):
        """Logits for ids that go on from what `cache`, if there is one, has read. Past block_size,
        it takes them one at a time, each in the place of the oldest."""
        T, D = idx.size(1), self.config.n_embd // self.config.n_head
        place, S, kv = torch.arange(T, device=idx.device), T, [None] * self.config.n_layer
        if cache is None:
            idx = F.pad(idx, (2, 0))
        else:
            place, S, kv = place + cache.length, self.config.block_size, cache.kv
            check(T == 1 or place[-1] < S, "past block_size, give a cache one id at a time")
            idx = torch.cat((cache.recent, idx), dim=1)
            cache.length += T
            cache.recent.copy_(idx[:, -2:])
        return self.stream(idx, place, positions(place, S, D), kv)

# ---- optimizer -----------------------------------------------------------------------------------
def orthogonalize(x):
    """Nearly U V^T for each U S V^T in x (L, rows, columns), by Newton-Schulz (Jordan, 2024)."""
    if x.size(-2) > x.size(-1):
        return orthogonalize(x.mT).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        series = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        series.diagonal(dim1=-2, dim2=-1).add_(3.4445)
        x = series @ x
    return x

class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum (Jordan et al., 2024) for matrices or stacks of them."""
    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                update = orthogonalize(p.grad.lerp(average, momentum))
                scale = max(1, p.size(-2) / p.size(-1)) ** 0.5
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr * scale)

def make_optimizers(model, config):
    """Muon for the stacks of matrices, AdamW for embedding and head."""
    stacks, tables = [model.qkv, model.out, model.up, model.down], [model.embedding, model.head]
    return [Muon(stacks, config.learning_rate, weight_decay=config.weight_decay),
            torch.optim.AdamW(tables, config.adamw_learning_rate, (0.9, 0.95),
                              weight_decay=config.adamw_weight_decay)]

# ---- training ------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, data, block_size):
    """Mean loss in nats of a function from ids (B, T) to logits (B, T, V), over all of `data`."""
    check(len(data) > 1, "the validation part of the text is shorter than 2 characters")
    rest, loss = -(len(data) - 1) % block_size, 0.0  # to fill the last window; it doesn't count
    inputs = F.pad(data[:-1], (0, rest)).view(-1, block_size)  # windows that don't overlap
    targets = F.pad(data[1:].long(), (0, rest), value=-100).view(-1, block_size)
    for x, y in zip(inputs.split(16), targets.split(16)):
        loss += F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="sum").item()
    return loss / (len(data) - 1)

def product_time(dtype):
    """Least seconds of a product of small matrices in one thread, which others disturb little."""
    x, threads = torch.ones(256, 256, dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = min(timeit.repeat(lambda: x @ x, number=1, repeat=50))
    torch.set_num_threads(threads)
    return seconds

def pick_device(device="auto", dtype="auto"):
    """torch.device, and the number format to multiply in: on a CPU, the one that is faster."""
    there = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    device = there[0] if device == "auto" else device
    check(device in there, f"there is no {device} here: use --device auto or --device cpu")
    chip, best = torch.cpu.get_capabilities(), torch.float32
    if device == "cuda":  # torch.cuda.is_bf16_supported() says yes on a T4, which only emulates it
        best = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    elif device == "cpu" and dtype == "auto" and chip.get("avx512_bf16"):  # may still be slower
        best = min(torch.float32, torch.bfloat16, key=product_time)
    return torch.device(device), best if dtype == "auto" else getattr(torch, dtype)

def load(path, device):
    """Model, tokenizer and content of a checkpoint. Reads tensors and values, and runs no code."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        with torch.device("meta"):  # shapes must agree before memory is taken
            model = GPT(Config(**saved["config"]))
        model.load_state_dict(saved["model"], assign=True)
        check(len(set(saved["chars"])) == model.config.vocab_size, "not one character for each id")
        return model.eval(), CharTokenizer(saved["chars"]), saved
    except Exception as error:
        raise UserError(f"{path} is missing or no checkpoint of gpt.py ({type(error).__name__})")

def try_compile(model, part, trial, graphs=False):
    """The model with its method `part` compiled; None, with a notice, if `trial` of it fails.
    With `graphs`, it runs as CUDA graphs, which the second trial records."""
    compiled = copy.copy(model)  # with the same weights
    options = {"triton.cudagraphs": graphs,
               "cpp.vec_isa_ok": True}  # believe the CPU: compiling tests of it takes seconds
    if model.head.is_cpu and not torch.is_grad_enabled():
        options |= {"realize_reads_threshold": 0,  # compute once what several loops read
                    "cpp.enable_floating_point_contract_flag": "fast"}  # x * y + z in one go
    elif torch.cpu.get_capabilities().get("avx512_f"):
        options["cpp.simdlen"] = 256  # at 512 bits, GCC 12 makes NaN of gradients
    try:
        setattr(compiled, part, torch.compile(getattr(model, part), dynamic=False, options=options))
        for _ in range(1 + graphs):
            trial(compiled)
        return compiled
    except Exception as error:  # no C++ compiler, no Triton, an old GPU: each has its own type
        print(f"torch.compile fails here ({type(error).__name__}): going on without", file=LOG)

def train(config, data="", out_dir=OUT_DIR, resume=False, device="auto", dtype="auto",
          compile="auto", teachers="", caught=()):
    """Train a GPT on a text; write checkpoints, metrics.jsonl and run.json into out_dir and return
    what run.json holds. From teachers, paths with commas between, it learns their mean prediction,
    too (Hinton et al., 2015; Furlanello et al., 2018). A signal in `caught` saves and stops it."""
    begin = time.perf_counter()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    (device, dtype), path, out_dir = pick_device(device, dtype), find_text(data), Path(out_dir)
    check(world == 1 or device.type != "mps", "several processes need --device cpu, or GPUs")
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        check(local < torch.cuda.device_count(), "more processes than GPUs: lower --nproc_per_node")
        torch.cuda.set_device(local)
    if world > 1 and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend)
    check(resume or not any((out_dir / name).exists() for name in ("best.pt", "last.pt")),
          f"{out_dir} holds a run: --resume it, or name another --out_dir")
    tokenizer, train_data, val_data = load_text(path)
    config = replace(config, vocab_size=len(tokenizer.chars))
    parts, tokens = config.gradient_accumulation_steps, config.batch_size * config.block_size
    interval = config.eval_interval or max(1, min(1000, 2 * len(train_data) // tokens))
    cuts = [math.gcd(cut, config.block_size) for cut in (4, 2, 1)]  # of the window, at first
    check(len(train_data) > config.block_size,
          f"{path} is too short for a block_size of {config.block_size}: lower it or use more text")
    check(config.batch_size % (world * parts) == 0, f"batch_size ({config.batch_size}) must be a "
          f"multiple of {world} processes x {parts} gradient_accumulation_steps")
    sha256, teach = hashlib.sha256(path.read_bytes()).hexdigest(), []
    for name in filter(None, teachers.split(",")):
        teacher, _, its = load(name, device)
        check(its["sha256"] == sha256 and teacher.config.block_size >= config.block_size,
              f"{name} can't teach this: it knows another text, or only shorter windows")
        teach.append(teacher)
    out_dir.mkdir(parents=True, exist_ok=True)  # what can't be written must not be trained
    check(os.access(out_dir, os.W_OK), f"{out_dir} can't be written to: name another --out_dir")
    torch.manual_seed(config.seed)
    model = GPT(config).to(device)
    run = {"config": asdict(config), "chars": tokenizer.chars, "teachers": teachers,
           "data": path.as_posix(), "sha256": sha256,
           "train_characters": len(train_data), "val_characters": len(val_data),
           "parameters": sum(p.numel() for p in model.parameters()),
           "device": str(device), "precision": str(dtype)[6:], "processes": world,
           "torch": str(torch.__version__), "metrics": []}
    if resume:
        model, _, saved = load(out_dir / "last.pt", "cpu")  # where AdamW wants its step counts
        check("state" in saved, f"{out_dir}/last.pt is the copy of a best.pt: it can't be resumed")
        old, new = ({**r["config"], "text": r["sha256"], "teachers": r.get("teachers")}
                    for r in (saved, run))
        changed = [key for key in new if old.get(key) != new[key]]
        check(not changed, f"{out_dir} was started with another {', '.join(changed)}: go on as it "
              "was, or name another --out_dir")
        run |= {key: saved[key] for key in ("metrics", "best_val_loss", *saved["metrics"][-1])}
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    keepers = [scaler, *make_optimizers(model.to(device).train(), config)]
    for keeper, state in zip(keepers, saved["state"] if resume else ()):
        keeper.load_state_dict(state or keeper.state_dict())  # a scaler that was off has none
    train_data, val_data, forward = train_data.to(device), val_data.to(device), model
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
    if compile == "on" or compile == "auto" and (config.minutes or config.max_iters / 200) > 1:
        inputs = [get_batch(train_data, config.batch_size * cut // world // parts,
                            config.block_size // cut, 0)[0]
                  for cut in dict.fromkeys(cuts if config.short_fraction else cuts[2:])]
        forward = try_compile(
            model, "stream" if device.type == "cuda" else "block",
            lambda it: [(model.zero_grad(), autocast(it)(x).sum().backward()) for x in inputs],
            graphs=device.type == "cuda" and world == parts == 1) or model
    run["compiled"] = forward is not model
    print(f"{run['parameters']:,} parameters, {device}, {run['precision']}, "
          f"{len(train_data):,} characters of {path}{', compiled' * run['compiled']}", file=LOG)
    forward = autocast(nn.parallel.DistributedDataParallel(forward) if world > 1 else forward)
    last, loss_sum, since = {"step": 0, "seconds": 0.0}, 0.0, time.perf_counter()
    if resume:  # starting again costs none of the time that was left
        last, begin = run["metrics"][-1], since - run["metrics"][-1]["seconds"]
    for step in itertools.count(last["step"]):
        minutes = (time.perf_counter() - begin) / 60
        done = minutes / config.minutes if config.minutes else step / config.max_iters
        shared = torch.tensor([done, len(caught)])
        if world > 1:  # clock and signals of the first process decide for all
            distributed.broadcast(shared, 0)
        done, stop = shared.tolist()
        factor = min(1.0, max(0.0, 1 - done) / config.decay_fraction)
        over = step > 0 and (done >= 1 or stop)
        if rank == 0 and step > last["step"] and (over or step % interval == 0):
            train_loss = float(loss_sum) / (step - last["step"])  # waits for the device
            now = time.perf_counter()
            val_loss = evaluate(model.eval(), val_data, config.block_size)
            model.train()
            check(math.isfinite(train_loss + val_loss), f"the loss is {train_loss + val_loss} by "
                  f"step {step}: start again with a lower learning_rate in another --out_dir")
            check(scaler.get_scale() > 1e-3, "float16 overflows: start again, or --resume what was "
                  "saved, with --dtype float32")
            speed = (step - last["step"]) * tokens / (now - since)
            last = {"step": step, "tokens": step * tokens, "seconds": now - begin,
                    "train_loss": train_loss, "val_loss": val_loss,
                    "learning_rate": config.learning_rate * factor, "tokens_per_second": speed}
            print(f"step {step}: train {train_loss:.4f}, val {val_loss:.4f}, {speed:,.0f} "
                  f"tokens/s, {done:.0%} done{', saved for --resume' * bool(stop)}", file=LOG)
            rows = run["metrics"] = [*run["metrics"], last]
            run |= last | {"best_val_loss": min(row["val_loss"] for row in rows)}
            content = run | {"model": model.state_dict()}
            if val_loss == run["best_val_loss"]:
                write(out_dir / "best.pt", content)
            write(out_dir / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
            write(out_dir / "run.json", json.dumps(run, indent=1).encode())
            write(out_dir / "last.pt", content | {"state": [k.state_dict() for k in keepers]})
            loss_sum, since = 0.0, time.perf_counter()
        if over:
            if world > 1:
                distributed.barrier()  # who leaves while gloo still works may abort on the way
                distributed.destroy_process_group()
            return run
        torch.manual_seed(hash((config.seed, step, rank)) % 2**32)  # for dropout
        cut = cuts[(done >= config.short_fraction / 2) + (done >= config.short_fraction)]
        batch = get_batch(train_data, config.batch_size * cut, config.block_size // cut, step,
                          config.seed)
        model.zero_grad()
        for x, y in zip(*(side[rank::world].chunk(parts) for side in batch)):
            logits = forward(x).flatten(0, 1).float() / config.train_temperature  # (B T, V)
            loss = F.cross_entropy(logits, y.flatten()) / parts
            loss_sum += loss.detach()
            if teach:
                with torch.no_grad():
                    soft = sum(autocast(teacher)(x).float().softmax(-1) for teacher in teach)
                loss = (loss + F.cross_entropy(logits, soft.flatten(0, 1) / len(teach)) / parts) / 2
            scaler.scale(loss).backward()
        for optimizer, peak in zip(keepers[1:], (config.learning_rate, config.adamw_learning_rate)):
            optimizer.param_groups[0]["lr"] = peak * factor
            autocast(scaler.step)(optimizer)
        scaler.update()

# ---- sampling ------------------------------------------------------------------------------------
def sample_next(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One id for each row of logits (B, V), int64 (B, 1) on the CPU. Temperature 0 takes the
    likeliest (of equals, any). top_k 0 and top_p 1 keep all (top-p: Holtzman et al., 2020)."""
    logits = logits.cpu().double()  # in 64 bits, so that any temperature and top_p has an effect
    logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # the highest first
    check(math.isfinite(logits[:, 0].sum()), "the model gives no numbers: damaged checkpoint?")
    probs = (logits / max(temperature, 1e-200)).softmax(-1)  # 0 leaves only the likeliest
    if top_p < 1:
        probs = probs * (probs.cumsum(-1) - probs < top_p)  # those before don't reach it
    ends = probs.cumsum(-1)
    point = torch.rand(len(ends), 1, dtype=ends.dtype, generator=generator) * ends[:, -1:]
    return ids.gather(-1, torch.searchsorted(ends, point, right=True))

def record(model, idx, cache):
    """The model's reading of ids of this shape as a CUDA graph: all its kernels in one launch."""
    cache.length.zero_()
    model(idx, cache)  # allocates what must not be allocated while it is recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(idx, cache)

    def replay(new, _):
        idx.copy_(new)
        graph.replay()
        return logits

    return replay

@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1, top_k=0, top_p=1, seed=1, compile=False):
    """Go on from the last block_size of idx (B, T): yields max_new_tokens ids (B, 1), one by one.
    Each layer sees the last block_size. Works on a copy with weights rounded to bfloat16."""
    check(temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and abs(seed) < 2**63, "temperature "
          "and top_k must be at least 0, top_p above 0 and at most 1, seed a number of 64 bits")
    device, idx = model.head.device, idx[:, -model.config.block_size:]
    idx = idx.clone(memory_format=torch.contiguous_format)  # other strides would compile again
    generator, cache = torch.Generator().manual_seed(seed), KVCache(model.config, len(idx), device)
    model = fast = copy.deepcopy(model).bfloat16().float()
    if compile:  # one text on a CPU: reading weights takes most time, so keep 16 bits of each
        single = len(idx) == 1 and device.type == "cpu"
        trial = torch.zeros(len(idx), 1, dtype=torch.long, device=device), cache
        fast = try_compile(copy.deepcopy(model).bfloat16() if single else model, "forward",
                           lambda it: it(*trial)) or model
        if fast is not model and device.type == "cuda":
            fast = record(fast, *trial)
        cache.length.zero_()
    for _ in range(max_new_tokens):
        logits = (fast if idx.size(1) == 1 else model)(idx.to(device), cache)[:, -1]  # (B, V)
        idx = sample_next(logits, temperature, top_k, top_p, generator)
        yield idx

# ---- command line --------------------------------------------------------------------------------
FLAGS = {f.name: ("train", f.default, f.metadata["meaning"]) for f in fields(Config)} | {
    "data": ("train evaluate", "", "UTF-8 text, instead of tiny Shakespeare"),
    "out_dir": ("train", OUT_DIR, "folder of the run"),
    "resume": ("train", False, "go on with the run in out_dir"),
    "device": ("train generate evaluate", "auto", "where to compute"),
    "dtype": ("train", "auto", "number format of matrix products"),
    "compile": ("train generate", "auto", "use torch.compile; auto does so where it pays"),
    "teachers": ("train", "", "checkpoints to learn from too, with commas between"),
    "checkpoint": ("generate evaluate", f"{OUT_DIR}/best.pt", "model to load"),
    "prompt": ("generate", "\n", "text to go on from"),
    "prompt_file": ("generate", "", "UTF-8 file that holds the prompt"),
    "max_new_tokens": ("generate", 500, "characters to write"),
    "num_samples": ("generate", 1, "texts to write"),
    "temperature": ("generate", 0.8, "0 takes the likeliest character, 1 samples as learned"),
    "top_k": ("generate", 0, "choose among the k likeliest characters; 0: all"),
    "top_p": ("generate", 1.0, "choose among the likeliest that make up this share"),
    "seed": ("train generate", 1, "seed of weights, batches and dropout, or of the text")}

CHOICES = {"device": ["auto", "cpu", "cuda", "mps"], "compile": ["auto", "on", "off"],
           "dtype": ["auto", "float32", "bfloat16", "float16"]}

def main(argv=None):
    """Run a command line and return its exit status."""
    parser = argparse.ArgumentParser("gpt.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: check(False, f"{message}; --help shows all flags")
    caught = []
    parser.add_argument("command", choices=["train", "generate", "evaluate"])
    for name, (commands, default, meaning) in FLAGS.items():
        others = "".join(f"; {where}: {p[name]!r}" for where, p in PRESETS.items() if name in p)
        kind = {"type": type(default), "choices": CHOICES.get(name)}
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS,
                            help=f"{meaning} (for {commands}; default: {default!r}{others})",
                            **({"action": "store_true"} if default is False else kind))
    try:
        given = vars(parser.parse_args(argv))
        command = given.pop("command")
        for name in given:
            check(command in FLAGS[name][0], f"--{name} is for {FLAGS[name][0]}, not for {command}")
            check(given[name] != [], f"--{name} needs a value")  # argparse takes --seed=-- for []
        check(not {"minutes", "max_iters"} <= set(given), "give --minutes or --max_iters, not both")
        args = argparse.Namespace(**{name: flag[1] for name, flag in FLAGS.items()} | given)
        device, _ = pick_device(args.device, "float32")  # train measures
        if command == "train":
            for number in (signal.SIGINT, signal.SIGTERM):  # finish the step, save, and stop
                signal.signal(number, lambda number, frame: caught.append(number) if not caught
                              else signal.default_int_handler(number, frame))  # the second time
            base = preset(device.type, args.minutes)
            if args.resume:
                _, _, saved = load(Path(args.out_dir, "last.pt"), "cpu")
                told = {key: saved.get(key, "") for key in ("data", "teachers")}
                if saved.get("device") == str(device):  # elsewhere, another format may be right
                    told["dtype"] = saved.get("precision", "auto")
                base, given = saved["config"], told | given
            chosen = {f.name: given.pop(f.name) for f in fields(Config) if f.name in given}
            train(Config(**base | chosen), **given, caught=caught)
            return 128 + caught[0] if caught else 0
        model, tokenizer, saved = load(args.checkpoint, device)
        if command == "evaluate":
            path = find_text(args.data or saved["data"])
            same = hashlib.sha256(path.read_bytes()).hexdigest() == saved["sha256"]
            check(args.data or same, f"{path} is not what was trained on: name a text with --data")
            _, _, val_data = load_text(path, tokenizer)
            loss = evaluate(model, val_data.to(device), model.config.block_size)
            print(f"{loss:.5f} nats and {loss / math.log(2):.5f} bits per character, "
                  f"perplexity {math.exp(min(loss, 700)):.4f}", flush=True)
            return 0
        if args.prompt_file:
            args.prompt = Path(args.prompt_file).read_text("utf-8-sig", "replace")
        elif "prompt" not in given and "\n" not in tokenizer.ids:  # a text without line breaks
            args.prompt = tokenizer.chars[0]
        sys.stdout.reconfigure(encoding="utf-8")
        idx = tokenizer.encode(args.prompt).long()[None]
        compile = {"on": True, "off": False}.get(args.compile, args.max_new_tokens >= 10_000)
        for i in range(args.num_samples):
            text = args.prompt if i == 0 else f"\n---\n{args.prompt}"
            for token in generate(model, idx, args.max_new_tokens, args.temperature, args.top_k,
                                  args.top_p, args.seed + i, compile):
                print(text + tokenizer.decode(token[0]), end="", flush=True)
                text = ""
            print(text, end="")
        print(flush=True)
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads, head say, has enough; nothing may be flushed at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except torch.OutOfMemoryError:
        print("error: out of memory: raise --gradient_accumulation_steps or lower --batch_size",
              file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    leave = os._exit if "RANK" in os.environ else sys.exit  # a late thread of gloo could abort
    leave(main())
