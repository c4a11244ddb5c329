"""Where does the chat page come from?

From the folder `page`, read once: a path is looked up among the files' names and never reaches the file system.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from nanollm.serve.errors import ApiError

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


@dataclass(frozen=True)
class PageFile:
    content: bytes
    media_type: str

    @property
    def response(self) -> Response:
        return Response(self.content, headers={"Content-Type": self.media_type, "Cache-Control": "no-cache"})


def read_page(folder: Path = FOLDER) -> dict[str, PageFile]:
    """The files of the page by their names."""
    return {
        file.name: PageFile(file.read_bytes(), MEDIA_TYPES[file.suffix])
        for file in sorted(folder.glob("*"))
        if file.suffix in MEDIA_TYPES
    }


def build_page(files: Mapping[str, PageFile]) -> APIRouter:
    """GET / and GET /page/NAME."""
    router = APIRouter(include_in_schema=False)

    def find(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name[:100]!r}")
        return files[name].response

    @router.get("/")
    async def index() -> Response:
        return find("index.html")

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        return find(name)

    return router
