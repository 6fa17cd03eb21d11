"""What tables start with: a function of (seed, table, block of rows), wherever their rows live."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from recsys_dist.config import rng_for
from recsys_dist.train.pieces import pieces

BLOCK_ROWS = 65_536  # rows initialised at once: bounds memory; part of what a seed means, do not change


@torch.no_grad()
def fill(weights: Mapping[str, Any], tables: Mapping[str, Any], seed: int) -> None:
    """Give the rows that live with this worker, of each table by its weight's name, what they start with."""
    for name, weight in weights.items():
        config = tables[name]
        for tensor, (row, column), (height, width) in pieces(weight, config):
            for start, block in blocks(config, seed, name, row, row + height):
                first, last = max(row, start), min(row + height, start + len(block))
                values = block[first - start : last - start, column : column + width]
                tensor[first - row : last - row].copy_(values)


def blocks(config: Any, seed: int, name: str, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, values) of the whole blocks that cover rows `first:last` of a table."""
    for start in range(first - first % BLOCK_ROWS, last, BLOCK_ROWS):
        block = torch.empty(min(BLOCK_ROWS, config.num_embeddings - start), config.embedding_dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng_for(seed, "table", name, start).integers(2**63)))
            config.init_fn(block)
        yield start, block
