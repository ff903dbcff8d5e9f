import math

import pytest
import torch
import torch.nn.functional as F

import gpt


def test_causal_at_every_position(model, idx):
    with torch.no_grad():
        before = model(idx)
        for t in range(16):
            touched = idx.clone()
            touched[:, t] = (touched[:, t] + 1) % 65
            moved = (model(touched) - before).abs().amax((0, 2)) > 1e-6
            assert not moved[:t].any() and moved[t:].any()


def test_forward_is_the_plain_formula(model, idx):
    """The whole model again, position by position and head by head, from the papers' formulas."""
    H, D = 2, 16
    angles = torch.outer(torch.arange(16), 10000.0 ** (-torch.arange(8) / 8))
    turns = torch.polar(torch.ones_like(angles), angles)  # (T, D / 2)

    def unit(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    def turned(x):
        return torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turns).mT.flatten(-2)

    with torch.no_grad():
        for text, logits in zip(idx, model(idx)):
            x = torch.stack([sum(model.embedding[i, text[t - i]] for i in range(3) if t >= i)
                             for t in range(16)])
            x = unit(x)
            for qkv, out, up, down in zip(model.qkv, model.out, model.up, model.down):
                heads = (unit(x) @ qkv.T).view(16, 3, H, D)
                read = []
                for h in range(H):
                    q, k, v = heads[:, 0, h], heads[:, 1, h], heads[:, 2, h]
                    scores = turned(unit(q)) @ turned(unit(k)).T / math.sqrt(D)
                    read.append(torch.stack([scores[t, :t + 1].softmax(0) @ v[:t + 1]
                                             for t in range(16)]))
                x = x + torch.cat(read, -1) @ out.T
                x = x + (unit(x) @ up.T).clamp(min=0) ** 2 @ down.T
            assert torch.allclose(unit(x) @ model.head.T, logits, atol=1e-4)


def test_attention_is_explicit_softmax():
    q, k, v = torch.randn(3, 2, 3, 10, 8)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(10, 10).triu(1) > 0, -math.inf)
    expected = scores.softmax(-1) @ v
    mask = gpt.positions(torch.arange(10), 10, 8)[-1]
    offset = gpt.positions(torch.arange(7, 10), 10, 8)[-1]
    with torch.no_grad():
        fused = gpt.attention(q, k, v, mask)
        last = gpt.attention(q[:, :, 7:], k, v, offset)
    assert torch.allclose(gpt.attention(q, k, v, mask), expected, atol=1e-6)
    assert torch.allclose(fused, expected, atol=1e-6)
    assert torch.allclose(last, expected[:, :, 7:], atol=1e-6)


def test_attention_on_both_paths_has_the_same_gradient():
    q, k, v = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    mask = gpt.positions(torch.arange(6), 6, 4)[-1]
    explicit = torch.autograd.grad(gpt.attention(q, k, v, mask).square().sum(), (q, k, v))
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    reference = torch.autograd.grad(fused.square().sum(), (q, k, v))
    for a, b in zip(explicit, reference):
        assert torch.allclose(a, b, atol=1e-5)


def test_rotary_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 20, 8)
    start, later, much_later = (gpt.positions(torch.arange(t, t + 20), 20, 8)[:2]
                                for t in (0, 1, 100))
    near = gpt.rotary(q, *start) @ gpt.rotary(k, *start).mT
    far = gpt.rotary(q, *much_later) @ gpt.rotary(k, *much_later).mT
    assert torch.allclose(near, far, atol=1e-4)
    assert not torch.allclose(near, gpt.rotary(q, *later) @ gpt.rotary(k, *start).mT, atol=1e-2)


def test_rotary_continues_where_it_starts():
    whole, rest = (gpt.positions(torch.arange(t, 20), 20, 8) for t in (0, 7))
    assert all(torch.equal(a[7:], b) for a, b in zip(whole, rest))


def test_norm_matches_torch():
    x = torch.randn(3, 5, 32) * 7
    assert torch.allclose(gpt.norm(x), torch.nn.RMSNorm(32, elementwise_affine=False)(x))


def test_initial_loss_is_ln_v(config, idx):
    loss = F.cross_entropy(gpt.GPT(config)(idx).flatten(0, 1), idx.flatten())
    assert loss.item() == pytest.approx(math.log(65), abs=1e-5)


def test_every_parameter_gets_a_gradient(model, idx):
    F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    for name, p in model.named_parameters():
        slices = p.grad if p.dim() == 3 else p.grad[None]
        assert all(part.abs().sum() > 0 for part in slices), name


def test_parameter_count(config):
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    count = sum(p.numel() for p in gpt.GPT(config).parameters())
    assert count == 4 * V * C + L * 12 * C * C


def test_embedding_sees_three_characters(config, idx):
    """With layers that do nothing yet, a character reaches its own and the next two positions."""
    model = gpt.GPT(config)
    torch.nn.init.normal_(model.head)
    touched = idx.clone()
    touched[:, 5] = (touched[:, 5] + 1) % 65
    moved = (model(touched) - model(idx)).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [5, 6, 7]


def test_dropout_is_off_in_eval_mode(config, idx):
    model = gpt.GPT(gpt.replace(config, dropout=0.5))
    torch.nn.init.normal_(model.out)
    torch.nn.init.normal_(model.head)
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


@pytest.mark.parametrize("wrong, named", [
    (dict(n_embd=100, n_head=6), "n_embd"), (dict(n_embd=36, n_head=4), "even"),
    (dict(n_layer=0), "n_layer"), (dict(n_head=0), "n_head"), (dict(n_layer=2.5), "n_layer"),
    (dict(dropout=1.0), "dropout"), (dict(learning_rate=-1.0), "learning_rate"),
    (dict(learning_rate=math.nan), "learning_rate"), (dict(decay_fraction=0.0), "decay_fraction"),
    (dict(seed=-1), "seed"), (dict(minutes=math.inf), "minutes"), (dict(n_layer="6"), "n_layer")])
def test_impossible_settings_are_refused(wrong, named):
    with pytest.raises(gpt.UserError, match=named):
        gpt.Config(**wrong)
