"""What a store that fails means to the user: errors of ours, each with the URL and the mend."""

from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

from fivefold.contract.files import disk_is_full
from fivefold.contract.s3.urls import Url
from fivefold.errors import FivefoldError, MissingInputError, RetryableError, SettingsError

REFUSED = {
    "AccessDenied", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch",
    "AccountProblem", "Forbidden", "403",
}  # fmt: skip
NO_CREDENTIALS = (
    CredentialRetrievalError, NoCredentialsError, PartialCredentialsError, ProfileNotFound, SSOError, TokenRetrievalError,
)  # fmt: skip
ABSENT = {"NoSuchBucket", "NoSuchKey", "NotFound", "404"}
TRANSIENT = {
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestTimeTooSkewed",
    "PreconditionFailed",
}


def as_ours(error: Exception, url: Url) -> FivefoldError:
    """The error of ours that a failed call for `url` amounts to."""
    if isinstance(error, FivefoldError):
        return error
    if disk_is_full(error):
        return RetryableError(f"no space left for {url}: free some, then run the same command again")
    if isinstance(error, ParamValidationError):
        return SettingsError(f"{url} cannot be a place in a store: {' '.join(str(error).split())}")
    if isinstance(error, NO_CREDENTIALS):
        return SettingsError(
            f"{url}: no credentials for it ({error}); set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or give this machine or pod a role"
        )
    if isinstance(error, ClientError):
        return _refusal(error, url)
    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, ClientError):
        return _refusal(error.__context__, url)
    if isinstance(error, S3DownloadFailedError):
        return RetryableError(f"{url} changed while it was read, the same command may succeed later")
    if isinstance(error, BotoCoreError | RetriesExceededError | S3UploadFailedError | OSError):
        return RetryableError(
            f"{url}: the store cannot be reached or broke off, the same command may succeed later: {error}"
        )
    if isinstance(error, ValueError):  # an endpoint that is no URL
        return SettingsError(f"{url}: {error}; check AWS_ENDPOINT_URL_S3")
    return FivefoldError(f"{url}: unexpected {type(error).__name__}: {error}")


def _refusal(error: ClientError, url: Url) -> FivefoldError:
    told = error.response.get("Error", {})
    code, status = str(told.get("Code", "")), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    words = f"{code} {told.get('Message', '')}".strip()
    if code in REFUSED or status == 403:
        return SettingsError(
            f"{url}: access refused ({words}); the credentials in use need s3:ListBucket, s3:GetObject, s3:PutObject, "
            "s3:DeleteObject and s3:AbortMultipartUpload there"
        )
    if code == "NoSuchBucket":
        return MissingInputError(f"{url}: there is no bucket {url.bucket!r}")
    if code in ABSENT:
        return RetryableError(f"{url} went away while it was read, as when its stage runs again: try once more")
    if code in TRANSIENT or status >= 500 or status == 429:
        return RetryableError(f"{url}: the store is busy or broken, the same command may succeed later: {words}")
    return SettingsError(f"{url}: the store refuses it: {words}")
