"""Reinforcement learning as sequence modelling: a causal Performer balances a pole, as a decision transformer (2106.01345).

A player with known weaknesses gathers episodes of gymnasium's CartPole: it knows how to balance the pole, but in each episode it
plays at random for a share of the moves, from none to all. An episode becomes a sequence of three tokens a move, (return still
to come, state, action), and a causal model learns to predict the actions. To play, it is told the return that is wanted: it has
seen what play leads to which return. The paper cuts its context to 20 moves; here it is the whole episode, 500 moves and 1,500
tokens, and playing on costs the same at every move, because the state of the attention has a fixed size.

    python examples/reinforcement.py --output reinforcement # the table in docs/beyond-proteins.md

Needs: pip install gymnasium.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from performers import PerformerConfig, PerformerModel
from performers.models import PerformerCache
from performers.randomness import derive_seed

try:
    import gymnasium
except ImportError as error:
    sys.exit(f"{error.name} is needed for this example: pip install gymnasium")

MOVES = 500  # CartPole-v1 stops there, and its return is the number of moves that the pole stood
EXPERT = np.array(
    [0.2, 0.4, 2.0, 1.0]
)  # weights of position, speed, angle and turning speed: push right if the sum is positive
SCALE = torch.tensor([0.5, 0.6, 0.08, 0.6])  # the usual size of the same four


class DecisionPerformer(nn.Module):
    """Tokens (return to come, state, action) of every move, in this order; an action is predicted where the state stands."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        config = PerformerConfig(
            vocab_size=2,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            intermediate_size=2 * width,
            attention_kwargs={"kernel": "relu", "num_features": 64},
            bos_token_id=None, eos_token_id=None, pad_token_id=None, mask_token_id=None,
        )  # fmt: skip
        self.body = PerformerModel(config, is_causal=True)  # its own embeddings, of two tokens, are the actions
        self.embed_return, self.embed_state = nn.Linear(1, width), nn.Linear(4, width)
        self.predict = nn.Linear(width, 2)

    def situation(self, returns: Tensor, states: Tensor) -> Tensor:
        """Returns to come (B, T) and states (B, T, 4) as two tokens a move: (B, T, 2, width)."""
        return torch.stack([self.embed_return(returns[..., None] / MOVES), self.embed_state(states / SCALE)], dim=2)

    def forward(self, returns: Tensor, states: Tensor, actions: Tensor, lengths: Tensor) -> Tensor:
        """The loss of the actions (B, T) of episodes of so many moves, padded on the right."""
        taken = self.body.embed_tokens(actions)[:, :, None]
        tokens = torch.cat([self.situation(returns, states), taken], dim=2).flatten(1, 2)
        hidden = self.body(inputs_embeds=tokens).last_hidden_state  # causal: padding comes after all that counts
        logits = self.predict(hidden[:, 1::3])
        real = torch.arange(actions.shape[1]) < lengths[:, None]
        return F.cross_entropy(logits[real], actions[real])


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    draw = np.random.Generator(np.random.Philox(derive_seed(args.seed, "gathering")))
    episodes = [
        play(imperfect(draw.random(), draw), derive_seed(args.seed, "gathering", i)) for i in range(args.episodes)
    ]
    gathered = np.array([len(actions) for _, actions in episodes])
    print(f"{len(episodes):,} episodes gathered, {gathered.sum():,} moves")

    torch.manual_seed(derive_seed(args.seed, "initial weights"))
    model = DecisionPerformer(args.width, args.layers)
    train(model, episodes, args)

    rows: dict[str, np.ndarray] = {}
    tests = [derive_seed(args.seed, "test", i) for i in range(args.tests)]
    rows["random"] = np.array([len(play(imperfect(1.0, draw), seed)[1]) for seed in tests])
    rows["the player who gathered"] = gathered
    for target in args.targets:
        rows[f"Performer, asked for {target}"] = perform(model, target, tests)
    rows["expert"] = np.array([len(play(imperfect(0.0, draw), seed)[1]) for seed in tests])
    table = Table("return", "mean", "median", "5 % to 95 %", "episodes", box=None)
    for name, returns in rows.items():
        low, high = np.quantile(returns, [0.05, 0.95])
        table.add_row(
            name, f"{returns.mean():.0f}", f"{np.median(returns):.0f}", f"{low:.0f} to {high:.0f}", str(len(returns))
        )
    Console(width=120).print("\n", table)
    seconds = round(time.monotonic() - started)
    print(f"\nDone in {seconds} s.")
    content = {"seconds": seconds, "mean return": {name: float(returns.mean()) for name, returns in rows.items()}}
    (args.output / "figures.json").write_text(json.dumps(content, indent=1) + "\n")


