import copy
import math

import pytest
import torch

import gpt


def in_chunks(model, idx, sizes):
    cache = gpt.KVCache(model.config, len(idx), idx.device)
    with torch.no_grad():
        return torch.cat([model(part, cache) for part in idx.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("sizes", [1, 5, 16, [7, 1, 8], [1, 15], [15, 1]])
def test_cached_logits_are_the_uncached(model, idx, sizes):
    with torch.no_grad():
        assert torch.allclose(in_chunks(model, idx, sizes), model(idx), atol=1e-5)


def test_single_characters_as_compiled_give_the_same_logits(model, idx, monkeypatch):
    """The lines that only a compiled model takes, without the compiler."""
    expected = in_chunks(model, idx, 1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    sums = torch.cat([in_chunks(model, part, 1) for part in idx.split(1)])
    assert torch.allclose(sums, expected, atol=1e-5)
    assert not torch.equal(sums, expected)  # other lines, other rounding


@pytest.mark.parametrize("compiling", [False, True])
def test_weights_in_bfloat16_count_as_their_values_in_float32(model, idx, monkeypatch, compiling):
    half = copy.deepcopy(model).bfloat16()
    expected = in_chunks(copy.deepcopy(half).float(), idx[:1], 1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert torch.allclose(in_chunks(half, idx[:1], 1), expected, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_text_is_the_uncompiled_also_past_the_window(model, batch, compiles):
    prompt = torch.randint(65, (batch, 3), generator=torch.Generator().manual_seed(1))
    texts = [torch.cat([*gpt.generate(model, prompt, 40, compile=fast)], dim=1)
             for fast in (False, True)]
    assert torch.equal(*texts)


def test_the_model_is_compiled_once(model, idx, compiles):
    """Not again for the first character written, wherever in memory the prompt lies."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompt in (idx[:1, :3], idx[:1, :1], idx[:1, 3:4], torch.zeros(1, 1).long()):
            assert len([*gpt.generate(model, prompt, 20, compile=True)]) == 20


def test_text_without_a_compiler_is_that_of_the_plain_model(model, monkeypatch):
    """Not of the copy in bfloat16 that was to be compiled, which would write the same slowly."""
    used, forward = set(), gpt.GPT.forward
    monkeypatch.setattr(gpt.torch, "compile", None)
    monkeypatch.setattr(gpt.GPT, "forward", lambda it, *args: used.add(it.head.dtype) or
                        forward(it, *args))
    plain, other = ([*gpt.generate(model, torch.zeros(1, 1).long(), 20, compile=compiled)]
                    for compiled in (False, True))
    assert plain == other and used == {torch.float32}


def in_a_band(model, idx):
    """Logits for idx (B, T) without a cache: each layer sees the last block_size positions."""
    place, config = torch.arange(idx.size(1)), model.config
    cos, sin, mask = gpt.positions(place, len(place), config.n_embd // config.n_head)
    mask = mask.masked_fill(place <= place[:, None] - config.block_size, -math.inf)
    padded = torch.nn.functional.pad(idx, (2, 0))  # gradients: attention then adds this mask
    return model.stream(padded, place, (cos, sin, mask), [None] * config.n_layer)


@pytest.mark.parametrize("sizes", [1, [9] + 51 * [1], [16] + 44 * [1]])
def test_past_the_window_each_layer_sees_the_last_block_size(model, sizes):
    idx = torch.randint(65, (2, 60), generator=torch.Generator().manual_seed(2))
    expected = in_a_band(model, idx)
    assert torch.allclose(in_chunks(model, idx, sizes), expected, atol=1e-5)
    assert torch.allclose(expected[:, :16], model(idx[:, :16]), atol=1e-5)
    assert not torch.allclose(expected[:, -1], model(idx)[:, -1], atol=1e-3)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 40])
def test_greedy_text_is_the_uncached_also_past_the_window(model, length):
    """The weights are rounded; the model that was given keeps its own. Of a prompt that is longer
    than the window, only its end counts."""
    given, model = model, copy.deepcopy(model).bfloat16().float()
    prompt = torch.randint(65, (1, length), generator=torch.Generator().manual_seed(length))
    seen = prompt[:, -16:]
    for _ in range(60):
        seen = torch.cat((seen, in_a_band(model, seen)[:, -1:].argmax(-1)), dim=1)
    fast = torch.cat([prompt[:, -16:], *gpt.generate(given, prompt, 60, temperature=0)], dim=1)
    assert torch.equal(fast, seen)


@pytest.mark.parametrize("sizes", [[17], [10, 7], [16, 2]])
def test_past_the_window_several_ids_at_once_are_refused(model, sizes):
    """Later ones would take places that earlier ones still need."""
    idx = torch.zeros(1, sum(sizes)).long()
    with pytest.raises(gpt.UserError, match="one id at a time"):
        in_chunks(model, idx, sizes)


@pytest.mark.parametrize("block_size, used", [(1, 1), (2, 2), (3, 3)])
def test_a_window_of_one_or_two_leaves_out_characters_never_seen_in_training(block_size, used):
    """Tables that no training could reach must not add their random rows past the window."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.Config(n_layer=1, n_head=1, n_embd=8, block_size=block_size)).eval()
    torch.nn.init.normal_(model.head)

    def text():
        it = gpt.generate(model, torch.zeros(8, 1).long(), 9, temperature=0)
        return torch.cat([*it], dim=1)
    before = text()
    with torch.no_grad():
        for i, table in reversed([*enumerate(model.embedding)]):
            table.neg_()
            assert torch.equal(text(), before) == (i >= used)


def test_text_is_that_of_weights_rounded_to_bfloat16(model):
    """So many draws that other weights would change one of them."""
    rounded, prompt = copy.deepcopy(model).bfloat16().float(), torch.zeros(200, 1).long()
    texts = [torch.cat([*gpt.generate(it, prompt, 40)], dim=1) for it in (model, rounded)]
    assert torch.equal(*texts)


def test_same_seed_same_text(model):
    def text(seed):
        return torch.cat([*gpt.generate(model, torch.zeros(2, 3).long(), 40, seed=seed)], dim=1)
    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))


LOGITS = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().repeat(2000, 1)


def drawn(**dials):
    """The set of ids that 2,000 draws produce."""
    generator = torch.Generator().manual_seed(0)
    return set(gpt.sample_next(LOGITS, generator=generator, **dials).flatten().tolist())


@pytest.mark.parametrize("dials, expected", [
    ({}, {0, 1, 2, 3}), (dict(top_k=99), {0, 1, 2, 3}), (dict(top_k=2), {0, 1}),
    (dict(top_k=1), {0}),
    (dict(top_p=0.35), {0}), (dict(top_p=0.65), {0, 1}), (dict(top_p=0.75), {0, 1, 2}),
    (dict(top_p=1e-300), {0}), (dict(temperature=0), {0}), (dict(temperature=1e-300), {0}),
    (dict(temperature=1e300), {0, 1, 2, 3}),
    (dict(top_k=3, top_p=0.65), {0, 1}), (dict(top_k=2, top_p=0.5), {0})])
def test_filters_exclude_what_they_should(dials, expected):
    assert drawn(**dials) == expected


@pytest.mark.parametrize("point", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_what_is_kept(monkeypatch, point):
    """The least and the largest number that torch.rand can return: the likeliest id, and a kept
    one, also where rounding makes the shares add up to a little more or less than 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, generator: torch.full(
        shape, point, dtype=dtype))
    assert drawn(top_p=0.65) == {1 if point else 0}
    logits = 9 * torch.randn(5000, 65, generator=torch.Generator().manual_seed(1))
    places = logits.argsort(-1, descending=True).argsort(-1)
    for dials, most in (({}, 64), (dict(top_k=7), 6), (dict(top_p=1e-300), 0)):
        found = places.gather(-1, gpt.sample_next(logits, 0.01, **dials))
        assert found.max() <= most if point else found.max() == 0


def test_temperature_shapes_the_distribution():
    draws = gpt.sample_next(LOGITS, 0.5, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([16, 9, 4, 1]) / 30
    assert torch.allclose(torch.bincount(draws.flatten()) / 2000, expected, atol=0.04)


@pytest.mark.parametrize("dials", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0),
                                   dict(top_p=2), dict(seed=2**64)])
def test_impossible_dials(model, dials):
    with pytest.raises(gpt.UserError, match="top_p"):
        next(gpt.generate(model, torch.zeros(1, 1).long(), 1, **dials))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(broken):
    with pytest.raises(gpt.UserError, match="damaged"):
        gpt.sample_next(torch.tensor([[0.0, broken]]))
