"""Requests that come while others are on their way are answered together.

(`serve.batch` closes a batch after a fixed wait, also while earlier ones are still being answered: under load
its batches stay small. 60 requests a second kept two batches of one at work for good, where 400 fit.)
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Batcher(Generic[Q, A]):
    """At most `concurrent` batches at once, of at most `size` requests; an idle one answers at once.

    While one is being answered, another joins it only when it is full: a batch costs the same however few
    requests it carries, and small ones side by side would keep the machine at work with nothing but that.
    """

    def __init__(
        self, answer: Callable[[list[Q]], Coroutine[Any, Any, list[A]]], size: int, concurrent: int
    ) -> None:
        self._answer, self._size, self._concurrent = answer, size, concurrent
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._running: set[asyncio.Task[list[A]]] = set()

    async def __call__(self, request: Q) -> A:
        """The request's own answer; what the batch raises, each of its requests raises."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._start()
        return await future

    def _start(self) -> None:
        while (
            len(self._waiting) >= (self._size if self._running else 1)
            and len(self._running) < self._concurrent
        ):
            count = min(self._size, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(count)]
            task = asyncio.create_task(self._answer([request for request, _ in batch]))  # noqa: RUF006, held below
            self._running.add(task)
            task.add_done_callback(partial(self._deliver, [future for _, future in batch]))

    def _deliver(self, futures: list[asyncio.Future[A]], task: asyncio.Task[list[A]]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        for number, future in enumerate(futures):
            if future.done():
                continue  # its client has gone
            if task.cancelled():
                future.cancel()
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(task.result()[number])
        self._start()
