"""``--max-bandwidth`` of the commands that copy or read blobs: what it limits, and what it refuses."""

import hashlib
import json
import time

import pytest

from tests.support.sites import KEYS
from tests.support.speed import slow_but

LARGE, LIMIT = 2_000_000, 1 << 20


@pytest.fixture
def arguments(tmp_path):
    """The options of each command, besides its zeo.conf, and what it says of the blobs that it moved or read."""
    return {
        "migrate": (["--from-blob-dir", tmp_path / "blobs"], "copied"),
        "export": (["--to-blob-dir", tmp_path / "out"], "copied"),
        "verify": (["--checksum"], "good"),
        "verify --sample": (["--checksum", "--sample", "1/1"], "good"),
    }


@pytest.mark.parametrize("name", slow_but("migrate", of=["migrate", "export", "verify", "verify --sample"]))
def test_all_bytes_together_take_as_long_as_the_limit_says(s3, bucket_name, site, tool, arguments, name):
    site.grow(large=LARGE)
    if name != "migrate":
        for blob, data in site.revisions.items():
            metadata = {"sha256": hashlib.sha256(data).hexdigest()}
            s3.client.put_object(Bucket=bucket_name, Key=KEYS.key(*blob), Body=data, Metadata=metadata)
    options, word = arguments[name]
    started = time.monotonic()
    out, _ = tool(
        name.split()[0], site.configure(s3, bucket_name), *options, "--json", "--max-bandwidth", f"{LIMIT // 1024}KB"
    )
    took = time.monotonic() - started
    assert json.loads(out)["found"][word]["objects"] == len(site.revisions)
    assert took > LARGE / LIMIT


@pytest.mark.parametrize("command", ["migrate", "export", "verify", "warm"])
@pytest.mark.parametrize("value", ["20", "fast"])
def test_a_limit_that_is_none_is_refused(s3, bucket_name, site, tool, arguments, command, value):
    options, _ = arguments.get(command, ([], ""))
    _, err = tool(command, site.configure(s3, bucket_name), *options, f"--max-bandwidth={value}", status=2)
    assert "--max-bandwidth: must be a whole number with KB, MB or GB" in err
