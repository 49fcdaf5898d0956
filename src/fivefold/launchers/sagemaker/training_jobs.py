"""Client of SageMaker through boto3: jobs and their status, logs and outputs. boto3's errors become FivefoldErrors."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fivefold.contract.s3.urls import parse
from fivefold.errors import FivefoldError, MissingInputError, RetryableError, SettingsError
from fivefold.launchers.sagemaker.requests import HIDDEN, Request, find_secrets
from fivefold.log import log

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
EXIT_CODE = re.compile(r"exit code:? (1|64|65|66|75|130|143)\b", re.IGNORECASE)
"""An exit code of Fivefold in the failure reason of a job."""
OUT_OF_TIME = ("MaxRuntimeExceeded", "MaxWaitTimeExceeded", "Interrupted")
THROTTLED = re.compile("Throttling|ResourceLimitExceeded|CapacityError|InternalFailure|ServiceUnavailable")
ACCESS_CODES = re.compile("AccessDenied|UnrecognizedClient|InvalidClientTokenId|ExpiredToken")


@dataclass(frozen=True)
class JobStatus:
    """A job as the service describes it: `status` is InProgress, Completed, Failed, Stopping or Stopped."""

    status: str
    detail: str
    reason: str = ""

    @property
    def exit_code(self) -> int | None:
        """Return None while the job runs, an exit code of Fivefold in the failure reason, 75 after a time limit, 143 if stopped."""
        if self.status in ("InProgress", "Stopping", "Completed"):
            return 0 if self.status == "Completed" else None
        if match := EXIT_CODE.search(self.reason):
            return int(match[1])
        if self.status == "Stopped":
            return RetryableError.exit_code if self.detail in OUT_OF_TIME else 143
        return 1


@contextmanager
def translate_errors() -> Iterator[None]:
    """Translate boto3's exceptions in the block, or in the decorated function, to FivefoldErrors."""
    from botocore import exceptions

    from fivefold.contract.s3.client import NO_CREDENTIALS

    try:
        yield
    except NO_CREDENTIALS as error:
        raise SettingsError(f"no credentials ({error}); set AWS_PROFILE, or log in with aws sso login") from error
    except exceptions.ClientError as error:
        code, status = error.response["Error"].get("Code", ""), error.response["ResponseMetadata"]["HTTPStatusCode"]
        if ACCESS_CODES.match(code) or status == 403:
            raise SettingsError(f"{error}; docs/sagemaker.md has the required policy") from error
        if THROTTLED.match(code) or status >= 500 or status == 429:
            raise RetryableError(f"SageMaker is busy, or the account is at a limit: {error}") from error
        raise (MissingInputError if code.startswith("ResourceNotFound") else SettingsError)(str(error)) from error
    except exceptions.BotoCoreError as error:
        raise RetryableError(f"SageMaker is unreachable, the same command may succeed later: {error}") from error


def delete_outputs(output: str, job: str) -> None:
    """Delete the objects of `job` (empty: none) below the URL `output`. Raise a SettingsError if there are other objects."""
    from fivefold.contract.s3.client import S3Client

    store, url = S3Client(), parse(output, "sagemaker.output")
    urls = [entry.url for entry in store.list_objects(url)]
    foreign = [place for place in urls if not job or not place.relative_to(url).startswith(f"{job}/")]
    if foreign:
        raise SettingsError(
            f"{foreign[0]} exists already, from a job that is not in this folder of runs: use another run=, or "
            f"remove {output}"
        )
    store.delete(urls)


@dataclass
class Client:
    """The service in one region. boto3 itself retries if the service is unavailable or throttles."""

    sagemaker: Any
    logs: Any
    log_tokens: dict[str, str] = field(default_factory=dict)
    """The position in each log stream."""
    reads_logs: bool = True

    @classmethod
    @translate_errors()
    def for_region(cls, region: str) -> "Client":
        """Return the client of `region` (empty: the user's default). Raise a SettingsError if there is no region."""
        import boto3
        from botocore.config import Config

        region = region or os.environ.get("AWS_REGION") or boto3.session.Session().region_name or ""
        if not re.fullmatch(r"[a-z]{2,3}(-[a-z]+)+-\d", region):
            raise SettingsError(f"{region!r} is not a region: set sagemaker.region=eu-central-1, or AWS_DEFAULT_REGION")
        logging.getLogger("botocore").setLevel(logging.WARNING)  # at INFO it logs the source of credentials
        config = Config(retries={"mode": "adaptive", "total_max_attempts": 5})
        return cls(*(boto3.client(name, region_name=region, config=config) for name in ("sagemaker", "logs")))

    def start(self, request: Request) -> None:
        """Start the job of `request`. The service's errors repeat rejected values, so hide values that may be secret."""
        try:
            with translate_errors():
                self.sagemaker.create_training_job(**request)
        except FivefoldError as error:
            text = str(error)
            for value in sorted(filter(None, find_secrets(request).values()), key=len, reverse=True):
                text = text.replace(value, HIDDEN)
            raise (error if text == str(error) else type(error)(text)) from None

    @translate_errors()
    def describe(self, job: str) -> JobStatus:
        answer = self.sagemaker.describe_training_job(TrainingJobName=job)
        return JobStatus(
            answer["TrainingJobStatus"], answer.get("SecondaryStatus", ""), answer.get("FailureReason", "")
        )

    def read_new_lines(self, job: str) -> list[str]:
        """Return the lines that a job has logged since the last call. If reading is not allowed, warn once and return none."""
        lines: list[str] = []
        if not self.reads_logs:
            return lines
        try:
            with translate_errors():
                listing = self.logs.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{job}/")
                for name in sorted(stream["logStreamName"] for stream in listing["logStreams"]):
                    lines += self._read_stream(name)
        except SettingsError as error:
            log.warning("cannot follow logs: %s", error)
            self.reads_logs = False
        except FivefoldError as error:
            log.debug("%s", error)  # no log yet, or no network: the next call may succeed
        return lines

    def _read_stream(self, name: str) -> Iterator[str]:
        """Yield the new lines of a log stream. It has no more lines if the token stays the same."""
        token = ""
        while token != self.log_tokens.get(name):
            token = self.log_tokens.get(name, "")
            position = {"nextToken": token} if token else {"startFromHead": True}
            answer = self.logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=name, **position)
            yield from (event["message"] for event in answer["events"])
            self.log_tokens[name] = answer["nextForwardToken"]
