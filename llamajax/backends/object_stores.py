"""Where an object store is, and how long to wait for it: what its URL and the environment say.

TensorStore has the clients. It reads Google's credentials and the chain of AWS by itself, but not
the endpoint and the region of AWS.
"""

import os
from typing import Any

SCHEMES = ("gs", "s3")
# TensorStore's own default retries for a quarter of an hour, and the next save would wait for that.
RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "8s"}
# One attempt: curl waits 5 minutes for a connection, and TensorStore 2 on one that carries nothing.
_PATIENCE = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "30",
}
_FIXES = {
    "gs": "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of temporary keys also AWS_SESSION_TOKEN; "
    "or AWS_PROFILE; AWS_REGION; of another service than Amazon's also AWS_ENDPOINT_URL",
}


def kvstore_spec(url: str) -> dict[str, Any]:
    """Return TensorStore's spec of a key, or of a prefix of keys, at gs:// or s3://."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": key, "gcs_request_retries": RETRIES}
    spec = {"driver": "s3", "bucket": bucket, "path": key, "s3_request_retries": RETRIES}
    endpoint = _first_set("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = _first_set("AWS_REGION", "AWS_DEFAULT_REGION")
    if endpoint:
        # No object has two writers, and OpenStack's Swift refuses to write on a condition.
        spec |= {"endpoint": endpoint.rstrip("/"), "use_conditional_write": False}
    if endpoint or region:  # else TensorStore asks Amazon, once and without a retry
        spec["aws_region"] = region or "us-east-1"
    if _first_set("AWS_ACCESS_KEY_ID"):
        # The first of the default chain, which also logs an error for each file that is not there.
        spec["aws_credentials"] = {"type": "environment"}
    else:  # TensorStore 0.1.86 does not read AWS_PROFILE, and without a name it finds no profile
        profile = _first_set("AWS_PROFILE") or "default"
        spec["aws_credentials"] = {"type": "default", "profile": profile}
    return spec


def how_to_fix(url: str) -> str:
    """Return what a user can check when the store of this URL refuses."""
    scheme = url.partition("://")[0]
    return f"check the bucket's name, the network, and the credentials ({_FIXES[scheme]})"


def _first_set(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
