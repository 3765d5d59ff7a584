"""A stub of Google Cloud Storage's XML API, as far as obstore uses it: no emulator that can be installed has it."""

from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from tests.storage.stub_server import Answer, Request

DATE = "Fri, 02 Jan 2026 03:04:05 GMT"


@dataclass
class GoogleBucket:
    """A bucket: content and generation of each object by key."""

    name: str
    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    page_size: int = 1000
    _generation: int = 0

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""
        self._generation += 1
        self.objects[key] = (content, self._generation)

    def answer(self, request: Request) -> Answer:
        """Answer a request."""
        bucket, _, key = request.path[1:].partition("/")
        if bucket != self.name:
            return refuse(404, "NoSuchBucket")
        if request.method == "PUT":
            return self._put(key, request)
        if request.method == "GET" and not key:
            return self._list(request)
        if key not in self.objects:
            return refuse(404, "NoSuchKey")
        if request.method == "DELETE":
            del self.objects[key]
            return Answer(204)
        return self._get(key, request)

    def _put(self, key: str, request: Request) -> Answer:
        condition = request.headers.get("x-goog-if-generation-match")
        if condition is not None and int(condition) != self.objects.get(key, (b"", 0))[1]:
            return refuse(412, "PreconditionFailed")
        self.put(key, request.body)
        return Answer(200, headers=self._describe(key))

    def _get(self, key: str, request: Request) -> Answer:
        content, _ = self.objects[key]
        headers = {"Content-Length": str(len(content)), **self._describe(key)}
        if wanted := request.headers.get("range"):
            begin, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            part = content[begin : end + 1]
            of_part = {"Content-Length": str(len(part)), "Content-Range": f"bytes {begin}-{end}/{len(content)}"}
            return Answer(206, part, {**headers, **of_part})
        return Answer(200, content, headers)

    def _describe(self, key: str) -> dict[str, str]:
        return {"ETag": f'"{self.objects[key][1]:x}"', "Last-Modified": DATE}

    def _list(self, request: Request) -> Answer:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
        after = request.query.get("continuation-token") or request.query.get("start-after", "")
        found: dict[str, str] = {}
        for key, (content, generation) in sorted(self.objects.items()):
            if key.startswith(prefix):
                name, slash, _ = key[len(prefix) :].partition(delimiter or "\0")
                item = prefix + name + slash
                if item > after:
                    found[item] = (
                        f"<CommonPrefixes><Prefix>{escape(item)}</Prefix></CommonPrefixes>"
                        if slash
                        else f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
                        f"<ETag>&quot;{generation:x}&quot;</ETag><Size>{len(content)}</Size></Contents>"
                    )
        page = list(found)[: self.page_size]
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(page) < len(found) else ""
        head = f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}"
        return Answer(
            200, f"<ListBucketResult>{head}{''.join(found[item] for item in page)}</ListBucketResult>".encode()
        )


def refuse(status: int, code: str) -> Answer:
    """Return a refusal."""
    return Answer(status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode())
