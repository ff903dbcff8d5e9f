import math

import pytest
import torch
import torch.nn.functional as F

import gpt


def in_chunks(model, idx, sizes):
    cache = gpt.KVCache(model.config, len(idx))
    with torch.no_grad():
        return torch.cat([model(part, cache) for part in idx.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("prompt", [0, 1, 2, 7, 15, 16])
def test_cached_logits_are_the_uncached(model, idx, prompt, texts):
    """A prompt at once, then one character at a time; without a prompt from the start."""
    sizes = ([prompt] if prompt else []) + (16 - prompt) * [1]
    idx = idx[:texts]
    with torch.no_grad():
        assert torch.allclose(in_chunks(model, idx, sizes), model(idx), atol=1e-5)


@torch.no_grad()
def in_a_band(model, idx):
    """Logits for idx (B, T) without a cache: each layer sees the last block_size positions."""
    (B, T), config = idx.shape, model.config
    H, D, place = config.n_head, config.n_embd // config.n_head, torch.arange(T)
    angles = torch.outer(place, 10000.0 ** (-torch.arange(0, D, 2) / D))
    distance = place[:, None] - place
    hidden = (distance < 0) | (distance >= config.block_size)
    padded = F.pad(idx, (2, 0), value=config.vocab_size)
    x = gpt.norm(sum(table(padded[:, 2 - i:][:, :T]) for i, table in enumerate(model.embeddings)))
    for block in model.blocks:
        q, k, v = block.qkv(gpt.norm(x)).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        q, k = (gpt.rotary(gpt.norm(part), angles.cos(), angles.sin()) for part in (q, k))
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(hidden, -math.inf)
        x = x + block.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))
        x = x + block.down(block.up(gpt.norm(x)).relu().square())
    return model.head(gpt.norm(x))


@pytest.mark.parametrize("prompt", [1, 9, 16])
def test_past_the_window_each_layer_sees_the_last_block_size(model, prompt):
    idx = torch.randint(65, (2, 60), generator=torch.Generator().manual_seed(2))
    expected = in_a_band(model, idx)
    logits = in_chunks(model, idx, [prompt] + (60 - prompt) * [1])
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(expected[:, :16], model(idx[:, :16]), atol=1e-5)
    assert not torch.allclose(expected[:, -1], model(idx)[:, -1], atol=1e-3)


def test_the_cache_holds_what_was_put_last_and_grows_no_further(config):
    """Keys are the numbers of their positions, values the negative ones."""
    cache = gpt.KVCache(config, 2)
    for length in range(1, 50):
        k = torch.full((2, 2, 1, 16), float(length))
        for layer in range(2):
            keys, values = cache.update(layer, k, -k)
        cache.length += 1
        last = torch.arange(max(1, length - 15), length + 1).float()
        assert keys.shape == (2, 2, min(length, 16), 16) and torch.equal(values, -keys)
        assert torch.equal(keys.sort(2).values, last[:, None].expand_as(keys))


@pytest.mark.parametrize("length", [1, 5, 16, 17, 40])
def test_greedy_text_is_the_uncached_also_past_the_window(model, length):
    """Of a prompt that is longer than the window, only its end counts."""
    prompt = torch.randint(65, (2, length), generator=torch.Generator().manual_seed(length))
    seen = prompt[:, -16:]
    for _ in range(60):
        seen = torch.cat((seen, in_a_band(model, seen)[:, -1:].argmax(-1)), dim=1)
    text = torch.cat([prompt[:, -16:], *gpt.generate(model, prompt, 60, temperature=0)], dim=1)
    assert torch.equal(text, seen)


def test_same_seed_same_text(model):
    def text(seed):
        return torch.cat([*gpt.generate(model, torch.zeros(2, 3).long(), 40, seed=seed)], dim=1)
    assert text(1).shape == (2, 40) and torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))
    assert not torch.equal(*text(1))  # texts of one batch are drawn apart


LOGITS = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log().repeat(2000, 1)


def drawn(**dials):
    """The set of ids that 2,000 draws produce."""
    generator = torch.Generator().manual_seed(0)
    return set(gpt.sample_next(LOGITS, generator=generator, **dials).flatten().tolist())


@pytest.mark.parametrize("dials, expected", [
    ({}, {0, 1, 2, 3}), (dict(top_k=99), {0, 1, 2, 3}), (dict(top_k=2), {1, 3}),
    (dict(top_k=1), {1}), (dict(top_p=1e-9), {1}), (dict(top_p=0.35), {1}),
    (dict(top_p=0.65), {1, 3}), (dict(top_p=0.75), {0, 1, 3}),
    (dict(temperature=0), {1}), (dict(temperature=1e-300), {1}),
    (dict(temperature=1e300), {0, 1, 2, 3}), (dict(temperature=1e9, top_k=2), {1, 3}),
    (dict(top_k=3, top_p=0.65), {1, 3}), (dict(top_k=2, top_p=0.5), {1})])
def test_filters_exclude_what_they_should(dials, expected):
    assert drawn(**dials) == expected


def test_top_p_counts_what_temperature_and_top_k_leave():
    """Squared, the shares are 16, 9, 4 and 1 of 30; without the last two 16 and 9 of 25."""
    assert drawn(temperature=0.5, top_p=0.5) == drawn(top_k=2, top_p=0.55) == {1}
    assert drawn(temperature=0.5, top_k=2, top_p=0.63) == {1}


@pytest.mark.parametrize("temperature, shares", [(1, [0.2, 0.4, 0.1, 0.3]),
                                                 (0.5, [4 / 30, 16 / 30, 1 / 30, 9 / 30])])
def test_temperature_shapes_the_distribution(temperature, shares):
    draws = gpt.sample_next(LOGITS, temperature, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draws.flatten(), minlength=4)
    assert torch.allclose(counts / 2000, torch.tensor(shares), atol=0.04)


def test_each_row_is_drawn_from_its_own_logits():
    logits = torch.full((5, 7), -9.0)
    logits[torch.arange(5), torch.tensor([3, 0, 6, 3, 1])] = 9.0
    assert gpt.sample_next(logits, 0.5, 2, 0.9).tolist() == [[3], [0], [6], [3], [1]]


@pytest.mark.parametrize("dials", [dict(max_new_tokens=-1), dict(temperature=-1), dict(top_k=-1),
                                   dict(top_p=0), dict(top_p=2), dict(top_p=math.nan),
                                   dict(temperature=math.nan)])
def test_impossible_dials(model, dials):
    with pytest.raises(ValueError, match="out of range"):
        next(gpt.generate(model, torch.zeros(1, 1).long(), **dials))


def test_no_characters_are_as_many_as_asked_for(model):
    assert [*gpt.generate(model, torch.zeros(1, 1).long(), 0)] == []
