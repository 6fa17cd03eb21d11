"""Which bundle the service answers from: a small file that every replica reads when it starts."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from recsys_dist.data.output import write_text

_FILE = "serving.json"


@dataclass(frozen=True)
class Pointer:
    """`path` of the bundle; `refused` says why a newer one was not taken."""

    path: str
    refused: str | None = None

    @classmethod
    def read(cls, state: str | Path) -> Self | None:
        file = Path(state) / _FILE
        return cls(**json.loads(file.read_text())) if file.is_file() else None

    def write(self, state: str | Path) -> None:
        write_text(json.dumps(asdict(self)), Path(state) / _FILE)
