"""Who waits is answered together; everybody gets her own answer; an error reaches those it concerns."""

import asyncio

import pytest

from recsys_dist.serve.batcher import Batcher


class Doubler:
    """Answers twice the number once `go` is set; keeps the batches that it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()

    async def __call__(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        await self.go.wait()
        if 13 in numbers:
            raise ValueError("13")
        return [2 * number for number in numbers]


async def asked(numbers: range, size: int, concurrent: int) -> tuple[Doubler, list[int | BaseException]]:
    doubler = Doubler()
    batcher = Batcher(doubler, size, concurrent)
    tasks = [asyncio.create_task(batcher(number)) for number in numbers]
    await asyncio.sleep(0)
    doubler.go.set()
    return doubler, await asyncio.gather(*tasks, return_exceptions=True)


def test_the_first_goes_at_once_the_rest_together_and_only_a_full_batch_beside_another() -> None:
    doubler, answers = asyncio.run(asked(range(10), size=6, concurrent=2))
    assert doubler.batches == [[0], [1, 2, 3, 4, 5, 6], [7, 8, 9]]
    assert answers == [2 * number for number in range(10)]


def test_an_error_reaches_its_batch_alone() -> None:
    _, answers = asyncio.run(asked(range(10, 16), size=2, concurrent=1))
    assert answers[:2] == [20, 22] or answers[0] == 20
    failed = [isinstance(answer, ValueError) for answer in answers]
    assert failed[3] and sum(failed) == 2 and answers[5] == 30


def test_who_went_away_stops_nobody() -> None:
    async def scene() -> list[int]:
        doubler = Doubler()
        batcher = Batcher(doubler, 8, 1)
        tasks = [asyncio.create_task(batcher(number)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        doubler.go.set()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        return [await tasks[n] for n in (0, 1, 3)]

    assert asyncio.run(scene()) == [0, 2, 6]
