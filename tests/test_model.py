from dataclasses import replace
import math

import pytest
import torch
import torch.nn.functional as F

import gpt


def angles(length, D, start=0):
    """Cosines and sines of positions from `start` on, (T, D / 2) each."""
    place = torch.arange(start, start + length)
    turns = torch.outer(place, 10000.0 ** (-torch.arange(0, D, 2) / D))
    return turns.cos(), turns.sin()


def test_causal_at_every_position(model, idx):
    with torch.no_grad():
        before = model(idx)
        for t in range(16):
            touched = idx.clone()
            touched[:, t] = (touched[:, t] + 1) % 65
            moved = (model(touched) - before).abs().amax((0, 2)) > 1e-6
            assert not moved[:t].any() and moved[t:].all()


def test_forward_is_the_plain_formula(model, idx):
    """The whole model again, position by position and head by head, from the papers' formulas."""
    H, D = 2, 16
    places = torch.outer(torch.arange(16), 10000.0 ** (-torch.arange(8) / 8))
    turns = torch.polar(torch.ones_like(places), places)  # (T, D / 2)

    def unit(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    def turned(x):
        return torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turns).mT.flatten(-2)

    with torch.no_grad():
        for text, logits in zip(idx, model(idx)):
            x = torch.stack([sum(table.weight[text[t - i]] for i, table in
                                 enumerate(model.embeddings) if t >= i) for t in range(16)])
            x = unit(x)
            for block in model.blocks:
                heads = (unit(x) @ block.qkv.weight.T).view(16, 3, H, D)
                read = []
                for h in range(H):
                    q, k, v = heads[:, 0, h], heads[:, 1, h], heads[:, 2, h]
                    scores = (turned(unit(q)) @ turned(unit(k)).T / math.sqrt(D)).exp()
                    read.append(torch.stack([scores[t, :t + 1] @ v[:t + 1] / scores[t, :t + 1].sum()
                                             for t in range(16)]))
                x = x + torch.cat(read, -1) @ block.out.weight.T
                x = x + (unit(x) @ block.up.weight.T).clamp(min=0) ** 2 @ block.down.weight.T
            assert torch.allclose(unit(x) @ model.head.weight.T, logits, atol=1e-4)


def test_rotary_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 20, 8)
    start, later, much_later = (angles(20, 8, t) for t in (0, 1, 100))
    near = gpt.rotary(q, *start) @ gpt.rotary(k, *start).mT
    far = gpt.rotary(q, *much_later) @ gpt.rotary(k, *much_later).mT
    assert torch.allclose(near, far, atol=1e-4)
    assert not torch.allclose(near, gpt.rotary(q, *later) @ gpt.rotary(k, *start).mT, atol=1e-2)


def test_rotary_keeps_lengths_and_the_number_format():
    x = torch.randn(1, 1, 20, 8)
    assert torch.allclose(gpt.rotary(x, *angles(20, 8)).norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert gpt.rotary(x.bfloat16(), *angles(20, 8)).dtype == torch.bfloat16


def test_initial_loss_is_ln_v(config, idx):
    loss = F.cross_entropy(gpt.GPT(config)(idx).flatten(0, 1), idx.flatten())
    assert loss.item() == pytest.approx(math.log(65), abs=1e-5)


def test_every_parameter_gets_a_gradient(model, idx):
    """Each row of a matrix does, but the embeddings' only where their character was read."""
    F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    tables = [table.weight for table in model.embeddings]
    for name, p in model.named_parameters():
        if not any(p is table for table in tables):
            assert (p.grad.abs().sum(1) > 0).all(), name
    for i, table in enumerate(tables):
        read = table.grad.abs().sum(1).nonzero().flatten()
        assert torch.equal(read, idx[:, :16 - i].unique())


def test_the_row_that_stands_for_no_character_stays_zero(config, idx):
    model = gpt.GPT(config)
    optimizers = gpt.make_optimizers(model, replace(config, adamw_weight_decay=2.0))
    for _ in range(3):
        model.zero_grad()
        F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
    for table in model.embeddings:
        assert len(table.weight) == 66 and (table.weight[:65].abs().sum(1) > 0).all()
        assert not table.weight[65].any()


def test_parameter_count(config):
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    count = sum(p.numel() for p in gpt.GPT(config).parameters())
    assert count == 3 * (V + 1) * C + V * C + L * 12 * C * C


def test_embedding_sees_three_characters(config, idx):
    """With layers that do nothing yet, a character reaches its own and the next two positions."""
    model = gpt.GPT(config)
    torch.nn.init.normal_(model.head.weight)
    touched = idx.clone()
    touched[:, 5] = (touched[:, 5] + 1) % 65
    moved = (model(touched) - model(idx)).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [5, 6, 7]


def test_dropout_is_off_in_eval_mode(config, model, idx):
    dropping = gpt.GPT(replace(config, dropout=0.5))
    dropping.load_state_dict(model.state_dict())
    assert not torch.equal(dropping(idx), dropping(idx))
    assert torch.equal(dropping.eval()(idx), model(idx))


def test_dropout_draws_one_mask_for_all_positions(config):
    """A channel that is dropped from a branch is dropped at each position of a text; the others
    are doubled where half are dropped. Each text and each branch has channels of its own."""
    masks = []
    for branch, other in (("out", "down"), ("down", "out")):
        torch.manual_seed(0)
        block, x = gpt.Block(replace(config, dropout=0.5)), torch.randn(2, 16, 32)
        torch.nn.init.normal_(getattr(block, branch).weight)
        assert not getattr(block, other).weight.any()
        torch.manual_seed(1)
        with torch.no_grad():
            added = block.train()(x, *angles(16, 16)) - x
            whole = block.eval()(x, *angles(16, 16)) - x
        dropped = added.abs().amax(1) < 1e-6  # (B, C)
        assert 8 < dropped[0].sum() < 24 and not torch.equal(*dropped)
        assert torch.allclose(added, 2 * whole * ~dropped[:, None], atol=1e-5)
        masks.append(dropped)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("wrong", [
    dict(n_embd=100, n_head=6), dict(n_embd=36, n_head=4), dict(n_embd=0), dict(n_layer=0),
    dict(n_head=0), dict(n_head=-4), dict(block_size=3), dict(batch_size=0), dict(max_iters=0)])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="n_embd a multiple of 2 . n_head"):
        gpt.Config(**wrong)


@pytest.mark.parametrize("dtype", ["", "int8", "float64", "bfloat"])
def test_other_number_formats_are_refused(dtype):
    with pytest.raises(ValueError, match=f"no dtype {dtype}"):
        gpt.Config(dtype=dtype)
