"""SageMaker itself: jobs that are started, looked at, followed by their logs; its errors as ours."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fivefold.errors import (
    DataError,
    FivefoldError,
    MissingInputError,
    RetryableError,
    SettingsError,
)
from fivefold.launchers.sagemaker.requests import Request
from fivefold.launchers.sagemaker.trainer import start

log = logging.getLogger("fivefold")
T = TypeVar("T")

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
LINES_AT_ONCE = 1000
CODE = re.compile(r"exit code:? (\d+)", re.IGNORECASE)
OURS = {error.exit_code for error in (FivefoldError, SettingsError, DataError, MissingInputError, RetryableError)}
OURS |= {130, 143}
BUSY = {
    "ThrottlingException",
    "Throttling",
    "ResourceLimitExceeded",
    "CapacityError",
    "InternalFailure",
    "ServiceUnavailable",
}
REFUSED = {
    "AccessDeniedException",
    "AccessDenied",
    "UnrecognizedClientException",
    "InvalidClientTokenId",
    "ExpiredTokenException",
}
TIME_IS_UP = ("MaxRuntimeExceeded", "MaxWaitTimeExceeded", "Interrupted")


@dataclass(frozen=True)
class Look:
    """A job as the service describes it: `status` is InProgress, Completed, Failed, Stopping or Stopped."""

    status: str
    detail: str
    reason: str = ""

    @property
    def over(self) -> bool:
        return self.status in ("Completed", "Failed", "Stopped")

    @property
    def exit_code(self) -> int:
        """0 where it is completed; that of our container where its failure names it; 75 where its time was up."""
        if self.status == "Completed":
            return 0
        found = CODE.search(self.reason)
        if found and int(found[1]) in OURS:
            return int(found[1])
        if self.status == "Stopped":
            return 75 if self.detail in TIME_IS_UP else 143
        return 1


@dataclass
class Service:
    """The clients of one region; whatever they raise is an error of ours."""

    session: Any
    clients: dict[str, Any] = field(default_factory=dict)
    followed: dict[str, dict[str, str | None]] = field(default_factory=dict)
    """Of each job how far the log of each of its containers was read."""
    without_logs: bool = False

    @classmethod
    def of_region(cls, region: str) -> "Service":
        import boto3

        return cls(as_ours("the session", lambda: boto3.session.Session(region_name=region)))

    def client(self, name: str) -> Any:
        if name not in self.clients:
            self.clients[name] = as_ours(name, lambda: self.session.client(name))
        return self.clients[name]

    def start(self, request: Request) -> str:
        """Starts a job by the SDK's ModelTrainer; its name."""
        return as_ours(f"CreateTrainingJob {request['TrainingJobName']}", lambda: start(request, self.session))

    def look(self, job: str) -> Look:
        found = self.call(f"DescribeTrainingJob {job}", "sagemaker", "describe_training_job", TrainingJobName=job)
        return Look(found["TrainingJobStatus"], found.get("SecondaryStatus", ""), found.get("FailureReason", ""))

    def call(self, what: str, client: str, method: str, **given: Any) -> Mapping[str, Any]:
        """What the service answers; `what` names the call in errors."""
        return as_ours(what, lambda: getattr(self.client(client), method)(**given))

    def new_lines(self, job: str) -> list[str]:
        """What a job has said since it was asked last; nothing where its log may not be read, which is told once."""
        if self.without_logs:
            return []
        try:
            return self._new_lines(job)
        except SettingsError as error:
            log.warning("logs are not followed: %s", error)
            self.without_logs = True
        except FivefoldError as error:
            log.debug("%s", error)  # no log yet, or the network is away: the next look may tell more
        return []

    def _new_lines(self, job: str) -> list[str]:
        given = {"logGroupName": LOG_GROUP, "logStreamNamePrefix": f"{job}/"}
        streams = self.call(f"logs of {job}", "logs", "describe_log_streams", **given)["logStreams"]
        read, lines = self.followed.setdefault(job, {}), []
        for name in sorted(stream["logStreamName"] for stream in streams):
            while True:
                more = {"nextToken": read[name]} if read.get(name) else {"startFromHead": True}
                where = {"logGroupName": LOG_GROUP, "logStreamName": name, "limit": LINES_AT_ONCE}
                answer = self.call(f"logs of {job}", "logs", "get_log_events", **where, **more)
                lines += [event["message"] for event in answer["events"]]
                read[name] = answer["nextForwardToken"]
                if len(answer["events"]) < LINES_AT_ONCE:
                    break
        return lines


def as_ours(what: str, call: Callable[[], T]) -> T:
    """What `call` gives; an error of ours for whatever boto3 or the SDK raises, naming `what` was asked for."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        NoRegionError,
        ParamValidationError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    try:
        return call()
    except FivefoldError:
        raise
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise SettingsError(
            f"{what}: no credentials ({error}); set AWS_PROFILE, or log in with aws sso login"
        ) from error
    except NoRegionError as error:
        raise SettingsError(f"{what}: no region; give sagemaker.region=, or set AWS_DEFAULT_REGION") from error
    except ParamValidationError as error:
        raise SettingsError(f"{what}: {' '.join(str(error).split())}") from error
    except ClientError as error:
        raise _refusal(what, error) from error
    except BotoCoreError as error:
        raise RetryableError(
            f"{what}: the service cannot be reached, the same command may succeed later: {error}"
        ) from error


def _refusal(what: str, error: Any) -> FivefoldError:
    told = error.response.get("Error", {})
    code, status = str(told.get("Code", "")), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    words = f"{code} {told.get('Message', '')}".strip()
    if code in REFUSED or status == 403:
        return SettingsError(f"{what}: access refused ({words}); docs/sagemaker.md has the policy that is needed")
    if code in BUSY or status >= 500 or status == 429:
        return RetryableError(f"{what}: busy, or a limit of the account: {words}")
    if code in ("ResourceNotFoundException", "ResourceNotFound"):
        return MissingInputError(f"{what}: {words}")
    return SettingsError(f"{what}: the service refuses it: {words}")
