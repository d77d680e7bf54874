"""A stand-in for the Hugging Face hub on the loopback: local folders, served under the names the libraries ask for.

The real ``transformers`` and ``datasets`` load by name from it, unpatched and without a network.

    with HubStandIn(models={"google/flan-t5-xl": folder}, datasets={"nyu-mll/glue": folder}) as hub:
        subprocess.run(command, env=os.environ | hub.environment(tmp_path / "hf"))
        assert "GET /api/models/google/flan-t5-xl" in hub.requests

Folders are read when the stand-in is built; what changes in them afterwards is not served. Both libraries read
``HF_ENDPOINT`` when they are imported, so set the environment of a subprocess, or set it before the first import.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Rows = Sequence[Mapping[str, Any]]
LabelNames = Mapping[str, Sequence[str]]

CANONICAL = {
    "glue": "nyu-mll/glue",
    "squad": "rajpurkar/squad",
    "t5-small": "google-t5/t5-small",
    "bert-base-uncased": "google-bert/bert-base-uncased",
}
"""Old names without an owner, which the hub answers with a redirect.

``transformers`` follows it. ``datasets`` 5.2 follows it for the card, and then refuses the short name by itself: it
builds a ``hf://datasets/glue@…`` address, in which ``huggingface_hub`` 2.4 demands an owner.
"""

_FILE_URL = re.compile(r"/(?P<datasets>datasets/)?(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API_URL = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+(?:/[^/]+)?)"
    r"(?:/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
_RANGE = re.compile(r"bytes=(?P<first>\d+)-(?P<last>\d*)")


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; the body is bytes, or a file to stream from."""

    status: HTTPStatus
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Path = b""


