"""Which rows of a fused projection are query, key, value, gate or up: against what the model does with them."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.neurons import find_decoder
from lightning_rejuv.neurons.families import FAMILIES
from lightning_rejuv.neurons.fused_rows import (
    bigcode_qkv,
    falcon_qkv,
    gate_up,
    latent_key_value,
    latent_rotary_key,
    qkv,
    qkv_per_head,
)
from tests.families import CONFIGS, tiny


def _with(*rules):
    return [name for name in CONFIGS if set(rules) & set(FAMILIES[name.split("/")[0]].values())]


ATTENTION = _with(qkv, qkv_per_head, bigcode_qkv, falcon_qkv, latent_key_value, latent_rotary_key)


def _fused(model):
    """Modules of the first layer that fuse several projections, and the rows of each kind that the map gives."""
    found = {}
    for group in find_decoder(model).groups:
        if group.layer == 0 and group.index is not None and group.expert is None:
            found.setdefault(group.module, {})[group.kind] = set(group.index.tolist())
    return found


@torch.no_grad()
def _observe(model, module, change, watched):
    """Run a row of the batch for each output of a module, with its first position changed; return what follows."""
    ids = torch.tensor([[5, 9, 14, 7]])
    size, seen = [], []

    def sized(_module, _args, out):
        size.append(out.shape[-1])

    with model.get_submodule(module).register_forward_hook(sized):
        model(input_ids=ids, use_cache=False)
    rows = size[0]

    def changed(_module, _args, out):
        shape = out.shape
        out = out.reshape(rows + 1, 4, rows).clone()
        change(out)
        return out.reshape(shape)

    def watch(_module, args):
        seen.append(args[0].detach().reshape(rows + 1, 4, -1))

    with (
        model.get_submodule(module).register_forward_hook(changed),
        model.get_submodule(watched).register_forward_pre_hook(watch),
    ):
        model(input_ids=ids.expand(rows + 1, 4), use_cache=False)
    return seen[0]


@pytest.mark.parametrize("name", ATTENTION)
def test_rows_of_queries_keys_and_values(name):
    """A changed value at the first position is seen there; a key only by those after it; a query by nobody.

    There the softmax is over one position, so that neither query nor key matter to it.
    """
    model = tiny(name)
    writer = next(g.module for g in find_decoder(model).groups if g.kind == "o" and g.layer == 0)
    checked = 0
    for module, kinds in _fused(model).items():
        if not {"q", "k", "v"} & set(kinds):
            continue

        def raise_one(out):
            rows = out.shape[-1]
            out[torch.arange(rows), 0, torch.arange(rows)] += 3.0

        seen = _observe(model, module, raise_one, writer)
        moved = (seen[:-1] - seen[-1]).abs().amax(2) > 1e-5
        expected = {"q": set(), "k": set(), "v": set()}
        for row, (first, later) in enumerate(zip(moved[:, 0], moved[:, 1:].any(1), strict=True)):
            expected["v" if first else "k" if later else "q"].add(row)
        for kind, rows in kinds.items():
            if module.endswith(
                "kv_a_proj_with_mqa"
            ):  # its latent rows are keys and values both, and no neurons
                assert rows <= expected[kind]
            else:
                assert rows == expected[kind], (module, kind)
        checked += 1
    assert checked


@pytest.mark.parametrize("name", _with(gate_up))
def test_rows_of_gates_and_ups(name):
    """What a layer does is linear in its ups, and not in its gates."""
    model = tiny(name)
    writer = next(g.module for g in find_decoder(model).groups if g.kind == "down" and g.layer == 0)
    for module, kinds in _fused(model).items():
        if set(kinds) != {"gate", "up"}:
            continue
        at = {}
        for value in (-1.0, 0.0, 1.0):

            def put(out, value=value):
                rows = out.shape[-1]
                out[:] = 1.5
                out[torch.arange(rows), 0, torch.arange(rows)] = value

            at[value] = _observe(model, module, put, writer)[:-1, 0]
        bend = (at[-1.0] + at[1.0] - 2 * at[0.0]).abs().amax(1)
        assert kinds["up"] == set((bend < 1e-5).nonzero().flatten().tolist())
        assert kinds["gate"] == set((bend > 1e-2).nonzero().flatten().tolist())
