"""The services behind the routes, made once per app. Starts and stops them in the right order."""

import logging
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from imprint.adapters.files import FileFolder, ProgressFolder
from imprint.models.tokenizer import Tokenizer, load_tokenizer
from imprint.server.adapter_files import AdapterFiles
from imprint.server.answers import Answers
from imprint.server.completions import Completions
from imprint.server.config import Settings
from imprint.server.documents import Documents
from imprint.server.event_feed import EventFeed
from imprint.server.extraction import Extraction
from imprint.server.intake import Intake
from imprint.server.jobs import Jobs
from imprint.server.journal_thread import JournalThread
from imprint.server.limits import Limits
from imprint.server.messages import Observation
from imprint.server.metrics import Metrics
from imprint.server.places import Places
from imprint.server.pool_interface import Pool
from imprint.server.replays import Replays
from imprint.server.retention import Retention
from imprint.server.study_view import StudyView
from imprint.server.tokenization import Tokenization

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What a handler may call."""

    settings: Settings
    metrics: Metrics
    journal: JournalThread
    pool: Pool
    documents: Documents
    extraction: Extraction
    adapter_files: AdapterFiles
    jobs: Jobs
    retention: Retention
    replays: Replays
    intake: Intake
    answers: Answers
    completions: Completions
    tokenization: Tokenization
    tokenizer: Tokenizer
    events: EventFeed
    studies: StudyView

    @classmethod
    async def start(
        cls, settings: Settings, pool: Pool, metrics: Metrics, limits: Limits
    ) -> "Services":
        """Open the journal, start the pool, take up unfinished jobs.

        Raises CheckpointError or JournalError before anything runs.
        """
        tokenizer = load_tokenizer(settings.model, question_template=settings.question_template)
        journal = JournalThread(settings.journal_path)
        store = settings.pool_config().worker.store
        jobs = Jobs(
            journal,
            pool,
            tokenizer,
            metrics,
            ProgressFolder(store),
            model=settings.served_model_name,
            max_active=settings.max_active_adaptations,
            max_active_bytes=settings.max_active_bytes,
            share=limits.share,
            drain_timeout_s=settings.drain_timeout_s,
        )
        documents = Documents(settings, journal, tokenizer, limits)
        retention = Retention(
            journal, pool, jobs, documents, metrics, FileFolder(store), history_s=settings.history_s
        )
        intake = Intake(settings, jobs, documents, tokenizer, metrics, limits)
        pool.on_observation = _Observer(metrics)
        await pool.start()
        await jobs.start()
        await retention.start()
        return cls(
            settings=settings,
            metrics=metrics,
            journal=journal,
            pool=pool,
            documents=documents,
            extraction=Extraction(settings),
            adapter_files=AdapterFiles(store, max_tokens=settings.max_document_tokens),
            jobs=jobs,
            retention=retention,
            replays=Replays(journal),
            intake=intake,
            answers=Answers(settings, jobs, retention, intake, pool, tokenizer, metrics),
            completions=Completions(settings, retention, intake, pool, tokenizer, metrics),
            tokenization=Tokenization(settings, intake, tokenizer),
            tokenizer=tokenizer,
            events=EventFeed(
                journal,
                jobs,
                Places("event streams", settings.max_event_streams, limits.share, metrics),
            ),
            studies=StudyView(journal, tokenizer),
        )

    async def close(self) -> None:
        """Leave unfinished jobs to the next start, end the workers, close the journal."""
        await self.jobs.close()
        await self.retention.close()
        await self.pool.close(grace_s=self.jobs.drain_left_s)
        await self.journal.close()


async def services_of(request: Request) -> Services:
    """The services of the app that received the request."""
    services: Services = request.app.state.services
    return services


FromApp = Annotated[Services, Depends(services_of)]


class _Observer:
    """Counts what workers measure; a name that this build does not know is logged once."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._unknown: set[str] = set()

    def __call__(self, observation: Observation) -> None:
        if observation.name in self._metrics.declared:
            self._metrics.observe(observation)
        elif observation.name not in self._unknown:
            self._unknown.add(observation.name)
            logger.warning("a worker measures %s, which is not declared", observation.name)
