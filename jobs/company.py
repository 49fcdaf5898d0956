"""A stage that several processes run: who starts them, what the first decides for all, and what the others do."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

from fivefold.contract.job import Job
from fivefold.contract.stages import Stage
from fivefold.distributed import launch
from fivefold.distributed.place import check_batch, hosts_of, is_member, place_of, processes_of
from fivefold.launchers.local import gpus
from fivefold.recipe import Settings
from fivefold.settings import key_settings

log = logging.getLogger("fivefold")


def run_by_others(
    stage: Stage, arguments: Sequence[str], environ: Mapping[str, str], settings: Callable[[], Settings]
) -> int | None:
    """The exit code of a stage that processes of its own, or another host, run; None where this process is to run it."""
    if is_member(environ):
        first, several = place_of(environ).leads, place_of(environ).world > 1
    else:
        hosts = hosts_of(environ)
        first, several = hosts.index == 0, hosts.count > 1
    if not stage.writes_model:
        if several:
            log.info("%s runs in one process of the first host%s", stage.name, "" if first else ": nothing to do here")
        return None if first else 0
    if is_member(environ):
        return None
    processes = _processes(stage, environ, settings)
    if hosts.count * processes == 1:
        return None
    check_batch(_trained(stage, settings()).train.batch_size, hosts.count * processes)
    where = f" on each of {hosts.count} hosts, of which this is number {hosts.index}" if hosts.count > 1 else ""
    log.info("%s: %d process%s%s", stage.name, processes, "es" if processes > 1 else "", where)
    return launch.start([stage.name, *arguments], hosts, processes, environ)


def joined(job: Job) -> AbstractContextManager[Any]:
    """The processes that train together, once all are there; alone, nothing is waited for, and torch not loaded."""
    if job.place.world == 1:
        return nullcontext()
    from fivefold.distributed.replicas import joined

    return joined(job.place)


def decided(job: Job, settings: Settings, run: bool) -> bool:
    """Whether the stage is to run, as the first process decides for all of one group of settings."""
    if job.place.world == 1:
        return run
    check_batch(_trained(job.stage, settings).train.batch_size, job.place.world)
    from fivefold.distributed.replicas import Replicas

    company = Replicas(job.place)
    told = json.dumps(key_settings(settings, job.stage.sections), sort_keys=True)
    company.check_same(
        told, "its settings are others than the first one's; give all hosts the same arguments and variables"
    )
    return company.shared(run)


def follow(job: Job, settings: Settings) -> None:
    """What a process does that is not the first: it trains with it, and leaves all files to it."""
    job.probe()
    if decided(job, settings, False):
        import_module(job.stage.module, __package__).main(job, settings)


def _processes(stage: Stage, environ: Mapping[str, str], settings: Callable[[], Settings]) -> int:
    """The processes of this host: as many as NPROC says, else one a GPU where the settings leave the device open."""
    named = processes_of(environ)
    if named == 1 or (named and environ.get("NPROC")):
        return named
    named = len(gpus(environ)) if named is None else named
    if named <= 1:
        return 1
    return named if _trained(stage, settings()).train.device in ("auto", "cuda") else 1


def _trained(stage: Stage, settings: Settings) -> Settings:
    return settings.student() if stage.name == "distill" else settings
