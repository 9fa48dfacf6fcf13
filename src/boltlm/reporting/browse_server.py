"""The latent browser for any document, served on 127.0.0.1: `boltlm browse`."""

import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote

from boltlm.errors import UserError
from boltlm.reporting.browser_documents import DataFolders, named_documents
from boltlm.reporting.html_config import HtmlReportSettings
from boltlm.reporting.html_report import render_page
from boltlm.reporting.latent_browser import browser_data, corpus_sample

HOST = "127.0.0.1"
LOCAL_NAMES = (HOST, "localhost")

Page = Callable[[Sequence[str]], str]  # the HTML for these ids of documents; none: a sample


def browser_page(
    settings: HtmlReportSettings, latents: Path, models: Path, doc_ids: Sequence[str]
) -> str:
    """The page for documents of the corpus of `latents`, a folder data/latents/<entry>, with the
    latents of all entries over that corpus.

    Raises UserError where the folder is no entry of `latents`, or the corpus lacks a document.
    """
    name, folders = latents.name, DataFolders(latents.parent.parent, models)
    if name not in settings.latents or not latents.is_dir():
        known = ", ".join(str(folders.latents(entry)) for entry in settings.latents)
        raise UserError(
            f"{latents}: no latents of this experiment; give one of {known or '(there are none)'}"
            " and run the stage that makes it (dvc repro), or give its own --params"
        )
    corpus = settings.latents[name].corpus
    chunks = folders.chunks(corpus)
    shards = (
        named_documents(chunks, doc_ids) if doc_ids else corpus_sample(settings, chunks, corpus)
    )
    data = browser_data(settings, folders, {corpus: shards})
    data |= {"server": True, "more": "" if doc_ids else "A sample; open other documents by id."}
    return render_page(f"Latents of {corpus}", data)


def serve(page: Page, doc_ids: Sequence[str], port: int) -> None:
    """Serve pages until Ctrl-C. `doc_ids`: of the address that is printed; `port` 0: any free one.

    Raises UserError where the port cannot be used.
    """
    with make_server(page, port) as server:
        query = "&".join(f"doc={quote(doc_id, safe='')}" for doc_id in doc_ids)
        address = f"http://{HOST}:{server.server_address[1]}/{f'?{query}' if query else ''}"
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def make_server(page: Page, port: int) -> ThreadingHTTPServer:
    """The server, which answers only requests to its own local address: a web page elsewhere cannot
    read the data by way of a name that resolves to 127.0.0.1."""
    lock = threading.Lock()  # one page at a time has the models in memory

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if self.headers.get("Host", "").partition(":")[0] not in LOCAL_NAMES:
                self.answer(403, "text/plain", f"only requests to {HOST} are answered")
            elif path != "/":
                self.answer(404, "text/plain", "there is one page here, /")
            else:
                self.answer(*self.rendered(parse_qs(query).get("doc", [])))

        def rendered(self, doc_ids: Sequence[str]) -> tuple[int, str, str]:
            try:
                with lock:
                    return 200, "text/html", page(doc_ids)
            except (UserError, OSError) as error:
                return 404, "text/plain", f"error: {error}"

        def answer(self, status: int, kind: str, body: str) -> None:
            content = body.encode(errors="replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not reported."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--port {port} cannot be used ({error}); give another, or 0 for any free one"
        ) from error
