"""Ranks share what is left to train on: the same update, whoever makes it."""
import json
import random

import pytest
from test_stages import GRPO, close, metrics, newest, run, weights, work  # noqa: F401

import grpo


def drawn(world, seed, updates=1):
    chance = random.Random(seed)
    costs = {}
    for rank in range(world):
        for question in range(chance.randint(0, 6)):
            costs[chance.randrange(updates), rank, 10 * rank + question] = chance.randint(1, 500)
    return costs


@pytest.mark.parametrize("costs, expected", [
    ({}, []), ({(0, 0, 7): 5}, [0]),
    ({(0, 0, 1): 5, (0, 1, 2): 5}, [0, 1]),  # even: nothing moves
    ({(0, 0, 1): 5, (0, 0, 2): 5}, [0, 1]),  # rank 1 has nothing
    ({(0, 1, 1): 9, (0, 1, 2): 1}, [1, 0]),  # more than the mean, wherever it is
    ({(0, 0, 1): 5, (0, 0, 2): 5, (1, 1, 1): 5, (1, 1, 3): 5}, [0, 1, 1, 0]),  # each update by itself
])
def test_who_trains_what_on_two_ranks(costs, expected):
    assert [grpo.assigned(costs, 2)[item] for item in costs] == expected


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("updates", [1, 3])
def test_loads_end_within_an_item_of_the_mean(world, updates):
    for seed in range(50):
        costs = drawn(world, seed, updates)
        ranks = grpo.assigned(costs, world)
        assert ranks.keys() == costs.keys() and all(0 <= rank < world for rank in ranks.values())
        assert ranks == grpo.assigned(dict(reversed(costs.items())), world)  # in whatever order ranks report
        for number in range(updates):
            of_update = {item: cost for item, cost in costs.items() if item[0] == number}
            loads = [sum(cost for item, cost in of_update.items() if ranks[item] == rank)
                     for rank in range(world)]
            assert max(loads) <= sum(loads) / world + max(of_update.values(), default=0)
        before = grpo.evenness(costs, {item: item[1] for item in costs}, world)
        after = grpo.evenness(costs, ranks, world)
        assert before - 1e-9 <= after <= 1 + 1e-9 or max(costs.values()) * world > sum(costs.values())


def test_an_update_is_the_same_whoever_makes_it(work):  # noqa: F811
    """Three ranks, some without a group that counts:
    questions move, and the weights are those of one rank.
    """
    command = [*GRPO, "--steps", "3", "--lr", "1e-4", "--prompts_per_step", "15", "--ssr", "replay"]
    run(work, *command, "--out", "one")
    run(work, *command, "--out", "three", ranks=3)
    for a, b in zip(metrics(work / "one"), metrics(work / "three"), strict=True):
        close(a, b, 2e-5)
    close(weights(newest(work / "one")), weights(newest(work / "three")), 2e-5)
    rows = [json.loads(line) for line in (work / "three/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"]]
    assert all(row["balance/before"] <= row["balance/after"] + 1e-9 for row in rows)
