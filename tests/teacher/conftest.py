import pytest

from pujax.teacher import asking
from tests.teacher_server import TeacherServer


@pytest.fixture
def server():
    with TeacherServer() as running:
        yield running


@pytest.fixture
def store(tmp_path):
    return tmp_path / "anchors.jsonl"


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch):
    """Wait as long as the server asks, but no more than a blink otherwise."""
    monkeypatch.setattr(asking, "_backoff", lambda error, doubled: error.after)
