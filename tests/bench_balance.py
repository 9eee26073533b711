"""How evenly ranks are loaded, as sampled and as trained: python tests/bench_balance.py

Simulated: 16 questions a rank with 8 rollouts each, of which a share has an advantage; response lengths are
drawn from a log-normal distribution around 500 tokens, prompts have 300. Mean load over largest, mean of 20
steps: what is left of the GPUs while they wait for the last one.
"""
import random
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo  # noqa: E402

QUESTIONS, GROUP = 16, 8


def drawn_costs(world, effective, chance):
    costs = {}
    for rank in range(world):
        for question in range(QUESTIONS):
            if chance.random() < effective:
                lengths = [min(4096, chance.lognormvariate(6.2, 0.6)) for _ in range(GROUP)]
                costs[0, rank, rank * QUESTIONS + question] = 300 + int(sum(lengths))
    return costs


def main():
    print("| ranks | groups with an advantage | before | after | questions that move |\n"
          "|---|---|---|---|---|")
    for world in (8, 64, 512):
        for effective in (1.0, 0.5, 0.2):
            rows = []
            for step in range(20):
                costs = drawn_costs(world, effective, random.Random(f"{world}/{step}"))
                ranks = grpo.assigned(costs, world)
                stay = {item: item[1] for item in costs}
                moved = mean(ranks[item] != item[1] for item in costs)
                rows.append((grpo.evenness(costs, stay, world), grpo.evenness(costs, ranks, world), moved))
            before, after, moved = map(mean, zip(*rows))
            print(f"| {world} | {100 * effective:.0f} % | {before:.2f} | {after:.2f} | {100 * moved:.0f} % |")


if __name__ == "__main__":
    main()