def imperfect(share: float, draw: np.random.Generator) -> Callable[[np.ndarray], int]:
    """The expert, but for this share of its moves, which are random."""
    return lambda state: int(draw.integers(2) if draw.random() < share else state @ EXPERT > 0)


def play(policy: Callable[[np.ndarray], int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The states (T, 4) and actions (T,) of one episode."""
    environment = gymnasium.make("CartPole-v1")
    state, _ = environment.reset(seed=seed % 2**31)
    states, actions, over = [], [], False
    while not over:
        states.append(state)
        actions.append(policy(state))
        state, _, fallen, stopped, _ = environment.step(actions[-1])
        over = fallen or stopped
    return np.array(states, dtype=np.float32), np.array(actions)


def train(model: DecisionPerformer, episodes: list[tuple[np.ndarray, np.ndarray]], args: argparse.Namespace) -> None:
    """Batches of whole episodes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.1)
    draw = np.random.Generator(np.random.Philox(derive_seed(args.seed, "batches")))
    model.train()
    recent = []
    for step in range(1, args.steps + 1):
        batch = [episodes[i] for i in draw.integers(len(episodes), size=args.batch_size)]
        lengths = torch.tensor([len(actions) for _, actions in batch])
        states = nn.utils.rnn.pad_sequence([torch.from_numpy(states) for states, _ in batch], batch_first=True)
        actions = nn.utils.rnn.pad_sequence([torch.from_numpy(actions) for _, actions in batch], batch_first=True)
        to_come = (lengths[:, None] - torch.arange(actions.shape[1])).clamp(min=0).float()
        loss = model(to_come, states, actions, lengths)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(loss.item() / np.log(2))
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}/{args.steps}: {np.mean(recent[-50:]):.3f} bits per action", flush=True)


@torch.no_grad()
def perform(model: DecisionPerformer, target: int, seeds: list[int]) -> np.ndarray:
    """The returns of the model, told to reach `target`, in one episode for each seed, all played side by side."""
    model.eval()
    generator = torch.Generator().manual_seed(derive_seed(seeds[0], "perform", target))
    environments = [gymnasium.make("CartPole-v1") for _ in seeds]
    states = np.array([e.reset(seed=seed % 2**31)[0] for e, seed in zip(environments, seeds, strict=True)])
    returns, alive = np.zeros(len(seeds), dtype=int), np.ones(len(seeds), dtype=bool)
    cache = PerformerCache(model.body.config.num_hidden_layers)
    for move in range(MOVES):
        to_come = torch.full((len(seeds), 1), max(target - move, 1.0))
        tokens = model.situation(to_come, torch.from_numpy(states)[:, None])[:, 0]
        hidden = model.body(inputs_embeds=tokens, past_key_values=cache).last_hidden_state
        actions = torch.multinomial(model.predict(hidden[:, -1]).softmax(-1), 1, generator=generator)
        model.body(actions, past_key_values=cache)
        for i in np.flatnonzero(alive):
            states[i], _, fallen, _, _ = environments[i].step(int(actions[i]))
            returns[i], alive[i] = move + 1, not fallen
        if not alive.any():
            break
    return returns


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("reinforcement"), help="folder for figures.json")
    parser.add_argument("--episodes", type=int, default=1000, help="to gather")
    parser.add_argument("--targets", type=int, nargs="+", default=[25, 50, 100, 200, 500], help="returns to ask for")
    parser.add_argument("--tests", type=int, default=100, help="episodes to play for each row of the table")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few episodes and steps: shows that it runs, no more")
    args = parser.parse_args()
    if args.quick:
        args.episodes, args.steps, args.tests, args.layers, args.targets = 100, 40, 10, 1, [25, 500]
    return args


if __name__ == "__main__":
    main()
