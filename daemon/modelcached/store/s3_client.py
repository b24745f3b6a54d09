"""The connection to one bucket: botocore's credentials, endpoint, addressing and retries as everybody configures them, and nothing
of it imported before the first request. Every request goes through `call`, so every error has a name and the store's clock is known.
"""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import AsyncExitStack
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from modelcached import __version__
from modelcached.errors import InvalidRequest, StoreProblem
from modelcached.tasks import Pool

from .s3_errors import Place, StoreNoCredentials, translated

CONNECT_SECONDS = 10.0
SMALL_REQUESTS = 16  # connections beside those that carry parts and ranges
CLOCK_SECONDS = 60.0  # how long the time an answer had is counted on from


class Client:
    """`_made` is the botocore client once there is one; `_clock` the store's time and ours when it was said."""

    def __init__(self, bucket: str, url: str, pool: Pool, connections: int, stall_seconds: float) -> None:
        self.bucket = bucket
        self.place = Place(url)
        self._pool = pool
        self._connections = connections
        self._stall_seconds = stall_seconds
        self._made: Any = None
        self._making = asyncio.Lock()
        self._closing = AsyncExitStack()
        self._clock: tuple[float, float] | None = None
        self.requests = 0

    async def call(self, operation: str, key: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One request; `key` is what an error names. The answer is botocore's."""
        client = self._made or await self._connect()
        self.requests += 1
        try:
            with translated(self.place, key):
                answer: dict[str, Any] = await getattr(client, operation)(Bucket=self.bucket, **parameters)
        except StoreNoCredentials:
            await self._forget(client)
            raise
        self._clock = (date_of(answer), time.monotonic())
        return answer

    async def now(self) -> float:
        if self._clock is None or time.monotonic() - self._clock[1] > CLOCK_SECONDS:
            await self.call("list_objects_v2", MaxKeys=1)
        assert self._clock is not None
        return self._clock[0] + time.monotonic() - self._clock[1]

    async def close(self) -> None:
        await self._closing.aclose()

    async def _forget(self, client: Any) -> None:
        """botocore looks for credentials once in a client's life: where there were none yet, the next request looks again."""
        if client is self._made:
            self._made, closing, self._closing = None, self._closing, AsyncExitStack()
            await closing.aclose()

    async def _connect(self) -> Any:
        async with self._making:
            if self._made is None:
                await self._pool.run(_import)
                try:
                    with translated(self.place):
                        self._made = await self._make()
                except ValueError:  # its words may hold an URL
                    raise StoreProblem(
                        f"{self.place.url}: the S3 client can't be set up", "look at AWS_ENDPOINT_URL_S3 and ~/.aws/config"
                    ) from None
            return self._made

    async def _make(self) -> Any:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session

        config = AioConfig(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=self._stall_seconds,
            max_pool_connections=self._connections + SMALL_REQUESTS,
            user_agent_extra=f"modelcached/{__version__}",
            # Each request that carries bytes carries their checksum as a signed header of its own: hashing them once more for the
            # signature, on the event loop, would only cost time. What comes back is checked against its SHA-256.
            s3={"payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        session = get_session()
        session.register_component("data_loader", _loader())
        client = await self._closing.enter_async_context(session.create_client("s3", config=config))
        endpoint = urlsplit(client.meta.endpoint_url)
        if "@" in endpoint.netloc:
            raise InvalidRequest(
                "the S3 endpoint's URL has credentials in it", "name them as the AWS tools want them; look at AWS_ENDPOINT_URL_S3"
            )
        self.place.endpoint = f"{endpoint.scheme}://{endpoint.netloc}"
        client.meta.events.register_last("before-call.s3", _expect_nothing)
        return client


def date_of(answer: dict[str, Any]) -> float:
    """The time of day by the clock of whoever answered."""
    try:
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return time.time()


@functools.cache
def _loader() -> Any:
    """botocore's descriptions of S3, read once for all stores: a tenth of the time and a fifth of the memory from the second one on."""
    from botocore.loaders import create_loader

    return create_loader()


def _import() -> None:
    """Half a second, for which the event loop need not wait."""
    import aiobotocore.config
    import aiobotocore.session  # noqa: F401

    for description in ("service-2", "endpoint-rule-set-1"):
        _loader().load_service_model("s3", description)
    for data in ("endpoints", "partitions"):
        _loader().load_data(data)


def _expect_nothing(params: dict[str, Any], **_: Any) -> None:
    """Without `Expect: 100-continue`, which not every server answers: aiohttp would wait for it for ever."""
    params["headers"].pop("Expect", None)
