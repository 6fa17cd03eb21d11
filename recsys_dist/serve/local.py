"""The service in one process: what `http.create_app` carries, with Ray Serve or without."""

import asyncio

from recsys_dist.bundle import Bundle
from recsys_dist.serve.api import (
    Answer,
    EventsAnswer,
    EventsRequest,
    RankRequest,
    RecallRequest,
    RecommendRequest,
    Version,
)
from recsys_dist.serve.events import canonical
from recsys_dist.serve.recommend import BUDGET_MS, Recommender, Stages
from recsys_dist.serve.state import UserState


class LocalService:
    """Answers requests one at a time; `stages` are in this process unless given."""

    def __init__(
        self, bundle: Bundle, state: UserState, stages: Stages | None = None, budget_ms: float = BUDGET_MS
    ) -> None:
        self.recommender = Recommender(bundle, state, stages)
        self.state = state
        self.budget_ms = budget_ms

    async def recommend(self, request: RecommendRequest) -> Answer:
        self.recommender.check(request)
        [answer] = await self.recommender.recommend([request], self.budget_ms)
        return answer

    async def recall(self, request: RecallRequest) -> Answer:
        self.recommender.check(request)
        [answer] = await self.recommender.recall([request], self.budget_ms)
        return answer

    async def rank(self, request: RankRequest) -> Answer:
        self.recommender.check(request)
        [answer] = await self.recommender.rank([request], self.budget_ms)
        return answer

    async def record(self, request: EventsRequest) -> EventsAnswer:
        events = canonical(request.events, self.recommender.spec)
        await asyncio.to_thread(self.state.append, events)
        named = {name for event in request.events for name in event.context}
        return EventsAnswer(accepted=len(events), ignored=sorted(named - set(self.recommender.spec.context)))

    def version(self) -> Version:
        facts = self.recommender.bundle.manifest
        names = {task: model["name"] for task, model in facts.models.items()}
        return Version(bundle=facts.version, models=names, created=facts.created, refused=None)
