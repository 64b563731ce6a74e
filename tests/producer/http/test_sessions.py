"""Sessions of browsers: a key has a few, and the oldest ends."""

from __future__ import annotations

from deploy.embedded.servers import ValkeyProcess
from producer.http.sessions import LASTS_S, MAX_SESSIONS, Sessions
from worker.state.keys import HTTP_SESSION, HTTP_SESSIONS
from worker.state.redis_client import connect


def test_a_key_has_so_many_sessions_and_the_oldest_ends(valkey: ValkeyProcess) -> None:
    with connect(valkey.url, 1) as client:
        sessions = Sessions(client)
        theirs = sessions.begin("their-key")
        tokens = [sessions.begin("a-key") for _ in range(MAX_SESSIONS)]
        sessions.end(tokens[1])
        assert sessions.key_of(tokens[1]) is None
        # A session that was signed out does not count.
        tokens.append(sessions.begin("a-key"))
        assert sessions.key_of(tokens[0]) == "a-key"
        tokens += [sessions.begin("a-key") for _ in range(2)]
        assert [sessions.key_of(each) for each in tokens[:4]] == [None, None, None, "a-key"]
        assert sum(sessions.key_of(each) == "a-key" for each in tokens) == MAX_SESSIONS
        assert sessions.key_of(theirs) == "their-key"
        assert client.zcard(f"{HTTP_SESSIONS}a-key") == MAX_SESSIONS
        assert 0 < client.ttl(f"{HTTP_SESSIONS}a-key") <= LASTS_S
        assert len(list(client.scan_iter(f"{HTTP_SESSION}*"))) == MAX_SESSIONS + 1
