"""The chat example in a real browser, through deploys: the page must not notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.process.browser import Page, browser
from tests.support import Server

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "chat_app"


def say(page: Page, text: str) -> None:
    page.run(f"document.getElementById('text').value = {text!r}; document.getElementById('form').requestSubmit(); 1")


def heard(page: Page) -> list[str]:
    return list(page.run("[...document.querySelectorAll('#lines li')].map(line => line.innerText)"))


def test_a_chat_goes_on_through_reloads_and_no_page_notices(tmp_path: Path) -> None:
    """Two pages, three deploys: no socket is closed, no line lost or doubled, each client's count goes on."""
    pytest.importorskip("starlette")
    env = {"CHAT_DB": str(tmp_path / "chat.sqlite3")}
    with Server("app:app", cwd=EXAMPLE, env=env) as server, browser() as session:
        pages = [session.open(server.url) for _ in range(2)]
        for page, name in zip(pages, ("Ada", "Bob"), strict=True):
            page.wait_for("document.getElementById('opened').innerText === '1'")
            page.run(f"document.getElementById('name').value = {name!r}; document.getElementById('name').onchange(); 1")
        expected = []
        workers = set()
        for deploy in range(4):
            if deploy:
                assert server.reload() == deploy + 1
            for page, name in zip(pages, ("Ada", "Bob"), strict=True):
                line = f"{name}: after {deploy} deploys"
                expected.append(line)
                say(page, f"after {deploy} deploys")
                for each in pages:
                    each.wait_for(f"document.getElementById('lines').innerText.includes({line!r})")
                page.wait_for(f"document.getElementById('said').innerText === '{deploy + 1}'")
                workers.add((name, page.text("#worker")))
        for page in pages:
            assert heard(page) == expected
            assert (page.text("#opened"), page.text("#closed")) == ("1", "0")
        assert len(workers) == 8, "each deploy has brought each client to another worker"
        assert server.stop() == 0
