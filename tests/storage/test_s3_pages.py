"""Tests of segray.storage.s3_pages on a stub: what it parses itself, and stores that list in their own way."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

import boto3
import pytest
from botocore.config import Config

from segray import storage
from segray.errors import StorageError
from segray.storage import s3_pages
from tests.storage.stub_server import Answer, Request, StubServer

NAMES = [
    "a",
    "a-b",
    "a/b",
    "a//b",
    "/lead",
    "sub/",
    "sub/c",
    "a&b=<c>.png",
    "a+b %20.png",
    "späť.png",
    "\U0001f600.png",
]
KEYS = sorted(f"in/{name}" for name in [*NAMES, "\ufffd.png", *(f"n/{number:03}" for number in range(40))])
FILES = [f"s3://bucket/{key}" for key in KEYS if not key.endswith("/")]
MODIFIED = "<LastModified>2026-01-02T03:04:05.678Z</LastModified>"
ENTRY = "<Contents><Key>{key}</Key>" + MODIFIED + "<ETag>&quot;{etag}&quot;</ETag><Size>{size}</Size></Contents>"
Entry = Callable[[str], str]


def write_entry(key: str) -> str:
    return ENTRY.format(key=escape(key), etag=f"{len(key):032x}", size=len(key))


def answer_listing(
    keys: Sequence[str], request: Request, entry: Entry = write_entry, knows_start: bool = True
) -> Answer:
    """Answer as S3 does, with a page of ``max-keys``."""
    query = request.query
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = unquote(query.get("continuation-token", "")) or (query.get("start-after", "") if knows_start else "")
    encode = quote if query.get("encoding-type") == "url" else escape
    found: dict[str, str] = {}
    for key in keys:
        if key.startswith(prefix):
            name, slash, _ = key[len(prefix) :].partition(delimiter or "\0")
            item = prefix + name + slash
            if item > after and not (slash and after.startswith(item)):
                text = f"<CommonPrefixes><Prefix>{encode(item)}</Prefix></CommonPrefixes>"
                found[item] = text if slash else entry(key)
    page = list(found)[: int(query.get("max-keys", 1000))]
    more = f"<NextContinuationToken>{quote(page[-1])}</NextContinuationToken>" if len(page) < len(found) else ""
    body = "".join([text for text in (found[item] for item in page) if text.startswith("<Con")])
    body += "".join([text for text in (found[item] for item in page) if not text.startswith("<Con")])
    head = f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}<Prefix>{encode(prefix)}</Prefix>"
    if encode is quote:
        head += "<EncodingType>url</EncodingType>"
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return Answer(
        200, f'<?xml version="1.0"?><ListBucketResult xmlns="{space}">{head}{body}</ListBucketResult>'.encode()
    )


def write_quoted(key: str) -> str:
    return ENTRY.format(key=quote(key), etag="0" * 32, size=1)


@pytest.mark.parametrize("page_size", [1, 2, 7, 1000])
def test_odd_keys_are_listed_in_the_order_of_their_bytes(
    s3_stub: StubServer, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_pages, "PAGE_SIZE", page_size)
    s3_stub.answer = lambda request: answer_listing(KEYS, request, write_quoted)
    listed = [file.uri for file in storage.list_files("s3://bucket/in")]
    assert listed == FILES == sorted(FILES, key=lambda uri: uri.encode())
    assert [file.uri for file in storage.list_files("s3://bucket/in", start="n/01")] == [
        uri for uri in FILES if uri.startswith("s3://bucket/in/n/01")
    ]


def strip_etag(key: str) -> str:
    return write_entry(key).replace(f"<ETag>&quot;{len(key):032x}&quot;</ETag>", "")


def reorder(key: str) -> str:
    return write_entry(key).replace(MODIFIED, "").replace("</Contents>", f"{MODIFIED}</Contents>")


def indent(key: str) -> str:
    return write_entry(key).replace("><", ">\n  <")


@pytest.mark.parametrize("entry", [write_entry, write_quoted, strip_etag, reorder, indent])
def test_pages_are_parsed_as_boto3_does(s3_stub: StubServer, entry: Entry) -> None:
    s3_stub.answer = lambda request: answer_listing(KEYS, request, entry)
    client = boto3.client("s3", endpoint_url=s3_stub.endpoint, config=Config(s3={"addressing_style": "path"}))

    def list_keys(**options: Any) -> Iterator[tuple[Any, ...]]:
        pages = s3_pages.S3Pages("s3://bucket/", "in/", lambda **more: client.list_objects_v2(Bucket="bucket", **more))
        return ((file.uri, file.size_bytes, file.etag, file.modified_s) for file in pages.iterate_files(**options))

    for options in ({}, {"delimiter": "/"}):
        expected = list(list_keys(**options))
        s3_pages.parse_entries_fast(client)
        assert list(list_keys(**options)) == expected
        client.meta.events.unregister("before-parse.*.ListObjectsV2", s3_pages.take_entries)


def test_a_usual_page_is_not_parsed_by_boto3() -> None:
    response = {"body": answer_listing(KEYS, Request("GET", "/", {}, {}, b"")).body}
    taken: dict[str, Any] = {}
    s3_pages.take_entries(response, taken)
    assert len(taken["RawContents"]) == len(KEYS)
    assert b"Contents" not in response["body"]


def test_a_store_that_ignores_where_to_begin_is_listed_page_by_page(
    s3_stub: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_pages, "PAGE_SIZE", 5)
    s3_stub.answer = lambda request: answer_listing(KEYS, request, write_quoted, knows_start=False)
    assert [file.uri for file in storage.list_files("s3://bucket/in")] == FILES


@pytest.mark.parametrize("keys", [KEYS[::-1], KEYS[10:] + KEYS[:10], KEYS[:20] + KEYS[30:] + KEYS[20:30]])
def test_an_unsorted_store_is_refused(
    s3_stub: StubServer, keys: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_pages, "PAGE_SIZE", 10)

    def answer(request: Request) -> Answer:  # In pages by position.
        begin = int(request.query.get("continuation-token", 0))
        more = f"<NextContinuationToken>{begin + 10}</NextContinuationToken><IsTruncated>true</IsTruncated>"
        body = more * (begin + 10 < len(keys)) + "".join(map(write_entry, keys[begin : begin + 10]))
        return Answer(200, f"<ListBucketResult>{body}</ListBucketResult>".encode())

    s3_stub.answer = answer
    with pytest.raises(StorageError, match="expected sorted keys; use a manifest"):
        list(storage.list_files("s3://bucket/in"))


def test_an_empty_page_is_not_the_end(s3_stub: StubServer) -> None:
    def answer(request: Request) -> Answer:
        if "continuation-token" not in request.query and "start-after" not in request.query:
            more = "<IsTruncated>true</IsTruncated><NextContinuationToken>in/</NextContinuationToken>"
            return Answer(200, f"<ListBucketResult>{more}</ListBucketResult>".encode())
        return answer_listing(KEYS, request, write_quoted)

    s3_stub.answer = answer
    assert [file.uri for file in storage.list_files("s3://bucket/in")] == FILES
