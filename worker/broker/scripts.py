"""What the transport writes into Redis: where it keeps messages, and the five scripts that move them.

Each script is one step that is done or not done, whoever is killed, and reads Redis' clock only. They are
sent whole, with EVAL: a Redis that was restarted has forgotten the scripts that it was given before.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: Pops the next message and registers it as held, both or neither.
#: KEYS: hash, index, list for what cannot be read, then the lists in fetching order.
#: ARGV: for each list its queue as JSON, or '' where messages are not acknowledged.
#: A delivery tag is printable ASCII without spaces; kombu's is a UUID.
#: Returns {which list, message, delivery tag}, the tag null for a message that was set aside; {} for none.
#: The entry's empty exchange makes the queue its routing key: whoever restores it needs no bindings.
#: Popping first lets it through when Redis is full: a script that has written may go on writing.
FETCH: Final = """
for i = 4, #KEYS do
    local raw = redis.call('RPOP', KEYS[i])
    if raw then
        local queue = ARGV[i - 3]
        if queue == '' then
            return {i - 4, raw, ''}
        end
        local read, tag = pcall(function() return cjson.decode(raw).properties.delivery_tag end)
        if not read or type(tag) ~= 'string' or not string.find(tag, '^[!-~]+$') then
            redis.call('LPUSH', KEYS[3], raw)
            return {i - 4, raw, false}
        end
        local time = redis.call('TIME')
        local now = time[1] .. '.' .. string.format('%06d', time[2])
        local done = redis.pcall('ZADD', KEYS[2], now, tag)
        if type(done) == 'number' then
            done = redis.pcall('HSET', KEYS[1], tag, '[' .. raw .. ',"",' .. queue .. ']')
        end
        if type(done) ~= 'number' then
            redis.pcall('ZREM', KEYS[2], tag)
            redis.call('RPUSH', KEYS[i], raw)
            return done
        end
        return {i - 4, raw, tag}
    end
end
return {}
"""

#: Sets the score of each message in ARGV to now. KEYS: the index. Returns those that are no longer in it.
#: Removing first lets it through when Redis is full: a script that has written may go on writing.
RENEW: Final = """
local time = redis.call('TIME')
local now = time[1] .. '.' .. string.format('%06d', time[2])
local lost = {}
for _, tag in ipairs(ARGV) do
    if redis.call('ZREM', KEYS[1], tag) == 1 then
        redis.call('ZADD', KEYS[1], now, tag)
    else
        lost[#lost + 1] = tag
    end
end
return lost
"""

#: Lists messages whose lease ran out as {tag, score, entry}. KEYS: index, hash. ARGV: lease in s, limit.
EXPIRED: Final = """
local time = redis.call('TIME')
local ceiling = string.format('%.6f', time[1] + time[2] / 1e6 - ARGV[1])
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ceiling, 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local found = {}
for i = 1, #due, 2 do
    found[#found + 1] = {due[i], due[i + 1], redis.call('HGET', KEYS[2], due[i])}
end
return found
"""

#: Moves a held message into lists, once. KEYS: index, hash, lists. ARGV: tag, the score that it must
#: still have or '', LPUSH or RPUSH, message. A renewal between EXPIRED and this changes the score.
MOVE: Final = """
if ARGV[2] ~= '' and redis.call('ZSCORE', KEYS[1], ARGV[1]) ~= ARGV[2] then
    return 0
end
redis.call('ZREM', KEYS[1], ARGV[1])
if redis.call('HDEL', KEYS[2], ARGV[1]) == 0 then
    return 0
end
for i = 3, #KEYS do
    redis.call(ARGV[3], KEYS[i], ARGV[4])
end
return 1
"""


#: Sets a held message aside until later. KEYS: the index. ARGV: tag, delay minus lease, in s.
#: Its score is that of a worker whose lease ends then, so whoever sweeps restores it.
POSTPONE: Final = """
if redis.call('ZREM', KEYS[1], ARGV[1]) == 1 then
    local time = redis.call('TIME')
    redis.call('ZADD', KEYS[1], string.format('%.6f', time[1] + time[2] / 1e6 + ARGV[2]), ARGV[1])
end
"""


@dataclass(frozen=True)
class Layout:
    """Where a transport keeps its messages. All keys are complete: with `global_keyprefix`."""

    #: Hash: delivery tag -> [message, exchange, routing key] as JSON.
    unacked: str
    #: Sorted set: delivery tag -> when its holder was last heard of, in s.
    index: str
    #: List of messages that nobody can read.
    undecodable: str
    #: Set of an exchange's bindings; holds one %s.
    bindings: str
    #: `global_keyprefix`, for the queues.
    prefix: str
    #: Between queue and priority in a list's key, and between the parts of a binding.
    separator: str
    #: Lowest priority value of each list, ascending.
    priority_steps: Sequence[int]

    def list_of(self, queue: str, priority: object) -> str:
        """The list that a message of this priority waits in."""
        try:
            value = max(0, min(int(priority), 9))  # type: ignore[call-overload]
        except (TypeError, ValueError):
            value = 0
        step = self.priority_steps[bisect.bisect(self.priority_steps, value) - 1]
        return f"{self.prefix}{queue}{self.separator}{step}" if step else f"{self.prefix}{queue}"


def json_name(queue: str) -> str:
    """A queue's name as it stands in an entry of the `unacked` hash."""
    return json.dumps(queue)
