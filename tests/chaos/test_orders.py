"""The same seed gives the same deaths, and every failpoint has its turn."""

import pytest

from service.failpoints import FAILPOINTS, parse_failpoints
from tests.chaos.orders import ANYWHERE, ELSEWHERE, LONGEST_PASS, Orders

ROLES = ("api", "runner", "runner-2")


def test_a_seed_decides_everything():
    one, twin, other = Orders(7, workers=True), Orders(7, workers=True), Orders(8, workers=True)
    lives = [(role, n) for role in ROLES for n in range(30)]
    assert [one.of(*life) for life in lives] == [twin.of(*life) for life in lives]
    assert [one.of(*life) for life in lives] != [other.of(*life) for life in lives]


def test_every_failpoint_has_its_turn():
    orders = Orders(1, workers=True)
    named = {
        action.name
        for role in ROLES
        for n in range(100)
        for action in parse_failpoints(orders.of(role, n).entries)
    }
    assert named == set(LONGEST_PASS) == set(FAILPOINTS) - ELSEWHERE


def test_processes_die_and_sleep_at_failpoints_and_anywhere():
    orders = [Orders(1).of(role, n) for role in ROLES for n in range(100)]
    assert {order.verb for order in orders} == {"kill", "stop"}
    assert any(order.place == ANYWHERE for order in orders)
    assert all(order.entries == "" for order in orders if order.place == ANYWHERE)


def test_a_role_is_told_what_its_own_process_passes():
    orders = Orders(1, workers=True, without=frozenset({"runner.checkpoint_stored"}))
    assert {name.partition(".")[0] for name in orders.places("api")} == {"api"}
    assert {name.partition(".")[0] for name in orders.places("runner-2")} == {"runner", "webhook"}
    assert "runner.checkpoint_stored" not in orders.places("runner")
    assert not any(orders.of("api", n).worker for n in range(50))
    assert any(orders.of("runner", n).worker for n in range(50))
    assert not any(Orders(1).of("runner", n).worker for n in range(50))


@pytest.mark.parametrize("n", range(5))
def test_rounds_hold_each_place_once(n):
    orders = Orders(3)
    size = len(orders.places("runner"))
    drawn = [orders.of("runner", n * size + position).place for position in range(size)]
    named = [place for place in drawn if place != ANYWHERE]
    assert len(named) == len(set(named))
