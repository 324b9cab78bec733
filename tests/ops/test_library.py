"""Registration: opcheck, use inside ``torch.compile``, and no import of Triton without need."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from lightning_rejuv import ops

registered = torch.ops.lightning_rejuv


def table(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64)


MASK = torch.arange(9) % 3 > 0
OPCHECKS = {
    "activation_stats_": [
        lambda h: (table(7, 33), h, None, 0.1),
        lambda h: (table(7, 33), h[:, ::2].repeat(1, 2)[:, :33], MASK, 0.0),
    ],
    "grad_activation_stats_": [
        lambda h: (table(4, 33), h, h + 1, None),
        lambda h: (table(4, 33), h.bfloat16(), h, MASK),
    ],
    "weight_drift": [lambda h: (h, h + 1), lambda h: (h.t(), h.t().bfloat16())],
    "token_partials": [
        lambda h: (h, torch.arange(9), 0.7, None, 0),
        lambda h: (h, torch.arange(5, 14), 1.0, torch.linspace(0.5, 2, 9), 5),
    ],
    "merge_token_partials": [
        lambda h: [x.unsqueeze(0) for x in registered.token_partials(h, torch.arange(9), 1.0, None, 0)],
    ],
}


@pytest.mark.parametrize(
    ("name", "case"), [(name, i) for name, all_ in OPCHECKS.items() for i in range(len(all_))]
)
def test_opcheck(name, case):
    h = torch.randn(9, 33, generator=torch.Generator().manual_seed(0))
    opcheck(getattr(registered, name).default, tuple(OPCHECKS[name][case](h)))


class Probed(nn.Module):
    """A small network whose hook accumulates statistics in a buffer, the way a monitor does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("table", table(7, 16))
        self.down.register_forward_pre_hook(self.record)

    def record(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not ops.is_recomputing():
            ops.activation_stats(inputs[0], eps=0.1, out=self.table)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def every_op(h: Tensor, target: Tensor, mask: Tensor) -> list[Tensor]:
    stats = ops.token_stats(h[:, :-1], target, 0.7)
    return [
        *ops.activation_stats(h, mask, eps=0.1),
        *ops.grad_activation_stats(h, h + 1, mask),
        *ops.weight_drift(h[0], h[1]).rows,
        *stats,
        *ops.token_stats_from_hidden(h[:, :-1], h[1].clone(), target),
    ]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_hook_inside_a_compiled_graph_counts_like_eager(backend):
    torch.manual_seed(0)
    net, x = Probed(), torch.randn(4, 6, 8)
    torch._dynamo.reset()
    expected_output = net(x)
    expected, net.table = net.table.clone(), torch.zeros_like(net.table)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for count in (1, 2):
        output = compiled(x)
        output.sum().backward()
        torch.testing.assert_close(output, expected_output)
        torch.testing.assert_close(net.table[[0, 1, 2, 4, 5, 6]], count * expected[[0, 1, 2, 4, 5, 6]])
        torch.testing.assert_close(net.table[3], expected[3])
    assert net.up.weight.grad is not None


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_op_compiles_without_a_graph_break(backend):
    torch.manual_seed(0)
    h, target, mask = torch.randn(2, 5, 33), torch.randint(0, 5, (2, 4)), torch.rand(2, 5) < 0.5
    torch._dynamo.reset()
    found = torch.compile(every_op, fullgraph=True, backend=backend)(h, target, mask)
    for a, b in zip(found, every_op(h, target, mask), strict=True):
        torch.testing.assert_close(a, b)


def test_cpu_needs_no_triton():
    program = (
        "import sys; sys.modules['triton'] = None  # every import of it fails\n"
        "import torch; from lightning_rejuv import ops\n"
        "ops.activation_stats(torch.ones(2, 3)); ops.weight_drift(torch.ones(2, 3), torch.ones(2, 3))\n"
        "ops.token_stats_from_hidden(torch.ones(2, 3), torch.ones(4, 3))\n"
        "print([name for name in sys.modules if name.startswith('lightning_rejuv.ops.triton')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_gradients_pass_by():
    """Statistics of a tensor that needs a gradient neither warn nor hold its graph."""
    h = torch.randn(3, 4, requires_grad=True)
    results = [*ops.activation_stats(h), *ops.weight_drift(h, h).rows, ops.token_stats(h).entropy]
    assert not any(result.requires_grad for result in results)