@dataclass(frozen=True)
class Repo:
    """One repository at its only commit: the files of a folder, with their blob ids."""

    name: str
    files: dict[str, Path]
    blobs: dict[str, str]
    commit: str

    @classmethod
    def of_folder(cls, name: str, folder: Path) -> Repo:
        """Read a folder.

        Raises:
            FileNotFoundError: If the folder is missing or has no file.
        """
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if not files:
            raise FileNotFoundError(f"{name}: no file under {folder}")
        blobs = {path: _blob_id(file) for path, file in files.items()}
        return cls(name, files, blobs, _sha1(json.dumps([name, blobs]).encode()))

    def has_revision(self, revision: str) -> bool:
        """Whether a branch or commit exists here; there is one of each."""
        return revision in ("main", self.commit)

    def entry(self, path: str) -> dict[str, Any] | None:
        """A file or folder as the tree and paths-info endpoints describe it, None where there is neither."""
        if path in self.files:
            return {"type": "file", "path": path, "oid": self.blobs[path], "size": self.files[path].stat().st_size}
        if any(file.startswith(f"{path}/") for file in self.files):
            return {"type": "directory", "path": path, "oid": _sha1(f"{self.commit}/{path}".encode()), "size": 0}
        return None

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below a folder ("" for the root), at any depth or only its own."""
        prefix = f"{folder}/" if folder else ""
        inside = [path.removeprefix(prefix) for path in self.files if path.startswith(prefix)]
        found = {"/".join(parts[:depth]) for parts in map(_parts, inside) for depth in range(1, len(parts) + 1)}
        shown = sorted(path for path in found if recursive or "/" not in path)
        return [entry for path in shown if (entry := self.entry(prefix + path)) is not None]

    def card(self) -> dict[str, Any]:
        """The answer of the model and dataset info endpoints."""
        siblings = [{"rfilename": path} for path in self.files]
        return {
            "id": self.name,
            "modelId": self.name,
            "sha": self.commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            "siblings": siblings,
        }


class HubStandIn:
    """Serves models and datasets by name while it is entered.

    Args:
        models: Folder of each model repository, by its hub name.
        datasets: Folder of each dataset repository, by its hub name; `write_dataset_repo` writes such a folder.
        aliases: Names answered with a redirect, as the hub does for its old names without an owner.

    Attributes:
        endpoint: What ``HF_ENDPOINT`` has to be.
        requests: Method and path of every request, in the order they came, without the query; with the whole
            address where a request meant for another host reached it as the proxy (see `environment`).
    """

    def __init__(
        self,
        models: Mapping[str, Path] | None = None,
        datasets: Mapping[str, Path] | None = None,
        aliases: Mapping[str, str] = CANONICAL,
    ) -> None:
        self._repos = {
            "models": {name: Repo.of_folder(name, Path(folder)) for name, folder in (models or {}).items()},
            "datasets": {name: Repo.of_folder(name, Path(folder)) for name, folder in (datasets or {}).items()},
        }
        self._aliases = dict(aliases)
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, hf_home: Path) -> dict[str, str]:
        """Variables under which a process asks this hub alone, and keeps what it downloads under ``hf_home``."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(hf_home),
            "HF_HUB_CACHE": str(hf_home / "hub"),
            "HF_DATASETS_CACHE": str(hf_home / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            # `datasets` also asks a host named datasets-server.<endpoint's host>. As the proxy, the stand-in is asked
            # instead, with no name looked up; and a request to anybody else ends here too, refused and on record.
            "HTTP_PROXY": self.endpoint,
            "HTTPS_PROXY": self.endpoint,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def answer(self, method: str, url: str, form: str = "") -> Answer:
        """What the hub says to one request; ``form`` is the body of a POST."""
        parts = urlsplit(url)
        elsewhere = method == "CONNECT" or parts.netloc != ""
        self.requests.append(f"{method} {url}" if elsewhere else f"{method} {parts.path}")
        if elsewhere:
            return Answer(HTTPStatus.FORBIDDEN)
        if match := _API_URL.fullmatch(parts.path):
            return self._api(match, parse_qs(parts.query), form)
        if match := _FILE_URL.fullmatch(parts.path):
            return self._file(match)
        return _not_found("EntryNotFound", f"nothing is served at {parts.path}")

    def _file(self, match: re.Match[str]) -> Answer:
        kind = "datasets" if match["datasets"] else "models"
        repo = self._repo(kind, match)
        if isinstance(repo, Answer):
            return repo
        path = unquote(match["path"])
        commit = {"X-Repo-Commit": repo.commit}
        if path not in repo.files:
            return _not_found("EntryNotFound", f"no file {path} in {repo.name}", commit)
        headers = commit | {"ETag": f'"{repo.blobs[path]}"', "Accept-Ranges": "bytes"}
        return Answer(HTTPStatus.OK, headers, repo.files[path])

    def _api(self, match: re.Match[str], query: Mapping[str, list[str]], form: str) -> Answer:
        repo = self._repo(match["kind"], match)
        if isinstance(repo, Answer):
            return repo
        if match["verb"] == "paths-info":
            return _json([entry for path in _paths_of(form) if (entry := repo.entry(path))])
        folder = unquote(match["path"] or "")
        if match["verb"] == "tree":
            entries = repo.tree(folder, recursive=query.get("recursive", ["false"])[0].lower() == "true")
            return _json(entries) if entries else _not_found("EntryNotFound", f"no folder {folder} in {repo.name}")
        return _json(repo.card())

    def _repo(self, kind: str, match: re.Match[str]) -> Repo | Answer:
        """The repository a URL names, or the answer where there is none to give: a redirect or not found."""
        name = match["repo"]
        repos = self._repos[kind]
        if name not in repos and self._aliases.get(name) in repos:
            start, end = match.span("repo")
            target = match.string[:start] + self._aliases[name] + match.string[end:]
            return Answer(HTTPStatus.TEMPORARY_REDIRECT, {"Location": target})
        if name not in repos:
            return _not_found("RepoNotFound", "Repository not found")
        revision = unquote(match["revision"] or "main")
        if not repos[name].has_revision(revision):
            return _not_found("RevisionNotFound", f"Invalid rev id: {revision}")
        return repos[name]


def _handler_of(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    """The request handler class of one hub; the standard server makes an instance of it per connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps the connection: the libraries make dozens of requests

        def do_HEAD(self) -> None:
            self._send(hub.answer("HEAD", self.path), with_body=False)

        def do_GET(self) -> None:
            self._send(hub.answer("GET", self.path), with_body=True)

        def do_POST(self) -> None:
            form = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            self._send(hub.answer("POST", self.path, form), with_body=True)

        def do_CONNECT(self) -> None:
            self._send(hub.answer("CONNECT", self.path), with_body=False)

        def _send(self, answer: Answer, with_body: bool) -> None:
            size = answer.body.stat().st_size if isinstance(answer.body, Path) else len(answer.body)
            status, headers, first, length = answer.status, answer.headers, 0, size
            wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
            if with_body and wanted and int(wanted["first"]) < size:
                first = int(wanted["first"])
                last = min(int(wanted["last"] or size - 1), size - 1)
                status, length = HTTPStatus.PARTIAL_CONTENT, last - first + 1
                headers = headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(length)}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self._send_body(answer.body, first, length)

        def _send_body(self, body: bytes | Path, first: int, length: int) -> None:
            if isinstance(body, bytes):
                self.wfile.write(body[first : first + length])
                return
            with body.open("rb") as file:
                file.seek(first)
                while length and (chunk := file.read(min(length, 1 << 20))):
                    self.wfile.write(chunk)
                    length -= len(chunk)

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent: `HubStandIn.requests` is the log."""

    return Handler


def write_dataset_repo(
    folder: Path,
    configs: Mapping[str, Mapping[str, Rows | pa.Table]],
    class_names: Mapping[str, LabelNames] | None = None,
) -> Path:
    """Write a dataset repository laid out as those of GLUE and SQuAD are: parquet per split, metadata in the card.

    Args:
        folder: Emptied and written.
        configs: Rows, or a table, of every split of every config: ``{"sst2": {"train": [{"sentence": …}, …]}}``.
        class_names: Names of the label columns, per config: ``{"sst2": {"label": ["negative", "positive"]}}``;
            the column loads as a ``ClassLabel``.

    Returns:
        The folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    cards = [_write_config(folder, name, splits, (class_names or {}).get(name, {})) for name, splits in configs.items()]
    metadata = {"configs": [files for files, _ in cards], "dataset_info": [info for _, info in cards]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n", encoding="utf-8")
    return folder


def _write_config(
    folder: Path, config: str, splits: Mapping[str, Rows | pa.Table], labels: LabelNames
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the files of one config; returns its entries in the card: where its files are, and what is in them."""
    tables = {name: _to_table(rows) for name, rows in splits.items()}
    (folder / config).mkdir(parents=True)
    for name, table in tables.items():
        pq.write_table(table, folder / config / f"{name}-00000-of-00001.parquet")
    data_files = [{"split": name, "path": f"{config}/{name}-*"} for name in tables]
    schema = next(iter(tables.values())).schema
    features = [_to_feature(column, labels.get(column.name)) for column in schema]
    sizes = [{"name": name, "num_bytes": table.nbytes, "num_examples": len(table)} for name, table in tables.items()]
    return {"config_name": config, "data_files": data_files}, {
        "config_name": config,
        "features": features,
        "splits": sizes,
    }


def _to_table(rows: Rows | pa.Table) -> pa.Table:
    """Rows as a table without foreign metadata, so that the card alone says what the columns are."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([dict(row) for row in rows])
    return table.replace_schema_metadata(None)


def _to_feature(column: pa.Field, names: Sequence[str] | None) -> dict[str, Any]:
    """One column as the ``features`` of a dataset card spell it."""
    if names is not None:
        return {"name": column.name, "dtype": {"class_label": {"names": {str(i): n for i, n in enumerate(names)}}}}
    if pa.types.is_struct(column.type):
        return {"name": column.name, "struct": [_to_feature(inner, None) for inner in column.type]}
    if pa.types.is_list(column.type):
        inner = _to_feature(column.type.value_field, None)
        return {"name": column.name, "list": inner.get("dtype", inner.get("struct", inner.get("list")))}
    arrow_name = str(column.type)
    return {"name": column.name, "dtype": {"double": "float64", "float": "float32"}.get(arrow_name, arrow_name)}


def _not_found(code: str, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    """A 404 as the hub words it; the libraries choose their error by the code in the header."""
    said = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    return Answer(HTTPStatus.NOT_FOUND, said | dict(headers or {}), json.dumps({"error": message}).encode())


def _json(value: object) -> Answer:
    return Answer(HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _paths_of(form: str) -> list[str]:
    """The paths asked for in a paths-info request, sent as a form or as JSON."""
    if form.startswith("{"):
        paths: list[str] = json.loads(form)["paths"]
        return paths
    return parse_qs(form).get("paths", [])


def _parts(path: str) -> list[str]:
    return path.split("/")


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _blob_id(file: Path) -> str:
    """The id that git gives to the file's content; the libraries name their cached copy by it."""
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
