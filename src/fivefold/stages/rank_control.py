"""Multi-process stages: start the ranks, and broadcast rank 0's decisions."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fivefold.config.loading import hashed_settings
from fivefold.config.schema import Settings
from fivefold.contract.job import StageContext
from fivefold.contract.stage_specs import Stage
from fivefold.distributed import rank_launcher
from fivefold.distributed.ranks import check_batch, hosts_from_env, processes_from_env, rank_from_env
from fivefold.launchers.local import list_gpus
from fivefold.log import log


def launch_ranks(
    stage: Stage, arguments: Sequence[str], environ: Mapping[str, str], settings: Callable[[], Settings]
) -> int | None:
    """Run a stage in subprocesses, or skip it if another host runs it; return the exit code. None: this process must run it."""
    rank, hosts = rank_from_env(environ), hosts_from_env(environ)
    if not stage.writes_model:
        is_first = rank.is_main and hosts.index == 0
        if rank.world_size > 1 or hosts.count > 1:
            log.info("%s runs in one process on the first host%s", stage.name, "" if is_first else ": nothing to do")
        return None if is_first else 0
    processes = _count_processes(stage, environ, settings)
    if hosts.count * processes == 1:
        return None
    check_batch(settings().of_stage(stage.name).train.batch_size, hosts.count * processes)
    where = f" on each of {hosts.count} hosts; this is host {hosts.index}" if hosts.count > 1 else ""
    log.info("%s: %d process%s%s", stage.name, processes, "es" if processes > 1 else "", where)
    return rank_launcher.run_ranks([stage.name, *arguments], hosts, processes, environ)


def process_group(job: StageContext) -> AbstractContextManager[Any]:
    """Return the process group as a context, after all ranks have joined; for a single process do not load torch."""
    if job.rank.world_size == 1:
        return nullcontext()
    from fivefold.distributed.process_group import init_process_group

    return init_process_group(job.rank)


def broadcast_decision(job: StageContext, settings: Settings, run: bool) -> bool:
    """Return rank 0's decision whether the stage runs, on all ranks; check that all ranks have the same settings."""
    if job.rank.world_size == 1:
        return run
    check_batch(settings.of_stage(job.stage.name).train.batch_size, job.rank.world_size)
    from fivefold.distributed.process_group import ProcessGroup

    group = ProcessGroup(job.rank)
    group.check_same(
        json.dumps(hashed_settings(settings, job.stage.sections), sort_keys=True),
        "its settings differ from those of rank 0; give all hosts the same arguments and variables",
    )
    return group.broadcast(run)


def _count_processes(stage: Stage, environ: Mapping[str, str], settings: Callable[[], Settings]) -> int:
    """Return the number of processes on this host: NPROC, else one per GPU if the settings do not fix another device."""
    count = processes_from_env(environ)
    if count is not None and environ.get("NPROC"):
        return count
    count = len(list_gpus(environ)) if count is None else count
    if count <= 1:
        return 1
    return count if settings().of_stage(stage.name).train.device in ("auto", "cuda") else 1
