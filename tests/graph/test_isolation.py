"""What a capture leaves of the process and of the network: other threads notice nothing."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimkit as sk
from slimkit.graph import capture, check_equivalence
from slimkit.graph.isolation import undisturbed
from slimkit.graph.random_numbers import PrivateRandomNumbers


class Noisy(nn.Module):
    """Draws in evaluation mode, too, in all ways there are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.fc(x), 0.5, training=True) + torch.rand_like(x) + torch.randn(4)
        return x + torch.randint(9, (4,)) + torch.empty(4).uniform_() + torch.randperm(4)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4)


def test_a_capture_draws_from_no_generator_of_the_process(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4), Noisy())
    before = torch.get_rng_state()
    graph = capture(net, x)
    plan = sk.prune.plan(net, x, ratio=0.5)
    assert check_equivalence(net, plan, x).equal
    assert any("rand" in op.name for op in graph.ops)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.5),
        torch.rand_like,
        torch.randn_like,
        lambda _: torch.rand(3, 4),
        lambda _: torch.randint(9, (3, 4)),
        lambda _: torch.randperm(4),
        lambda x: torch.empty(4).normal_() + torch.bernoulli(x.sigmoid()),
        lambda x: torch.multinomial(x.sigmoid(), 2),
        lambda x: F.rrelu(x, training=True),
        F.gumbel_softmax,
    ],
)
def test_private_numbers_are_those_that_would_be_next(
    draw: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    state = torch.get_rng_state()
    with PrivateRandomNumbers():
        private = draw(x), draw(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, draw(x)) for one in private)
    with PrivateRandomNumbers(seed=0):
        seeded = draw(x)
    torch.manual_seed(0)
    assert torch.equal(seeded, draw(x))


def attended(x: Tensor, dropout: float) -> Tensor:
    """Attention, whose operators know the default generator only."""
    heads = x.reshape(1, 1, 3, 4)
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_draws_privately_in_the_innermost_of_nested_modes(
    dropout: float, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.get_rng_state()
    with torch.no_grad():
        with PrivateRandomNumbers(), PrivateRandomNumbers(seed=0):
            private = attended(x, dropout), torch.native_dropout(x, 0.5, train=True)[0]
            if dropout == 0:  # nothing is lent, which other threads could notice
                monkeypatch.setattr(PrivateRandomNumbers, "_lent", lambda *_: pytest.fail("lent"))
                assert torch.equal(attended(x, dropout), private[0])
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(0)
        again = attended(x, dropout), torch.native_dropout(x, 0.5, train=True)[0]
    assert all(map(torch.equal, private, again))


def test_private_numbers_leave_a_generator_of_the_network_alone() -> None:
    own = torch.Generator().manual_seed(5)
    with PrivateRandomNumbers():
        drawn = torch.rand(4, generator=own)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(5)))


def test_settings_of_the_process_are_back_after_the_last_of_overlapping_threads() -> None:
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with undisturbed(nn.Linear(1, 1)):
            inside.set()
            assert leave.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    with undisturbed(nn.Linear(1, 1)):
        leave.set()
        thread.join()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_profiles_of_one_network_in_threads_agree_and_leave_it_as_it_was(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    net[1].eval()
    alone = sk.profile(net, x)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: sk.profile(net, x), range(24)))
    assert all(one == alone for one in found)
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert torch.backends.mha.get_fastpath_enabled()
    assert gc.isenabled()


def test_random_numbers_of_another_thread_do_not_repeat(x: Tensor) -> None:
    net = Noisy()
    thread = threading.Thread(target=lambda: [sk.profile(net, x) for _ in range(10)])
    thread.start()
    drawn = []
    while thread.is_alive():
        drawn.append(torch.rand((), dtype=torch.float64).item())
    assert len(set(drawn)) == len(drawn)
